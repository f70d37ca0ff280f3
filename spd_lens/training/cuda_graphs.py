"""A training step as a CUDA graph: what the host would launch one kernel at a time is replayed as one.

A step of a small model is many small kernels, and launching them costs the host more than computing them costs the
card. `GraphedStep` records the whole step (clean pass, gates, masked passes, adversaries, clipping, Adam) once and
replays it. What the host decides is frozen while a recording is used: learning rates, the annealing of penalties, the
adversary's warm-up. So it is recorded anew every `steps_per_capture` steps, and schedules move in stairs of that width.

Which rows are routed is drawn on the card (in `train` on the CPU, so that unrouted rows need not be computed): the
draws differ, their distribution does not. Batches must keep their shape. Memory: the step's activations stay allocated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

import torch
from torch import Tensor

from spd_lens.data.batches import Batch
from spd_lens.support.given import given_whole
from spd_lens.training.learner import Learner
from spd_lens.training.step import take_step

# Optimisers make their state, and libraries their handles, in ordinary steps before anything is recorded.
STEPS_BEFORE = 5

Results = TypeVar("Results")


class Recording(Generic[Results]):
    """`take(step)`, a function that only launches kernels, as a CUDA graph that is recorded anew every so many steps.

    - `generators`: everything that it draws from, all on the card.
    - `ordinary`: so many calls come before the first recording.

    What a call returns is overwritten by the next one.
    """

    def __init__(
        self,
        take: Callable[[int], Results],
        generators: Iterable[torch.Generator],
        *,
        steps_per_capture: int,
        ordinary: int = STEPS_BEFORE,
    ) -> None:
        self._take, self._generators = take, list(generators)
        self.steps_per_capture = given_whole("steps_per_capture", steps_per_capture, least=1)
        self._ordinary_left, self._replays_left = ordinary, 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._results: Results | None = None

    def __call__(self, step: int) -> Results:
        """What `take(step)` returns."""
        if self._ordinary_left > 0:
            self._ordinary_left -= 1
            return self._take(step)
        if self._replays_left == 0:
            self._capture(step)
        assert self._graph is not None
        assert self._results is not None
        self._graph.replay()
        self._replays_left -= 1
        return self._results

    def _capture(self, step: int) -> None:
        self._graph, self._results = None, None
        graph = torch.cuda.CUDAGraph()
        for generator in self._generators:
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph):
            self._results = self._take(step)
        self._graph, self._replays_left = graph, self.steps_per_capture


class GraphedStep:
    """`take_step` for one learner on a CUDA device, recorded and replayed.

        step = GraphedStep(make_learner(decomposition, config))
        losses, importances, norms = step(batch, 0)

    What it returns is overwritten by the next call. Raises ValueError for a learner that is not on a CUDA device, for
    models that copy from the host in their passes (a TransformerBridge), and for batches of another shape than the
    first.
    """

    def __init__(self, learner: Learner, *, steps_per_capture: int = 50) -> None:
        device = learner.decomposition.device
        if not learner.decomposition.host.records():
            name = type(learner.decomposition.model).__name__
            raise ValueError(
                f"the model is a {name}, whose passes copy numbers from the host to the card, which a CUDA graph "
                "cannot record; use `train`, or a HookedTransformer"
            )
        if device.type != "cuda":
            raise ValueError(f"the decomposition is on {device}; CUDA graphs need a CUDA device (use `train`)")
        if learner.config.accumulate > 1:
            raise ValueError(f"accumulate={learner.config.accumulate}; a recorded step takes a batch in one part")
        self.learner = learner
        routing = torch.Generator(device).manual_seed(learner.generators["routing"].initial_seed())
        learner.generators["routing"] = routing
        self._batch: Batch | None = None
        self._recording = Recording(self._take_step, learner.generators.values(), steps_per_capture=steps_per_capture)

    def __call__(self, batch: Batch, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """One step on `batch`: losses by name (unweighted), L0 by site, and gradient norms before clipping."""
        self._hold(batch)
        return self._recording(step)

    def _take_step(self, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        assert self._batch is not None
        return take_step(self.learner, self._batch, step)

    def _hold(self, batch: Batch) -> None:
        """Put the batch's numbers into the memory that the recording reads."""
        if self._batch is None:
            device = self.learner.decomposition.device
            copies = {k: v.to(device).clone() for k, v in _tensors(batch).items()}
            self._batch = dataclasses.replace(batch, **copies)
            return
        given, held = _tensors(batch), _tensors(self._batch)
        shapes = [{name: tuple(t.shape) for name, t in tensors.items()} for tensors in (given, held)]
        if shapes[0] != shapes[1] or batch.start_at != self._batch.start_at:
            raise ValueError(f"a batch has shapes {shapes[0]}, the recorded step {shapes[1]}; keep the batch size")
        for name, tensor in held.items():
            tensor.copy_(given[name], non_blocking=True)


def _tensors(batch: Batch) -> dict[str, Tensor]:
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}
