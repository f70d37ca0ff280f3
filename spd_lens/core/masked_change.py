"""What masks change in a site's output (M2), as pure functions: with it no `W - V @ U` is ever built."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from spd_lens.support.compiling import compilable


def masked_change(
    y0: Tensor,
    a: Float[Tensor, "*batch C"],
    patched: Float[Tensor, "*batch C"],
    mask: Tensor | None,
    delta: Tensor | None,
    *,
    U: Float[Tensor, "C d_out"],
    bias: Tensor | None,
) -> Tensor:
    """`y - y0`: `(m * a' - d * a) @ U - (1 - d) * (y0 - b)`, `a'` given as `patched`.

    A mask or a delta mask that is None is 1; `patched` may be `a` itself. `y0` may have a head axis.
    """
    kept = None if delta is None else delta.unsqueeze(-1)
    if patched is a:
        one = torch.ones((), dtype=a.dtype, device=a.device)
        coefficients = ((one if mask is None else mask) - (one if kept is None else kept)) * a
    else:
        coefficients = (patched if mask is None else mask * patched) - (a if kept is None else kept * a)
    change = through_U(coefficients, U, y0)
    if delta is not None:
        dense = dense_part(y0, bias)
        weight = (1 - delta).expand(a.shape[:-1])
        weight = weight.reshape(*weight.shape, *([1] * (dense.ndim - weight.ndim)))
        change = change - weight * dense
    return change


@compilable
def masked_sum(
    y0: Tensor,
    a: Float[Tensor, "*batch C"],
    patched: Float[Tensor, "*batch C"],
    mask: Tensor | None,
    delta: Tensor | None,
    U: Float[Tensor, "C d_out"],
    bias: Tensor | None,
) -> Tensor:
    """`y` of M2, in the dtype of `y0`."""
    return (y0 + masked_change(y0, a, patched, mask, delta, U=U, bias=bias)).to(y0.dtype)


def through_U(coefficients: Float[Tensor, "*batch C"], U: Float[Tensor, "C d_out"], y0: Tensor) -> Tensor:
    """`coefficients @ U` in the shape of `y0`, which may have a head axis and repeat grouped heads."""
    split_input = coefficients.ndim == y0.ndim
    # By the number of axes too: with one stored head, d_head is all of d_out.
    has_heads = y0.ndim > coefficients.ndim or y0.shape[-1] != U.shape[1]
    if not has_heads:
        return coefficients @ U
    d_head = y0.shape[-1]
    U_heads = rearrange(U, "C (head d_head) -> head C d_head", d_head=d_head)
    repeats = y0.shape[-2] // U_heads.shape[0]
    if split_input:  # every head has an input of its own and uses its own columns of U
        if repeats > 1:
            U_heads = U_heads.repeat_interleave(repeats, dim=0)
        return (coefficients.unsqueeze(-2) @ U_heads).squeeze(-2)
    out = rearrange(coefficients @ U, "... (head d_head) -> ... head d_head", d_head=d_head)
    return out if repeats == 1 else out.repeat_interleave(repeats, dim=-2)


def dense_part(y0: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ W` in the shape of `y0`, taken from `y0`."""
    if bias is None:
        return y0
    if bias.ndim == 2 and bias.shape[0] != y0.shape[-2]:  # grouped keys, which the host has repeated
        bias = bias.repeat_interleave(y0.shape[-2] // bias.shape[0], dim=0)
    # Not in half precision: the rounding that y0 has already must cancel where delta is 0.
    return y0.to(torch.promote_types(y0.dtype, torch.float32)) - bias.to(y0.device)
