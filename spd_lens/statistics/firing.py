"""Statistics of subcomponents over a data set: how often each fires, how strongly, and where most.

Streamed: memory is `sites x C x top_k x context` tokens whatever the size of the data. Cost: one clean pass and the
gates per batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.inputs import checked_decomposition
from spd_lens.core.squashings import importance_of
from spd_lens.data.streams import first_batches
from spd_lens.support.names import near_names
from spd_lens.support.progress import tqdm
from spd_lens.support.tables import format_table


@dataclass(frozen=True)
class Example:
    """One position where a subcomponent fires: the tokens around it, which of them fired, and how strongly."""

    tokens: list[int]
    at: int
    importance: float
    activation: float


@dataclass(frozen=True)
class SiteHarvest:
    """Statistics of one site's subcomponents.

    - `firing_rate` `[C]`: share of positions with importance above the threshold.
    - `mean_importance` `[C]`; `mean_activation` `[C]`: mean `|a|` over the positions where it fires.
    - `n_positions`: positions seen.
    """

    firing_rate: Float[Tensor, " C"]
    mean_importance: Float[Tensor, " C"]
    mean_activation: Float[Tensor, " C"]
    n_positions: int
    _windows: Int[Tensor, "C k window"]
    _scores: Float[Tensor, "C k"]
    _importances: Float[Tensor, "C k"]
    _activations: Float[Tensor, "C k"]
    _before: int

    def __repr__(self) -> str:
        fired = int((self.firing_rate > 0).sum())
        return f"SiteHarvest({fired} of {len(self.firing_rate)} subcomponents fire, {self.n_positions:,} positions)"

    def most_used(self, n: int, *, below: float = 1.0) -> list[int]:
        """Ids of the subcomponents with the highest firing rate that is at most `below`, most frequent first."""
        rates = torch.where(self.firing_rate <= below, self.firing_rate, -1.0)
        order = rates.argsort(descending=True, stable=True)[:n]
        return [int(c) for c in order if rates[c] > 0]

    def examples(self, c: int) -> list[Example]:
        """The positions where subcomponent `c` had the largest `importance * |activation|`, strongest first."""
        count = len(self.firing_rate)
        if isinstance(c, bool) or not isinstance(c, Integral) or not 0 <= c < count:
            raise ValueError(f"c={c!r}; expected the id of a subcomponent, in 0..{count - 1}")
        found = []
        for k in range(self._scores.shape[1]):
            if self._scores[c, k] <= 0:
                continue
            window = self._windows[c, k].tolist()
            lead = sum(1 for token in window[: self._before] if token < 0)
            found.append(
                Example(
                    tokens=[token for token in window if token >= 0],
                    at=self._before - lead,
                    importance=float(self._importances[c, k]),
                    activation=float(self._activations[c, k]),
                )
            )
        return found


class Harvest(Mapping[str, SiteHarvest]):
    """What `harvest` found: a `SiteHarvest` for every site, by its name; printed, a table of all sites."""

    def __init__(self, sites: Mapping[str, SiteHarvest], threshold: float) -> None:
        self._sites = dict(sites)
        self.threshold = threshold

    def __getitem__(self, site: str) -> SiteHarvest:
        if site not in self._sites:
            raise KeyError(f"no harvested site {site!r}; near: {near_names(str(site), self._sites)}")
        return self._sites[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def __repr__(self) -> str:
        positions = next((found.n_positions for found in self.values()), 0)
        return f"Harvest({len(self)} sites, {positions:,} positions, fires above {self.threshold:g})"

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


@torch.no_grad()
def harvest(
    decomposition: Decomposition,
    batches: Any,
    *,
    max_batches: int = 64,
    top_k: int = 8,
    before: int = 10,
    after: int = 4,
    threshold: float = 0.1,
) -> Harvest:
    """Firing rates and top examples (with `before` and `after` tokens of context) of every subcomponent, by site.

    A subcomponent fires where its importance exceeds `threshold`; examples are ranked by importance times
    `|activation|`, at most one per sequence and batch. Needs batches with tokens.
    """
    checked_decomposition(decomposition, "harvest")
    for name, number, least in (("top_k", top_k, 1), ("before", before, 0), ("after", after, 0)):
        if isinstance(number, bool) or not isinstance(number, Integral) or number < least:
            raise ValueError(f"{name}={number!r}; expected a whole number, at least {least}")
    source = first_batches(batches, decomposition, max_batches, purpose="harvest")
    collectors = {
        name: _Collector(weight.n_subcomponents, top_k, before, after) for name, weight in decomposition.items()
    }
    for batch in tqdm(source, desc="harvest", leave=False):
        if batch.tokens is None:
            raise ValueError("harvest needs tokens beside the inputs: give Batch(inputs, tokens=...)")
        batch = batch.to(decomposition.device)
        assert batch.tokens is not None
        clean = decomposition.clean_pass(batch.inputs, start_at=batch.start_at, attention_mask=batch.attention_mask)
        inputs = clean.inputs
        pre = decomposition.pre_importances(inputs)
        for name, collector in collectors.items():
            g, a = importance_of(pre[name]), decomposition[name].activations(inputs[name])
            if g.ndim == 4:  # a head axis: the strongest head speaks for the position
                a, g = a.abs().amax(2), g.amax(2)
            if batch.position_mask is not None:
                g = g * batch.position_mask.unsqueeze(-1)
            collector.add(g, a, batch.tokens, batch.position_mask, threshold)
    return Harvest({name: collector.finish() for name, collector in collectors.items()}, threshold)


class _Collector:
    """Running statistics and top examples of one site, on the CPU."""

    def __init__(self, n_subcomponents: int, top_k: int, before: int, after: int) -> None:
        C, window = n_subcomponents, before + 1 + after
        self.before, self.after, self.top_k = before, after, top_k
        self.fired, self.importance, self.activation = torch.zeros(C), torch.zeros(C), torch.zeros(C)
        self.positions = 0
        self.scores = torch.zeros(C, top_k)
        self.importances, self.activations = torch.zeros(C, top_k), torch.zeros(C, top_k)
        self.windows = torch.full((C, top_k, window), -1)

    def add(self, g: Tensor, a: Tensor, tokens: Tensor, position_mask: Tensor | None, threshold: float) -> None:
        fires = g > threshold
        self.fired += fires.sum((0, 1)).cpu()
        self.importance += g.sum((0, 1)).cpu()
        self.activation += (a.abs() * fires).sum((0, 1)).cpu()
        self.positions += g.shape[0] * g.shape[1] if position_mask is None else int(position_mask.sum())

        score, position = (g * a.abs() * fires).max(dim=1)  # [batch C]: the best position of every sequence
        rows = torch.arange(len(g), device=g.device)[:, None].expand_as(position)
        columns = torch.arange(g.shape[2], device=g.device).expand_as(position)
        best_g, best_a = g[rows, position, columns], a[rows, position, columns]
        self._merge(score.T.cpu(), best_g.T.cpu(), best_a.T.cpu(), self._windows(tokens, position).cpu())

    def _windows(self, tokens: Tensor, position: Tensor) -> Int[Tensor, "C batch window"]:
        length = tokens.shape[1]
        offsets = torch.arange(-self.before, self.after + 1, device=tokens.device)
        index = position.T[..., None] + offsets
        rows = torch.arange(len(tokens), device=tokens.device)[None, :, None]
        inside = (index >= 0) & (index < length)
        return torch.where(inside, tokens[rows, index.clamp(0, length - 1)], -1)

    def _merge(self, score: Tensor, importance: Tensor, activation: Tensor, windows: Tensor) -> None:
        scores = torch.cat([self.scores, score], dim=1)
        self.scores, keep = scores.topk(self.top_k, dim=1)
        self.importances = torch.cat([self.importances, importance], dim=1).gather(1, keep)
        self.activations = torch.cat([self.activations, activation], dim=1).gather(1, keep)
        together = torch.cat([self.windows, windows], dim=1)
        self.windows = together.gather(1, keep[..., None].expand(-1, -1, together.shape[2]))

    def finish(self) -> SiteHarvest:
        return SiteHarvest(
            firing_rate=self.fired / max(1, self.positions),
            mean_importance=self.importance / max(1, self.positions),
            mean_activation=self.activation / self.fired.clamp_min(1),
            n_positions=self.positions,
            _windows=self.windows,
            _scores=self.scores,
            _importances=self.importances,
            _activations=self.activations,
            _before=self.before,
        )
