"""Starts of a run: what V and U are before the first step."""

from __future__ import annotations

import pytest
import torch

from spd_lens import decompose
from tests.small_models import tiny_transformer

SITE = "blocks.0.mlp.W_in"


@pytest.mark.parametrize("count", [5, 16, 20])
def test_the_singular_start_is_the_best_sum_and_its_subcomponents_do_not_cancel(count: int) -> None:
    weight = decompose(tiny_transformer(), {SITE: count}, init="singular")[SITE]
    W, V, U = weight.target_weight.detach().double(), weight.V.detach().double(), weight.U.detach().double()
    sizes = torch.linalg.svdvals(W)
    error = (W - V @ U).square().sum()
    assert float(error) == pytest.approx(float(sizes[count:].square().sum()), rel=1e-4, abs=1e-8)
    kept = torch.zeros_like(sizes)
    kept[: min(count, 16)] = sizes[:count]
    pieces = torch.einsum("ic,co->cio", V, U)
    # Parseval: the squares of orthogonal terms add up to that of their sum.
    assert float(pieces.square().sum()) == pytest.approx(float(kept.square().sum()), rel=1e-5)
    assert torch.equal(V.square().sum(0)[: min(count, 16)].argsort(descending=True), torch.arange(min(count, 16)))
