"""`Rival`: a change of a model with a strength, so that ways to edit are compared at equal effect.

Each way looks at the same examples (prompts with the habit) and the same control text. Left out: every method's own
tricks. Where a choice is needed (the block, the number of heads), the one with the smaller KL on the control text is
taken (`cheapest`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spd_lens.core import Decomposition
from spd_lens.editing import Habit, kl_from


@dataclass(frozen=True)
class Rival:
    """A change of a model with a strength: inside `at(s)` the decomposition's model computes what the changed one does.

    - `strongest`: the largest strength that makes sense. `parameters_changed`: of the weights that it would be written
      into, or, for an intervention that is not in the weights, the numbers that it keeps.
    """

    name: str
    at: Callable[[float], AbstractContextManager[Any]]
    parameters_changed: int
    strongest: float = 1.0

    def forward(self, decomposition: Decomposition, strength: float) -> Callable[[Tensor], Tensor]:
        """The changed model as a function of tokens."""

        def run(tokens: Tensor) -> Tensor:
            with torch.no_grad(), self.at(strength):
                return decomposition.host.forward(tokens)

        return run


def effect_at(decomposition: Decomposition, rival: Rival, habit: Habit, strength: float) -> float:
    """The share of the habit's probability that is gone at a strength."""
    return _effect(decomposition, rival, habit, strength, _before(decomposition, habit))


def _before(decomposition: Decomposition, habit: Habit) -> Tensor:
    return habit.probability(decomposition.host.forward).mean()


def _effect(decomposition: Decomposition, rival: Rival, habit: Habit, strength: float, before: Tensor) -> float:
    return 1 - float(habit.probability(rival.forward(decomposition, strength)).mean() / before)


def strength_for(decomposition: Decomposition, rival: Rival, habit: Habit, goal: float, *, halvings: int = 4) -> float:
    """The smallest strength found with an effect of at least `goal` on the habit; the strongest if none has it."""
    low, high, before = 0.0, min(1.0, rival.strongest), _before(decomposition, habit)
    # From below: far beyond what a change was made for, anything may happen.
    while _effect(decomposition, rival, habit, high, before) < goal:
        if high >= rival.strongest:
            return high
        low, high = high, min(2 * high, rival.strongest)
    for _ in range(halvings):
        middle = (low + high) / 2
        reached = _effect(decomposition, rival, habit, middle, before) >= goal
        low, high = (low, middle) if reached else (middle, high)
    return high


def cheapest(
    decomposition: Decomposition, rivals: Sequence[Rival], habit: Habit, controls: Tensor, goal: float
) -> Rival:
    """The rival with the smallest KL on the controls at equal effect, of those that come nearest to the goal."""
    if len(rivals) == 1:
        return rivals[0]

    def cost(rival: Rival) -> tuple[float, float]:
        strength = strength_for(decomposition, rival, habit, goal)
        missed = max(0.0, goal - effect_at(decomposition, rival, habit, strength))
        with torch.no_grad():
            clean = decomposition.host.forward(controls)
        return round(missed, 2), float(kl_from(clean, rival.forward(decomposition, strength)(controls)).mean())

    return min(rivals, key=cost)


def against(habit: Habit, logits: Tensor, clean: Tensor) -> Tensor:
    """`-log(1 - p(answers))` where the habit comes next, plus the KL to the unedited model at the other positions."""
    p = habit.log_probability(logits).exp()
    first, second = clean[:, :-1].detach().log_softmax(-1), logits[:, :-1].log_softmax(-1)
    return -torch.log1p(-p.clamp_max(0.9999)).mean() + (first.exp() * (first - second)).sum(-1).mean()
