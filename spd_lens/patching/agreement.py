"""How well predicted effects agree with measured ones, on a sample that was measured both ways."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens.support.given import given_instance, given_whole
from spd_lens.support.shown import short_repr, text_html


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Predicted and measured effects of a sample, one number each.

    The first `n_strongest` are those with the largest predictions, the others were drawn at random from the rest.
    Where a measurement left no finite number, `not_finite` counts it and the figures are of the others.
    """

    predicted: tuple[float, ...]
    measured: tuple[float, ...]
    n_strongest: int

    __repr__ = short_repr
    _repr_html_ = text_html

    @property
    def not_finite(self) -> int:
        """How many measurements left no finite number; the figures are of the others.

        It happens where a large part is removed while normalisation is frozen and much between is not decomposed.
        """
        return int((~np.isfinite(np.array(self.measured, dtype=float))).sum())

    def _finite(self, of: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        p, m = np.array(self.predicted[of], dtype=float), np.array(self.measured[of], dtype=float)
        finite = np.isfinite(m)
        return p[finite], m[finite]

    @property
    def correlation(self) -> float:
        """Pearson correlation of predicted and measured; NaN with fewer than two of them or a constant side."""
        return correlation(*self._finite())

    @property
    def same_sign(self) -> float:
        """Share of predictions with the sign of what was measured, of those that are not 0; NaN if there are none."""
        p, m = self._finite()
        return float((np.sign(p) == np.sign(m))[p != 0].mean()) if p.any() else float("nan")

    @property
    def slope(self) -> float:
        """`sum(measured * predicted) / sum(predicted^2)`: 1 where predictions have the right size."""
        p, m = self._finite()
        return float(p @ m / (p @ p)) if p.any() else float("nan")

    @property
    def max_error(self) -> float:
        """The largest `|measured - predicted|`."""
        p, m = self._finite()
        return float(np.abs(m - p).max()) if len(p) else float("nan")

    @property
    def relative_error(self) -> float:
        """`max_error` divided by the largest `|measured|`."""
        largest = float(np.abs(self._finite()[1]).max(initial=0.0))
        return self.max_error / largest if largest else float("nan")

    def __str__(self) -> str:
        n, k = len(self.measured), self.n_strongest
        text = f"correlation with exact patching {self.correlation:.3f} on {n} cells"
        if k > 2 and n - k > 2:
            strong, rest = (correlation(*self._finite(of)) for of in (slice(k), slice(k, None)))
            text += f" ({strong:.3f} on the {k} largest estimates, {rest:.3f} on {n - k} others at random)"
        return text


def sampled(strengths: Float[Tensor, ...], n: int, generator: torch.Generator | None) -> tuple[list[int], int]:
    """Flat numbers of `n` entries, and how many of them come first for being strongest: half; the rest at random.

    From seed 0 if no generator is given. Raises ValueError for n < 1.
    """
    n = given_whole("n_checked", n, least=1, of=": predictions carry their measured agreement with experiments (C2)")
    order = strengths.flatten().abs().argsort(descending=True, stable=True)
    n = min(n, len(order))
    strongest, rest = order[: (n + 1) // 2], order[(n + 1) // 2 :]
    if generator is not None:
        given_instance("generator", generator, torch.Generator, "torch.Generator().manual_seed(0)")
    generator = generator or torch.Generator().manual_seed(0)
    drawn = rest[torch.randperm(len(rest), generator=generator, device=generator.device).cpu()[: n - len(strongest)]]
    return [*strongest.tolist(), *drawn.tolist()], len(strongest)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation; NaN with fewer than two numbers or a constant side."""
    if len(a) < 2 or not np.ptp(a) or not np.ptp(b):
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])
