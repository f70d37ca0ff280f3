"""Directions of every matrix in the order of what they are worth on a domain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from spd_lens.specialists.allocation import Kept
from spd_lens.specialists.domain import Domain
from spd_lens.specialists.matrices import SmallMatrix, cheapest_form
from spd_lens.support.shown import short_repr


@dataclass(frozen=True, eq=False)
class Directions:
    """For each site `V [d_in, n]`, `U [n, d_out]`, and each direction's worth `[n]`, best first.

    - `numbers[site]`: the subcomponents that they are, where they are some.
    """

    V: Mapping[str, Tensor]
    U: Mapping[str, Tensor]
    worth: Mapping[str, Tensor]
    numbers: Mapping[str, Tensor]

    __repr__ = short_repr

    def kept(self, kept: Kept, whole: Mapping[str, Tensor]) -> dict[str, SmallMatrix]:
        """The matrices with the first `kept[site]` directions each."""
        return {
            site: SmallMatrix(whole[site])
            if k is None
            else cheapest_form(self.V[site][:, :k], self.U[site][:k], whole[site])
            for site, k in kept.items()
        }

    def counts(self, share: float) -> dict[str, int]:
        """How many the best `share` of each site's directions are, at least one where there are any."""
        return {site: min(len(worth), max(1, int(share * len(worth)))) for site, worth in self.worth.items()}


def ordered(
    domain: Domain, factors: Mapping[str, tuple[Tensor, Tensor]], numbers: Mapping[str, Tensor] | None = None
) -> Directions:
    """Directions in the falling order of what they are worth on the domain. ValueError if one's worth is NaN."""
    V, U, worth, named = {}, {}, {}, {}
    for site, (v, u) in factors.items():
        effect = domain.effects(site, v, u)
        if not bool(effect.isfinite().all()):
            raise ValueError(
                f"what directions of {site} are worth is NaN: its V, U or W holds NaN or infinite numbers; load an "
                "earlier state of the decomposition"
            )
        order = effect.argsort(descending=True, stable=True)
        V[site], U[site], worth[site] = v[:, order], u[order], effect[order]
        if numbers is not None:
            named[site] = numbers[site][order]
    return Directions(V, U, worth, named)
