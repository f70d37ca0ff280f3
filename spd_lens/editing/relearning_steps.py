"""Relearning: how many fine-tuning steps bring a habit back into a model that was edited.

A few steps mean that the edit has hidden the habit rather than removed it. The steps are those of an attacker who has
examples of the habit and trains every parameter on them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spd_lens.editing.baking import given_plain, outputs_of
from spd_lens.editing.habit import Habit, checked_habit
from spd_lens.support.given import given_number, given_whole
from spd_lens.support.shown import short_repr, text_html

# Back means: this share of the probability before the edit.
BACK_AT = 0.9


@dataclass(frozen=True)
class Relearning:
    """The habit's probability on held-out prompts after each number of fine-tuning steps.

    - `goal`: the probability before the edit; `steps[i]` steps gave `probability[i]`.
    - `n_examples`, `learning_rate`: of AdamW on every parameter, all examples at once.
    """

    goal: float
    steps: tuple[int, ...]
    probability: tuple[float, ...]
    n_examples: int
    learning_rate: float

    __repr__ = short_repr
    _repr_html_ = text_html

    @property
    def back_after(self) -> int | None:
        """The first number of steps with 90 % of the probability from before the edit; None: not within these steps."""
        return next((s for s, p in zip(self.steps, self.probability, strict=True) if p >= BACK_AT * self.goal), None)

    def curves(self) -> list[list[float]]:
        """`[step, probability / goal]`, for pictures."""
        return [[float(s), p / self.goal] for s, p in zip(self.steps, self.probability, strict=True)]

    def __str__(self) -> str:
        within = f"not back within {self.steps[-1]} steps (at {self.probability[-1] / self.goal:.0%})"
        after = within if self.back_after is None else f"back after {self.back_after} steps"
        return (
            f"fine-tuning on {self.n_examples} examples at learning rate {self.learning_rate:g}: {after}; back is "
            f"{BACK_AT:.0%} of p = {self.goal:.3f}"
        )


def relearning(
    model: nn.Module,
    examples: Habit,
    held_out: Habit,
    *,
    goal: float,
    steps: int = 64,
    learning_rate: float = 1e-4,
) -> Relearning:
    """Fine-tune a copy of a plain model on `examples`; measure the habit on `held_out` after 0, 1, 2, 4 ... steps.

    Raises TypeError and ValueError for what is no model, no habit, and numbers out of range.
    """
    given_plain("model", model)
    examples, held_out = checked_habit(examples, "relearning"), checked_habit(held_out, "relearning")
    goal = given_number("goal", goal, above=0.0, most=1.0)
    steps = given_whole("steps", steps, least=0)
    learning_rate = given_number("learning_rate", learning_rate, above=0.0)
    tuned: Any = copy.deepcopy(model)
    tuned.requires_grad_(True)
    optimiser = torch.optim.AdamW(tuned.parameters(), lr=learning_rate, weight_decay=0.0)

    def forward(tokens: Tensor) -> Tensor:
        return outputs_of(tuned, tokens)

    looked_at = sorted({0, steps} | {2**k for k in range(steps.bit_length()) if 2**k <= steps})
    found = []
    for step in range(steps + 1):
        if step in looked_at:
            found.append(float(held_out.probability(forward).mean()))
            if found[-1] >= BACK_AT * goal:
                break
        if step < steps:
            with torch.enable_grad():
                loss = -examples.log_probability(forward(examples.prompts)).mean()
                optimiser.zero_grad()
                loss.backward()
            optimiser.step()
    return Relearning(goal, tuple(looked_at[: len(found)]), tuple(found), len(examples), learning_rate)
