"""The losses of SPD (L1 to L7) as pure functions of tensors; the total is a weighted sum of them.

`reconstruction_loss` is one function for every mask source and every routing: both are arguments. Everything is
computed in float32 or wider whatever the model's dtype. Source: Bushnaq, Braun and Sharkey 2025 (arXiv 2506.20790),
section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spd_lens.masks import Importances, MaskKind, Routing, mask_from_source, route, sample_masks, sample_routing
from spd_lens.subcomponents import SiteMask

Divergence = Literal["kl", "mse"]
MaskedForward = Callable[[Mapping[str, SiteMask]], Tensor]
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
        total = total + _squared_error(W, V, U)
        entries += W.numel()
    if entries == 0:
        raise ValueError("faithfulness_loss was given no site")
    assert isinstance(total, Tensor)
    return total / entries


def relative_faithfulness(
    W: Float[Tensor, "d_in d_out"], V: Float[Tensor, "d_in C"], U: Float[Tensor, "C d_out"]
) -> Float[Tensor, ""]:
    """`|W - V U|_F^2 / |W|_F^2` of one site: the share of the matrix's energy that is not explained."""
    return _squared_error(W, V, U) / W.to(_at_least_float32(V).dtype).square().sum()


def _squared_error(W: Tensor, V: Tensor, U: Tensor) -> Tensor:
    """`|W - V U|_F^2` in float32 or wider, also under autocast, which would multiply in bfloat16."""
    with torch.autocast(V.device.type, enabled=False):
        V, U = _at_least_float32(V), _at_least_float32(U)
        return (W.to(V.dtype) - V @ U).square().sum()


def _mean_over_positions(
    per_position: Float[Tensor, "*batch"], position_mask: Bool[Tensor, "*batch"] | None
) -> Float[Tensor, ""]:
    """Mean over the positions that count (M5)."""
    if position_mask is None:
        return per_position.mean()
    kept = position_mask.to(per_position.dtype)
    return (per_position * kept).sum() / kept.sum().clamp_min(1)


def _fit_position_mask(position_mask: Tensor | None, like: Tensor) -> Tensor | None:
    """The position mask `[batch pos]` for values `[batch pos]`, or `[batch pos head]` under split heads."""
    if position_mask is None:
        return None
    while position_mask.ndim < like.ndim:
        position_mask = position_mask.unsqueeze(-1)
    return position_mask.expand_as(like)


def minimality_loss(
    upper: Importances, *, p: float, position_mask: Bool[Tensor, ...] | None = None
) -> Float[Tensor, ""]:
    """L2: mean over batch and positions of `sum over sites and c of (g_upper + 1e-12)^p`.

    Never divided by the number of sites or subcomponents.

    >>> float(minimality_loss({"site": torch.tensor([[0.5, 0.5]])}, p=2.0))
    0.5
    """
    total: Tensor | None = None
    for g in upper.values():
        per_position = (_at_least_float32(g) + EPSILON).pow(p).sum(-1)
        mean = _mean_over_positions(per_position, _fit_position_mask(position_mask, per_position))
        total = mean if total is None else total + mean
    if total is None:
        raise ValueError("minimality_loss was given no site")
    return total


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
        powered = (_at_least_float32(g) + EPSILON).pow(p).flatten(0, -2)
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


def divergence(
    clean: Float[Tensor, "*batch d_out"],
    masked: Float[Tensor, "*batch d_out"],
    *,
    kind: Divergence = "kl",
    position_mask: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, ""]:
    """`D` of L4, averaged over batch and positions.

    `kl`: `KL(softmax(clean) || softmax(masked))`, summed over the vocabulary. `mse`: squared error summed over the
    outputs and divided by their number.
    """
    match kind:
        case "kl":
            per_position = _KLFromFrozen.apply(masked, clean.detach())
        case "mse":
            per_position = (_at_least_float32(clean) - _at_least_float32(masked)).square().mean(-1)
        case _:
            raise ValueError(f"divergence={kind!r}; expected 'kl' or 'mse'")
    return _mean_over_positions(per_position, position_mask)


class _KLFromFrozen(torch.autograd.Function):
    """`KL(softmax(clean) || softmax(masked))` per row, with the gradient `softmax(masked) - softmax(clean)`.

    Rows are worked off in chunks that fit the processor's cache: over a real vocabulary the five passes over the
    logits that the formula needs would otherwise each go through main memory, and autograd would keep three of them.
    """

    @staticmethod
    def forward(ctx: Any, masked: Tensor, clean: Tensor) -> Tensor:
        ctx.save_for_backward(masked, clean)
        rows = []
        for q, p in zip(_row_chunks(masked), _row_chunks(clean), strict=True):
            log_p, log_q = _at_least_float32(p).log_softmax(-1), _at_least_float32(q).log_softmax(-1)
            rows.append((log_p.exp() * (log_p - log_q)).sum(-1))
        return torch.cat(rows).reshape(masked.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        masked, clean = ctx.saved_tensors
        gradient = torch.empty_like(masked, memory_format=torch.contiguous_format)
        per_row = grads[0].reshape(-1, 1)
        start = 0
        for q, p, out in zip(_row_chunks(masked), _row_chunks(clean), _row_chunks(gradient), strict=True):
            stop = start + len(q)
            difference = _at_least_float32(q).softmax(-1).sub_(_at_least_float32(p).softmax(-1))
            out.copy_(difference.mul_(per_row[start:stop]))
            start = stop
        return gradient, None


def _row_chunks(x: Float[Tensor, "*batch d_out"]) -> tuple[Tensor, ...]:
    """Views of some rows each: about 4 MB on a CPU, far more elsewhere, where launches cost more than traffic."""
    flat = x.reshape(-1, x.shape[-1])
    entries = 2**20 if x.device.type == "cpu" else 2**28
    return flat.split(max(1, entries // flat.shape[1]))


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def masks_from_sources(
    importances: Importances, sources: Mapping[str, Float[Tensor, "*_batch _C_and_delta"]], *, delta: bool = True
) -> dict[str, SiteMask]:
    """K3: `m = g + (1 - g) s` with the first C channels of `s`, delta mask the last one (0 with `delta=False`).

    Sources may be smaller than the importances in batch and position (`[1 1 C+1]`): they are then shared.
    """
    return {
        name: SiteMask(
            mask_from_source(g, sources[name][..., :-1]),
            sources[name][..., -1].expand(g.shape[:-1]) if delta else g.new_zeros(g.shape[:-1]),
        )
        for name, g in importances.items()
    }


def reconstruction_loss(
    forward: MaskedForward,
    clean_output: Float[Tensor, "*output_batch d_out"],
    importances: Importances,
    *,
    masks: MaskKind | Mapping[str, Tensor] = "stochastic",
    routing: Routing | list[dict[str, Tensor | None]] = "all",
    kind: Divergence = "kl",
    delta: bool = True,
    draws: int = 1,
    position_mask: Bool[Tensor, "*output_batch"] | None = None,
    generator: torch.Generator,
    routing_generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    """L4 to L6: mean over draws, and over the passes that the routing asks for, of `D(clean, forward(masks))`.

    - `forward` maps masks per site to the model's output; sites that are not named stay with the target.
    - `masks` is a kind for `sample_masks`, or adversarial sources `{site: [... C+1]}` (K3).
    - `routing` is a kind for `sample_routing`, or passes drawn before, so that an adversary and the loss share
      them. `"layerwise"` is L6.
    - `clean_output` comes from a frozen forward of the target, never from "all masks 1".

    Fresh masks are drawn for every pass. Cost: `draws` times the number of passes, each a forward of the model.
    """
    if draws < 1:
        raise ValueError(f"draws={draws}; expected at least 1")
    if not importances:
        raise ValueError("reconstruction_loss was given no site")
    shapes = {name: g.shape[:-1] for name, g in importances.items()}
    losses = []
    for _ in range(draws):
        passes = (
            routing
            if isinstance(routing, list)
            else sample_routing(shapes, routing, generator=routing_generator or generator)
        )
        for routed in passes:
            chosen = {name: importances[name] for name in routed}
            drawn = (
                sample_masks(chosen, kind=masks, delta=delta, generator=generator)
                if isinstance(masks, str)
                else masks_from_sources(chosen, masks, delta=delta)
            )
            output = forward(route(drawn, routed))
            losses.append(divergence(clean_output, output, kind=kind, position_mask=position_mask))
    return torch.stack(losses).mean()


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
