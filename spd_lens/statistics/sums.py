"""`SiteSums`: everything that a harvest counts of one site, added to batch by batch and mergeable.

Sums are kept in float64 and counts as integers, so that shards can be added in any order. Memory does not depend on
the size of the data; `bytes()` says what it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spd_lens.statistics.reservoir import Reservoir, SeenBatch, random_keys
from spd_lens.statistics.token_counts import TokenCounts

# Bins of the histograms: of importance in (0, 1]; of log2 |activation|, half an octave each, for either sign.
IMPORTANCE_BINS = 20
ACTIVATION_RANGE = (-14.0, 10.0)
ACTIVATION_BINS = 48

# Positions of a batch that are looked at together hold at most so many (position, subcomponent) pairs.
_ENTRIES = 2**22


@dataclass(frozen=True)
class HarvestSettings:
    """What a harvest counts and keeps.

    - `threshold`: importance above which a subcomponent fires.
    - `top_k`, `random_k`: examples of each subcomponent by strength, and drawn at random among all where it fires.
    - `bands`, `per_band`: random examples from each of `bands` equal ranges of importance above the threshold.
    - `before`, `after`: tokens of context. `tokens_kept`: different tokens counted for each subcomponent.
    - `n_background`: random windows of the data, with what fires in them. `n_events`: random positions, with all that
      fires there (what fires together). `seed`: of the random examples.
    """

    threshold: float = 0.1
    top_k: int = 8
    random_k: int = 8
    bands: int = 4
    per_band: int = 2
    before: int = 10
    after: int = 4
    tokens_kept: int = 256
    n_background: int = 64
    n_events: int = 8192
    seed: int = 0


@dataclass(frozen=True)
class Positions:
    """One batch as the sums see it: `counted` positions are those that count, `predicted` the model's likeliest token.

    `hashes` is a number for each row, from its tokens.
    """

    tokens: Int[Tensor, "batch pos"]
    predicted: Int[Tensor, "batch pos"] | None
    counted: Bool[Tensor, "batch pos"] | None
    hashes: Int[Tensor, " batch"]


@dataclass(eq=False)
class SiteSums:
    """Sums of one site over what was added so far; `salt` tells the random draws of different sites apart."""

    n_subcomponents: int
    d_vocab: int
    settings: HarvestSettings
    salt: int
    fired: Int[Tensor, " C"] = field(init=False)
    importance: Float[Tensor, " C"] = field(init=False)
    activation: Float[Tensor, " C"] = field(init=False)
    signed_activation: Float[Tensor, " C"] = field(init=False)
    square: Float[Tensor, " C"] = field(init=False)
    effect: Float[Tensor, " C"] = field(init=False)
    importance_histogram: Int[Tensor, "C bins"] = field(init=False)
    activation_histogram: Int[Tensor, "C sign_bins"] = field(init=False)

    def __post_init__(self) -> None:
        C, settings = self.n_subcomponents, self.settings
        self.fired = torch.zeros(C, dtype=torch.int64)
        for name in ("importance", "activation", "signed_activation", "square", "effect"):
            setattr(self, name, torch.zeros(C, dtype=torch.float64))
        self.importance_histogram = torch.zeros(C, IMPORTANCE_BINS, dtype=torch.int64)
        self.activation_histogram = torch.zeros(C, 2 * ACTIVATION_BINS, dtype=torch.int64)
        self.inputs = TokenCounts(C, self.d_vocab, settings.tokens_kept)
        self.predicted = TokenCounts(C, self.d_vocab, settings.tokens_kept)
        around = {"before": settings.before, "after": settings.after}
        self.top = Reservoir(C, settings.top_k, **around)
        self.random = Reservoir(C, settings.random_k, **around)
        self.banded = Reservoir(C * settings.bands, settings.per_band, **around)

    # -- adding ------------------------------------------------------------------------------------------------

    def add(self, g: Float[Tensor, "batch pos C"], a: Float[Tensor, "batch pos C"], positions: Positions) -> None:
        """Importances and activations of one batch; where a position does not count, `g` is 0."""
        rows = max(1, _ENTRIES // max(1, g.shape[1] * g.shape[2]))
        for start in range(0, len(g), rows):
            part = slice(start, start + rows)
            self._add(g[part], a[part], positions, start)

    def _add(self, g: Tensor, a: Tensor, positions: Positions, start: int) -> None:
        counted = None if positions.counted is None else positions.counted[start : start + len(g)]
        fires = g > self.settings.threshold
        # Chosen, not multiplied: where a position does not count, `a` may be NaN.
        where_it_fires = torch.where(fires, a, 0.0)
        own = a if counted is None else a.masked_fill(~counted.unsqueeze(-1), 0.0)
        self.fired += fires.sum((0, 1)).cpu()
        self.importance += g.double().sum((0, 1)).cpu()
        self.activation += where_it_fires.abs().double().sum((0, 1)).cpu()
        self.signed_activation += where_it_fires.double().sum((0, 1)).cpu()
        self.square += own.double().square().sum((0, 1)).cpu()

        row, at, c = fires.nonzero(as_tuple=True)
        strength, value = g[row, at, c].cpu(), a[row, at, c].cpu()
        tokens = positions.tokens[start : start + len(g)]
        seen = SeenBatch(tokens, g, a)
        input_token = tokens[row, at].cpu()
        if positions.predicted is not None:
            self.predicted.add(c.cpu(), positions.predicted[start : start + len(g)][row, at].cpu())
        row, at, c = row.cpu(), at.cpu(), c.cpu()
        self.inputs.add(c, input_token)
        self._add_histograms(c, strength, value)
        self._offer_strongest(g * where_it_fires.abs(), seen)
        hashes = positions.hashes[start : start + len(g)].cpu()
        key = random_keys(hashes[row], at, c + self.salt * 1_000_003)
        self.random.offer(c, key, (row, at, c), seen)
        self.banded.offer(c * self.settings.bands + self._band(strength), key, (row, at, c), seen)

    def _band(self, strength: Tensor) -> Tensor:
        """0 for importances just above the threshold, `bands - 1` for those near 1."""
        low, bands = self.settings.threshold, self.settings.bands
        share = (strength.double() - low) / max(1 - low, 1e-12)
        return (share * bands).long().clamp(0, bands - 1)

    def _add_histograms(self, c: Tensor, strength: Tensor, value: Tensor) -> None:
        bins = (strength * IMPORTANCE_BINS).ceil().long().clamp(1, IMPORTANCE_BINS) - 1
        _count(self.importance_histogram, c, bins)
        low, high = ACTIVATION_RANGE
        size = value.abs().double().clamp_min(2.0**-60).log2()
        bins = ((size - low) / (high - low) * ACTIVATION_BINS).floor().long().clamp(0, ACTIVATION_BINS - 1)
        # Negative ones in the first half, largest first, so that the bins rise from left to right.
        bins = torch.where(value < 0, ACTIVATION_BINS - 1 - bins, ACTIVATION_BINS + bins)
        _count(self.activation_histogram, c, bins)

    def _offer_strongest(self, strength: Float[Tensor, "batch pos C"], seen: SeenBatch) -> None:
        """The strongest position of every row."""
        score, position = strength.max(dim=1)  # [batch C]
        score, position = score.cpu(), position.cpu()
        row, c = (score > 0).nonzero(as_tuple=True)
        self.top.offer(c, score[row, c].double(), (row, position[row, c], c), seen)

    # -- merging and saving --------------------------------------------------------------------------------------

    def _sums(self) -> dict[str, Tensor]:
        names = ("fired", "importance", "activation", "signed_activation", "square", "effect")
        return {name: getattr(self, name) for name in (*names, "importance_histogram", "activation_histogram")}

    def _parts(self) -> dict[str, TokenCounts | Reservoir]:
        return {name: getattr(self, name) for name in ("inputs", "predicted", "top", "random", "banded")}

    def merge(self, other: SiteSums) -> None:
        """As if everything that was added to `other` had been added here."""
        for name, value in self._sums().items():
            value += getattr(other, name)
        for own in ("inputs", "predicted", "top", "random", "banded"):
            getattr(self, own).merge(getattr(other, own))

    def tensors(self) -> dict[str, Tensor]:
        """Everything that it holds, by name."""
        parts = {f"{name}.{key}": t for name, part in self._parts().items() for key, t in part.tensors().items()}
        return {**self._sums(), **parts}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Take what `tensors` gave. Raises ValueError for other shapes, KeyError for what is missing."""
        for name, own in self._sums().items():
            if saved[name].shape != own.shape or saved[name].dtype != own.dtype:
                raise ValueError(f"{name} is {tuple(saved[name].shape)}; expected {tuple(own.shape)}, {own.dtype}")
            setattr(self, name, saved[name])
        for name, part in self._parts().items():
            prefix = f"{name}."
            part.load({key.removeprefix(prefix): t for key, t in saved.items() if key.startswith(prefix)})

    def bytes(self) -> int:
        """Memory of everything that it holds."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())


def _count(histogram: Tensor, c: Tensor, bins: Tensor) -> None:
    flat = torch.bincount(c * histogram.shape[1] + bins, minlength=histogram.numel())
    histogram += flat.view_as(histogram)
