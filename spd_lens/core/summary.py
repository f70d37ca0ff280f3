"""`Summary`: how far the subcomponents are from the weights, and how many of them are in use, by site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from spd_lens.core.decomposed_weight import DecomposedWeight
from spd_lens.core.subcomponents import relative_faithfulness, smallest_relative_error
from spd_lens.core.units import ALIVE_ABOVE
from spd_lens.support.pages import table_html
from spd_lens.support.tables import format_table


@dataclass(frozen=True)
class SiteSummary:
    """One site. `alive` and `l0` are of the batch that was given, or None without one.

    - `error`: `|W - V U|^2 / |W|^2`; `smallest_error`: the smallest that so many subcomponents allow.
    """

    name: str
    n_subcomponents: int
    rank_bound: int
    error: float
    smallest_error: float
    alive: int | None
    l0: float | None


@dataclass(frozen=True)
class Summary:
    """All sites, the numbers of target weights and of trained parameters; `print` it, or show it in a notebook."""

    sites: tuple[SiteSummary, ...]
    n_target_weights: int
    n_trained: int
    alive_above: float = ALIVE_ABOVE

    def _table(self) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
        title = (
            f"{len(self.sites)} sites, {self.n_target_weights:,} target weights, {self.n_trained:,} trained parameters"
        )
        above = f">{self.alive_above:g}"
        header = ("site", "C", "rank bound", f"alive{above}", f"L0{above}", "|W-VU|^2/|W|^2", "smallest possible")
        rows = [
            (
                site.name,
                str(site.n_subcomponents),
                str(site.rank_bound),
                "-" if site.alive is None else str(site.alive),
                "-" if site.l0 is None else f"{site.l0:.1f}",
                f"{site.error:.2e}",
                f"{site.smallest_error:.2e}",
            )
            for site in self.sites
        ]
        return title, header, rows

    def __str__(self) -> str:
        title, header, rows = self._table()
        return title + "\n" + format_table(header, rows)

    def __repr__(self) -> str:
        return f"Summary({self._table()[0]})"

    def _repr_html_(self) -> str:
        return table_html(*self._table())


def summarise(
    weights: Mapping[str, DecomposedWeight], importances: Mapping[str, Tensor] | None, n_trained: int
) -> Summary:
    """The summary of a decomposition, with what `importances [batch pos C]` say, if they are given."""
    sites = []
    for name, weight in weights.items():
        W = weight.target_weight.detach()
        alive = l0 = None
        if importances is not None:
            fires = importances[name].flatten(0, -2) > ALIVE_ABOVE
            alive, l0 = int(fires.any(0).sum()), float(fires.float().sum(-1).mean())
        sites.append(
            SiteSummary(
                name,
                weight.n_subcomponents,
                weight.rank_bound,
                float(relative_faithfulness(W, weight.V.detach(), weight.U.detach())),
                smallest_relative_error(W, weight.n_subcomponents),
                alive,
                l0,
            )
        )
    own = [weight for weight in weights.values() if weight.tied_to is None]
    return Summary(
        tuple(sites),
        sum(weight.target_weight.numel() for weight in own),
        n_trained,
    )
