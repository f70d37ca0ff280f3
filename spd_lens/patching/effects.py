"""What an experiment on subcomponents measured: one number per unit and position, with labels.

`Effects` is what ablation and patching return. Nothing here runs a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens.core.units import Unit
from spd_lens.support.given import given_whole
from spd_lens.support.pages import table_html
from spd_lens.support.tables import format_table


@dataclass(frozen=True)
class Effect:
    """One line of a result: the unit, where it was changed (None: everywhere, or where the unit itself says), and what
    that did to the metric."""

    unit: Unit
    position: int | None
    effect: float
    standard_error: float | None

    @property
    def site(self) -> str:
        """The unit's (first) site."""
        return self.unit.site

    @property
    def id(self) -> int:
        """The (first) subcomponent's id."""
        return self.unit.id


@dataclass(frozen=True, repr=False)
class Effects:
    """What changing each unit did to a metric. `str(effects)` is a table of the largest.

    - `what`: the experiment, in words.
    - `units`, `positions`: the labels; positions None means that every unit was changed at all positions at once (or
      at those of its own), and the position axis has length 1.
    - `values` `[unit position example]`: the metric in each changed pass. A metric that returned a scalar gives one
      "example"; one that returned `[batch]` keeps its examples.
    - `baseline` `[example]`: the metric with nothing changed.
    - `clean_metric` `[example]`: the metric of the pass that was patched from, where that is known.
    """

    what: str
    units: tuple[Unit, ...]
    positions: tuple[int, ...] | None
    values: Float[Tensor, "unit position example"]
    baseline: Float[Tensor, " example"]
    clean_metric: Float[Tensor, " example"] | None = None

    @property
    def effects(self) -> Float[Tensor, "unit position"]:
        """`values - baseline`, mean over examples."""
        return (self.values - self.baseline).mean(-1)

    @property
    def recovered(self) -> Float[Tensor, "unit position"]:
        """`effects / (clean_metric - baseline)`, means over examples: 1 where a patch restores the whole metric.

        Raises ValueError if the metric of the clean run is unknown, or no different from the baseline.
        """
        if self.clean_metric is None:
            raise ValueError(
                f"{self.what}: the metric of the clean run is not known here; give clean tokens instead of a cache"
            )
        span = float((self.clean_metric - self.baseline).mean())
        if span == 0:
            raise ValueError(f"{self.what}: clean and corrupted runs have the same metric; nothing can be recovered")
        return self.effects / span

    @property
    def standard_error(self) -> Float[Tensor, "unit position"]:
        """Standard error of `effects` over examples.

        Raises ValueError with fewer than two examples: the metric has to return `[batch]`, one number per row.
        """
        n = self._n_examples("a standard error")
        return (self.values - self.baseline).std(-1, correction=1) / n**0.5

    def interval(
        self, confidence: float = 0.95
    ) -> tuple[Float[Tensor, "unit position"], Float[Tensor, "unit position"]]:
        """Lower and upper end of Student's t interval for the mean effect over examples.

        The examples are taken as independent draws. Raises ValueError with fewer than two of them.
        """
        from scipy.stats import t

        if not 0 < confidence < 1:
            raise ValueError(f"confidence={confidence}; expected a number between 0 and 1")
        n = self._n_examples("an interval")
        half = float(t.ppf((1 + confidence) / 2, n - 1)) * self.standard_error
        return self.effects - half, self.effects + half

    def _n_examples(self, wanted: str) -> int:
        n = self.values.shape[-1]
        if n < 2:
            raise ValueError(
                f"{wanted} needs at least two examples, and the metric gave {n}; return one number per row, [batch], "
                "instead of their mean"
            )
        return n

    def top(self, k: int = 10) -> list[Effect]:
        """The `k` largest effects by absolute value, largest first."""
        k = given_whole("k", k, least=1, of=" effect")
        flat = self.effects.flatten()
        errors = self.standard_error.flatten() if self.values.shape[-1] > 1 else None
        n_positions = self.values.shape[1]
        found = []
        for i in flat.abs().argsort(descending=True, stable=True)[:k].tolist():
            unit, position = divmod(i, n_positions)
            where = None if self.positions is None else self.positions[position]
            error = None if errors is None else float(errors[i])
            found.append(Effect(self.units[unit], where, float(flat[i]), error))
        return found

    def grid(self, site: str) -> Float[Tensor, "position C"]:
        """The effects of one site's single subcomponents as `[position C]`, for heat maps.

        Row i is `positions[i]`. NaN stands where a subcomponent was not measured; C ends at the largest id that was.
        Raises ValueError if no unit is a single subcomponent of `site`, and for units with positions of their own,
        which have no row here.
        """
        if own := [u for u in self.units if u.positions is not None]:
            raise ValueError(f"{own[0]} has positions of its own, and a grid has one row for all units; use .effects")
        rows = {u.members[0][1]: i for i, u in enumerate(self.units) if len(u.members) == 1 and u.sites == (site,)}
        if not rows:
            known = sorted({s for u in self.units for s in u.sites})
            raise ValueError(f"nothing was measured for single subcomponents of {site!r}; sites here: {known}")
        grid = torch.full((self.values.shape[1], max(rows) + 1), torch.nan, dtype=self.values.dtype)
        effects = self.effects
        for c, row in rows.items():
            grid[:, c] = effects[row]
        return grid

    def _table(self) -> tuple[str, list[str], list[list[str]]]:
        """Title, header and rows of the largest effects."""
        header = ["unit"] + ([] if self.positions is None else ["position"]) + ["effect"]
        has_error = self.values.shape[-1] > 1
        header += ["std. error"] if has_error else []
        rows = []
        for e in self.top(20):
            row = [str(e.unit)] + ([] if e.position is None else [str(e.position)]) + [f"{e.effect:+.4g}"]
            rows.append(row + ([f"{e.standard_error:.2g}"] if has_error else []))
        n_cells = self.values.shape[0] * self.values.shape[1]
        shown = f"{n_cells} effects" if n_cells <= 20 else f"the 20 largest of {n_cells} effects"
        title = f"{self.what}: {shown}; metric {float(self.baseline.mean()):.4g} before"
        if self.clean_metric is not None:
            title += f", {float(self.clean_metric.mean()):.4g} in the clean run"
        return title, header, rows

    def __str__(self) -> str:
        title, header, rows = self._table()
        return title + "\n" + format_table(header, rows)

    def __repr__(self) -> str:
        n_units, n_positions, n_examples = self.values.shape
        where = "everywhere" if self.positions is None else f"{n_positions} positions"
        return f"Effects({self.what!r}: {n_units} units, {where}, {n_examples} examples)"

    def _repr_html_(self) -> str:
        return table_html(*self._table())

    def to_transformer_lens(self) -> Any:
        """The same as TransformerLens 4's `PatchingResult`, with its bootstrap intervals and permutation tests.

        `values [row example]` are flat; `index_df` has the columns `unit`, `site`, `subcomponent` (for groups: all
        members, as text) and `position` (-1: everywhere; as text for a unit with several). Raises ValueError on
        TransformerLens 3, which has no such class.
        """
        try:
            from transformer_lens.patching import PatchingResult  # pyright: ignore[reportAttributeAccessIssue]
        except ImportError:
            raise ValueError(
                "the installed TransformerLens has no PatchingResult (new in 4.x); use .effects, .standard_error and "
                ".interval() here"
            ) from None
        import pandas as pd

        rows = []
        for i, unit in enumerate(self.units):
            site, c = unit.members[0]
            single = len(unit.members) == 1
            for position in (_place(unit),) if self.positions is None else self.positions:
                where = {"site": site if single else " + ".join(unit.sites), "subcomponent": c if single else str(unit)}
                rows.append({"unit": i, **where, "position": position})
        per_example = self.values.shape[-1] > 1
        flat = self.values.flatten(0, 1)
        return PatchingResult(
            values=flat if per_example else flat[:, 0],
            axis_names=[],
            index_df=pd.DataFrame(rows),
            metric_names=["metric"],
            reduced=not per_example,
            baseline=self.baseline if per_example else self.baseline[0],
        )


def _place(unit: Unit) -> int | str:
    """Where a unit was changed that no position of the experiment was given for; -1: everywhere."""
    if unit.positions is None:
        return -1
    return unit.positions[0] if len(unit.positions) == 1 else ", ".join(map(str, unit.positions))
