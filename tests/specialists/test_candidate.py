"""What is written anew against other ways to compute it, and candidates against their rules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spd_lens import decompose
from spd_lens.baselines import small_model, truncated_svd
from spd_lens.core import Decomposition
from spd_lens.specialists import (
    SHARES,
    SmallMatrix,
    candidates,
    checked_plain,
    domain_of,
    matrix_budget,
    ordered,
    plain_copy,
    specialise,
    whitened_factors,
    whole_matrices,
)
from tests.small_models import randn, tiny_transformer, tokens

SITES: dict[str, int | None] = {"blocks.*.attn.W_*": 10, "blocks.*.mlp.W_*": 12}


def symmetric_root(moments: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(moments)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def test_whitened_factors_lose_least_on_the_inputs() -> None:
    """Reduced-rank regression, computed another way: the projection of the fit onto its principal directions."""
    W, x = randn(7, 6), randn(300, 7, seed=1) * torch.arange(1, 8)
    A, B = whitened_factors(W, x.T @ x / 300, damping=0.0)
    plain = truncated_svd(W)
    for k in range(1, 6):
        error = (x @ W - x @ A[:, :k] @ B[:k]).square().sum()
        assert torch.allclose(error, torch.linalg.svdvals(x @ W)[k:].square().sum())
        assert error < (x @ W - x @ plain[0][:, :k] @ plain[1][:k]).square().sum()
    assert torch.allclose(A @ B, W)


def test_whitened_factors_weigh_outputs_by_their_gradients() -> None:
    """The bound that no matrix of rank k can pass, with symmetric roots in place of Cholesky factors."""
    W, x, g = randn(7, 6).double(), randn(300, 7, seed=1).double(), randn(200, 6, seed=2).double()
    x, g = x * torch.arange(1, 8), g * torch.arange(6, 0, -1)
    M, G = x.T @ x / 300, g.T @ g / 200
    A, B = whitened_factors(W, M, G, damping=0.0)
    one_sided = whitened_factors(W, M, damping=0.0)
    least = torch.linalg.svdvals(symmetric_root(M) @ W @ symmetric_root(G))
    for k in range(1, 6):
        D, D_one = (W - a[:, :k] @ b[:k] for a, b in ((A, B), one_sided))
        cost, cost_one = ((M @ d @ G * d).sum() for d in (D, D_one))
        assert torch.allclose(cost, least[k:].square().sum())
        assert cost < cost_one
    assert torch.allclose(A @ B, W)


@pytest.fixture(scope="module")
def decomposition() -> Decomposition:
    return decompose(tiny_transformer(), SITES, seed=0)


def test_what_is_written_anew_is_what_was_chosen(decomposition: Decomposition) -> None:
    """By hand, with symmetric roots: the chosen subcomponents' sum, and of its directions those worth most."""
    rows = tokens(8)
    made = specialise(decomposition, rows, 0.6, write="whitened", allocation="uniform")
    domain = domain_of(decomposition, rows)
    matrices = {}
    for site, kept in made.kept.items():
        assert kept is not None
        weight, rank = decomposition[site], made.ranks[site]
        assert rank is not None
        assert 0 < rank < len(kept)
        W = (weight.V[:, list(kept)] @ weight.U[list(kept)]).detach().double()
        x, g = (torch.cat(seen[site]).double() for seen in (domain.inputs, domain.gradients))
        moments = [v.flatten(0, 1).T @ v.flatten(0, 1) / v[..., 0].numel() for v in (x, g)]
        left, right = (symmetric_root(m + 1e-6 * m.diagonal().mean() * torch.eye(len(m)).double()) for m in moments)
        P, sizes, Q = torch.linalg.svd(left @ W @ right, full_matrices=False)
        A, B = torch.linalg.inv(left) @ (P * sizes), Q @ torch.linalg.inv(right)
        worth = torch.stack([((x @ a) * (g @ b)).sum(1).square().sum() for a, b in zip(A.T, B, strict=True)])
        best = A[:, worth.topk(rank).indices] @ B[worth.topk(rank).indices]
        matrices[site] = SmallMatrix(best.float())
    new = tokens(4, seed=9)
    expected = plain_copy(decomposition, matrices)(new).detach()
    assert torch.allclose(made.model(new), expected, atol=2e-4 * float(expected.abs().max()))
    assert not made.exact
    assert made.parameters <= 0.6 * sum(p.numel() for p in made.before.parameters())
    assert "rank" in str(made)


def test_with_all_subcomponents_it_is_the_svd_of_their_sum(decomposition: Decomposition) -> None:
    """Control draws as many; every candidate keeps within the room."""
    domain = domain_of(decomposition, tokens(4))
    whole, before = whole_matrices(decomposition, domain), checked_plain(decomposition, domain)
    room = matrix_budget(decomposition, domain, before, 0.6, None)
    factors = {s: (decomposition[s].V.detach(), decomposition[s].U.detach()) for s in domain.sites}
    offered = list(candidates(domain, ordered(domain, factors), whole, room, write="whitened"))
    assert [one.share for one in offered] == [share for share in SHARES for _ in range(2)]
    for one in offered:
        used = sum(m.A.numel() + (0 if m.B is None else m.B.numel()) for m in one.matrices.values())
        assert used <= room
    # With everything chosen, the two-sided SVD of V U: its product at full rank is V U itself.
    site = "blocks.0.mlp.W_in"
    V, U = factors[site]
    A, B = whitened_factors(V @ U, domain.moments[site], domain.gradient_moments[site])
    assert torch.allclose(A @ B, V @ U, atol=1e-5)
    ours, control = (small_model(decomposition, domain, room, m) for m in
                     ("subcomponents, whitened", "random subcomponents, whitened"))  # fmt: skip
    assert ours.chosen_from == control.chosen_from


def test_a_way_to_write_that_there_is_not_is_named(decomposition: Decomposition, without_type_checks: None) -> None:
    with pytest.raises(ValueError, match=r"write='whiten'.*'whitened'"):
        specialise(decomposition, tokens(4), 0.6, write="whiten")  # pyright: ignore[reportArgumentType]
