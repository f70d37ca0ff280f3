"""Means over positions with bootstrap intervals over texts (E10).

Positions of one text belong together, so texts are drawn again, not positions. The mean is a ratio of sums: what all
positions of the drawn texts add up to, over their number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

RESAMPLES = 1000
COVERAGE = 0.95
_BLOCK = 2**22

Interval = tuple[float, float]


class Tally:
    """Sums and counts per text of several quantities in several mask regimes.

    `whole` makes all rows of a batch from those that this process has.
    """

    def __init__(self, whole: Callable[[Tensor], Tensor] = lambda rows: rows) -> None:
        self._whole = whole
        self._sums: dict[tuple[str, str], list[Tensor]] = {}
        self._counts: dict[tuple[str, str], list[Tensor]] = {}

    def add(self, quantity: str, regime: str, values: Tensor, counted: Tensor) -> None:
        """One batch: `values` and `counted` are `[row ...]`; what is not counted does not enter."""
        values = values.masked_fill(~counted, 0.0)
        self._sums.setdefault((quantity, regime), []).append(self._whole(_per_row(values)))
        self._counts.setdefault((quantity, regime), []).append(self._whole(_per_row(counted)))

    def texts(self) -> dict[str, dict[str, PerText]]:
        """What was added: by quantity and regime, sums and counts of every text."""
        found: dict[str, dict[str, PerText]] = {}
        for (quantity, regime), sums in self._sums.items():
            # One transfer for all batches.
            total, count = torch.cat(sums).cpu().tolist(), torch.cat(self._counts[quantity, regime]).cpu().tolist()
            found.setdefault(quantity, {})[regime] = (total, count)
        return found


PerText = tuple[list[float], list[float]]


def _per_row(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1).double().sum(1)


def mean_per_position(texts: PerText) -> float | None:
    """Mean over all counted positions; None where none counts."""
    total, count = sum(texts[0]), sum(texts[1])
    return total / count if count else None


def bootstrap_intervals(several: Sequence[PerText], seed: int = 0, resamples: int = RESAMPLES) -> list[Interval | None]:
    """The middle 95 % of each mean when texts are drawn again with replacement; None for fewer than two texts.

    The same texts are drawn for all, so that the intervals of two regimes move together.
    """
    found: list[Interval | None] = []
    draws: dict[int, np.ndarray] = {}
    for sums, counts in several:
        n = len(sums)
        if n < 2 or sum(1 for c in counts if c) < 2:
            found.append(None)
            continue
        if n not in draws:
            draws[n] = _drawn_counts(n, seed, resamples)
        with np.errstate(invalid="ignore"):
            means = (draws[n] @ np.asarray(sums)) / (draws[n] @ np.asarray(counts, dtype=np.float64))
        means = means[~np.isnan(means)]
        outside = (1 - COVERAGE) / 2
        low, high = np.quantile(means, [outside, 1 - outside])
        found.append((float(low), float(high)))
    return found


def _drawn_counts(n: int, seed: int, resamples: int) -> np.ndarray:
    """How often each of n texts is drawn, `[resamples n]`; with very many texts fewer resamples say the same."""
    resamples = max(100, min(resamples, 10 * _BLOCK // n))
    generator = np.random.default_rng(seed)
    drawn = np.zeros((resamples, n), dtype=np.float64)
    for row in drawn:
        row += np.bincount(generator.integers(n, size=n), minlength=n)
    return drawn
