"""The three squashings of a gate's pre-activation `p` (S1 to S3)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens.support.compiling import compilable

aten = torch.ops.aten
LEAK = 0.01


def importance_of(pre: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch C"]:
    """`clamp(p, 0, 1)`, the importance that reports and analysis use (S3).

    >>> importance_of(torch.tensor([-1.0, 0.25, 3.0])).tolist()
    [0.0, 0.25, 1.0]
    """
    return pre.clamp(0, 1)


class _StraightLower(torch.autograd.Function):
    """S1: clamp forward; backward leaks below 0 only where descent wants `p` up."""

    generate_vmap_rule = True

    @staticmethod
    def forward(pre: Tensor) -> Tensor:
        return pre.clamp(0, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (pre,) = ctx.saved_tensors
        (grad,) = grads
        # `torch.where` on data without pattern costs thirty times an element-wise product; these two do not branch.
        inside = aten.hardtanh_backward(grad, pre, 0.0, _just_above(1.0, pre.dtype))
        wants_up = grad.clamp_max(0)
        return inside.add_(wants_up - aten.threshold_backward(wants_up, pre, 0.0), alpha=LEAK)


class _Upper(torch.autograd.Function):
    """S2, keeping nothing but `p` for the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(pre: Tensor) -> Tensor:
        return pre.clamp(0, 1).add_((pre - 1).clamp_min_(0), alpha=LEAK)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (pre,) = ctx.saved_tensors
        (grad,) = grads
        from_zero = aten.threshold_backward(grad, pre, -torch.finfo(pre.dtype).tiny)
        return from_zero.sub_(aten.threshold_backward(grad, pre, 1.0), alpha=1 - LEAK)


def _just_above(value: float, dtype: torch.dtype) -> float:
    return value + torch.finfo(dtype).eps


@compilable
def squashed(
    pre: Float[Tensor, "*batch C"], variant: Literal["straight", "leaky"]
) -> tuple[Float[Tensor, "*batch C"], Float[Tensor, "*batch C"]]:
    """`lower_squash` and `upper_squash` of the same pre-activations."""
    return lower_squash(pre, variant=variant), upper_squash(pre)


def lower_squash(
    pre: Float[Tensor, "*batch C"], *, variant: Literal["straight", "leaky"] = "straight"
) -> Float[Tensor, "*batch C"]:
    """The importance that masks are made from (S1).

    `straight`: forward `clamp(p, 0, 1)`; backward passes the gradient for `0 < p <= 1`, is 0 for `p > 1`, and for
    `p <= 0` is 0.01 times the gradient when that is negative (descent wants `p` up), else 0.
    `leaky`: the paper's own, forward and backward `0.01 p` below 0, so masks may be slightly negative; the
    published table was made with it.

    >>> lower_squash(torch.tensor([-1.0, 0.5, 2.0]), variant="leaky").tolist()
    [-0.009999999776482582, 0.5, 1.0]
    """
    match variant:
        case "straight":
            return _StraightLower.apply(pre)  # pyright: ignore[reportReturnType]
        case "leaky":
            return torch.where(pre > 0, pre.clamp_max(1), LEAK * pre)
    raise ValueError(f"variant={variant!r}; expected 'straight' or 'leaky'")


def upper_squash(pre: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch C"]:
    """The importance that the minimality loss pays for (S2): 0 below 0, `p` in [0, 1], `1 + 0.01 (p - 1)` above.

    >>> upper_squash(torch.tensor([-1.0, 0.5, 2.0])).tolist()
    [0.0, 0.5, 1.0099999904632568]
    """
    return _Upper.apply(pre)  # pyright: ignore[reportReturnType]
