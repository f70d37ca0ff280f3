"""`Harvest`: what `harvest` found, of all sites; printed, saved, merged."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path

import torch

from spd_lens.core.decomposition import Decomposition
from spd_lens.statistics.browser import Contents, write_browser
from spd_lens.statistics.coactivations import CoActivation
from spd_lens.statistics.directions import SiteDirections
from spd_lens.statistics.firing_together import cofiring
from spd_lens.statistics.harvest_sums import HarvestSums
from spd_lens.statistics.labels import Labels, read_labels
from spd_lens.statistics.saved import MadeFrom, made_from, read_harvest, write_harvest
from spd_lens.statistics.site_harvest import SiteHarvest
from spd_lens.support.names import near_names
from spd_lens.support.tables import format_table


class Harvest(Mapping[str, SiteHarvest]):
    """What `harvest` found: a `SiteHarvest` for every site, by its name; printed, a table of all sites."""

    def __init__(
        self,
        sums: HarvestSums,
        made: MadeFrom,
        directions: Mapping[str, SiteDirections],
        token_strings: Mapping[int, str],
    ) -> None:
        self.sums, self.made_from = sums, made
        self.token_strings = dict(token_strings)
        self._sites = {
            name: SiteHarvest(
                site,
                n_positions=sums.n_positions,
                effect_positions=sums.effect_positions,
                input_totals=sums.input_totals,
                predicted_totals=sums.predicted_totals,
                directions=directions.get(name),
            )
            for name, site in sums.sites.items()
        }

    @property
    def threshold(self) -> float:
        """Importance above which a subcomponent fires."""
        return self.sums.settings.threshold

    @property
    def n_positions(self) -> int:
        """Positions that were counted."""
        return self.sums.n_positions

    def __getitem__(self, site: str) -> SiteHarvest:
        if site not in self._sites:
            raise KeyError(f"no harvested site {site!r}; near: {near_names(str(site), self._sites)}")
        return self._sites[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def token_string(self, token: int) -> str:
        """The token as text, or its number where the model has no tokenizer."""
        return self.token_strings.get(token, f"[{token}]")

    def coactivation(self) -> CoActivation:
        """Which subcomponents fire together, over all sites, at a random sample of the positions."""
        events = self.sums.events.tensors()
        fired = torch.cat([site.fired for site in self.values()])
        return CoActivation(
            sites=self.sums.counts,
            starts=events["starts"].numpy(),
            ids=events["ids"].numpy(),
            keys=events["keys"].numpy(),
            fired=fired.numpy(),
            n_seen=self.n_positions,
            max_events=self.sums.settings.n_events,
            threshold=self.threshold,
        )

    def check_of(self, decomposition: Decomposition) -> None:
        """ValueError, naming the first difference, unless this is the harvest of that decomposition."""
        self.made_from.check_same(made_from(decomposition), "the harvest")

    # -- files -----------------------------------------------------------------------------------------------------

    def save(self, directory: str | Path) -> Path:
        """Write `harvest.safetensors` and `harvest.json` to `directory`, which may be that of the decomposition.

        Raises OSError if the disk is full; what was there then still is.
        """
        directions = {name: site.directions for name, site in self.items() if site.directions is not None}
        return write_harvest(
            directory,
            self.sums,
            self.made_from,
            directions=directions,
            token_strings=self.token_strings,
            finished=True,
        )

    @staticmethod
    def load(directory: str | Path, decomposition: Decomposition | None = None) -> Harvest:
        """What `save` wrote, or `harvest(..., out_dir=...)`.

        Raises ValueError for damaged, foreign and newer files, for a harvest that was not finished, and, given a
        decomposition, for the harvest of another one.
        """
        saved = read_harvest(directory)
        assert saved is not None
        if not saved.finished:
            raise ValueError(
                f"the harvest in {directory} was interrupted after {saved.sums.n_batches} batches; call harvest(..., "
                f"out_dir={str(directory)!r}) with the same data to go on"
            )
        if decomposition is not None:
            saved.made.check_same(made_from(decomposition), f"the harvest in {directory}")
        return Harvest(saved.sums, saved.made, saved.directions, saved.token_strings)

    def merged(self, *others: Harvest) -> Harvest:
        """The harvest of all the data that this one and the others read, each part once.

        Counts, sums, and random examples are those of one pass over everything; so are the counts of tokens within
        `tokens_kept`, and top examples, except that a row that was cut differently counts as another row.

        Raises ValueError for harvests of other decompositions, with other settings, and for the same data twice.
        """
        every = (self, *others)
        for i, other in enumerate(others, start=1):
            self.made_from.check_same(other.made_from, f"harvest {i}")
            if other.sums.settings != self.sums.settings or other.sums.counts != self.sums.counts:
                raise ValueError(f"harvest {i} was made with other settings: {other.sums.settings}")
        seen: dict[str, int] = {}
        for i, found in enumerate(every):
            # A harvest that was merged before has several.
            for digest in found.sums.read.split("+"):
                if digest in seen:
                    raise ValueError(f"harvest {i} read the same data as harvest {seen[digest]}; give each once")
                seen[digest] = i
        sums = copy.deepcopy(self.sums)
        strings = dict(self.token_strings)
        for other in others:
            sums.merge(copy.deepcopy(other.sums))
            strings |= other.token_strings
        directions = {name: site.directions for name, site in self.items() if site.directions is not None}
        return Harvest(sums, replace(self.made_from), directions, strings)

    # -- pages -----------------------------------------------------------------------------------------------------

    def to_html(
        self,
        directory: str | Path,
        *,
        title: str = "Subcomponents",
        labels: Labels | str | Path | None = None,
        max_pages: int | None = None,
    ) -> Path:
        """Write a browser of all subcomponents to `directory` and return its `index.html`.

        Files that open from disk without a network: a list to sort, search, group and filter, and a page of at most
        50 KB for every subcomponent that fires (the `max_pages` most used). `labels` are `{site: {id: text}}`, or a
        file of them that the pages exported.

        Raises ValueError if `directory` has an `index.html` of something else, and for labels of what there is not.
        """
        return write_browser(directory, self.contents(labels), title=title, max_pages=max_pages)

    def contents(self, labels: Labels | str | Path | None = None) -> Contents:
        """What pages are made of, with these labels."""
        if isinstance(labels, (str, Path)):
            labels = read_labels(labels, decomposition_sha256=self.made_from.decomposition)
        return Contents(
            sites=self,
            token_string=self.token_string,
            threshold=self.threshold,
            n_positions=self.n_positions,
            decomposition_sha256=self.made_from.decomposition,
            labels=labels or {},
            cofires=cofiring(self.coactivation()) if self.sums.settings.n_events else None,
        )

    # -- printed ---------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        return f"Harvest({len(self)} sites, {self.n_positions:,} positions, fires above {self.threshold:g})"

    def __str__(self) -> str:
        return f"{self!r}\n{format_table(_HEADER, self._rows())}"

    def _repr_html_(self) -> str:
        def row(cells: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        body = "".join(row(cells, "td") for cells in self._rows())
        return f"<p>{escape(repr(self))}</p><table>{row(_HEADER, 'th')}{body}</table>"

    def _rows(self) -> list[tuple[str, ...]]:
        rows = []
        for name, found in self.items():
            rates = found.firing_rate
            used = ", ".join(f"{c} ({float(rates[c]):.1%})" for c in found.most_used(3))
            rows.append((name, str(len(rates)), str(int((rates > 0).sum())), f"{float(rates.sum()):.1f}", used or "-"))
        return rows


_HEADER = ("site", "C", "ever fires", "fires per position", "most used")
