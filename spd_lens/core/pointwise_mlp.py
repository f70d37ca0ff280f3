"""Many small MLPs `1 -> h -> 1` at once, each on one column of its input: what a scalar gate computes.

    p[..., c] = sum_h w_out[c, h] * gelu(a[..., c] * w_in[c, h] + b_in[c, h]) + b_out[c]

Written naively the hidden layer `[... C h]` exists several times in memory, forward and backward. Here it never
does: blocks that fit the processor's cache are computed, used and forgotten, and the backward pass computes them
again. Values and gradients are those of the formula, up to the order of its sums.

Cost per entry of the hidden layer: one GELU forward; one GELU and one derivative backward. Memory: three blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from spd_lens.support.compiling import region
from spd_lens.support.workspace import block_entries, workspace


def _in_blocks(a: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor) -> Tensor:
    columns = _Transposed.apply(a.to(w_in.dtype).reshape(-1, a.shape[-1]))
    p = _Transposed.apply(_PointwiseMLP.apply(columns, w_in, b_in, w_out))
    return p.reshape(a.shape) + b_out  # pyright: ignore[reportAttributeAccessIssue]


@region(_in_blocks)
def _at_once(a: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor) -> Tensor:
    return (F.gelu(a.to(w_in.dtype).unsqueeze(-1) * w_in + b_in) * w_out).sum(-1) + b_out


def pointwise_mlp(
    a: Float[Tensor, "*batch C"],
    w_in: Float[Tensor, "C h"],
    b_in: Float[Tensor, "C h"],
    w_out: Float[Tensor, "C h"],
    b_out: Float[Tensor, " C"],
) -> Float[Tensor, "*batch C"]:
    """`p [... C]` of the module's formula, in the dtype of the weights; differentiable once in all arguments.

    >>> one = torch.ones(1, 1)
    >>> round(float(pointwise_mlp(torch.tensor([[2.0]]), one, 0 * one, one, torch.zeros(1))), 4)
    1.9545
    """
    return _at_once(a, w_in, b_in, w_out, b_out)


class _Transposed(torch.autograd.Function):
    """A transposed copy, also of the gradient: later element-wise work then never mixes two layouts."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.t().contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].t().contiguous()


class _PointwiseMLP(torch.autograd.Function):
    """`columns [C n]` to `p - b_out`, `[C n]`."""

    @staticmethod
    def forward(columns: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor) -> Tensor:
        out = torch.empty_like(columns)
        for block in _blocks(columns, w_in):
            hidden = block.hidden(columns, w_in, b_in)
            out[block.c, block.n] = torch.bmm(w_out[block.c].unsqueeze(1), hidden).squeeze(1)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _PointwiseMLPBackward.apply(grads[0], *ctx.saved_tensors)  # pyright: ignore[reportReturnType]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> tuple[Tensor, int]:
        out = _PointwiseMLP.apply(*_fold_members(info, in_dims, args))
        return out.unflatten(0, (info.batch_size, -1)), 0  # pyright: ignore[reportAttributeAccessIssue]


class _PointwiseMLPBackward(torch.autograd.Function):
    """The gradients as a Function of their own, so that a backward pass inside `vmap` folds its members as well."""

    @staticmethod
    def forward(
        grad: Tensor, columns: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        grad_columns = torch.empty_like(columns)
        grad_w_in, grad_b_in, grad_w_out = (torch.zeros_like(w) for w in (w_in, b_in, w_out))
        for block in _blocks(columns, w_in):
            c, n = block.c, block.n
            above = grad[c, n].unsqueeze(1)
            hidden = block.hidden(columns, w_in, b_in)
            grad_w_out[c] += torch.mul(hidden, above, out=block.spare).sum(-1)
            torch.mul(w_out[c].unsqueeze(-1), above, out=block.spare)
            # `hidden` is not needed any more: its place takes the gradient of the pre-activation.
            below = torch.ops.aten.gelu_backward.grad_input(block.spare, block.pre, grad_input=hidden)
            grad_b_in[c] += below.sum(-1)
            grad_w_in[c] += torch.mul(below, columns[c, n].unsqueeze(1), out=block.spare).sum(-1)
            grad_columns[c, n] = torch.bmm(w_in[c].unsqueeze(1), below).squeeze(1)
        return grad_columns, grad_w_in, grad_b_in, grad_w_out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> tuple[Any, Any]:
        grads = _PointwiseMLPBackward.apply(*_fold_members(info, in_dims, args))
        by_member = tuple(g.unflatten(0, (info.batch_size, -1)) for g in grads)  # pyright: ignore[reportGeneralTypeIssues]
        return by_member, (0, 0, 0, 0)


class _Block:
    """One block of columns `c` and rows `n`, with room for its hidden layer."""

    def __init__(self, c: slice, n: slice, room: list[Tensor], width: int) -> None:
        shape = (c.stop - c.start, width, n.stop - n.start)
        size = shape[0] * shape[1] * shape[2]
        self.c, self.n = c, n
        self.pre, self.activated, self.spare = (buffer[:size].view(shape) for buffer in room)

    def hidden(self, columns: Tensor, w_in: Tensor, b_in: Tensor) -> Tensor:
        torch.mul(w_in[self.c].unsqueeze(-1), columns[self.c, self.n].unsqueeze(1), out=self.pre)
        self.pre.add_(b_in[self.c].unsqueeze(-1))
        return torch.ops.aten.gelu.out(self.pre, out=self.activated)


def _blocks(columns: Float[Tensor, "C n"], w_in: Float[Tensor, "C h"]) -> Iterator[_Block]:
    (n_columns, n_rows), width = columns.shape, w_in.shape[1]
    entries = block_entries(columns.device)
    rows = max(1, min(n_rows, entries // width))
    width_of_block = max(1, min(n_columns, entries // (width * rows)))
    room = workspace(3, width_of_block * width * rows, columns)
    with torch.autocast(columns.device.type, enabled=False):
        for c in range(0, n_columns, width_of_block):
            for n in range(0, n_rows, rows):
                yield _Block(slice(c, min(c + width_of_block, n_columns)), slice(n, min(n + rows, n_rows)), room, width)


def _fold_members(info: Any, in_dims: tuple[int | None, ...], args: tuple[Tensor, ...]) -> list[Tensor]:
    """Members one below the other: `[S C n]` to `[(S C) n]`, weights `[S C h]` to `[(S C) h]`."""
    return [
        (arg.expand(info.batch_size, *arg.shape) if dim is None else arg.movedim(dim, 0)).flatten(0, 1)
        for arg, dim in zip(args, in_dims, strict=True)
    ]
