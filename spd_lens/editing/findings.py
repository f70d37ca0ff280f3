"""`Findings`: which units a habit hangs on, as `find` measured them, and the smallest edit that can be made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.units import Unit
from spd_lens.editing.edits import Edit, edit
from spd_lens.editing.habit import Habit
from spd_lens.patching.agreement import Agreement
from spd_lens.support.given import given_number, given_whole
from spd_lens.support.pages import table_html
from spd_lens.support.tables import format_table


@dataclass(frozen=True)
class MeasuredUnit:
    """One unit without which the habit was measured.

    - `drop`: by how much the log odds of the answers fall without it, mean over prompts; `standard_error` of that.
    - `cost`: mean KL from the target on the control text without it.
    - `estimate`: the drop that gradients predicted.
    - `score`: `drop / (cost + the median cost)`.
    """

    unit: Unit
    drop: float
    standard_error: float
    cost: float
    estimate: float
    score: float


@dataclass(frozen=True, repr=False)
class Findings:
    """What `find` measured, best first: large drops at small costs. `str(found)` is a table.

    `agreement` compares the estimates with exact ablations of a sample, half of them drawn at random.
    """

    decomposition: Decomposition
    habit: Habit
    candidates: tuple[MeasuredUnit, ...]
    agreement: Agreement | None
    n_units: int

    @property
    def units(self) -> list[Unit]:
        """The measured units, best first; those whose drop is not clear of its error are last."""
        return [candidate.unit for candidate in self.candidates]

    @property
    def clear(self) -> list[Unit]:
        """The units whose drop is positive by more than twice its standard error, best first."""
        return [c.unit for c in self.candidates if c.drop > 2 * c.standard_error]

    def smallest(self, effect: float, *, at_most: int = 64) -> Edit:
        """The smallest edit found that lowers the habit's probability on its prompts by the share `effect`.

        Units are taken in order until the effect is reached, then those that are not needed are given back, the
        costliest first, until none of what is left can be left out. Which set is smallest of all nobody knows without
        trying all. Raises ValueError if `at_most` units are not enough.
        """
        if given_number("effect", effect, above=0.0) >= 1:
            raise ValueError(f"effect={effect}; expected a share of the probability between 0 and 1, for example 0.9")
        ranked = self.clear[: given_whole("at_most", at_most, least=1)]
        if not ranked:
            raise ValueError(
                f"no unit lowers {self.habit.name!r} by more than twice its standard error: give more prompts, or "
                "measure more units (n_measured)"
            )
        before = float(self._probability([]))
        if before == 0:
            raise ValueError(f"the model gives {self.habit.name!r} no probability at all, so there is nothing to lower")

        def reached(units: Sequence[Unit]) -> float:
            return 1 - float(self._probability(units)) / before

        size = next((k for k in _sizes(len(ranked)) if reached(ranked[:k]) >= effect), None)
        if size is None:
            raise ValueError(
                f"without the {len(ranked)} best units the probability falls by {reached(ranked):.1%}, not by "
                f"{effect:.1%}: ask for less, measure more (n_measured), or give components as ids"
            )
        low = max((k for k in _sizes(len(ranked)) if k < size), default=0)
        while size - low > 1:
            middle = (low + size) // 2
            low, size = (low, middle) if reached(ranked[:middle]) >= effect else (middle, size)
        chosen = ranked[:size]
        costs = {candidate.unit: candidate.cost for candidate in self.candidates}
        n_before = len(chosen) + 1
        # Again after any was given back: without that one, another may not be needed any more.
        while len(chosen) < n_before:
            n_before = len(chosen)
            for unit in sorted(chosen, key=lambda u: -costs[u]):
                rest = [other for other in chosen if other is not unit]
                if rest and reached(rest) >= effect:
                    chosen = rest
        return edit(self.decomposition, chosen)

    def _probability(self, units: Sequence[Unit]) -> Tensor:
        if not units:
            return self.habit.probability(self.decomposition.host.forward).mean()
        return self.habit.probability(edit(self.decomposition, units).logits).mean()

    def _table(self) -> tuple[str, list[str], list[list[str]]]:
        header = ["without", "log odds fall by", "std. error", "KL on controls", "estimate"]
        rows = [
            [str(c.unit), f"{c.drop:.3f}", f"{c.standard_error:.2g}", f"{c.cost:.2g}", f"{c.estimate:.3f}"]
            for c in self.candidates[:20]
        ]
        title = (
            f"{self.habit.name}: {len(self.candidates)} of {self.n_units} units measured on {len(self.habit)} prompts"
        )
        return title, header, rows

    def _note(self) -> str:
        return "gradients were not compared" if self.agreement is None else f"gradients: {self.agreement}"

    def __str__(self) -> str:
        title, header, rows = self._table()
        return f"{title}\n{format_table(header, rows)}\n{self._note()}"

    def __repr__(self) -> str:
        return f"Findings({self.habit.name!r}: {len(self.candidates)} units measured)"

    def _repr_html_(self) -> str:
        return table_html(*self._table(), notes=[self._note()])


def _sizes(n: int) -> list[int]:
    """1, 2, 4 ... and n."""
    return sorted({2**k for k in range(n.bit_length()) if 2**k < n} | {n})
