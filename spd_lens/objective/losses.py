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
from spd_lens.core.subcomponents import share_of_energy, squared_error
from spd_lens.objective.divergences import divergence, mean_over_positions

# Unbound axis names: every site has its own sizes, and one annotation is checked against several sites.
Factors = tuple[Float[Tensor, "_d_in _d_out"], Float[Tensor, "_d_in _C"], Float[Tensor, "_C _d_out"]]
# `|W - V U|_F^2` of a site, and its `W`.
Error = tuple[Float[Tensor, ""], Float[Tensor, "_d_in _d_out"]]


def faithfulness_loss(sites: Iterable[Factors]) -> Float[Tensor, ""]:
    """L1: `sum over sites |W - V U|_F^2 / N`, with N the number of entries of all matrices.

    `sites` yields `(W, V, U)`; a matrix that two sites share is passed once.

    >>> W = torch.eye(2)
    >>> float(faithfulness_loss([(W, torch.zeros(2, 3), torch.zeros(3, 2))]))
    0.5
    """
    return error_per_entry((squared_error(W, V, U), W) for W, V, U in sites)


def error_per_entry(errors: Iterable[Error]) -> Float[Tensor, ""]:
    """L1 from what `squared_error` gave of every site, with its `W`."""
    total: Tensor | float = 0.0
    entries = 0
    for error, W in errors:
        total = total + error
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


def relative_faithfulness_loss(sites: Iterable[Factors]) -> Float[Tensor, ""]:
    """L1r: the mean over sites of `relative_faithfulness`, so that a small matrix counts as much as a large one.

    Of L1, the mean over all entries, most comes from few sites, and the wrong ones among the others do not show. A
    matrix of zeros has no energy; what counts of it is `|V U|_F^2` itself, as in reports.

    >>> W = torch.eye(2)
    >>> float(relative_faithfulness_loss([(W, torch.zeros(2, 3), torch.zeros(3, 2)), (2 * W, W, 2 * W)]))
    0.5
    """
    return mean_relative_error((squared_error(W, V, U), W) for W, V, U in sites)


def mean_relative_error(errors: Iterable[Error]) -> Float[Tensor, ""]:
    """L1r from what `squared_error` gave of every site, with its `W`."""
    relative = [share_of_energy(error, W) for error, W in errors]
    if not relative:
        raise ValueError("relative_faithfulness_loss was given no site")
    return torch.stack(relative).mean()


def minimality_loss(
    upper: Importances,
    *,
    penalty: Callable[[Tensor], Tensor],
    position_mask: Bool[Tensor, ...] | None = None,
    factors: Mapping[str, float] | None = None,
) -> Float[Tensor, ""]:
    """L2: mean over batch and positions of `sum over sites and c of phi(g_upper)`, phi the `penalty`.

    Never divided by the number of sites or subcomponents. `factors` multiply the parts of single sites (others: 1).

    >>> from spd_lens.objective import Power
    >>> float(minimality_loss({"site": torch.tensor([[0.5, 0.5]])}, penalty=Power(2.0)))
    0.5
    """
    total: Tensor | None = None
    for name, g in upper.items():
        per_position = penalty(g).sum(-1)
        mean = mean_over_positions(per_position, _fit_position_mask(position_mask, per_position))
        if factors is not None and name in factors:
            mean = factors[name] * mean
        total = mean if total is None else total + mean
    if total is None:
        raise ValueError("minimality_loss was given no site")
    return total


def frequency_loss(
    upper: Importances,
    *,
    penalty: Callable[[Tensor], Tensor],
    reference: int | None = None,
    position_mask: Bool[Tensor, ...] | None = None,
    sum_over_processes: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, ""]:
    """L3: `sum_c mean_c * log2(1 + N mean_c)` with `mean_c` the mean of `phi(g_upper)` over the global batch.

    N is the number of positions in the batch, or `reference`, which makes the loss independent of the batch's size. It
    makes subcomponents that are always on expensive. In multi-process training `sum_over_processes` (differentiable)
    adds a tensor up over all of them.
    """
    add = sum_over_processes or (lambda tensor: tensor)
    loss: Tensor | None = None
    for g in upper.values():
        costs = penalty(g).flatten(0, -2)
        if position_mask is None:
            count = costs.new_full((), float(costs.shape[0]))
        else:
            kept = _fit_position_mask(position_mask, g[..., 0])
            assert kept is not None
            costs = costs * kept.reshape(-1, 1)
            count = kept.sum().to(costs.dtype)
        total, count = add(costs.sum(0)), add(count)
        mean = total / count.clamp_min(1)
        term = (mean * torch.log2(1 + (total if reference is None else reference * mean))).sum()
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
    """L7: mean over the named hook points of the MSE between clean and masked activations.

    Their axes are batch, position and whatever else there is. With a position mask ValueError for other ones, such as
    attention patterns, whose second axis is the head.
    """
    if not clean:
        raise ValueError("hidden_reconstruction_loss was given no hook point")
    losses = []
    for name, activation in clean.items():
        flat = activation.flatten(2) if activation.ndim > 3 else activation
        other = masked[name].reshape(flat.shape)
        losses.append(divergence(flat, other, kind="mse", position_mask=position_mask))
    return torch.stack(losses).mean()
