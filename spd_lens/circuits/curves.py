"""Faithfulness against circuit size for any ranking of parts.

For a ranking of n parts, `f(k)` is the faithfulness with the k first ones live and all others left out
(`Parts.faithfulness`). Over the fraction `x = k / n`, with straight lines between measured sizes,

    CPR = integral of f(x) over x from 0 to 1          (higher is better; above 1 where circuits overshoot)
    CMD = integral of |1 - f(x)| over x from 0 to 1    (lower is better; 0: every size behaves as the whole model)

by the trapezoidal rule, as in the circuit track of the Mechanistic Interpretability Benchmark (MIB; Mueller et al.
2025), from which the default fractions are; here size 0 is measured too, and |1 - f| only at the measured sizes. Both
depend on the parts: a fraction of 8 heads is not one of 200 subcomponents, so compare sizes in parameters as well.

Left-out parts hold the corrupted prompt's values, or 0; neither is an adversary (see `spd_lens.circuits.check`).

Cost: one pass over the clean prompts per size, from the first decomposed block on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from scipy.integrate import trapezoid
from torch import Tensor

from spd_lens.circuits.parts import Parts
from spd_lens.support.given import given_instance, given_list, given_whole, shown
from spd_lens.support.pages import table_html
from spd_lens.support.tables import format_table

FRACTIONS = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


# With so few parts every size is measured.
_ALL_SIZES = 32


@dataclass(frozen=True, repr=False)
class FaithfulnessCurve:
    """Faithfulness at each of `sizes` (numbers of parts); `parameters` are the numbers in the weights of those parts.

    `ranking` are all parts' numbers, the first to be kept first; `n_parts` how many there are.
    """

    what: str
    sizes: tuple[int, ...]
    faithfulness: tuple[float, ...]
    parameters: tuple[int, ...]
    ranking: tuple[int, ...]
    n_parts: int

    @property
    def cpr(self) -> float:
        """Area under the curve over the fraction of parts (see the module)."""
        return self._area(self.faithfulness)

    @property
    def cmd(self) -> float:
        """Area of the distance to 1 over the fraction of parts (see the module)."""
        return self._area([abs(1 - f) for f in self.faithfulness])

    def _area(self, heights: Sequence[float]) -> float:
        x = [size / self.n_parts for size in self.sizes]
        return float(trapezoid(heights, x))

    def to_json(self) -> dict[str, Any]:
        """Plain values, without the ranking."""
        values = {k: v for k, v in vars(self).items() if k != "ranking"}
        return values | {"cpr": self.cpr, "cmd": self.cmd}

    def _table(self) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
        rows = [
            (f"{size:,}", f"{size / self.n_parts:.3f}", f"{parameters:,}", f"{f:.3f}")
            for size, parameters, f in zip(self.sizes, self.parameters, self.faithfulness, strict=True)
        ]
        return self.what, ("parts", "fraction", "parameters", "faithfulness"), rows

    def _areas(self) -> str:
        return f"CPR {self.cpr:.4f}, CMD {self.cmd:.4f}"

    def __str__(self) -> str:
        title, header, rows = self._table()
        return f"{title}\n{format_table(header, rows)}\n{self._areas()}"

    def __repr__(self) -> str:
        return f"FaithfulnessCurve({self.what}: {len(self.sizes)} sizes of {self.n_parts} parts, {self._areas()})"

    def _repr_html_(self) -> str:
        return table_html(*self._table(), notes=[self._areas()])


@torch.inference_mode(False)
def faithfulness_curve(
    parts: Parts,
    scores: Float[Tensor, " part"] | Mapping[str, float] | None = None,
    *,
    sizes: Sequence[int] | None = None,
) -> FaithfulnessCurve:
    """`f(k)` for the parts in order of falling scores (see the module for f, CPR and CMD).

    `scores`: one number per part, by number or by label (unnamed parts come last); None: `parts.scores()`, attribution.
    `sizes`: numbers of parts; None: every size up to 32 parts, beyond that the fractions of `FRACTIONS`. 0 and all
    are always measured. Raises ValueError for scores of another length, NaN, unknown labels and sizes out of range.
    """
    ranking = ranked(parts, scores)
    n = len(parts)
    if sizes is None:
        sizes = range(n + 1) if n <= _ALL_SIZES else [round(fraction * n) for fraction in FRACTIONS]
    sizes = [given_whole("a size", size) for size in given_list("sizes", sizes, "numbers of parts")]
    chosen = sorted({0, n, *sizes})
    if chosen[0] < 0 or chosen[-1] > n:
        raise ValueError(f"sizes {list(sizes)}: expected numbers of parts between 0 and {n}")
    found = [faithfulness_of_first(parts, ranking, size) for size in chosen]
    parameters = [sum(parts.parameters[i] for i in ranking[:size]) for size in chosen]
    return FaithfulnessCurve(parts.what, tuple(chosen), tuple(found), tuple(parameters), tuple(ranking), n)


def ranked(parts: Parts, scores: Float[Tensor, " part"] | Mapping[str, float] | None) -> list[int]:
    """The parts' numbers by falling score; equal ones in their own order."""
    given_instance("parts", parts, Parts, "SubcomponentParts(decomposition, task), for example")
    if scores is None:
        scores = parts.scores()
    if isinstance(scores, Mapping):
        by_label = torch.full((len(parts),), -torch.inf)
        for label, score in scores.items():
            by_label[parts.index(label)] = float(score)
        scores = by_label
    if not isinstance(scores, Tensor) or scores.shape != (len(parts),) or bool(scores.isnan().any()):
        raise ValueError(f"scores={shown(scores)}; expected a tensor ({len(parts)},), one per part, and no NaN")
    return scores.argsort(descending=True, stable=True).tolist()


def faithfulness_of_first(parts: Parts, ranking: Sequence[int], size: int) -> float:
    """Faithfulness with the first `size` parts of the ranking live."""
    kept = torch.zeros(len(parts), dtype=torch.bool)
    kept[list(ranking[:size])] = True
    return parts.faithfulness(kept)


def smallest_size(parts: Parts, ranking: Sequence[int], level: float) -> tuple[int, float]:
    """The size at which the ranking first reaches `level`, found by doubling and bisection, and the faithfulness there.

    Faithfulness need not rise with size: between the sizes that were tried, smaller ones may reach the level too.
    """
    n, low, high = len(parts), 0, 1
    reached = faithfulness_of_first(parts, ranking, 0)
    if reached >= level:
        return 0, reached
    while (reached := faithfulness_of_first(parts, ranking, high)) < level:
        if high == n:
            raise ValueError(f"no size tried reaches faithfulness {level}: with all {n} parts live it is {reached:.4g}")
        low, high = high, min(2 * high, n)
    return between(parts, ranking, level, low, high, reached)


def between(
    parts: Parts, ranking: Sequence[int], level: float, low: int, high: int, reached: float
) -> tuple[int, float]:
    """Bisection: `high` reaches the level, with the faithfulness `reached`, and `low` does not."""
    while high - low > 1:
        middle = (low + high) // 2
        value = faithfulness_of_first(parts, ranking, middle)
        if value >= level:
            high, reached = middle, value
        else:
            low = middle
    return high, reached
