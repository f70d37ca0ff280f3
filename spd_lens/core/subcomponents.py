"""The factors of one matrix, `V [d_in, C]` and `U [C, d_out]`, and how they start.

Column c of `V` and row c of `U` are subcomponent c: the rank-one matrix `V[:, c] U[c, :]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

InitKind = Literal["normal", "paper", "exact", "singular"]
T = TypeVar("T")


class Subcomponents(nn.Module):
    """The factors `V [d_in, C]` and `U [C, d_out]` of one matrix; their product is what they explain of it."""

    def __init__(self, V: Float[Tensor, "d_in C"], U: Float[Tensor, "C d_out"]) -> None:
        super().__init__()
        self.V = nn.Parameter(V)
        self.U = nn.Parameter(U)

    def forward(self, use: Callable[..., T], *tensors: Any) -> T:
        """`use(*tensors)`, with V and U whole meanwhile.

        Where they are sharded over processes, FSDP gathers them around this call, and again around its backward pass;
        it looks for gradients in `tensors` and in what comes out.
        """
        return use(*tensors)


def initial_factors(
    target: Float[Tensor, "d_in d_out"], n_subcomponents: int, kind: InitKind, generator: torch.Generator
) -> tuple[Float[Tensor, "d_in C"], Float[Tensor, "C d_out"]]:
    """Random `V [d_in, C]`, `U [C, d_out]`.

    - `normal`: `V ~ N(0, 1/d_in)`, `U ~ N(0, 1/C)` (variances).
    - `paper`: `V_c` and `U_c` random of unit norm, then `U_c` scaled by the inner product `<V_c U_c, W>`, so that
      each starts as W's projection on it.
    - `exact`: the factor on the smaller side is random, the other solves `V U = W` by least squares with the
      smallest norm, so with `C >= min(d_in, d_out)` the sum is W from the start; below that it is the best for the
      random factor. Costs one pseudo-inverse of a matrix of `C x min(d_in, d_out)`. Take C well above that smaller
      side: a square random matrix is ill-conditioned, and subcomponents become huge and cancel (C 64 of 64 diverged).
    - `singular`: W's own singular directions, the largest first, each factor with the root of its size; what C has
      beyond them is a random `V_c` beside `U_c = 0`. With `C >= min(d_in, d_out)` the sum is W from the start and no
      subcomponents cancel, so masks a little below 1 do little; it is no sign of anything found.
    """
    d_in, d_out = target.shape
    V = torch.randn(d_in, n_subcomponents, generator=generator)
    U = torch.randn(n_subcomponents, d_out, generator=generator)
    match kind:
        case "normal":
            return V / math.sqrt(d_in), U / math.sqrt(n_subcomponents)
        case "paper":
            V, U = V / V.norm(dim=0), U / U.norm(dim=1, keepdim=True)
            W = target.detach().to(V)
            return V, U * (V * (W @ U.T)).sum(0).unsqueeze(1)
        case "exact":
            W = target.detach().to(device="cpu", dtype=torch.float64)
            if d_in <= d_out:
                V = V / V.norm(dim=0)
                U = (torch.linalg.pinv(V.double()) @ W).float()
            else:
                U = U / U.norm(dim=1, keepdim=True)
                V = (W @ torch.linalg.pinv(U.double())).float()
            return V, U
        case "singular":
            W = target.detach().to(device="cpu", dtype=torch.float64)
            left, sizes, right = torch.linalg.svd(W, full_matrices=False)
            count = min(n_subcomponents, len(sizes))
            roots = sizes[:count].sqrt()
            V, U = V / math.sqrt(d_in), torch.zeros_like(U)
            V[:, :count] = (left[:, :count] * roots).float()
            U[:count] = (roots[:, None] * right[:count]).float()
            return V, U
    raise ValueError(f"init={kind!r}; expected 'normal', 'paper', 'exact' or 'singular'")


def smallest_relative_error(W: Float[Tensor, "d_in d_out"], n_subcomponents: int) -> float:
    """The smallest `|W - V U|^2 / |W|^2` that C subcomponents allow: the tail of W's squared singular values.

    0 for a matrix of zeros, which any number of subcomponents can be.
    """
    if n_subcomponents >= min(W.shape):
        return 0.0
    squared = torch.linalg.svdvals(W.float()).square()
    return float(squared[n_subcomponents:].sum() / squared.sum()) if bool(squared.any()) else 0.0


def relative_faithfulness(
    W: Float[Tensor, "d_in d_out"], V: Float[Tensor, "d_in C"], U: Float[Tensor, "C d_out"]
) -> Float[Tensor, ""]:
    """`|W - V U|_F^2 / |W|_F^2` of one site: the share of the matrix's energy that is not explained.

    For a matrix of zeros, which has none, it is `|V U|_F^2` itself: 0 if the sum is right, and a number in any case.
    """
    return share_of_energy(squared_error(W, V, U), W)


def share_of_energy(error: Float[Tensor, ""], W: Float[Tensor, "d_in d_out"]) -> Float[Tensor, ""]:
    """A squared error divided by `|W|_F^2`; as it is where that is 0."""
    energy = W.to(error.dtype).square().sum()
    return error / torch.where(energy == 0, torch.ones_like(energy), energy)


def squared_error(W: Tensor, V: Tensor, U: Tensor) -> Tensor:
    """`|W - V U|_F^2` in float32 or wider, also under autocast, which would multiply in bfloat16."""
    with torch.autocast(V.device.type, enabled=False):
        V, U = at_least_float32(V), at_least_float32(U)
        return (W.to(V.dtype) - V @ U).square().sum()


def at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
