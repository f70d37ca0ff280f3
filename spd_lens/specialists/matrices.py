"""A matrix as it is stored in a small model: whole, or as the product of two narrow ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens.support.shown import short_repr


@dataclass(frozen=True, eq=False)
class SmallMatrix:
    """`A [d_in, d_out]`, or `A [d_in, k] @ B [k, d_out]`; with k = 0 it is zero and costs nothing."""

    A: Tensor
    B: Tensor | None = None

    __repr__ = short_repr

    @property
    def rank(self) -> int | None:
        """The inner width k; None for a whole matrix."""
        return None if self.B is None else self.A.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """`(d_in, d_out)`."""
        return self.A.shape[0], (self.A if self.B is None else self.B).shape[1]

    def product(self) -> Float[Tensor, "d_in d_out"]:
        """The matrix that it stands for."""
        return self.A if self.B is None else self.A @ self.B

    def rows(self, kept: Tensor) -> SmallMatrix:
        """Without the other inputs."""
        return SmallMatrix(self.A[kept], self.B)

    def columns(self, kept: Tensor) -> SmallMatrix:
        """Without the other outputs."""
        return SmallMatrix(self.A[:, kept]) if self.B is None else SmallMatrix(self.A, self.B[:, kept])

    def row_sizes(self) -> Float[Tensor, " d_in"]:
        """The norm of each row of the product."""
        return self.product().norm(dim=1)

    def column_sizes(self) -> Float[Tensor, " d_out"]:
        """The norm of each column of the product."""
        return self.product().norm(dim=0)


def cheapest_form(A: Float[Tensor, "d_in k"], B: Float[Tensor, "k d_out"], whole: Tensor) -> SmallMatrix:
    """The factors if they are fewer numbers than the matrix has, otherwise `whole`, which is then no dearer."""
    return SmallMatrix(A, B) if A.numel() + B.numel() < whole.numel() else SmallMatrix(whole)


def is_small(sizes: Tensor, below: float) -> Tensor:
    """Which sizes are at most the share `below` of the largest; with 0, which are exactly 0."""
    return sizes <= below * sizes.max() if sizes.numel() else torch.zeros(0, dtype=torch.bool)
