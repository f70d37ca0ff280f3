"""A matrix as two narrow ones that lose least where a domain looks, and where its output counts.

Cost: one singular value decomposition in float64.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

# Of the mean of the diagonal: what is added to it, so that directions no input has do not count as infinitely cheap.
_DAMPING = 1e-6


def whitened_factors(
    W: Float[Tensor, "d_in d_out"],
    inputs: Float[Tensor, "d_in d_in"],
    outputs: Float[Tensor, "d_out d_out"] | None = None,
    *,
    damping: float = _DAMPING,
) -> tuple[Float[Tensor, "d_in n"], Float[Tensor, "n d_out"]]:
    """`W = A B` whose first k directions, `W_k = A[:, :k] B[:k]`, make `tr(M (W - W_k) G (W - W_k)^T)` smallest, for
    every k: with `M = E x x^T` (`inputs`) and no `outputs` (G the identity) the mean squared error of `x W`; with
    `G = E g g^T`, g what the loss's gradient by the output is, the Kronecker-factored estimate of what it costs.

    With `M = L L^T`, `G = R R^T` (Cholesky) and `L^T W R = P S Q`: `A = L^-T P S`, `B = Q R^-1`.
    """
    for what, moments, d in (("inputs", inputs, W.shape[0]), ("outputs", outputs, W.shape[1])):
        if moments is not None and moments.shape != (d, d):
            raise ValueError(
                f"the moments of {what} are {list(moments.shape)}; expected {[d, d]} for W {list(W.shape)}"
            )
    L = _root(inputs, damping)
    weighted = L.T @ W.double()
    R = None if outputs is None else _root(outputs, damping)
    P, sizes, Q = torch.linalg.svd(weighted if R is None else weighted @ R, full_matrices=False)
    A = torch.linalg.solve_triangular(L.T, P * sizes, upper=True)
    B = Q if R is None else torch.linalg.solve_triangular(R, Q, upper=False, left=False)
    return A.to(W.dtype), B.to(W.dtype)


def _root(moments: Tensor, damping: float) -> Tensor:
    moments = moments.double()
    mean = moments.diagonal().mean()
    # Where nothing enters, or nothing depends on what comes out, all directions are equal.
    scale = torch.where(mean > 0, damping * mean, 1.0)
    return torch.linalg.cholesky(moments + scale * torch.eye(len(moments)).to(moments))
