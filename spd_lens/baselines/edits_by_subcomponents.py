"""Ours, as rivals: subcomponents scaled, and turned to directions that are trained against the habit."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spd_lens.baselines.rival import Rival, against, cheapest
from spd_lens.core import Decomposition
from spd_lens.editing import Edit, Findings, Habit, Rewrite, edit


def edit_rival(name: str, made: Edit, strongest: float = 2.0) -> Rival:
    """An edit, at any strength."""

    def at(strength: float) -> AbstractContextManager[Any]:
        return made.scaled(max(strength, 1e-9)).applied()

    return Rival(name, at, sum(made.parameters_changed().values()), strongest)


def components(
    decomposition: Decomposition, habit: Habit, controls: Tensor, goal: float, found: Findings
) -> tuple[Rival, Edit]:
    """Ours: subcomponents that `find` names, scaled; of several numbers of them the one that costs least."""
    ranked = found.clear or found.units
    edits = [edit(decomposition, ranked[:k]) for k in (1, 4, 8, 16, 32) if k <= len(ranked)]
    rivals = [edit_rival("components", made) for made in edits]
    best = cheapest(decomposition, rivals, habit, controls, goal)
    return best, edits[next(k for k, rival in enumerate(rivals) if rival is best)]


def component_writes(
    decomposition: Decomposition, habit: Habit, found: Findings, *, n: int = 8, lr: float = 3e-2, steps: int = 20
) -> tuple[Rival, Edit]:
    """Ours: what the best subcomponents write is turned to a direction that is trained against the habit."""
    units = [unit for unit in (found.clear or found.units) if len(unit.members) == 1][:n]
    by_site: dict[str, list[int]] = {}
    for unit in units:
        by_site.setdefault(unit.site, []).append(unit.id)
    turned = {
        site: torch.zeros(len(ids), decomposition[site].U.shape[1], device=decomposition.device, requires_grad=True)
        for site, ids in by_site.items()
    }
    acts: dict[str, Tensor] = {}
    hooks = []
    for site, ids in by_site.items():
        weight = decomposition[site]
        hooks.append((weight.site.point_names()[0], partial(_keep, acts=acts, site=site, ids=ids)))
        moved = partial(_write_more, acts=acts, site=site, weight=weight, more=turned[site])
        hooks.append((weight.site.output.name, moved))
    forward = decomposition.host.forward
    with torch.no_grad():
        clean = forward(habit.prompts)
    optimiser = torch.optim.Adam(list(turned.values()), lr=lr)
    for _ in range(steps):
        with torch.enable_grad(), decomposition.model.hooks(fwd_hooks=hooks):
            loss = against(habit, forward(habit.prompts), clean)
            optimiser.zero_grad()
            loss.backward()
        optimiser.step()
    changes = {
        site: {
            c: Rewrite(writes=(decomposition[site].U[c] + turned[site][k]).detach())
            for k, c in enumerate(by_site[site])
        }
        for site in by_site
    }
    made = edit(decomposition, changes)
    return edit_rival("components, trained writes", made, 16.0), made


def _keep(value: Tensor, hook: Any, *, acts: dict[str, Tensor], site: str, ids: list[int]) -> None:
    acts[site] = value[..., ids]


def _write_more(value: Tensor, hook: Any, *, acts: dict[str, Tensor], site: str, weight: Any, more: Tensor) -> Tensor:
    return value + weight.through_U(acts[site], value, more)
