"""Evaluation while training: a fast one every so many steps and a full one less often, both in the log.

An evaluation draws from generators of its own and leaves no gradients, so a run with it equals the run without it bit
for bit; that is why it is no part of `TrainConfig`, and may be changed when a run goes on.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from spd_lens.core.decomposition import Decomposition
from spd_lens.data.batches import Batch
from spd_lens.data.streams import first_batches
from spd_lens.evaluation.evaluating import evaluate
from spd_lens.support.names import near_names
from spd_lens.support.shown import short_repr
from spd_lens.support.validated import Count, validated

# What `evaluate` takes besides the decomposition and its batches, and what is not the user's to set here.
_OPTIONS = tuple(n for n in inspect.signature(evaluate).parameters if n not in ("decomposition", "batches", "quick"))


@validated
class Evaluations:
    """When `train` evaluates, and on what: `train(..., evaluations=Evaluations(held_out, fast_every=500))`.

    - `batches`: held-out data, as for `evaluate`; its first `max_batches` are read once, when the run begins.
    - `fast_every`: steps between fast evaluations (`evaluate(quick=True)`: no adversary), logged as `fast/...`.
    - `slow_every`: steps between full ones, adversary and deletion test included, logged as `slow/...`; there is one
      at the end of the run as well. None: never.
    - `options`: arguments of the full `evaluate` (`max_batches`, `adversary_steps`, `starts`, ...).

    Values are those of `EvaluationReport.log_values`, in the log's line of the step that came before.
    """

    batches: Any
    fast_every: Count | None = None
    slow_every: Count | None = None
    options: dict[str, Any] = field(default_factory=dict)

    __repr__ = short_repr

    def __post_init__(self) -> None:
        if self.fast_every is None and self.slow_every is None:
            raise ValueError("Evaluations without fast_every and slow_every never evaluate; expected one of them")
        for name in self.options:
            if name not in _OPTIONS:
                raise ValueError(f"evaluate has no option {name!r}; near: {near_names(name, _OPTIONS)}")
        sample = self.options.get("deletion_sample")
        if isinstance(sample, Iterator):
            raise ValueError(
                f"deletion_sample is a {type(sample).__name__}, which is used up after the first evaluation; expected "
                "a list of batches"
            )


@dataclass
class Evaluator:
    """The evaluations of one run, with their batches read.

    `together`: several processes share out the rows of their batches, which have enough of them. Otherwise each of them
    computes everything, so that none waits for another longer than an exchange may take.
    """

    decomposition: Decomposition
    plan: Evaluations
    last_step: int
    batches: list[Batch]
    options: dict[str, Any]
    together: bool = False

    @staticmethod
    def of(
        decomposition: Decomposition, plan: Evaluations | None, last_step: int, n_processes: int = 1
    ) -> Evaluator | None:
        """Read the batches; None where there is no plan. Raises ValueError as `evaluate` does for them."""
        if plan is None:
            return None
        if not isinstance(plan, Evaluations):
            raise TypeError(f"evaluations is a {type(plan).__name__}; expected Evaluations(batches, fast_every=...)")
        options = dict(plan.options)
        count = options.get("max_batches", inspect.signature(evaluate).parameters["max_batches"].default)
        batches = list(first_batches(plan.batches, decomposition, count, purpose="evaluate on"))
        read = batches
        if (sample := options.get("deletion_sample")) is not None:
            options["deletion_sample"] = list(first_batches(sample, decomposition, None, purpose="look for needs in"))
            read = [*batches, *options["deletion_sample"]]
        together = n_processes > 1 and all(len(batch.inputs) >= n_processes for batch in read)
        return Evaluator(decomposition, plan, last_step, batches, options, together)

    def is_due(self, step: int) -> bool:
        """Whether there is an evaluation after so many finished steps."""
        return self._is_fast(step) or self._is_slow(step)

    def values(self, step: int) -> dict[str, float]:
        """What the log gets after so many finished steps."""
        found: dict[str, float] = {}
        if self._is_fast(step):
            found |= self._measured("fast/", quick=True, options={})
        if self._is_slow(step):
            found |= self._measured("slow/", quick=False, options=self.options)
        return found

    def _measured(self, prefix: str, *, quick: bool, options: Mapping[str, Any]) -> dict[str, float]:
        report = evaluate(self.decomposition, self.batches, quick=quick, together=self.together, **options)
        return report.log_values(prefix)

    def _is_fast(self, step: int) -> bool:
        return self.plan.fast_every is not None and step % self.plan.fast_every == 0

    def _is_slow(self, step: int) -> bool:
        every = self.plan.slow_every
        return every is not None and (step % every == 0 or step == self.last_step)
