"""Batches and text."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from spd_lens import Batch, TokenBatches, cache_residuals, decompose, load_tokens, pack_tokens
from tests.small_models import tiny_tokenizer, tiny_transformer, tokens


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


def test_packed_windows_are_the_joined_texts_cut_up() -> None:
    tokenizer = tiny_tokenizer(PreTrainedTokenizerFast)
    packed = pack_tokens(["w1 w2 w3", "w4 w5", "w6 w7"], tokenizer, 4)
    assert packed.tolist() == [[1, 2, 3, 0], [4, 5, 0, 6]]
    with_bos = pack_tokens(["w1 w2 w3", "w4 w5"], tokenizer, 4, prepend_bos=True)
    assert with_bos.tolist() == [[0, 1, 2, 3], [0, 0, 4, 5]]
    assert len(pack_tokens(["w1 w2 w3"] * 100, tokenizer, 4, max_rows=3)) == 3


def test_too_little_text_is_an_error() -> None:
    with pytest.raises(ValueError, match="not one window of context=8"):
        pack_tokens(["w1 w2"], tiny_tokenizer(PreTrainedTokenizerFast), 8)


def test_a_dataset_is_tokenised_and_packed_and_streamed() -> None:
    from datasets import Dataset

    tokenizer = tiny_tokenizer(PreTrainedTokenizerFast)
    data = Dataset.from_dict({"text": ["w1 w2 w3", "w4 w5"] * 5, "other": [1] * 10})
    expected = pack_tokens(["w1 w2 w3", "w4 w5"] * 5, tokenizer, 4, max_rows=3)
    assert torch.equal(load_tokens(data, tokenizer, 4, max_rows=3), expected)
    assert torch.equal(load_tokens(data.to_iterable_dataset(), tokenizer, 4, max_rows=3), expected)
    with pytest.raises(ValueError, match="no column 'body'; its columns"):
        load_tokens(data, tokenizer, 4, column="body")


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
