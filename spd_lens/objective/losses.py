"""The losses of SPD (L1 to L7) as pure functions of tensors; the total is a weighted sum of them.

`reconstruction_loss` is one function for every mask source and every routing: both are arguments. Everything is
computed in float32 or wider whatever the model's dtype. Source: Bushnaq, Braun and Sharkey 2025 (arXiv 2506.20790),
section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spd_lens.core.masks import Importances
from spd_lens.core.subcomponents import at_least_float32, squared_error
from spd_lens.objective.divergences import divergence, mean_over_positions

# Unbound axis names: every site has its own sizes, and one annotation is checked against several sites.
Factors = tuple[Float[Tensor, "_d_in _d_out"], Float[Tensor, "_d_in _C"], Float[Tensor, "_C _d_out"]]


# Without it the gradient of g^p at g = 0 is infinite for p < 1.
EPSILON = 1e-12


def faithfulness_loss(sites: Iterable[Factors]) -> Float[Tensor, ""]:
    """L1: `sum over sites |W - V U|_F^2 / N`, with N the number of entries of all matrices.

    `sites` yields `(W, V, U)`; a matrix that two sites share is passed once.

    >>> W = torch.eye(2)
    >>> float(faithfulness_loss([(W, torch.zeros(2, 3), torch.zeros(3, 2))]))
    0.5
    """
    total: Tensor | float = 0.0
    entries = 0
    for W, V, U in sites:
        total = total + squared_error(W, V, U)
        entries += W.numel()
    if entries == 0:
        raise ValueError("faithfulness_loss was given no site")
    assert isinstance(total, Tensor)
    return total / entries


def _fit_position_mask(position_mask: Tensor | None, like: Tensor) -> Tensor | None:
    """The position mask `[batch pos]` for values `[batch pos]`, or `[batch pos head]` under split heads."""
    if position_mask is None:
        return None
    while position_mask.ndim < like.ndim:
        position_mask = position_mask.unsqueeze(-1)
    return position_mask.expand_as(like)


def minimality_loss(
    upper: Importances,
    *,
    p: float,
    position_mask: Bool[Tensor, ...] | None = None,
    factors: Mapping[str, float] | None = None,
) -> Float[Tensor, ""]:
    """L2: mean over batch and positions of `sum over sites and c of (g_upper + 1e-12)^p`.

    Never divided by the number of sites or subcomponents. `factors` multiply the parts of single sites (others: 1).

    >>> float(minimality_loss({"site": torch.tensor([[0.5, 0.5]])}, p=2.0))
    0.5
    """
    total: Tensor | None = None
    for name, g in upper.items():
        per_position = _powered(g, p).sum(-1)
        mean = mean_over_positions(per_position, _fit_position_mask(position_mask, per_position))
        if factors is not None and name in factors:
            mean = factors[name] * mean
        total = mean if total is None else total + mean
    if total is None:
        raise ValueError("minimality_loss was given no site")
    return total


def _powered(g: Float[Tensor, "*batch C"], p: float) -> Float[Tensor, "*batch C"]:
    shifted = at_least_float32(g) + EPSILON
    return shifted if p == 1 else shifted.pow(p)


def frequency_loss(
    upper: Importances,
    *,
    p: float,
    position_mask: Bool[Tensor, ...] | None = None,
    sum_over_processes: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, ""]:
    """L3: `sum_c mean_c * log2(1 + total_c)` with `mean_c`, `total_c` the mean and sum of `(g_upper + 1e-12)^p`.

    Both run over the global batch: in multi-process training `sum_over_processes` (differentiable) adds a tensor
    up over all of them. It makes subcomponents that are always on expensive.
    """
    add = sum_over_processes or (lambda tensor: tensor)
    loss: Tensor | None = None
    for g in upper.values():
        powered = _powered(g, p).flatten(0, -2)
        if position_mask is None:
            count = powered.new_tensor(float(powered.shape[0]))
        else:
            kept = _fit_position_mask(position_mask, g[..., 0])
            assert kept is not None
            powered = powered * kept.reshape(-1, 1)
            count = kept.sum().to(powered.dtype)
        total, count = add(powered.sum(0)), add(count)
        term = (total / count.clamp_min(1) * torch.log2(1 + total)).sum()
        loss = term if loss is None else loss + term
    if loss is None:
        raise ValueError("frequency_loss was given no site")
    return loss


def hidden_reconstruction_loss(
    clean: Mapping[str, Float[Tensor, "*batch _"]],
    masked: Mapping[str, Float[Tensor, "*batch _"]],
    *,
    position_mask: Bool[Tensor, ...] | None = None,
) -> Float[Tensor, ""]:
    """L7: mean over the named hook points of the MSE between clean and masked activations."""
    if not clean:
        raise ValueError("hidden_reconstruction_loss was given no hook point")
    losses = []
    for name, activation in clean.items():
        flat = activation.flatten(2) if activation.ndim > 3 else activation
        other = masked[name].reshape(flat.shape)
        losses.append(divergence(flat, other, kind="mse", position_mask=position_mask))
    return torch.stack(losses).mean()
