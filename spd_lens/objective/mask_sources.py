"""Where the masks of a reconstruction term come from (K1 to K4): drawn at random, or chosen by an adversary.

`MaskSource` is the one protocol that training, evaluation and the circuit search use. A training step calls

    source.climb(Climb(objective, importances, ...))  # adversaries look for bad masks; others do nothing
    source.masks(importances, ...)                    # one forward pass's masks, with gradients to the importances
    source.after_backward()                           # persistent adversaries climb once more, on its gradients

and checkpoints hold `state()`. A source of one's own is a subclass; it is passed where the names of ours are:
`Reconstruction(masks=MySource())`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spd_lens.core.draws import RowsGenerator
from spd_lens.core.masks import Importances, MaskKind, SiteMask, mask_from_source, sample_masks
from spd_lens.objective.adversary import PGD, Persistent, PersistentSources, WholeBatch, ascend, random_sources
from spd_lens.support.given import given_instance, given_number

Masks: TypeAlias = dict[str, SiteMask]
# The loss of one set of masks; with a number of rows, over that many of the first rows of the batch alone.
MaskObjective: TypeAlias = Callable[[Masks, int | None], Tensor]
Routed: TypeAlias = Mapping[str, Bool[Tensor, "*batch"] | None]


def masks_from_sources(
    importances: Importances, sources: Mapping[str, Float[Tensor, "*_batch _C_and_delta"]], *, delta: bool = True
) -> Masks:
    """K3: `m = g + (1 - g) s` with the first C channels of `s`, delta mask the last one (0 with `delta=False`).

    Sources may be smaller than the importances in batch and position (`[1 1 C+1]`): they are then shared.
    """
    return {
        name: SiteMask(
            mask_from_source(g, sources[name][..., :-1]),
            sources[name][..., -1].expand(g.shape[:-1]) if delta else g.new_zeros(g.shape[:-1]),
        )
        for name, g in importances.items()
    }


@dataclass(frozen=True)
class Merged:
    """Both in one pass (L9): the first `share` of a batch's rows is adversarial, the others stochastic.

    Rows under `persistent` masks route all sites; the others are routed as the term says. One masked pass does the
    work of two. Batches are shuffled, so which rows these are does not matter; their number is `share` of the batch,
    rounded, at least one.
    """

    share: float = 0.5
    persistent: Persistent = field(default_factory=lambda: Persistent(scope="position"))

    def __post_init__(self) -> None:
        if given_number("share", self.share, above=0, most=1) == 1:
            raise ValueError(f"share={self.share}; expected a share of the rows, 0 < share < 1")
        given_instance("persistent", self.persistent, Persistent, "Persistent(scope='position'), for example")


@dataclass(frozen=True)
class Climb:
    """What an adversary climbs on.

    - `objective`: the loss of one set of masks; with `rows`, over that many of the first rows of the batch alone.
    - `importances`: detached; `delta`: whether masks of deltas are chosen, too (else they are 0).
    - `progress`: the share of the run that is done.
    """

    objective: MaskObjective
    importances: Importances
    generator: torch.Generator
    delta: bool = True
    progress: float = 1.0
    rows: int | None = None

    def of(self, sources: Mapping[str, Tensor]) -> Float[Tensor, ""]:
        """The objective of the masks that these sources make (K3)."""
        return self.objective(masks_from_sources(self.importances, sources, delta=self.delta), self.rows)

    def in_first(self, rows: int) -> Climb:
        """The same for the first rows alone."""
        return replace(self, importances={name: g[:rows] for name, g in self.importances.items()}, rows=rows)


class MaskSource(ABC):
    """A source of masks for one reconstruction term; what it remembers between steps is its `state`."""

    # In logs.
    name: str
    # Whether passes and routing have to be known before the masks are chosen.
    climbs = False
    # Whether the rows of `state()` are those of the batch, so that every process holds others.
    by_rows = False
    # Set where several processes share a batch: makes gradients of this process's rows those of the whole batch.
    whole_batch: WholeBatch | None = None
    # Which part of the batch masks are for, and of how many: part k of m has rows k, k + m, ...
    part: tuple[int, int] = (0, 1)

    @abstractmethod
    def masks(self, importances: Importances, *, delta: bool, generator: torch.Generator) -> Masks:
        """Masks of one forward pass for these sites."""

    def climb(self, on: Climb) -> None:  # noqa: B027 (most sources do not climb)
        """Look for masks of high objective."""

    def routed(self, routed: Routed) -> Routed:
        """The routing that is used in place of the drawn one."""
        return routed

    def after_backward(self) -> None:  # noqa: B027
        """Called once gradients of the step's loss are there."""

    def leaves(self) -> list[Tensor]:
        """Tensors that climb on the loss's own gradients in `after_backward`."""
        return []

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint has to hold."""
        return {}

    def load(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:  # noqa: B027
        """Undo `state`."""


class SampledMasks(MaskSource):
    """A kind of `sample_masks`: stochastic, Bernoulli, importance itself, ..."""

    def __init__(self, kind: MaskKind) -> None:
        self.kind: MaskKind = kind
        self.name = kind

    def masks(self, importances: Importances, *, delta: bool, generator: torch.Generator) -> Masks:
        return sample_masks(importances, kind=self.kind, delta=delta, generator=generator)


class AdversarialMasks(MaskSource):
    """A fresh adversary in every step (K3).

    `climb` begins at random sources; `climb_on` goes on from where it is.
    """

    climbs = True
    name = "pgd"

    def __init__(self, pgd: PGD) -> None:
        self.pgd = pgd
        self._sources: dict[str, Tensor] = {}

    def climb(self, on: Climb) -> None:
        self._sources = random_sources(on.importances, self.pgd.scope, on.generator)
        self.climb_on(on, self.pgd.steps)

    def climb_on(self, on: Climb, steps: int) -> None:
        """So many further ascents: n steps and m more are an ascent of n + m steps."""
        self._sources = ascend(on.of, self._sources, replace(self.pgd, steps=steps), self.whole_batch)

    def masks(self, importances: Importances, *, delta: bool, generator: torch.Generator) -> Masks:
        return masks_from_sources(importances, of_part(self._sources, self.part), delta=delta)


class PersistentMasks(MaskSource):
    """An adversary that goes on where it was in the step before (K4)."""

    climbs = True
    name = "persistent"

    def __init__(self, spec: Persistent) -> None:
        self.spec = spec
        self.by_rows = spec.scope != "batch"
        self.sources: PersistentSources | None = None
        self._active = False

    def climb(self, on: Climb) -> None:
        self._active = on.progress >= self.spec.start
        if not self._active:
            return
        if self.sources is None:
            self.sources = PersistentSources(on.importances, self.spec, generator=on.generator)
            self.sources.whole_batch = self.whole_batch
            self.sources.warm(on.of, self.spec.first_steps)
        _check_shapes(on.importances, self.sources.tensors())
        self.sources.set_progress((on.progress - self.spec.start) / (1 - self.spec.start))
        self.sources.warm(on.of)

    def masks(self, importances: Importances, *, delta: bool, generator: torch.Generator) -> Masks:
        if not self._active or self.sources is None:
            return sample_masks(importances, delta=delta, generator=generator)
        return masks_from_sources(importances, of_part(self.sources.tensors(), self.part), delta=delta)

    def after_backward(self) -> None:
        if self._active and self.sources is not None:
            self.sources.ascend_from_graph()

    def leaves(self) -> list[Tensor]:
        return [] if self.sources is None else list(self.sources.tensors().values())

    def state(self) -> dict[str, Tensor]:
        return {} if self.sources is None else self.sources.tensors_by_name()

    def load(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        self.sources = PersistentSources.from_tensors(tensors, self.spec, device=device) if tensors else None
        if self.sources is not None:
            self.sources.whole_batch = self.whole_batch


class MergedMasks(PersistentMasks):
    """The first rows under a persistent adversary, the others under stochastic masks (L9)."""

    name = "merged"

    def __init__(self, merged: Merged) -> None:
        super().__init__(merged.persistent)
        self.share = merged.share

    def _rows(self, n_rows: int) -> int:
        """How many of the first rows are adversarial, of `n_rows` rows of the batch's part."""
        n_parts = self.part[1]
        whole = n_rows * n_parts
        if whole < 2:
            raise ValueError("merged masks need at least two rows in a batch: one adversarial, one stochastic")
        rows = min(whole - 1, max(1, round(self.share * whole)))
        if rows % n_parts:
            raise ValueError(
                f"merged masks with share={self.share} of {whole} rows do not divide into {n_parts} parts; expected a "
                "batch and a share of which every part gets as many adversarial rows"
            )
        return rows // n_parts

    def climb(self, on: Climb) -> None:
        rows = self._rows(_n_rows(on.importances))
        if isinstance(on.generator, RowsGenerator):
            self._check_shared(on.generator.count, _n_rows(on.importances), rows)
        super().climb(on.in_first(rows))

    def masks(self, importances: Importances, *, delta: bool, generator: torch.Generator) -> Masks:
        if not self._active:
            return sample_masks(importances, delta=delta, generator=generator)
        rows = self._rows(_n_rows(importances))
        chosen = super().masks({n: g[:rows] for n, g in importances.items()}, delta=delta, generator=generator)
        drawn = sample_masks({n: g[rows:] for n, g in importances.items()}, delta=delta, generator=generator)
        return {name: _stacked(mask, drawn[name]) for name, mask in chosen.items()}

    def routed(self, routed: Routed) -> Routed:
        if not self._active:
            return routed
        return {name: None if where is None else self._all_first(where) for name, where in routed.items()}

    def _check_shared(self, n_processes: int, n_rows: int, rows: int) -> None:
        whole = n_rows * n_processes
        if min(whole - 1, max(1, round(self.share * whole))) != rows * n_processes:
            raise ValueError(
                f"merged masks with share={self.share} of {whole} rows do not divide among {n_processes} processes; "
                "expected a batch and a share of which every process gets as many adversarial rows"
            )

    def _all_first(self, where: Bool[Tensor, "*batch"]) -> Bool[Tensor, "*batch"]:
        where = where.clone()
        where[: self._rows(len(where))] = True
        return where


def of_part(sources: Mapping[str, Tensor], part: tuple[int, int]) -> dict[str, Tensor]:
    """Sources of part k of m of the batch's rows; those that all rows share are everywhere the same."""
    k, count = part
    return {name: s if count == 1 or s.shape[0] == 1 else s[k::count] for name, s in sources.items()}


def _n_rows(importances: Importances) -> int:
    return next(iter(importances.values())).shape[0]


def _stacked(first: SiteMask, second: SiteMask) -> SiteMask:
    def joined(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        return None if a is None or b is None else torch.cat([a, b])

    return SiteMask(joined(first.mask, second.mask), joined(first.delta, second.delta))


def _check_shapes(importances: Importances, sources: Mapping[str, Tensor]) -> None:
    for name, g in importances.items():
        expected = (*g.shape[:-1], g.shape[-1] + 1)
        found = sources[name].shape
        if len(found) != len(expected) or any(a not in (1, b) for a, b in zip(found, expected, strict=True)):
            raise ValueError(
                f"persistent sources at {name} have shape {tuple(found)} and this batch needs {expected}; with "
                "scope='position' or 'example' every batch must have the same shape (drop the last, smaller one), or "
                "use scope='batch'"
            )


# What `Reconstruction.masks` accepts: names and budgets of ours, or a source of one's own.
MasksGiven: TypeAlias = MaskKind | Literal["pgd", "persistent", "merged"] | PGD | Persistent | Merged | MaskSource


def mask_source(given: MasksGiven) -> MaskSource:
    """The source that a name or a budget stands for; names of adversaries stand for their default budgets.

    Raises ValueError for an unknown name, TypeError for what is no source.
    """
    match given:
        case "pgd":
            return AdversarialMasks(PGD())
        case "persistent":
            return PersistentMasks(Persistent())
        case "merged":
            return MergedMasks(Merged())
        case PGD():
            return AdversarialMasks(given)
        case Persistent():
            return PersistentMasks(given)
        case Merged():
            return MergedMasks(given)
        case MaskSource():
            if not isinstance(getattr(given, "name", None), str):
                raise TypeError(f"masks is a {type(given).__name__} without a name; expected name = 'its name in logs'")
            return given
        case "stochastic" | "bernoulli" | "importance" | "rounded" | "random" | "none" | "off":
            return SampledMasks(given)
        case str():
            raise ValueError(
                f"masks={given!r}; expected 'stochastic', 'bernoulli', 'importance', 'rounded', 'random', 'none', "
                "'off', 'pgd', 'persistent', 'merged', or a PGD, Persistent, Merged or MaskSource"
            )
    raise TypeError(
        f"masks is a {type(given).__name__}; expected a name, or a PGD, Persistent, Merged or MaskSource object"
    )
