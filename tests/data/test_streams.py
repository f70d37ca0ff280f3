"""Streams: every way to give data means the same to `train`, `evaluate`, `harvest` and `dataset_graph`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from spd_lens import Batch, Decomposition, Reconstruction, TokenBatches, decompose, evaluate, harvest, train
from spd_lens.data import endless_batches, first_batches
from spd_lens.graphs import dataset_graph
from tests.small_models import D_VOCAB, TiedAutoencoder, rand, tiny_transformer, tokens

SITE = "blocks.1.mlp.W_in"
ROWS = tokens(6)


@pytest.fixture
def decomposition() -> Decomposition:
    return decompose(tiny_transformer(), {SITE: 6})


def _generator() -> Iterator[Tensor]:
    yield from ROWS.split(2)


WAYS: dict[str, Callable[[], Any]] = {
    "list": lambda: list(ROWS.split(2)),
    "generator": _generator,
    "loader": lambda: DataLoader(TensorDataset(ROWS), batch_size=2),
    "dicts": lambda: [{"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in ROWS.split(2)],
    "int32": lambda: list(ROWS.int().split(2)),
    "numpy": lambda: list(ROWS.numpy().reshape(3, 2, 12)),
    "lists": lambda: ROWS.reshape(3, 2, 12).tolist(),
    "table": lambda: TokenBatches(ROWS.int(), 2),
}


@pytest.mark.parametrize("way", WAYS)
def test_all_ways_to_give_the_same_data_are_the_same(decomposition: Decomposition, way: str) -> None:
    found = [b.inputs for b in first_batches(WAYS[way](), decomposition, 8, purpose="read")]
    assert torch.equal(torch.cat(found), ROWS)
    assert all(b.dtype == torch.int64 for b in found)


@pytest.mark.parametrize("way", [*WAYS, "tensor"])
def test_evaluate_and_harvest_see_the_same_positions(decomposition: Decomposition, way: str) -> None:
    def data() -> Any:
        return ROWS if way == "tensor" else WAYS[way]()

    report = evaluate(decomposition, data(), adversary_steps=())
    assert report.positions == ROWS.numel()
    with torch.no_grad():
        logits = decomposition.model(ROWS)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ROWS[:, 1:].flatten())
    assert report.cross_entropy["target"] == pytest.approx(float(expected), rel=1e-4)
    assert harvest(decomposition, data())[SITE].n_positions == ROWS.numel()


@pytest.mark.parametrize("bare", [ROWS, ROWS.numpy(), {"input_ids": ROWS}, Batch(ROWS), (ROWS, ROWS >= 0)])
def test_a_bare_batch_is_one_batch_and_not_its_rows(decomposition: Decomposition, bare: Any) -> None:
    for stream in (
        list(first_batches(bare, decomposition, 8, purpose="read")),
        list(islice(endless_batches(bare, decomposition), 2)),
    ):
        assert all(torch.equal(batch.inputs, ROWS) for batch in stream)
    assert len(list(first_batches(bare, decomposition, 8, purpose="read"))) == 1


def test_float_inputs_of_a_model_without_tokens_are_one_batch() -> None:
    decomposition = decompose(TiedAutoencoder(), {"encoder.W": 3})
    x = rand(7, 5).float()
    (batch,) = first_batches(x, decomposition, 8, purpose="read")
    assert torch.equal(batch.inputs, x)


ENTRIES: dict[str, Callable[[Decomposition, Any], Any]] = {
    "train": lambda d, data: train(d, data, steps=1),
    "evaluate": lambda d, data: evaluate(d, data, adversary_steps=()),
    "harvest": harvest,
    "dataset_graph": dataset_graph,
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(
    ("data", "error", "text"),
    [
        ([], ValueError, "the data is empty"),
        (iter(()), ValueError, "the data is empty"),
        ("a text", TypeError, "the data is text"),
        (3, TypeError, "the data is a int; expected tokens"),
        ({"train": [ROWS]}, TypeError, r"a dict with keys \['train'\]"),
        (ROWS + D_VOCAB, ValueError, "token ids run from 40 to .*, but the vocabulary is 0..39"),
        (-ROWS - 1, ValueError, "token ids run from -40 to"),
        (ROWS[0], ValueError, r"shape \(12,\); expected \[batch pos\]"),
        (ROWS.float(), TypeError, "dtype torch.float32; expected an integer tensor"),
        (ROWS > 3, TypeError, "boolean, which looks like a mask"),
        (tokens(2, length=13), ValueError, "rows of 13 tokens, but this model's context is 12"),
        ([ROWS, "text"], TypeError, "batch 1: a batch is text"),
        (Batch(ROWS, position_mask=torch.zeros_like(ROWS)), ValueError, "(leaves|leave) out every"),
    ],
)
def test_bad_data_is_refused_alike_everywhere(
    decomposition: Decomposition, entry: str, data: Any, error: type[Exception], text: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_type_checks: None,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    if entry == "train" and isinstance(data, list) and len(data) == 2:
        data = data[::-1]
        text = text.replace("batch 1", "batch 0")
    with pytest.raises(error, match=text):
        ENTRIES[entry](decomposition, data)


@pytest.mark.parametrize("entry", ENTRIES)
def test_what_is_no_decomposition_is_refused_everywhere(
    decomposition: Decomposition, entry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_type_checks: None
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TypeError, match=rf"{entry} was given a \w+; expected a Decomposition: decompose\(model"):
        ENTRIES[entry](decomposition.model, ROWS)
    with pytest.raises(TypeError, match=rf"{entry} was given a Tensor; expected a Decomposition"):
        ENTRIES[entry](ROWS, decomposition)  # pyright: ignore[reportArgumentType]
    decomposition.remove()
    with pytest.raises(ValueError, match="this decomposition was removed"):
        ENTRIES[entry](decomposition, ROWS)


@pytest.mark.parametrize("n", [0, -1])
def test_no_batches_at_all_is_an_error(decomposition: Decomposition, n: int) -> None:
    for call in (evaluate, harvest, dataset_graph):
        with pytest.raises(ValueError, match=f"max_batches={n}; expected at least 1"):
            call(decomposition, ROWS, max_batches=n)


def test_data_without_an_end_needs_a_number_of_batches() -> None:
    from spd_lens.toys import tms_features

    decomposition = decompose(TiedAutoencoder(), {"encoder.W": 3})
    with pytest.raises(ValueError, match="has no end; say how many"):
        first_batches(tms_features(5, 4), decomposition, None, purpose="read")


# -- masks -----------------------------------------------------------------------------------------------------------


def _masked(*columns: slice) -> Tensor:
    mask = torch.zeros_like(ROWS, dtype=torch.bool)
    for column in columns:
        mask[:, column] = True
    return mask


def test_cross_entropy_counts_pairs_and_nothing_else(decomposition: Decomposition) -> None:
    masks = [_masked(slice(0, 12)), _masked(slice(0, 12, 2)), _masked(slice(0, 0)), _masked(slice(3, 5), slice(8, 9))]
    batches = [Batch(tokens(6, seed=i), position_mask=mask) for i, mask in enumerate(masks)]
    report = evaluate(decomposition, batches, adversary_steps=())
    losses = []
    for batch in batches:
        assert batch.position_mask is not None
        with torch.no_grad():
            log_probs = decomposition.model(batch.inputs).log_softmax(-1).double()
        for row, row_mask, row_tokens in zip(log_probs, batch.position_mask, batch.inputs, strict=True):
            losses += [
                -float(row[i, row_tokens[i + 1]]) for i in range(11) if bool(row_mask[i]) and bool(row_mask[i + 1])
            ]
    assert report.cross_entropy["target"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert report.positions == sum(int(mask.sum()) for mask in masks)
    assert all(math.isfinite(value) for value in (*report.cross_entropy.values(), *report.divergence.values()))


def test_padding_behind_a_text_changes_nothing(decomposition: Decomposition) -> None:
    padded = ROWS.clone()
    padded[:, 8:] = 0
    mask = _masked(slice(0, 8)).long()
    short = evaluate(decomposition, ROWS[:, :8], adversary_steps=())
    long = evaluate(decomposition, [{"input_ids": padded, "attention_mask": mask}], adversary_steps=())
    assert long.positions == short.positions
    assert long.divergence["all off"] == pytest.approx(short.divergence["all off"], rel=1e-4)
    assert long.cross_entropy["target"] == pytest.approx(short.cross_entropy["target"], rel=1e-4)


def test_padding_before_a_text_reaches_the_model(decomposition: Decomposition, tmp_path: Path) -> None:
    """With learned positions the mask also says where the text begins: the numbers are those of the text alone."""
    short = ROWS[:, :8]
    padded = torch.cat([torch.zeros_like(short[:, :3]), short], dim=1)
    mask = torch.cat([torch.zeros_like(short[:, :3]), torch.ones_like(short)], dim=1)
    both = [short, {"input_ids": padded, "attention_mask": mask}]
    alone, behind = (evaluate(decomposition, [batch], adversary_steps=()) for batch in both)
    assert behind.positions == alone.positions
    for regime in ("all off", "importance", "all on, no delta"):
        assert behind.divergence[regime] == pytest.approx(alone.divergence[regime], rel=1e-3)
    assert behind.cross_entropy["target"] == pytest.approx(alone.cross_entropy["target"], rel=1e-3)
    found = [
        train(copy.deepcopy(decomposition), [batch], steps=1, log_every=1, faithfulness=0.0, out_dir=tmp_path / str(i),
              reconstructions=(Reconstruction(masks="importance"),)).log[0]
        for i, batch in enumerate(both)
    ]  # fmt: skip
    assert found[1]["importance_all"] == pytest.approx(found[0]["importance_all"], rel=1e-3)
    assert found[1]["minimality"] == pytest.approx(found[0]["minimality"], rel=1e-3)


def test_gates_that_would_see_padding_are_refused() -> None:
    gated = decompose(tiny_transformer(), {"blocks.1.mlp.W_in": 6}, gate="attention", gate_width=8)
    mask = torch.ones_like(ROWS)
    mask[:, 0] = 0
    with pytest.raises(ValueError, match=r"padding on the left.*gates look across positions"):
        evaluate(gated, [{"input_ids": ROWS, "attention_mask": mask}], adversary_steps=())


def test_the_log_counts_the_positions_that_the_losses_count(decomposition: Decomposition, tmp_path: Path) -> None:
    batch = Batch(ROWS, position_mask=_masked(slice(0, 5)))
    expected = (decomposition.importance(ROWS)[SITE][:, :5] > 0.01).float().sum(-1).mean()
    result = train(decomposition, batch, steps=1, log_every=1, faithfulness_warmup=0, out_dir=tmp_path / "run")
    assert result.log[0][f"L0/{SITE}"] == pytest.approx(float(expected))


def test_a_batch_in_which_nothing_counts_is_named(decomposition: Decomposition, tmp_path: Path) -> None:
    batches = [Batch(ROWS), Batch(ROWS, position_mask=_masked())]
    with pytest.raises(ValueError, match="batch 1: its mask leaves out every position"):
        train(decomposition, batches, steps=3, out_dir=tmp_path / "run")


def test_numpy_numbers_of_batches_are_numbers(decomposition: Decomposition, without_type_checks: None) -> None:
    assert len(list(first_batches(list(ROWS.split(1)), decomposition, np.int64(2), purpose="read"))) == 2  # pyright: ignore[reportArgumentType]


def test_residuals_of_a_bridge_can_be_cached_after_it_has_run() -> None:
    """Its first pass puts hooks of TransformerLens's own on its norms."""
    from spd_lens import cache_residuals
    from spd_lens.models import load_tiny_lm

    decomposition = decompose(load_tiny_lm(host="bridge"), {"blocks.1.mlp.W_*": 6})
    rows = tokens(4)
    decomposition.model(rows)
    cached = cache_residuals(decomposition, TokenBatches(rows, 2))
    clean = decomposition.clean_pass(rows)
    assert torch.equal(cached.residuals, clean.residuals[1])
    hooks = [("blocks.0.mlp.hook_out", lambda value, hook: value * 2)]
    with decomposition.model.hooks(fwd_hooks=hooks), pytest.raises(ValueError, match="has a hook on it"):
        cache_residuals(decomposition, TokenBatches(rows, 2))
