"""Adversarial mask sources (K3, K4): the masks, allowed by the importances, that hurt reconstruction most.

A decomposition that only survives random masks is not shown to be right: gradient ascent on the sources
`s in [0, 1]` of `m = g + (1 - g) s` looks for the worst case (E1). State the budget (steps and step size) beside
every number that comes from here.

Cost: one forward and one backward pass of the model per ascent step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from spd_lens.core.draws import uniform
from spd_lens.core.masks import Importances
from spd_lens.support.given import given_list, given_number, given_one_of, given_whole

Scope = Literal["position", "example", "batch"]


Sources = dict[str, Tensor]


Objective = Callable[[Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class PGD:
    """Budget of a projected gradient ascent by sign steps.

    - `steps`, `step_size`: how often and how far every source moves.
    - `scope`: one source per `position`, per `example` (shared over its positions), or one for the whole `batch`.
    """

    steps: int = 1
    step_size: float = 0.1
    scope: Scope = "batch"

    def __post_init__(self) -> None:
        given_whole("steps", self.steps, least=0)
        given_number("step_size", self.step_size, above=0)
        given_one_of("scope", self.scope, get_args(Scope))


def random_sources(importances: Importances, scope: Scope, generator: torch.Generator) -> Sources:
    """`U(0, 1)` sources with C + 1 channels per site (the last is the delta's), in the shape of `scope`."""
    sources = {}
    for name, g in importances.items():
        match scope:
            case "position":
                lead = tuple(g.shape[:-1])
            case "example":
                lead = (g.shape[0], *([1] * (g.ndim - 2)))
            case "batch":
                lead = (1,) * (g.ndim - 1)
        drawn = uniform((*lead, g.shape[-1] + 1), generator, rows=None if scope == "batch" else 0)
        # Never in half precision: its grid is coarser than a step, and its rounding reaches 1.
        sources[name] = drawn.to(device=g.device, dtype=torch.promote_types(g.dtype, torch.float32))
    return sources


# Makes of the gradients of one process's rows those of the whole batch; `shared`: whether all rows share the sources.
WholeBatch = Callable[[Sequence[Tensor], bool], None]


def ascend(objective: Objective, sources: Sources, pgd: PGD, whole_batch: WholeBatch | None = None) -> Sources:
    """`pgd.steps` sign steps on `objective(sources)`, each clamped to [0, 1]; returns detached sources (K3).

    The objective is evaluated with gradients for the sources alone: whatever it closes over should be detached.
    """
    for _ in range(pgd.steps):
        leaves = {name: source.detach().requires_grad_(True) for name, source in sources.items()}
        with torch.enable_grad():
            gradients = torch.autograd.grad(objective(leaves), list(leaves.values()), allow_unused=True)
        if whole_batch is not None:
            gradients = _of_whole_batch(leaves.values(), gradients, whole_batch, shared=pgd.scope == "batch")
        sources = {
            name: leaf.detach() if grad is None else (leaf.detach() + pgd.step_size * grad.sign()).clamp(0, 1)
            for (name, leaf), grad in zip(leaves.items(), gradients, strict=True)
        }
    return {name: source.detach() for name, source in sources.items()}


def _of_whole_batch(
    sources: Iterable[Tensor], gradients: Iterable[Tensor | None], whole_batch: WholeBatch, *, shared: bool
) -> list[Tensor]:
    """Gradients over all processes; a source that this process's rows do not use has one of zeros."""
    found = [
        torch.zeros_like(source) if gradient is None else gradient.contiguous()
        for source, gradient in zip(sources, gradients, strict=True)
    ]
    whole_batch(found, shared)
    return found


@dataclass(frozen=True)
class Persistent:
    """Sources that are kept between training steps and climb by Adam (K4, K4b).

    - `warm_steps`: ascents before the loss of a step is computed; one more uses the gradients of the loss itself.
    - `lr`, `betas`: Adam's. The published rule of thumb: ascents times `lr` over a source's life is about 2.
    - `lr_warmup`: share of the run from `start` on over which `lr` rises from 0 (published: 0.025).
    - `scope`: as for `PGD`; with `"position"` every row of the batch and position has sources of its own, and batches
      must keep their shape.
    - `start`: share of the run before which masks are drawn at random instead.
    - `first_steps`: ascents when the sources are made, before anything is descended.
    """

    warm_steps: int = 1
    lr: float = 0.01
    betas: tuple[float, float] = (0.5, 0.99)
    lr_warmup: float = 0.0
    scope: Scope = "batch"
    start: float = 0.0
    first_steps: int = 0

    def __post_init__(self) -> None:
        given_whole("first_steps", self.first_steps, least=0)
        given_whole("warm_steps", self.warm_steps, least=0)
        given_number("lr", self.lr, above=0)
        given_one_of("scope", self.scope, get_args(Scope))
        for name in ("lr_warmup", "start"):
            if given_number(name, getattr(self, name), least=0, most=1) == 1:
                raise ValueError(f"{name}=1; expected a share of the run, below 1")
        betas = given_list("betas", self.betas, "two numbers, such as (0.5, 0.99)")
        if len(betas) != 2 or any(given_number("beta", beta, least=0, most=1) == 1 for beta in betas):
            raise ValueError(f"betas={self.betas}; expected two numbers, 0 <= beta < 1")


class PersistentSources:
    """Sources kept between training steps and ascended by Adam (K4); by default Adam(0.5, 0.99) at learning rate 0.01.

    Every training step calls `warm(objective)` (n ascents), uses `tensors()` in its loss, and after the backward pass
    `ascend_from_graph()` (one more). Their shape is that of the first batch's importances in the given scope.
    """

    def __init__(self, importances: Importances, spec: Persistent, *, generator: torch.Generator) -> None:
        self._start(random_sources(importances, spec.scope, generator), spec)

    def _start(self, sources: Sources, spec: Persistent) -> None:
        self.spec = spec
        self.whole_batch: WholeBatch | None = None
        self._sources = {name: source.requires_grad_(True) for name, source in sources.items()}
        # maximize: the sources climb the loss that everything else descends.
        devices = {source.device.type for source in sources.values()}
        self._adam = torch.optim.Adam(
            self._sources.values(),
            lr=spec.lr,
            betas=spec.betas,
            maximize=True,
            fused=devices <= {"cpu", "cuda"},
            capturable=devices == {"cuda"},
        )

    def tensors(self) -> Sources:
        """The sources themselves, requiring gradients."""
        return self._sources

    def set_progress(self, progress: float) -> None:
        """Set the learning rate for a share of the run: linear warm-up, then constant."""
        rising = self.spec.lr_warmup > 0 and progress < self.spec.lr_warmup
        self._adam.param_groups[0]["lr"] = self.spec.lr * (progress / self.spec.lr_warmup if rising else 1.0)

    def warm(self, objective: Objective, steps: int | None = None) -> None:
        """`warm_steps` (or `steps`) ascents on the objective; gradients reach only the sources."""
        for _ in range(self.spec.warm_steps if steps is None else steps):
            with torch.enable_grad():
                gradients = torch.autograd.grad(
                    objective(self._sources), list(self._sources.values()), allow_unused=True
                )
            for source, gradient in zip(self._sources.values(), gradients, strict=True):
                # Fused Adam reads memory in order: an expanded gradient (of a sum) would be misread.
                source.grad = None if gradient is None else gradient.contiguous()
            self._step()

    def ascend_from_graph(self) -> None:
        """One ascent with the gradients that the training step's backward pass left on the sources."""
        self._step()

    def _step(self) -> None:
        if self.whole_batch is not None:
            sources = self._sources.values()
            gradients = _of_whole_batch(
                sources, [s.grad for s in sources], self.whole_batch, shared=self.spec.scope == "batch"
            )
            for source, gradient in zip(sources, gradients, strict=True):
                source.grad = gradient
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        with torch.no_grad():
            for source in self._sources.values():
                source.clamp_(0, 1)

    def tensors_by_name(self) -> dict[str, Tensor]:
        """Sources and Adam's moments, for checkpoints."""
        tensors = {f"source|{name}": source.detach().clone() for name, source in self._sources.items()}
        names = list(self._sources)
        for index, state in self._adam.state_dict()["state"].items():
            tensors |= {f"adam.{key}|{names[index]}": value.clone() for key, value in state.items()}
        return tensors

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], spec: Persistent, *, device: torch.device
    ) -> PersistentSources:
        """Undo `tensors_by_name`."""
        restored = cls.__new__(cls)
        sources = {k.removeprefix("source|"): v.to(device) for k, v in tensors.items() if k.startswith("source|")}
        restored._start({name: source.clone() for name, source in sources.items()}, spec)
        states: dict[int, dict[str, Tensor]] = {}
        for index, name in enumerate(sources):
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if f"adam.{key}|{name}" in tensors:
                    states.setdefault(index, {})[key] = tensors[f"adam.{key}|{name}"].clone()
        groups = restored._adam.state_dict()["param_groups"]
        restored._adam.load_state_dict({"state": states, "param_groups": groups})
        return restored
