"""How far a masked output is from the clean one: KL over the vocabulary, or a squared error (L4)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spd_lens.core.subcomponents import at_least_float32
from spd_lens.support.compiling import region
from spd_lens.support.workspace import block_entries

Divergence = Literal["kl", "mse", "relative_mse"]


def mean_over_positions(
    per_position: Float[Tensor, "*batch"], position_mask: Bool[Tensor, "*batch"] | None
) -> Float[Tensor, ""]:
    """Mean over the positions that count (M5); of the others not even infinity or NaN enters."""
    if position_mask is None:
        return per_position.mean()
    if position_mask.shape != per_position.shape:
        raise ValueError(
            f"a position mask of shape {tuple(position_mask.shape)} for values at {tuple(per_position.shape)}; "
            "expected one entry for each"
        )
    counted = position_mask.bool()
    return per_position.masked_fill(~counted, 0.0).sum() / counted.sum().clamp_min(1).to(per_position.dtype)


def log_probs(logits: Float[Tensor, "*batch d_vocab"]) -> Float[Tensor, "*batch d_vocab"]:
    """`log_softmax` in float32 or wider, block by block."""
    return torch.cat([at_least_float32(rows).log_softmax(-1) for rows in _row_blocks(logits)]).view(logits.shape)


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
    outputs and divided by their number. `relative_mse`: the same, divided by the variance of the clean outputs at that
    position, which is how blocks read a residual stream that they normalise.
    """
    per_position = divergence_per_position(clean, masked, kind=kind, clean_is_log_probs=clean_is_log_probs)
    return mean_over_positions(per_position, position_mask)


def divergence_per_position(
    clean: Float[Tensor, "*batch d_out"],
    masked: Float[Tensor, "*batch d_out"],
    *,
    kind: Divergence = "kl",
    clean_is_log_probs: bool = False,
) -> Float[Tensor, "*batch"]:
    """`divergence` before the mean over positions.

    Vocabulary entries that both outputs hold at minus infinity count 0; an entry that only the masked output excludes
    makes the KL practically infinite, as it should.
    """
    match kind:
        case "kl":
            clean = clean.detach()
            log_p = clean if clean_is_log_probs else log_probs(clean)
            return _kl(masked, log_p)
        case "mse":
            return (at_least_float32(clean) - at_least_float32(masked)).square().mean(-1)
        case "relative_mse":
            clean, masked = at_least_float32(clean), at_least_float32(masked)
            variance = (clean - clean.mean(-1, keepdim=True)).square().mean(-1)
            # A row of equal outputs has no scale of its own.
            return (clean - masked).square().mean(-1) / variance.clamp_min(1e-12)
    raise ValueError(f"divergence={kind!r}; expected 'kl', 'mse' or 'relative_mse'")


def _kl_in_blocks(masked: Tensor, log_p: Tensor) -> Tensor:
    # Not `masked.requires_grad`, which is hidden inside `vmap`.
    per_position, _ = _KLFromFrozen.apply(masked, log_p, torch.is_grad_enabled())  # pyright: ignore[reportGeneralTypeIssues]
    return per_position


@region(_kl_in_blocks)
def _kl(masked: Tensor, log_p: Tensor) -> Tensor:
    log_q, log_p = at_least_float32(masked).log_softmax(-1), at_least_float32(log_p)
    lowest = torch.finfo(torch.float32).min
    return (log_p.exp() * (log_p.clamp_min(lowest) - log_q.clamp_min(lowest))).sum(-1)


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
            log_q, log_p = at_least_float32(q).log_softmax(-1), at_least_float32(log_p)
            p = log_p.exp()
            # Finite ends instead of minus infinity, or 0 * infinity would make the sum NaN; nothing else changes.
            lowest = torch.finfo(torch.float32).min
            difference = log_p.clamp_min(lowest) - log_q.clamp_min(lowest)
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
