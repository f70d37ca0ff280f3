"""What APD measures and trains on, as pure functions: attributions, batch top-k, the losses, a sparse pass."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spd_lens.baselines.apd_targets import Matrices, Target

# Under the root of the simplicity loss, as in the authors' code: its gradient at 0 is infinite for p < 1.
EPSILON = 1e-16
# Attributions of as many components are taken together as keep the tensors in the processor's cache.
ENTRIES_AT_ONCE = 250_000


def attributions(
    target: Target,
    matrices: Matrices,
    P: Matrices,
    constants: Matrices,
    x: Float[Tensor, "batch features"],
    *,
    entries_at_once: int = ENTRIES_AT_ONCE,
) -> Float[Tensor, "batch C"]:
    """`A_c(x)` at the parameters `matrices`, for components `P [C d_in d_out]`; see `spd_lens.baselines.apd`."""
    at_once = max(1, entries_at_once // max(1, x.numel()))
    sizes = []
    for start in range(0, len(next(iter(P.values()))), at_once):
        some = {name: p[start : start + at_once] for name, p in P.items()}
        sizes.append(target.derivatives(matrices, some, constants, x).square().mean(-1).sqrt())
    return torch.cat(sizes).mT


def batch_top_k(
    scores: Float[Tensor, "member batch C"], counts: Int[Tensor, " member"]
) -> Float[Tensor, "member batch C"]:
    """1 for each member's `counts` largest scores over inputs and components together, else 0."""
    flat = scores.flatten(1)
    largest = min(int(counts.max()), flat.shape[1])
    where = flat.topk(largest, dim=1).indices
    counted = torch.arange(largest, device=flat.device) < counts[:, None]
    return torch.zeros_like(flat).scatter_(1, where, counted.to(flat)).view_as(scores)


def simplicity_loss(V: Matrices, U: Matrices, rates: Float[Tensor, " C"], p: float) -> Float[Tensor, ""]:
    """`sum_c rates_c sum_{matrices, m} (|V[c, m]|^2 |U[c, m]|^2)^(p/2) / N`, `rates_c` the mean of s_c over inputs.

    `|V[c, m]| |U[c, m]|` stand for the singular values of P_c: summed they are at least as large as its Schatten norm.
    """
    total = rates.new_zeros(())
    for name, v in V.items():
        squares = v.square().sum(-1) * U[name].square().sum(-1)
        total = total + (rates * (squares + EPSILON).pow(p / 2).sum(-1)).sum()
    return total / _n_entries(V, U)


def faithfulness_loss(V: Matrices, U: Matrices, matrices: Matrices) -> Float[Tensor, ""]:
    """`|theta* - sum_c P_c|^2 / N`, of whole matrices."""
    sums = {name: v.flatten(0, 1).mT @ U[name].flatten(0, 1) for name, v in V.items()}
    return torch.stack([(sums[name] - W).square().sum() for name, W in matrices.items()]).sum() / _n_entries(V, U)


def sparse_forward(
    target: Target,
    P: Matrices,
    constants: Matrices,
    active: Float[Tensor, "batch C"],
    x: Float[Tensor, "batch features"],
) -> dict[str, Tensor]:
    """What the target's `forward` gives with the parameters `sum_c s_c(x) P_c`, of every input its own."""
    kappa = {name: (active @ p.flatten(1)).unflatten(1, p.shape[1:]) for name, p in P.items()}
    return torch.vmap(lambda own, row: target.forward(own, constants, row))(kappa, x)


def _n_entries(V: Matrices, U: Matrices) -> int:
    return sum(v.shape[-1] * U[name].shape[-1] for name, v in V.items())
