"""Batches: what is accepted as one, and `TokenBatches`."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from spd_lens import Batch, TokenBatches, cache_residuals, decompose
from spd_lens.data import as_batch
from tests.small_models import tiny_transformer, tokens


def test_every_epoch_holds_every_row_once_in_another_order() -> None:
    rows = torch.arange(12)[:, None].expand(12, 3)
    batches = TokenBatches(rows, 4, seed=1)

    def epoch(start: int) -> list[int]:
        return [int(row) for batch in islice(batches.batches_from(start), 3) for row in batch.inputs[:, 0]]

    first, second = epoch(0), epoch(3)
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second


@pytest.mark.parametrize("start", [0, 1, 3, 4, 7, 11])
def test_starting_late_gives_the_same_batches_as_reading_up_to_there(start: int) -> None:
    batches = TokenBatches(tokens(14), 4, seed=2)
    whole = [b.inputs for b in islice(batches, start + 3)]
    late = [b.inputs for b in islice(batches.batches_from(start), 3)]
    assert all(torch.equal(a, b) for a, b in zip(whole[start:], late, strict=True))


def test_once_gives_every_row_in_order() -> None:
    rows = tokens(10)
    assert torch.equal(torch.cat([b.inputs for b in TokenBatches(rows, 4).once()]), rows)


def test_excluded_tokens_are_masked_out() -> None:
    batch = next(iter(TokenBatches(torch.tensor([[0, 5, 0, 7]]), 1, exclude=[0])))
    assert batch.position_mask is not None
    assert batch.position_mask.tolist() == [[False, True, False, True]]


def test_bad_shapes_and_sizes_are_refused_in_words() -> None:
    with pytest.raises(ValueError, match="expected integers"):
        TokenBatches(tokens(3).float(), 1)
    with pytest.raises(ValueError, match="batch_size=9 with 3 rows"):
        TokenBatches(tokens(3), 9)


def test_cached_residuals_are_what_enters_the_block() -> None:
    model = tiny_transformer()
    decomposition = decompose(model, {"blocks.1.mlp.W_in": 4})
    rows = tokens(6)
    seen = []
    point = "blocks.1.hook_resid_pre" if "blocks.1.hook_resid_pre" in model.hook_dict else "blocks.1.hook_in"
    model.run_with_hooks(rows, fwd_hooks=[(point, lambda value, hook: seen.append(value.detach().clone()))])
    cached = cache_residuals(decomposition, TokenBatches(rows, 3))
    torch.testing.assert_close(cached.residuals, seen[0])
    batch = next(iter(cached))
    assert batch.start_at == 1
    assert batch.tokens is not None


def test_nothing_can_be_cached_before_a_decomposed_embedding() -> None:
    decomposition = decompose(tiny_transformer(), {"embed.W_E": 4, "blocks.1.mlp.W_in": 4})
    with pytest.raises(ValueError, match=r"embed\.W_E: there is no block before"):
        cache_residuals(decomposition, TokenBatches(tokens(4), 2))


def test_a_batch_moves_as_a_whole() -> None:
    batch = Batch(tokens(2), tokens=tokens(2), position_mask=tokens(2) > 0).to(torch.device("meta"))
    assert batch.inputs.is_meta
    assert batch.tokens is not None
    assert batch.tokens.is_meta


def test_integers_become_int64_and_masks_of_ones_become_bool() -> None:
    for dtype in (torch.uint8, torch.int16, torch.int32):
        batch = Batch(tokens(2).to(dtype), position_mask=torch.ones(2, 12, dtype=dtype))
        assert batch.inputs.dtype == torch.int64
        assert batch.tokens is not None
        assert torch.equal(batch.tokens, tokens(2))
        assert batch.position_mask is not None
        assert batch.position_mask.dtype == torch.bool
        assert batch.position_mask.all()


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (torch.full((2, 12), 2), "holds other numbers than 0 and 1"),
        (torch.full((2, 12), float("nan")), "holds other numbers than 0 and 1"),
        (torch.ones(2, 11), r"position_mask has shape \(2, 11\); expected \(2, 12\)"),
        (torch.ones(2), r"position_mask has shape \(2,\)"),
        (torch.ones(2, 1, 1, 12), r"position_mask has shape \(2, 1, 1, 12\)"),
    ],
)
def test_other_masks_are_refused(mask: torch.Tensor, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Batch(tokens(2), position_mask=mask)


def test_what_people_yield_is_the_same_batch() -> None:
    rows = tokens(3)
    mask = torch.ones_like(rows)
    mask[:, 9:] = 0
    given = [
        rows,
        rows.numpy(),
        rows.tolist(),
        (rows,),
        [rows],
        {"tokens": rows},
        {"input_ids": rows.tolist(), "labels": rows, "attention_mask": torch.ones_like(rows)},
        Batch(rows),
    ]
    for item in given:
        batch = as_batch(item)
        assert torch.equal(batch.inputs, rows)
        assert batch.tokens is not None
        assert torch.equal(batch.tokens, rows)
        assert batch.position_mask is None
    for item in ((rows, mask), [rows, mask.bool()], {"input_ids": rows, "attention_mask": mask}):
        batch = as_batch(item)
        assert batch.position_mask is not None
        assert torch.equal(batch.position_mask, mask.bool())


@pytest.mark.parametrize(
    ("item", "error", "text"),
    [
        ("a text", TypeError, "a batch is text; expected token ids"),
        (["a text"], TypeError, "a batch is text"),
        ({"text": "a"}, ValueError, "keys \\['text'\\]; expected 'tokens' or 'input_ids'"),
        (3, TypeError, "a batch is a int"),
        ([[1, 2], [3]], ValueError, "rows of different lengths"),
        ((tokens(2), tokens(2)), ValueError, "the second is no mask"),
        ((tokens(2), tokens(2) > 0, tokens(2)), ValueError, "a tuple of 3"),
        (tokens(2) > 3, TypeError, "boolean, which looks like a mask"),
        (torch.zeros(0, 12), ValueError, "it is empty"),
    ],
)  # fmt: skip
def test_what_is_no_batch_is_refused_in_words(item: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        as_batch(item)


def test_a_mask_before_counted_positions_must_say_what_it_means() -> None:
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[:, 0] = False
    with pytest.raises(ValueError, match="say what the mask means"):
        as_batch((tokens(2), mask))


def test_token_tables_of_any_width_and_from_files_give_the_same_batches(tmp_path: Path) -> None:
    rows = tokens(10)
    wanted = [b.inputs for b in islice(TokenBatches(rows, 4), 5)]
    np.save(tmp_path / "rows.npy", rows.numpy().astype(np.uint16))
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    for table in (rows.int(), rows.to(torch.uint8), mapped, rows.tolist()):
        found = [b.inputs for b in islice(TokenBatches(table, 4), 5)]
        assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


def test_arguments_of_token_batches_are_checked(without_type_checks: None) -> None:
    with pytest.raises(TypeError, match=r"batch_size=2\.0; expected a whole number"):
        TokenBatches(tokens(4), 2.0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="exclude=0; expected a list of token ids"):
        TokenBatches(tokens(4), 2, exclude=0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="exclude holds None; expected token ids"):
        TokenBatches(tokens(4), 2, exclude=[None])  # pyright: ignore[reportArgumentType]


def test_a_dict_says_which_positions_count() -> None:
    rows, counts, padding = tokens(2), torch.zeros_like(tokens(2)), torch.ones_like(tokens(2))
    counts[:, 3:6], padding[0, :4] = 1, 0
    alone = as_batch({"tokens": rows, "position_mask": counts})
    assert alone.position_mask is not None
    assert alone.attention_mask is None
    assert torch.equal(alone.position_mask, counts.bool())
    both = as_batch({"input_ids": rows, "position_mask": counts, "attention_mask": padding})
    assert both.position_mask is not None
    assert both.attention_mask is not None
    assert torch.equal(both.position_mask, counts.bool() & padding.bool())
    assert torch.equal(both.attention_mask, padding.bool())
    with pytest.raises(ValueError, match="a batch has a key 'loss_mask'; say what that mask means"):
        as_batch({"tokens": rows, "loss_mask": counts})
