"""What `evaluate` says of one site, and the failure modes that the numbers of sites show (E6)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spd_lens.core.decomposed_weight import DecomposedWeight
from spd_lens.core.subcomponents import relative_faithfulness, smallest_relative_error
from spd_lens.core.units import ALIVE_ABOVE

# Importances above which L0 is counted; the second is the one above which a subcomponent is alive.
THRESHOLDS = (0.0, 0.01, 0.1, 0.5)


@dataclass(frozen=True)
class SiteReport:
    """One site: its C and rank bound, the relative faithfulness error and the smallest that C allows, mean L0 per
    position at each threshold, and how many subcomponents are alive (importance above 0.01 anywhere in the data)."""

    n_subcomponents: int
    rank_bound: int
    relative_faithfulness: float
    smallest_possible: float
    l0: dict[float, float]
    alive: int


class ImportanceSums:
    """L0 and aliveness of one site, summed over batches."""

    def __init__(self, n_subcomponents: int, device: torch.device) -> None:
        self.above = torch.zeros(len(THRESHOLDS), dtype=torch.float64, device=device)
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.largest = torch.zeros(n_subcomponents, device=device)

    def add(self, g: Float[Tensor, "*batch C"], counted: Bool[Tensor, "*batch"]) -> None:
        """One batch; a head axis of `g` counts as positions of its own."""
        if len(g) != len(counted):  # one row for all texts
            counted = counted.any(0, keepdim=True)
        where = counted.reshape(*counted.shape, *([1] * (g.ndim - 1 - counted.ndim))).expand(g.shape[:-1])
        g = g.masked_fill(~where.unsqueeze(-1), -1.0)
        self.above += torch.stack([(g > threshold).sum() for threshold in THRESHOLDS])
        self.count += where.sum()
        self.largest = torch.maximum(self.largest, g.flatten(0, -2).amax(0).to(self.largest.dtype))

    @property
    def alive(self) -> Bool[Tensor, " _"]:
        """Which subcomponents have an importance above 0.01 at some position that counts."""
        return self.largest > ALIVE_ABOVE

    def report(self, weight: DecomposedWeight) -> SiteReport:
        per_threshold = (self.above / self.count.clamp_min(1)).tolist()
        W = weight.target_weight
        return SiteReport(
            n_subcomponents=weight.n_subcomponents,
            rank_bound=weight.rank_bound,
            relative_faithfulness=float(relative_faithfulness(W, weight.V, weight.U)),
            smallest_possible=smallest_relative_error(W, weight.n_subcomponents),
            l0=dict(zip(THRESHOLDS, per_threshold, strict=True)),
            alive=int(self.alive.sum()),
        )


def failure_modes(sites: Mapping[str, SiteReport], values: Mapping[str, float]) -> list[str]:
    """Known ways in which a decomposition can be empty while some numbers look good (E6), in words."""
    found = []
    for name, site in sites.items():
        if site.relative_faithfulness > 0.05 and site.relative_faithfulness > 1.5 * site.smallest_possible:
            found.append(f"{name}: {site.relative_faithfulness:.0%} of the weight is unexplained; the delta carries it")
        if site.l0[0.1] == 0:
            found.append(f"{name}: no subcomponent is important anywhere; the minimality coefficient is too high")
        if site.l0[0.1] > 0.9 * site.rank_bound:
            found.append(
                f"{name}: about as many subcomponents are on at every position ({site.l0[0.1]:.0f}) as the matrix has "
                "rank; nothing is separated yet (minimality too low, or too few steps)"
            )
    if values["stochastic"] > 0.5 * values["all off"] and values["all off"] > 0:
        found.append(
            "under stochastic masks more than half of the effect of removing everything remains: too few steps, or "
            "importance below 1 on what is needed (minimality too high)"
        )
    return found
