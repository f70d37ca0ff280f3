"""The deletion test: what the gates say is never needed is removed for good (E8).

Importance is a claim about masks that an adversary may choose; deletion is the plainest instance of it, and where
decompositions without an adversary in their training fail. Three measurements, in all of which delta is 0 too:

- *never needed*: subcomponents whose importance stays below 0.01 at every position of a sample are set to 0;
- *own union*: every text runs with what at least one of its own positions needs, and with nothing else;
- *others' union* (the control): as many subcomponents per site, but what positions of other texts need: 64 of them,
  drawn at random, and further ones where 64 do not need as many. Where their union is larger, it is cut to the same
  number at random.

Need is asked at all positions of the sample, also those that count in no mean: the model runs them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spd_lens.core.masks import SiteMask
from spd_lens.core.units import ALIVE_ABOVE
from spd_lens.evaluation.held import Held
from spd_lens.support.shown import short_repr

CONTROL_POSITIONS = 64
# Positions of the sample that controls are drawn from; more would only cost memory.
POOL = 1024

NEVER_NEEDED, OWN_UNION, OTHERS_UNION = "never needed off", "own union", "others' union"


@dataclass(frozen=True)
class Deletion:
    """What the deletion test cost: mean divergence from the target (E8).

    - `divergence`: by test (`"never needed off"`, and for texts `"own union"` and its control `"others' union"`).
    - `never_needed`: how many subcomponents of each site no position of the sample needed.
    - `sample_positions`: positions in that sample.
    - `kept`: mean number of subcomponents that stayed on, by test.
    """

    divergence: dict[str, float]
    never_needed: dict[str, int]
    sample_positions: int
    kept: dict[str, float]

    __repr__ = short_repr


class Needs:
    """Who needed what in a sample: for every site the subcomponents ever needed, and a pool of single positions."""

    def __init__(self, generator: torch.Generator, n_batches: int) -> None:
        self._generator = generator
        self._quota = -(-POOL // max(1, n_batches))
        self.ever: dict[str, Bool[Tensor, " _"]] = {}
        self.positions = 0
        self._pool: dict[str, list[Tensor]] = {}
        self._texts: list[Tensor] = []
        self._n_texts = 0

    def add(self, needed: Mapping[str, Bool[Tensor, "_row _pos _C"]], rows: int, *, pooled: bool = True) -> None:
        """One batch of `rows` texts, by `needed_at`; `pooled` offers some of its positions to the controls."""
        per_row = max(g.shape[1] for g in needed.values())
        for name, own in needed.items():
            ever = own.flatten(0, 1).any(0)
            self.ever[name] = self.ever[name] | ever if name in self.ever else ever
        self.positions += rows * per_row
        if not pooled:
            return
        count = min(self._quota, rows * per_row)
        chosen = torch.randperm(rows * per_row, generator=self._generator, device=self._generator.device)[:count]
        row, position = chosen // per_row, chosen % per_row
        self._texts.append(row + self._n_texts)
        self._n_texts += rows
        for name, own in needed.items():
            at = own[row.clamp_max(len(own) - 1), position.clamp_max(own.shape[1] - 1)]
            self._pool.setdefault(name, []).append(at)

    def never(self) -> dict[str, Bool[Tensor, " _"]]:
        """Subcomponents that no position needed."""
        return {name: ~ever for name, ever in self.ever.items()}

    @cached_property
    def _joined(self) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.cat(self._texts), {name: torch.cat(parts) for name, parts in self._pool.items()}

    def of_others(self, text: int, sizes: Mapping[str, int]) -> dict[str, Bool[Tensor, " _"]]:
        """`sizes[site]` subcomponents per site that positions of other texts needed, drawn positions first."""
        texts, pool = self._joined
        others = (texts != text).nonzero().squeeze(1)
        order = others[torch.randperm(len(others), generator=self._generator, device=self._generator.device)]
        chosen = {}
        for name, size in sizes.items():
            needed = pool[name][order]
            if len(needed) == 0:
                chosen[name] = torch.zeros(needed.shape[1], dtype=torch.bool, device=needed.device)
                continue
            first = needed.int().argmax(0).to(torch.float32)
            # The first 64 positions are one union, in which no position comes before another.
            first = first.masked_fill(first < CONTROL_POSITIONS, 0.0)
            noise = torch.rand(len(first), generator=self._generator, device=self._generator.device)
            rank = (first + noise).masked_fill(~needed.any(0), torch.inf).argsort()
            chosen[name] = torch.zeros_like(needed[0])
            chosen[name][rank[: min(size, int(needed.any(0).sum()))]] = True
        return chosen


def needed_at(importance: Float[Tensor, "*batch C"]) -> Bool[Tensor, "row pos C"]:
    """Where a subcomponent is needed: `[row pos C]`, one position for models without, over all heads together."""
    needed = importance >= ALIVE_ABOVE
    if needed.ndim == 2:
        return needed.unsqueeze(1)
    return needed.flatten(2, -2).any(2) if needed.ndim > 3 else needed


def keeping(held: Held, kept: Mapping[str, Bool[Tensor, "_ _"]]) -> dict[str, SiteMask]:
    """Masks of 1 for what is kept in each text and of 0 for all else, delta included."""
    masks = {}
    for name, g in held.importances.items():
        own = kept[name][: len(g)].to(g.dtype)
        own = own.reshape(len(own), *([1] * (g.ndim - 2)), g.shape[-1])
        masks[name] = SiteMask(own.expand(g.shape), g.new_zeros(g.shape[:-1]))
    return masks


def unions_of(
    needed: Mapping[str, Bool[Tensor, "_row _pos _C"]], n_rows: int, needs: Needs, first_text: int
) -> tuple[dict[str, Bool[Tensor, "_ _"]], dict[str, Bool[Tensor, "_ _"]]]:
    """For every text of the batch what its own positions need, and as much that positions of other texts need."""
    own = {name: at.any(1) for name, at in needed.items()}
    sizes = {name: kept.sum(1).tolist() for name, kept in own.items()}
    rows = range(n_rows)
    drawn = [
        needs.of_others(first_text + row, {name: n[min(row, len(n) - 1)] for name, n in sizes.items()}) for row in rows
    ]
    return own, {name: torch.stack([one[name] for one in drawn]) for name in own}


def mean_kept(unions: Iterable[Mapping[str, Bool[Tensor, "_ _"]]]) -> float:
    """Mean number of subcomponents, over all sites, that stay on in a text."""
    totals: list[Tensor] = []
    for union in unions:
        sizes = [kept.sum(1).float() for kept in union.values()]
        rows = max(map(len, sizes))
        totals.append(torch.stack([size.expand(rows) for size in sizes]).sum(0))
    return float(torch.cat(totals).mean())
