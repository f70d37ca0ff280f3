"""Time, memory and shares of a training step: what `benchmarks/step.py` prints."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.configurations import ProductStep
from benchmarks.machine import Clock
from benchmarks.work import CLEAN, FAITHFULNESS, GATES, OPTIMIZER, ascents
from spd_lens.core import Decomposition
from spd_lens.data import Batch
from spd_lens.objective import AdversarialMasks, PersistentMasks
from spd_lens.support import workspace as blocks
from spd_lens.training import masked_terms, parts, step

Step = Callable[[], object]


def alternate(steps: Mapping[str, Step], rounds: int, clock: Clock, *, warm_up: int = 2) -> dict[str, list[float]]:
    """Seconds of every step in each round; who goes first changes from round to round."""
    names = list(steps)
    for name in names:
        for _ in range(warm_up):
            steps[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names if i % 2 else reversed(names):
            times[name].append(clock.time(steps[name]))
    return times


def paired_ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Median over rounds of how much longer one took than the other."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


# -- memory ---------------------------------------------------------------------------------------------------------


def peak_memory(run: Step, device: torch.device) -> int:
    """Bytes by which memory rises during a step above what is held between steps (parameters, Adam's moments).

    On a CPU the allocations that torch's profiler records are added up. What `kept_workspace` tells is held between
    steps, so it is not in here.
    """
    run()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    recorded: Any = profiler.profiler
    events = [e for e in recorded.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def kept_workspace() -> int:
    """Bytes of the workspace that this thread keeps."""
    return sum(room.nbytes for rooms in blocks._kept.rooms.values() for room in rooms)


def drop_workspace() -> None:
    """Start without one, so that what a step then keeps is its own."""
    blocks._kept.rooms.clear()


# -- shares of terms ------------------------------------------------------------------------------------------------


def time_by_term(product: ProductStep, batch: Batch, steps: int, clock: Clock) -> dict[str, float]:
    """Median seconds of every term, from time marks where a step goes from one to the next.

    The marks sit around functions that the step calls, so what runs is the step itself. A term's backward pass belongs
    to it; that of the gates, with the minimality loss, comes after the last masked pass.
    """
    of_steps: dict[str, list[float]] = defaultdict(list)
    for _ in range(steps):
        marks = _Marks(clock)
        with marks.placed():
            product.losses(batch)
        marks.enter(OPTIMIZER)
        product.update()
        marks.enter("")
        for term, seconds in marks.spent.items():
            of_steps[term].append(seconds)
    return {term: statistics.median(seconds) for term, seconds in of_steps.items() if term}


class _Marks:
    """Adds up time by term; at every moment one term is running."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.spent = clock, defaultdict(float)
        self.running, self.since = CLEAN, clock.now()

    def enter(self, term: str) -> str:
        """From now on `term` is running; returns what was before."""
        now, before = self.clock.now(), self.running
        self.spent[before] += now - self.since
        self.running, self.since = term, now
        return before

    def within(self, function: Callable[..., Any], term_of: Callable[..., str]) -> Callable[..., Any]:
        """`function`, booked on the term that its arguments tell."""

        def marked(*args: Any, **kwargs: Any) -> Any:
            before = self.enter(term_of(*args))
            try:
                return function(*args, **kwargs)
            finally:
                self.enter(before)

        return marked

    @contextmanager
    def placed(self) -> Iterator[None]:
        """While open, the step's functions are marked."""
        passes, one_term, faithfulness = step.masked_terms, masked_terms._summands, step.faithfulness
        climb = masked_terms._climb

        def marked_passes(*args: Any) -> Iterator[Any]:
            # Each is differentiated before the next is asked for.
            yield from passes(*args)
            self.enter(GATES)

        def marked_term(learner: Any, term: Any, *args: Any) -> Any:
            # An adversary asks for the same passes.
            if self.running != ascents(term.name):
                self.enter(term.name)
            return one_term(learner, term, *args)

        def marked_climb(learner: Any, parts: Any, term: Any, *args: Any) -> Any:
            self.enter(term.name)
            return climb(learner, parts, term, *args)

        def marked_faithfulness(learner: Any) -> Any:
            self.enter(FAITHFULNESS)
            return faithfulness(learner)

        def climbing(*_: Any) -> str:
            return ascents(self.running)

        places: list[tuple[Any, str, Callable[..., Any]]] = [
            (step, "masked_terms", marked_passes),
            (masked_terms, "_summands", marked_term),
            (masked_terms, "_climb", marked_climb),
            (step, "faithfulness", marked_faithfulness),
            (AdversarialMasks, "climb", self.within(AdversarialMasks.climb, climbing)),
            (parts, "_importances", self.within(parts._importances, lambda *_: GATES)),
            (Decomposition, "clean_pass", self.within(Decomposition.clean_pass, lambda *_: CLEAN)),
            (PersistentMasks, "climb", self.within(PersistentMasks.climb, climbing)),
        ]
        with ExitStack() as stack:
            for owner, name, function in places:
                stack.enter_context(mock.patch.object(owner, name, function))
            yield
