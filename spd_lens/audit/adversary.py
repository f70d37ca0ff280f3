"""The adversary of a claim: masks that the importances allow and that make the claim as small as they can.

Claim: replacing these cells moves the margin by e. Under masks `m = g + (1 - g) s` (K3; delta's mask is `s` too) the
same intervention moves it by e(s). The adversary looks for the `s in [0, 1]` with the smallest `sign(e) e(s)`; one
source per site and subcomponent, shared by all positions of the one case. What counts is the smallest value seen at any
step of any start, so a larger budget never gives a larger one (E1b). Sign steps; their size halves when half of them
are done, and again at three quarters, because steps of one size overshoot.

The same climb with nothing replaced tells how small the margin itself can be made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens.audit.trials import Cells, Trials, Values
from spd_lens.core.masks import mask_from_source
from spd_lens.objective.adversary import random_sources

# A report may ask for no more: nobody waits for what a file from elsewhere makes `verify` do.
MOST_STEPS, MOST_STARTS = 1_000, 64


@dataclass(frozen=True)
class Budget:
    """What an adversary may do: `steps` of `step_size` (at first) from each of `starts` random starts."""

    steps: int = 20
    step_size: float = 0.1
    starts: int = 2

    def __post_init__(self) -> None:
        if not (1 <= self.steps <= MOST_STEPS and 1 <= self.starts <= MOST_STARTS and 0 < self.step_size <= 1):
            raise ValueError(
                f"{self}; expected 1 to {MOST_STEPS:,} steps, 1 to {MOST_STARTS} starts and 0 < step_size <= 1"
            )


def worst_claims(
    trials: Trials,
    importances: Mapping[str, Float[Tensor, "1 pos C"]],
    claims: Sequence[tuple[Cells, float]],
    values: Values,
    budget: Budget,
    generator: torch.Generator,
) -> list[float]:
    """For every claim (cells, effect) the smallest `sign * effect` that the adversary reaches; last the margin's own.

    All claims and starts climb in one batch, two rows each: with the cells as they are and with them replaced.
    """
    n = (len(claims) + 1) * budget.starts
    signs = torch.tensor([1.0 if effect >= 0 else -1.0 for _, effect in claims] + [1.0], device=trials.tokens.device)
    signs = signs.repeat(budget.starts)
    nothing = {name: torch.zeros_like(g[0], dtype=torch.bool) for name, g in importances.items()}
    sets = ([cells for cells, _ in claims] + [nothing]) * budget.starts
    where = {name: torch.stack([torch.zeros_like(cells[name]) for cells in sets] + [c[name] for c in sets])
             for name in importances}  # fmt: skip
    rows = {name: g.expand(n, -1, -1) for name, g in importances.items()}
    x = random_sources(rows, "example", generator)
    best = torch.full((n,), torch.inf, device=signs.device)
    is_margin = torch.zeros(len(claims) + 1, device=signs.device)
    is_margin[-1] = 1.0
    is_margin = is_margin.repeat(budget.starts)
    for step in range(budget.steps + 1):
        leaves = {name: s.detach().requires_grad_(True) for name, s in x.items()}
        with torch.enable_grad():
            both = trials.run(2 * n, _hooks(trials, importances, leaves, where, values))
            own, replaced = both[:n], both[n:]
            claim = signs * (own - replaced * (1 - is_margin))
            gradients = torch.autograd.grad(claim.sum(), list(leaves.values()), allow_unused=True)
        best = torch.minimum(best, claim.detach())
        size = budget.step_size * 0.5 ** sum(step >= share * budget.steps for share in (0.5, 0.75))
        for name, gradient in zip(x, gradients, strict=True):
            if gradient is not None:
                x[name] = (x[name] - size * gradient.sign()).clamp(0, 1)
    return [float(v) for v in best.view(budget.starts, -1).amin(0)]


def _hooks(
    trials: Trials,
    importances: Mapping[str, Tensor],
    sources: Mapping[str, Tensor],
    where: Mapping[str, Tensor],
    values: Values,
) -> list[tuple[str, Any]]:
    hooks: list[tuple[str, Any]] = []
    for name, weight in trials.decomposition.items():
        acts, _, mask, delta = weight.site.point_names()
        source = torch.cat([sources[name], sources[name]])
        g = importances[name].expand(len(source), -1, -1)
        hooks.append((mask, partial(_times, factor=mask_from_source(g, source[..., :-1]))))
        hooks.append((delta, partial(_times, factor=source[..., -1:].expand(*g.shape[:-1], 1))))
        if bool(where[name].any()):
            hooks.append((acts, partial(_replace, where=where[name], values=values[name])))
    return hooks


def _times(value: Tensor, hook: Any, *, factor: Tensor) -> Tensor:
    return value * factor.to(value.dtype)


def _replace(value: Tensor, hook: Any, *, where: Tensor, values: Tensor) -> Tensor:
    return torch.where(where, values.to(value.dtype), value)
