"""Pruning rivals: each against the property that defines it, and all within the same room."""

from __future__ import annotations

import pytest
import torch

from spd_lens import decompose
from spd_lens.baselines import SMALL_METHODS, magnitude, small_model, truncated_svd, wanda
from spd_lens.specialists import checked_plain, domain_of, matrix_budget
from tests.small_models import randn, tiny_transformer, tokens


def test_truncated_svd_is_the_nearest_matrix_of_its_rank() -> None:
    W = randn(7, 6)
    A, B = truncated_svd(W)
    assert torch.allclose((W - A[:, :2] @ B[:2]).norm() ** 2, torch.linalg.svdvals(W)[2:].square().sum())


def test_magnitude_and_wanda_keep_the_largest() -> None:
    W = torch.tensor([[3.0, -1.0], [0.5, 2.0], [-4.0, 0.1], [1.0, 1.5]])
    assert magnitude(W, W, 0.5).tolist() == [[3.0, 0.0], [0.0, 2.0], [-4.0, 0.0], [0.0, 1.5]]
    # Scores |W| sqrt(E x^2) with sizes 1, 10, 1, 2: each column keeps its own two.
    moments = torch.diag(torch.tensor([1.0, 100.0, 1.0, 4.0], dtype=torch.float64))
    assert wanda(W, moments, 0.5).tolist() == [[0.0, 0.0], [0.5, 2.0], [-4.0, 0.0], [0.0, 1.5]]


def test_every_method_stays_within_the_room() -> None:
    decomposition = decompose(tiny_transformer(), {"blocks.*.attn.W_*": 10, "blocks.*.mlp.W_*": 12}, seed=0)
    domain = domain_of(decomposition, tokens(6))
    whole = checked_plain(decomposition, domain)
    total = sum(p.numel() for p in whole.parameters())
    room = matrix_budget(decomposition, domain, whole, 0.7, None)
    parameters = {m: small_model(decomposition, domain, room, m).parameters for m in SMALL_METHODS}
    # Cut heads and constants move a few biases.
    assert all(0.5 * total < n <= 0.71 * total for n in parameters.values()), parameters
    random = [small_model(decomposition, domain, room, "random subcomponents", seed=s).model for s in (0, 0, 1)]
    outputs = [model(tokens(1)) for model in random]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("share", [0.25, 0.75])
def test_entries_that_were_set_to_zero_do_not_count_and_other_zeros_do(share: float) -> None:
    model = tiny_transformer()
    with torch.no_grad():
        model.W_E[:5] = 0.0  # as rounding to four bits leaves many
    decomposition = decompose(model, {"blocks.*.mlp.W_in": 6}, seed=0)
    domain = domain_of(decomposition, tokens(4))
    room = int(share * 2 * 16 * 32)
    made = small_model(decomposition, domain, room, "magnitude")
    whole = sum(p.numel() for p in checked_plain(decomposition, domain).parameters())
    assert whole - made.parameters == made.zeroed == 2 * 16 * 32 - room
