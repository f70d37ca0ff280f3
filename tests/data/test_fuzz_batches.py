"""Batches under random objects: each becomes a batch whose shapes fit, or is refused in words (hypothesis)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spd_lens import Batch, decompose
from spd_lens.data import as_batch, first_batches
from tests.small_models import D_VOCAB, tiny_transformer

PROPERTY = settings(deadline=None, max_examples=200, derandomize=True, database=None)
DTYPES = [torch.int64, torch.int32, torch.uint8, torch.float32, torch.float16, torch.bool, torch.complex64]
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
TENSORS = st.builds(
    lambda shape, dtype, top: (torch.rand(shape) * top).to(dtype),
    SHAPES,
    st.sampled_from(DTYPES),
    st.sampled_from([1, D_VOCAB, 10**6]),
)
ATOMS = st.one_of(
    TENSORS, st.none(), st.integers(-5, 5), st.text(max_size=4), st.floats(), st.booleans(), st.binary(max_size=3)
)
ITEMS = st.one_of(
    ATOMS,
    TENSORS.map(lambda t: t.numpy()),
    st.lists(st.lists(st.integers(-1, D_VOCAB), max_size=4), max_size=3),
    st.tuples(TENSORS, TENSORS),
    st.dictionaries(st.sampled_from(["input_ids", "tokens", "attention_mask", "labels"]), ATOMS, max_size=3),
    st.builds(lambda a, b: {"input_ids": a, "attention_mask": b}, TENSORS, TENSORS),
)
DECOMPOSITION = decompose(tiny_transformer(), {"blocks.1.mlp.W_in": 4})


def require_words(item: Any, error: Exception) -> None:
    """Longer than a raw Python or torch error, and about the data."""
    if len(str(error)) < 30 or str(error).startswith(("'", "unsupported operand", "object of type")):
        pytest.fail(f"unclear: {item!r} -> {error}")


@PROPERTY
@given(ITEMS)
def test_an_item_is_a_batch_that_fits_or_is_refused_in_words(item: Any) -> None:
    try:
        batch = as_batch(item)
    except (TypeError, ValueError) as error:
        require_words(item, error)
        return
    assert isinstance(batch, Batch)
    assert batch.inputs.numel() > 0
    for mask in (batch.position_mask, batch.attention_mask):
        assert mask is None or (mask.dtype == torch.bool and mask.shape == batch.inputs.shape[: mask.ndim])
    assert batch.inputs.is_floating_point() or batch.inputs.dtype == torch.int64


@PROPERTY
@given(ITEMS)
def test_data_that_is_read_for_a_model_runs_or_is_refused_in_words(item: Any) -> None:
    try:
        (batch,) = first_batches([item], DECOMPOSITION, 1, purpose="run")
    except (TypeError, ValueError) as error:
        require_words(item, error)
        return
    clean = DECOMPOSITION.clean_pass(batch.inputs, attention_mask=batch.attention_mask)
    assert clean.output.shape[:2] == batch.inputs.shape
    assert np.isfinite(clean.output.numpy()).all()
