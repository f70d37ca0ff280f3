"""A batch in parts that a step goes through one after the other (`TrainConfig.accumulate`), as one batch would.

Part `k` of `m` has rows `k, k + m, ...` of the batch, as if it were a process of `m`: its random numbers are those that
the whole batch draws for these rows. What needs all rows at once (the frequency term, adversaries that all rows share)
goes through the parts once more for every time that it needs them, without a graph. So the step is that of the whole
batch, to the rounding of sums. Memory: activations of one part, instead of the batch. Cost: a clean pass and the gates
once more for the frequency term, and once for every ascent of an adversary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from spd_lens.core.draws import RowsGenerator
from spd_lens.core.site_inputs import SiteInputs
from spd_lens.core.squashings import squashed
from spd_lens.data.batches import Batch
from spd_lens.data.processes import every
from spd_lens.objective.divergences import log_probs
from spd_lens.training.learner import Learner


@dataclass(frozen=True)
class BatchPart:
    """A part of the batch after its clean pass, with the importances on it under both squashings.

    - `output`: what the divergence compares with; `sizes`: what a read-out divides by. `residuals`, `hidden`: of the
      clean pass.
    """

    batch: Batch
    output: Tensor
    sizes: Tensor | None
    residuals: dict[int, Tensor]
    hidden: dict[str, Tensor]
    lower: dict[str, Tensor]
    upper: dict[str, Tensor]


class BatchParts:
    """The parts of one batch of `learner`, each computed when it is asked for.

    A batch in one part is computed once and kept. Raises ValueError for a batch that does not divide.
    """

    def __init__(self, learner: Learner, batch: Batch) -> None:
        self.learner, self.batch = learner, batch
        self.count = learner.config.accumulate
        if len(batch.inputs) % self.count:
            raise ValueError(
                f"a batch has {len(batch.inputs)} rows on each process, for accumulate={self.count}; expected a batch "
                "size that is a multiple of it on every process (and drop the last, smaller batch)"
            )
        self._batches = [every(batch, k, self.count) for k in range(self.count)]
        self._only: BatchPart | None = None

    def prepared(self, k: int, *, graph: bool = False) -> BatchPart:
        """Part `k`; its importances have a graph with `graph`, or if it is the only one."""
        if self.count > 1:
            with nullcontext() if graph else torch.no_grad():
                return _prepared(self.learner, self._batches[k])
        if self._only is None:
            self._only = _prepared(self.learner, self.batch)
        return self._only

    def trained(self) -> Iterator[tuple[int, BatchPart]]:
        """Every part with its graph, while the generators of masks draw what the whole batch draws for its rows."""
        if self.count == 1:
            only, self._only = self.prepared(0), None
            yield 0, only
            return
        generator = self.learner.generators["masks"]
        assert isinstance(generator, RowsGenerator)
        rank, count, before = generator.rank, generator.count, generator.get_state()
        try:
            for k in range(self.count):
                generator.set_state(before)
                generator.rank, generator.count = rank + count * k, count * self.count
                for source in self.learner.sources.values():
                    source.part = (k, self.count)
                yield k, self.prepared(k, graph=True)
        finally:
            generator.rank, generator.count = rank, count
            for source in self.learner.sources.values():
                source.part = (0, 1)

    def shares(self, rows: int | None = None) -> list[Tensor | float | None]:
        """What the mean over each part counts in the mean over this process's positions (None: 1).

        With `rows`, over that many of the first rows of each part.
        """
        if self.count == 1:
            return [None]
        if self.batch.position_mask is None:
            return [1 / self.count] * self.count
        masks = [b.position_mask[:rows] for b in self._batches if b.position_mask is not None]
        counts = torch.stack([mask.sum().float() for mask in masks])
        return list(counts / counts.sum().clamp_min(1))


def _prepared(learner: Learner, batch: Batch) -> BatchPart:
    config = learner.config
    with learner.autocast():
        clean = learner.decomposition.clean_pass(
            batch.inputs,
            start_at=batch.start_at,
            stop_at=config.stop_at,
            hidden_points=config.hidden_points,
            attention_mask=batch.attention_mask,
        )
    lower, upper = _importances(learner, clean.inputs)
    # Shared by all terms.
    output, sizes = log_probs(clean.output) if config.divergence == "kl" else clean.output, None
    if config.readout is not None:
        sizes = config.readout.sizes(clean.output)
        output = config.readout.read(clean.output, sizes)
    return BatchPart(batch, output, sizes, clean.residuals, clean.hidden, lower, upper)


def _importances(learner: Learner, inputs: SiteInputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Importances of every site under both squashings; with `recompute`, of one gate at a time in the backward pass."""
    decomposition, squash = learner.decomposition, learner.config.squash
    names = list(inputs)

    def of(*given: str) -> Callable[..., tuple[Tensor, ...]]:
        def compute(*values: Tensor) -> tuple[Tensor, ...]:
            with learner.autocast():
                read = SiteInputs(dict(zip(given, values, strict=True)), inputs.residuals)
                pre = decomposition.pre_importances(read)
            found = [p if p.dtype == torch.float64 else p.float() for p in (pre[name] for name in given)]
            lower, upper = zip(*(squashed(p, squash) for p in found), strict=True)
            return (*lower, *upper)

        return compute

    if learner.config.recompute not in ("gates", "all"):
        found = of(*names)(*inputs.values())
        return dict(zip(names, found[: len(names)], strict=True)), dict(zip(names, found[len(names) :], strict=True))
    groups = [[name] for name in names] if decomposition.gates.is_by_site else [names]
    lower, upper = {}, {}
    for group in groups:
        found = checkpoint(of(*group), *(inputs[name] for name in group), use_reentrant=False, preserve_rng_state=False)
        lower |= dict(zip(group, found[: len(group)], strict=True))
        upper |= dict(zip(group, found[len(group) :], strict=True))
    return lower, upper
