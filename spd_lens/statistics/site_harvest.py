"""`SiteHarvest`: what was found about one site's subcomponents, to be read."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spd_lens.statistics.directions import SiteDirections
from spd_lens.statistics.reservoir import Reservoir
from spd_lens.statistics.sums import ACTIVATION_BINS, ACTIVATION_RANGE, IMPORTANCE_BINS, SiteSums
from spd_lens.statistics.token_counts import TokenCounts, TokenOrder, TokenStatistic
from spd_lens.support.shown import short_repr

ExampleKind: TypeAlias = Literal["top", "random", "stratified"]


@dataclass(frozen=True)
class Example:
    """One position where a subcomponent fires: the tokens around it, which of them it is, and how strongly.

    `importances` and `activations` are those of the subcomponent at all of `tokens`.
    """

    tokens: list[int]
    at: int
    importance: float
    activation: float
    importances: tuple[float, ...] = ()
    activations: tuple[float, ...] = ()

    __repr__ = short_repr


@dataclass(frozen=True)
class Histogram:
    """`counts[i]` positions between `edges[i]` and `edges[i + 1]`; what lies outside is in the first and last bin."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]

    __repr__ = short_repr


class SiteHarvest:
    """Statistics of one site's subcomponents.

    - `firing_rate` `[C]`: share of positions with importance above the threshold.
    - `mean_importance` `[C]` over all positions; `mean_activation` `[C]`: mean `|a|` where it fires;
      `signed_activation` `[C]`: mean `a` where it fires; `activation_rms` `[C]`: root of the mean `a^2` everywhere.
    - `effect` `[C]`: mean KL divergence, in nats per position, between the target and the model without the
      subcomponent; None where ablations were not measured (`harvest(..., effect_batches=...)`).
    - `n_positions`: positions seen.
    """

    def __init__(
        self,
        sums: SiteSums,
        *,
        n_positions: int,
        effect_positions: int,
        input_totals: Tensor,
        predicted_totals: Tensor,
        directions: SiteDirections | None,
    ) -> None:
        self._sums = sums
        self.n_positions = n_positions
        self._effect_positions = effect_positions
        self._totals = {"input": input_totals, "predicted": predicted_totals}
        self.directions = directions

    def __repr__(self) -> str:
        fired = int((self._sums.fired > 0).sum())
        return f"SiteHarvest({fired} of {len(self)} subcomponents fire, {self.n_positions:,} positions)"

    def __len__(self) -> int:
        return self._sums.n_subcomponents

    # -- numbers by subcomponent -----------------------------------------------------------------------------------

    @property
    def firing_rate(self) -> Float[Tensor, " C"]:
        """Share of positions where it fires."""
        return (self._sums.fired / max(1, self.n_positions)).float()

    @property
    def fired(self) -> Int[Tensor, " C"]:
        """Number of positions where it fires."""
        return self._sums.fired.clone()

    @property
    def mean_importance(self) -> Float[Tensor, " C"]:
        """Over all positions."""
        return (self._sums.importance / max(1, self.n_positions)).float()

    @property
    def mean_activation(self) -> Float[Tensor, " C"]:
        """Mean `|a|` where it fires."""
        return (self._sums.activation / self._sums.fired.clamp_min(1)).float()

    @property
    def signed_activation(self) -> Float[Tensor, " C"]:
        """Mean `a` where it fires."""
        return (self._sums.signed_activation / self._sums.fired.clamp_min(1)).float()

    @property
    def activation_rms(self) -> Float[Tensor, " C"]:
        """Root mean square of `a` over all positions."""
        return (self._sums.square / max(1, self.n_positions)).sqrt().float()

    @property
    def effect(self) -> Float[Tensor, " C"] | None:
        """Mean KL in nats when it is ablated, or None where that was not measured."""
        return None if not self._effect_positions else (self._sums.effect / self._effect_positions).float()

    def most_used(self, n: int, *, below: float = 1.0) -> list[int]:
        """Ids of the subcomponents with the highest firing rate that is at most `below`, most frequent first."""
        rates = torch.where(self.firing_rate <= below, self.firing_rate, -1.0)
        order = rates.argsort(descending=True, stable=True)[:n]
        return [int(c) for c in order if rates[c] > 0]

    # -- about one subcomponent --------------------------------------------------------------------------------------

    def examples(self, c: int, kind: ExampleKind = "top") -> list[Example]:
        """Positions where subcomponent `c` fires, with their contexts.

        `top`: the largest `importance * |activation|`, at most one of a row, strongest first. `random`: drawn from all.
        `stratified`: drawn from equal ranges of importance, the highest range first.
        """
        self._checked(c)
        settings = self._sums.settings
        match kind:
            case "top":
                return _windows(self._sums.top, [c])
            case "random":
                return _windows(self._sums.random, [c])
            case "stratified":
                groups = [c * settings.bands + band for band in reversed(range(settings.bands))]
                return _windows(self._sums.banded, groups)
        raise ValueError(f"kind={kind!r}; expected 'top', 'random' or 'stratified'")

    def input_tokens(
        self, c: int, n: int | None = 10, *, by: TokenOrder = "precision", least: int = 1
    ) -> list[TokenStatistic]:
        """The tokens at the positions where `c` fires, with at least `least` occurrences there; `n=None`: all known."""
        return self._tokens("input", self._sums.inputs, c, n, by, least)

    def predicted_tokens(
        self, c: int, n: int | None = 10, *, by: TokenOrder = "precision", least: int = 1
    ) -> list[TokenStatistic]:
        """The target's likeliest next tokens at the positions where `c` fires, as `input_tokens`."""
        return self._tokens("predicted", self._sums.predicted, c, n, by, least)

    def _tokens(
        self, which: str, table: TokenCounts, c: int, n: int | None, by: TokenOrder, least: int
    ) -> list[TokenStatistic]:
        self._checked(c)
        if by not in ("precision", "recall", "pmi"):
            raise ValueError(f"by={by!r}; expected 'precision', 'recall' or 'pmi'")
        found = int(self._sums.fired[c])
        totals = self._totals[which]
        return table.statistics(c, n_group=found, totals=totals, n_positions=self.n_positions, by=by, n=n, least=least)

    def undercounted(self, c: int) -> int:
        """By how much the counts of input tokens of `c` may be too small; 0: they are exact."""
        self._checked(c)
        return int(self._sums.inputs.lost[c])

    def top_token(self) -> Int[Tensor, " C"]:
        """The token on which each fires most often, -1 where it never fires."""
        return self._sums.inputs.most_frequent()

    def importance_histogram(self, c: int) -> Histogram:
        """Importances at the positions where `c` fires."""
        self._checked(c)
        edges = tuple(i / IMPORTANCE_BINS for i in range(IMPORTANCE_BINS + 1))
        return Histogram(edges, tuple(self._sums.importance_histogram[c].tolist()))

    def activation_histogram(self, c: int) -> Histogram:
        """Activations at the positions where `c` fires; bins are half an octave wide on either side of 0."""
        self._checked(c)
        low, high = ACTIVATION_RANGE
        size = [2 ** (low + (high - low) * i / ACTIVATION_BINS) for i in range(1, ACTIVATION_BINS + 1)]
        edges = (*(-s for s in reversed(size)), 0.0, *size)
        return Histogram(edges, tuple(self._sums.activation_histogram[c].tolist()))

    def _checked(self, c: int) -> None:
        count = len(self)
        if isinstance(c, bool) or not isinstance(c, Integral) or not 0 <= c < count:
            raise ValueError(f"c={c!r}; expected the id of a subcomponent, in 0..{count - 1}")

    @property
    def sums(self) -> SiteSums:
        """What was counted."""
        return self._sums


def _windows(reservoir: Reservoir, groups: list[int]) -> list[Example]:
    found = []
    for group in groups:
        for k in range(reservoir.k):
            if reservoir.keys[group, k] == -torch.inf:
                continue
            window = reservoir.tokens[group, k].tolist()
            kept = [i for i, token in enumerate(window) if token >= 0]
            g, a = (values[group, k].tolist() for values in (reservoir.importances, reservoir.activations))
            found.append(
                Example(
                    tokens=[window[i] for i in kept],
                    at=sum(1 for i in kept if i < reservoir.before),
                    importance=g[reservoir.before],
                    activation=a[reservoir.before],
                    importances=tuple(g[i] for i in kept),
                    activations=tuple(a[i] for i in kept),
                )
            )
    return found
