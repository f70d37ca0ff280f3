"""Ways to fill a budget, of which the one with the lowest loss on the domain is taken.

They differ in how the parameters are shared out among the matrices, and, where matrices are written anew, in how many
subcomponents choose what is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens.specialists.allocation import Kept, effect_allocation, uniform_allocation
from spd_lens.specialists.directions import Directions, ordered
from spd_lens.specialists.domain import Domain
from spd_lens.specialists.matrices import SmallMatrix
from spd_lens.specialists.whitening import whitened_factors
from spd_lens.support.shown import short_repr

Allocation = Literal["measured", "effect", "uniform"]
Write = Literal["subcomponents", "refitted", "whitened"]
# Of every site's subcomponents, where more than fit are written as fewer directions.
SHARES = (1.0, 0.9, 0.7, 0.5, 0.35, 0.25)


@dataclass(frozen=True, eq=False)
class Candidate:
    """Matrices within the budget.

    - `chosen[site]`: how many of the site's directions went into its matrix; None: it is kept whole.
    - `share`: of every site's directions, what was written anew; None: nothing was, they are the factors.
    """

    matrices: Mapping[str, SmallMatrix]
    chosen: Kept
    share: float | None = None

    __repr__ = short_repr


def candidates(
    domain: Domain,
    directions: Directions,
    whole: Mapping[str, Tensor],
    room: int,
    allocation: Allocation = "measured",
    write: Write = "subcomponents",
    shares: Sequence[float] = SHARES,
) -> Iterator[Candidate]:
    """One or two ways to share out `room` numbers; with `write="whitened"` for each of `shares`.

    - "subcomponents": the first k directions of every matrix are its two factors. "refitted": the second factor is
      fitted anew.
    - "whitened": the first n directions, more than fit, make `W_S = V_S U_S`; of the directions that it falls into by
      `whitened_factors` the k that are worth most are written.
    """
    shapes = {site: (W.shape[0], W.shape[1]) for site, W in whole.items()}
    if write != "whitened":
        for kept in _allocations(directions.worth, shapes, room, allocation):
            matrices = directions.kept(kept, whole)
            if write == "refitted":
                matrices = {site: refitted(m, whole[site], domain.moments[site]) for site, m in matrices.items()}
            yield Candidate(matrices, kept)
        return
    for share in shares:
        counts = directions.counts(share)
        written = ordered(domain, {
            site: whitened_factors(directions.V[site][:, :n] @ directions.U[site][:n], domain.moments[site],
                                   domain.gradient_moments[site])
            for site, n in counts.items()
        })  # fmt: skip
        for kept in _allocations(written.worth, shapes, room, allocation):
            chosen = {site: None if k is None else counts[site] if k else 0 for site, k in kept.items()}
            yield Candidate(written.kept(kept, whole), chosen, share)


def _allocations(
    worth: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], room: int, allocation: Allocation
) -> list[Kept]:
    found = []
    if allocation != "uniform":
        found.append(effect_allocation(worth, shapes, room))
    if allocation != "effect":
        found.append(uniform_allocation(shapes, room))
    return found


def refitted(matrix: SmallMatrix, W: Float[Tensor, "d_in d_out"], moments: Float[Tensor, "d_in d_in"]) -> SmallMatrix:
    """`A @ B` with the B that brings `x A B` nearest to `x W`, least squares over the domain's inputs."""
    if matrix.B is None or matrix.rank == 0:
        return matrix
    A = matrix.A.double()
    # Kept directions may depend on each other, and inputs may not reach all of them.
    inverse = torch.linalg.pinv(A.T @ moments @ A, rtol=1e-10, hermitian=True)
    return SmallMatrix(matrix.A, (inverse @ (A.T @ moments @ W.double())).to(W.dtype))
