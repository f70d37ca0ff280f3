"""Changes of parameters as rivals, and a rank-one edit with the covariance of its keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from spd_lens.baselines.rival import Rival, cheapest
from spd_lens.core import Decomposition
from spd_lens.editing import Habit


@contextmanager
def weights_moved(deltas: Sequence[tuple[Tensor, Tensor]], strength: float) -> Iterator[None]:
    """While open, every parameter is `p + strength * delta`; afterwards it is bit for bit what it was."""
    before = [p.detach().clone() for p, _ in deltas]
    with torch.no_grad():
        try:
            for p, delta in deltas:
                p += strength * delta
            yield
        finally:
            for (p, _), old in zip(deltas, before, strict=True):
                p.copy_(old)


def weight_rival(name: str, deltas: Sequence[tuple[Tensor, Tensor]], strongest: float = 16.0) -> Rival:
    """A change of parameters, `(parameter, delta)`, at any strength."""
    changed = sum(int((delta != 0).sum()) for _, delta in deltas)
    return Rival(name, partial(weights_moved, list(deltas)), changed, strongest)


def site_deltas(decomposition: Decomposition, deltas: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """`(parameter, delta)` of changes `[d_in d_out]` of sites."""
    found = []
    for site, delta in deltas.items():
        matrix = decomposition[site].site.matrix
        found.append((matrix.stored(), matrix.as_stored(delta).to(matrix.stored().dtype)))
    return found


def rank_one(
    decomposition: Decomposition,
    habit: Habit,
    controls: Int[Tensor, "row pos"],
    goal: float,
    *,
    steps: int = 20,
) -> Rival:
    """A rank-one edit of an output matrix with the covariance of its keys, as in ROME.

    `W' = W + C^-1 k v^T / (k^T C^-1 k)`: `k` the mean input where the habit comes next, `C` the second moment of inputs
    on control text, `v` what has to be added to the output there, found by gradient descent on `log p(answers)`.
    """
    sites = [s for s in decomposition if s.endswith("mlp.W_out")] or [s for s in decomposition if s.endswith("W_O")]
    rivals = []
    for site in sites:
        x = decomposition.clean_pass(controls).inputs[site]
        x = x.flatten(2) if x.ndim == 4 else x
        k = decomposition.clean_pass(habit.prompts).inputs[site][:, -1]
        k = (k.flatten(1) if k.ndim == 3 else k).mean(0)
        x = x.flatten(0, 1)
        C = x.T @ x / len(x)
        C = C + 1e-3 * C.diagonal().mean() * torch.eye(len(C), device=C.device)
        direction = torch.linalg.solve(C, k)
        v = _value_against(decomposition, site, habit, steps)
        delta = torch.outer(direction / (k @ direction), v)
        rivals.append(weight_rival("rank one, key covariance", site_deltas(decomposition, {site: delta}), 16.0))
    return cheapest(decomposition, rivals, habit, controls, goal)


def _value_against(decomposition: Decomposition, site: str, habit: Habit, steps: int) -> Tensor:
    point = decomposition[site].site.output.name
    v = torch.zeros(decomposition[site].U.shape[1], device=decomposition.device, requires_grad=True)
    optimiser = torch.optim.Adam([v], lr=0.1)

    def added(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[:, -1] = value[:, -1] + v
        return value

    for _ in range(steps):
        with torch.enable_grad(), decomposition.model.hooks(fwd_hooks=[(point, added)]):
            loss = habit.log_probability(decomposition.host.forward(habit.prompts)).mean() + 0.05 * v.square().sum()
            optimiser.zero_grad()
            loss.backward()
        optimiser.step()
    return v.detach()
