"""The losses of SPD (L1 to L7) as pure functions of tensors; the total is a weighted sum of them.

`reconstruction_loss` is one function for every mask source and every routing: both are arguments. Everything is
computed in float32 or wider whatever the model's dtype. Source: Bushnaq, Braun and Sharkey 2025 (arXiv 2506.20790),
section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spd_lens.blocks import block_entries
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
        mean = _mean_over_positions(per_position, _fit_position_mask(position_mask, per_position))
        if factors is not None and name in factors:
            mean = factors[name] * mean
        total = mean if total is None else total + mean
    if total is None:
        raise ValueError("minimality_loss was given no site")
    return total


def _powered(g: Float[Tensor, "*batch C"], p: float) -> Float[Tensor, "*batch C"]:
    shifted = _at_least_float32(g) + EPSILON
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


def log_probs(logits: Float[Tensor, "*batch d_vocab"]) -> Float[Tensor, "*batch d_vocab"]:
    """`log_softmax` in float32 or wider, block by block."""
    return torch.cat([_at_least_float32(rows).log_softmax(-1) for rows in _row_blocks(logits)]).view(logits.shape)


def divergence(
    clean: Float[Tensor, "*batch d_out"],
    masked: Float[Tensor, "*batch d_out"],
    *,
    kind: Divergence = "kl",
    position_mask: Bool[Tensor, "*batch"] | None = None,
    clean_is_log_probs: bool = False,
) -> Float[Tensor, ""]:
    """`D` of L4, averaged over batch and positions.

    `kl`: `KL(softmax(clean) || softmax(masked))`, summed over the vocabulary; with `clean_is_log_probs`, `clean` has
    been through `log_softmax` already, which saves doing so for every term. `mse`: squared error summed over the
    outputs and divided by their number.
    """
    match kind:
        case "kl":
            clean = clean.detach()
            log_p = clean if clean_is_log_probs else log_probs(clean)
            # Not `masked.requires_grad`, which is hidden inside `vmap`.
            per_position, _ = _KLFromFrozen.apply(masked, log_p, torch.is_grad_enabled())  # pyright: ignore[reportGeneralTypeIssues]
        case "mse":
            per_position = (_at_least_float32(clean) - _at_least_float32(masked)).square().mean(-1)
        case _:
            raise ValueError(f"divergence={kind!r}; expected 'kl' or 'mse'")
    return _mean_over_positions(per_position, position_mask)


class _KLFromFrozen(torch.autograd.Function):
    """`KL(clean || masked)` per row, and its gradient by the logits `masked`: `softmax(masked) - softmax(clean)`.

    Rows are worked off in blocks that fit the processor's cache: over a real vocabulary the passes over the logits
    that the formula needs would otherwise each go through main memory, and autograd would keep three of them. The
    gradient is written down at once, because its parts are at hand; it takes the place of the logits in memory.
    """

    @staticmethod
    def forward(masked: Tensor, clean_log_probs: Tensor, wants_gradient: bool) -> tuple[Tensor, Tensor]:
        gradient = torch.empty_like(masked, memory_format=torch.contiguous_format) if wants_gradient else None
        gradient_rows = _row_blocks(masked if gradient is None else gradient)
        rows = []
        for q, log_p, out in zip(_row_blocks(masked), _row_blocks(clean_log_probs), gradient_rows, strict=True):
            log_q, log_p = _at_least_float32(q).log_softmax(-1), _at_least_float32(log_p)
            p = log_p.exp()
            difference = log_p - log_q
            rows.append(torch.linalg.vecdot(p, difference))
            if gradient is not None:
                out.copy_(torch.sub(log_q.exp_(), p, out=difference))
        kl = torch.cat(rows).reshape(masked.shape[:-1])
        return kl, kl.new_empty(0) if gradient is None else gradient

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        (gradient,), above = ctx.saved_tensors, grads[0]
        return gradient * above.to(gradient.dtype).unsqueeze(-1), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        masked, log_p = (
            t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in zip(args[:2], in_dims, strict=False)
        )
        kl, gradient = _KLFromFrozen.apply(masked, log_p, args[2])  # pyright: ignore[reportGeneralTypeIssues]
        return (kl, gradient), (0, 0 if args[2] else None)


def _row_blocks(x: Float[Tensor, "*batch d_out"]) -> tuple[Tensor, ...]:
    flat = x.reshape(-1, x.shape[-1])
    return flat.split(max(1, block_entries(x.device) // (8 * flat.shape[1])))


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
    clean_is_log_probs: bool = False,
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
    passes = reconstruction_passes(
        forward,
        clean_output,
        importances,
        masks=masks,
        routing=routing,
        kind=kind,
        delta=delta,
        draws=draws,
        position_mask=position_mask,
        clean_is_log_probs=clean_is_log_probs,
        generator=generator,
        routing_generator=routing_generator,
    )
    return torch.stack(list(passes)).sum()


def reconstruction_passes(
    forward: MaskedForward,
    clean_output: Float[Tensor, "*output_batch d_out"],
    importances: Importances,
    *,
    masks: MaskKind | Mapping[str, Tensor],
    routing: Routing | list[dict[str, Tensor | None]],
    kind: Divergence,
    delta: bool,
    draws: int,
    position_mask: Bool[Tensor, "*output_batch"] | None,
    clean_is_log_probs: bool,
    generator: torch.Generator,
    routing_generator: torch.Generator | None,
) -> Iterator[Float[Tensor, ""]]:
    """The summands of `reconstruction_loss`, one for every pass, each computed when it is asked for.

    Differentiating each before asking for the next keeps one graph alive instead of all.
    """
    if draws < 1:
        raise ValueError(f"draws={draws}; expected at least 1")
    if not importances:
        raise ValueError("reconstruction_loss was given no site")
    shapes = {name: g.shape[:-1] for name, g in importances.items()}
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
            distance = divergence(
                clean_output,
                forward(route(drawn, routed)),
                kind=kind,
                position_mask=position_mask,
                clean_is_log_probs=clean_is_log_probs,
            )
            yield distance / (draws * len(passes))


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
