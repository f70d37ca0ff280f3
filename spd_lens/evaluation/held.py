"""Batches held ready for measuring: what the target says, what the gates say, and where masked passes may start.

Everything that judges a decomposition (mask regimes, the adversary, the deletion test) runs masked passes beside the
same clean pass. That pass is kept while all kept ones fit into `KEPT_BYTES`, and made again at every visit beyond.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain, zip_longest

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.masks import SiteMask
from spd_lens.core.squashings import importance_of
from spd_lens.data.batches import Batch
from spd_lens.objective.divergences import Divergence, divergence_per_position, log_probs
from spd_lens.objective.mask_sources import masks_from_sources
from spd_lens.support.shown import short_repr

KEPT_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Held:
    """One batch with its clean pass.

    - `clean`: the target's output, as log-probabilities where the divergence is the KL.
    - `importances`: `g [batch pos C]` per site; `counted` `[batch pos]`: the positions that count (M5).
    """

    decomposition: Decomposition
    batch: Batch
    kind: Divergence
    clean: Float[Tensor, "*batch d_out"]
    importances: Mapping[str, Float[Tensor, "*_batch _C"]]
    residuals: Mapping[int, Tensor]
    counted: Bool[Tensor, "*batch"]

    __repr__ = short_repr

    def forward(self, masks: Mapping[str, SiteMask]) -> Tensor:
        """The model's output under masks; blocks before the first masked site are not run again."""
        return self.decomposition.masked_forward(
            self.batch.inputs,
            masks,
            start_at=self.batch.start_at,
            residuals=self.residuals,
            attention_mask=self.batch.attention_mask,
        )

    def divergences(self, output: Tensor) -> Float[Tensor, "*batch"]:
        """Divergence from the target at every position, 0 where none counts."""
        values = divergence_per_position(self.clean, output, kind=self.kind, clean_is_log_probs=self.kind == "kl")
        return values.masked_fill(~self.counted, 0.0)

    def total(self, sources: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The summed divergence under the masks of these sources (K3), and the number of positions that count."""
        values = self.divergences(self.forward(masks_from_sources(self.importances, sources)))
        return values.sum(), self.counted.sum()

    @property
    def n_bytes(self) -> int:
        """Memory that keeping this costs."""
        kept = [self.clean, *self.importances.values(), *self.residuals.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)


def hold(
    decomposition: Decomposition,
    batch: Batch,
    kind: Divergence,
    importances: Mapping[str, Float[Tensor, "*_batch _C"]] | None = None,
) -> Held:
    """Run the clean pass of a batch and its gates; given importances take the place of the gates."""
    batch = batch.to(decomposition.device)
    clean = decomposition.clean_pass(batch.inputs, start_at=batch.start_at, attention_mask=batch.attention_mask)
    if importances is None:
        with torch.no_grad():
            pre = decomposition.pre_importances(clean.inputs)
            importances = {name: importance_of(p) for name, p in pre.items()}
    lead = clean.output.shape[:-1]
    counted = batch.position_mask
    if counted is None:
        counted = torch.ones(lead, dtype=torch.bool, device=decomposition.device)
    return Held(
        decomposition=decomposition,
        batch=batch,
        kind=kind,
        clean=log_probs(clean.output) if kind == "kl" else clean.output,
        importances={name: g.detach() for name, g in importances.items()},
        residuals=clean.residuals,
        counted=counted.bool(),
    )


class Passes(Sequence[Held]):
    """The held passes of batches, in their order."""

    def __init__(
        self,
        decomposition: Decomposition,
        batches: Sequence[Batch],
        kind: Divergence,
        importances: Mapping[str, Float[Tensor, "*_batch _C"]] | None = None,
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        self.decomposition, self.batches = decomposition, list(batches)
        self.kind: Divergence = kind
        self._given, self._room = importances, kept_bytes
        self._kept: dict[int, Held] = {}

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Held:  # pyright: ignore[reportIncompatibleMethodOverride]
        if index not in range(len(self)):
            raise IndexError(index)
        if index in self._kept:
            return self._kept[index]
        held = hold(self.decomposition, self.batches[index], self.kind, self._given)
        if held.n_bytes <= self._room:
            self._room -= held.n_bytes
            self._kept[index] = held
        return held

    def __iter__(self) -> Iterator[Held]:
        return (self[index] for index in range(len(self)))

    def in_spans(self, rows: int | None) -> list[Sequence[Held]]:
        """Groups of passes with at least `rows` rows each, all in one group for None; batches are cut where needed.

        What is left over joins the last group.
        """
        total = sum(len(batch.inputs) for batch in self.batches)
        if rows is None or rows >= total:
            return [self]
        cut: list[Sequence[Held]] = []
        groups: list[list[Batch]] = [[]]
        left = rows
        for batch in self.batches:
            done, length = 0, len(batch.inputs)
            while done < length:
                if left == 0:
                    groups.append([])
                    left = rows
                taken = min(left, length - done)
                groups[-1].append(_rows(batch, done, done + taken))
                done, left = done + taken, left - taken
        if left > 0 and len(groups) > 1:
            rest = groups.pop()
            groups[-1] += rest
        if all(a is b for a, b in zip_longest(chain(*groups), self.batches)):
            indices = iter(range(len(self)))
            return [_Some(self, [next(indices) for _ in group]) for group in groups]
        for group in groups:
            cut.append(Passes(self.decomposition, group, self.kind, self._given, self._room // len(groups)))
        return cut


class _Some(Sequence[Held]):
    """Some of the passes, kept where they are."""

    def __init__(self, passes: Passes, indices: Sequence[int]) -> None:
        self.passes, self.indices = passes, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Held:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.passes[self.indices[index]]


def _rows(batch: Batch, start: int, stop: int) -> Batch:
    """Some rows of a batch; the batch itself where that is all."""
    if start == 0 and stop == len(batch.inputs):
        return batch
    cut = {f.name: v[start:stop] for f in fields(batch) if isinstance(v := getattr(batch, f.name), Tensor)}
    return replace(batch, **cut)
