"""Adversarial mask sources (K3, K4): the masks, allowed by the importances, that hurt reconstruction most.

A decomposition that only survives random masks is not shown to be right: gradient ascent on the sources
`s in [0, 1]` of `m = g + (1 - g) s` looks for the worst case (E1). State the budget (steps and step size) beside
every number that comes from here.

Cost: one forward and one backward pass of the model per ascent step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from spd_lens.core.masks import Importances

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
        if self.steps < 0 or self.step_size <= 0:
            raise ValueError(f"{self}; expected steps >= 0 and step_size > 0")
        if self.scope not in ("position", "example", "batch"):
            raise ValueError(f"scope={self.scope!r}; expected 'position', 'example' or 'batch'")


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
        drawn = torch.rand((*lead, g.shape[-1] + 1), generator=generator, device=generator.device)
        # Never in half precision: its grid is coarser than a step, and its rounding reaches 1.
        sources[name] = drawn.to(device=g.device, dtype=torch.promote_types(g.dtype, torch.float32))
    return sources


def ascend(objective: Objective, sources: Sources, pgd: PGD) -> Sources:
    """`pgd.steps` sign steps on `objective(sources)`, each clamped to [0, 1]; returns detached sources (K3).

    The objective is evaluated with gradients for the sources alone: whatever it closes over should be detached.
    """
    for _ in range(pgd.steps):
        leaves = {name: source.detach().requires_grad_(True) for name, source in sources.items()}
        with torch.enable_grad():
            gradients = torch.autograd.grad(objective(leaves), list(leaves.values()), allow_unused=True)
        sources = {
            name: leaf.detach() if grad is None else (leaf.detach() + pgd.step_size * grad.sign()).clamp(0, 1)
            for (name, leaf), grad in zip(leaves.items(), gradients, strict=True)
        }
    return {name: source.detach() for name, source in sources.items()}


class PersistentSources:
    """Sources kept between training steps and ascended by Adam(0.5, 0.99) at learning rate 0.01 (K4).

    Shared over batch and positions, so that their shape never changes. Every training step calls `warm(objective)`
    (n ascents), uses `tensors()` in its loss, and after the backward pass `ascend_from_graph()` (one more).
    """

    def __init__(self, importances: Importances, *, warm_steps: int, generator: torch.Generator) -> None:
        self._start(random_sources(importances, "batch", generator), warm_steps)

    def _start(self, sources: Sources, warm_steps: int) -> None:
        self.warm_steps = warm_steps
        self._sources = {name: source.requires_grad_(True) for name, source in sources.items()}
        # maximize: the sources climb the loss that everything else descends.
        self._adam = torch.optim.Adam(self._sources.values(), lr=0.01, betas=(0.5, 0.99), maximize=True)

    def tensors(self) -> Sources:
        """The sources themselves, requiring gradients."""
        return self._sources

    def warm(self, objective: Objective) -> None:
        """`warm_steps` ascents on the objective; gradients reach only the sources."""
        for _ in range(self.warm_steps):
            with torch.enable_grad():
                gradients = torch.autograd.grad(
                    objective(self._sources), list(self._sources.values()), allow_unused=True
                )
            for source, gradient in zip(self._sources.values(), gradients, strict=True):
                source.grad = gradient
            self._step()

    def ascend_from_graph(self) -> None:
        """One ascent with the gradients that the training step's backward pass left on the sources."""
        self._step()

    def _step(self) -> None:
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        with torch.no_grad():
            for source in self._sources.values():
                source.clamp_(0, 1)

    def tensors_by_name(self) -> dict[str, Tensor]:
        """Sources, Adam's moments and the number of warm steps, for checkpoints."""
        tensors = {f"source|{name}": source.detach().clone() for name, source in self._sources.items()}
        names = list(self._sources)
        for index, state in self._adam.state_dict()["state"].items():
            tensors |= {f"adam.{key}|{names[index]}": value.clone() for key, value in state.items()}
        return tensors | {"warm_steps": torch.tensor(self.warm_steps)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], *, device: torch.device) -> PersistentSources:
        """Undo `tensors_by_name`."""
        restored = cls.__new__(cls)
        sources = {k.removeprefix("source|"): v.to(device) for k, v in tensors.items() if k.startswith("source|")}
        restored._start({name: source.clone() for name, source in sources.items()}, int(tensors["warm_steps"]))
        states: dict[int, dict[str, Tensor]] = {}
        for index, name in enumerate(sources):
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if f"adam.{key}|{name}" in tensors:
                    states.setdefault(index, {})[key] = tensors[f"adam.{key}|{name}"].clone()
        groups = restored._adam.state_dict()["param_groups"]
        restored._adam.load_state_dict({"state": states, "param_groups": groups})
        return restored
