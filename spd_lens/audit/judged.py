"""What the interventions of an audit say about one candidate for a reason, and whether that makes it one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from spd_lens.audit.candidates import Key, key_of

# Agreement of a counterfactual: a difference of at most this share of the larger change, or this much.
CF_SHARE, CF_ABSOLUTE = 0.25, 0.05
# Beside these: what only an audit as a whole can say.
Why = Literal[
    "no more than random subcomponents of equal use",
    "the adversary undoes it",
    "no controls of equal use",
    "it does not come out again with other control cases",
    "as many stronger reasons are given",
]


@dataclass(frozen=True)
class Change:
    """The token at `position` changed to `token`: what a candidate's subcomponents predict that the margin loses, and
    what it loses."""

    position: int
    token: int
    predicted: float
    measured: float

    @property
    def agrees(self) -> bool:
        """Equal signs, and a difference of at most a quarter of the larger, or 0.05."""
        gap, size = abs(self.measured - self.predicted), max(abs(self.measured), abs(self.predicted))
        return self.measured * self.predicted > 0 and gap <= max(CF_SHARE * size, CF_ABSOLUTE)


@dataclass(frozen=True)
class Judged:
    """What the interventions say about one place, or about one component.

    - `position`: the place; of a component the one at which another token moves its subcomponents' effect most.
    - `effect`: what the margin loses when its subcomponents are as in the control cases, mean over these.
    - `controls`: the middle 95 % of what random subcomponents of equal use do; None where there are none.
    - `worst`: the smallest effect, in its own direction, that the adversary reaches.
    - `change`: the counterfactual; None where every control case has the same token there.
    """

    position: int
    effect: float
    effects: tuple[float, ...]
    controls: tuple[float, float] | None
    worst: float
    change: Change | None
    component: str | None = None

    @property
    def key(self) -> Key:
        """The component's name, or the position."""
        return key_of(self.component, self.position)

    @property
    def beyond_controls(self) -> bool:
        """Whether the effect is larger, in its own direction, than what random subcomponents of equal use do.

        Below them is not enough: where random ones push hard, an effect near 0 stands outside of theirs, too.
        """
        if self.controls is None:
            return False
        low, high = self.controls
        return self.effect > max(high, 0.0) if self.effect > 0 else self.effect < min(low, 0.0)

    @property
    def why_not(self) -> Why | None:
        """Why this is no reason; None: it is one."""
        if self.controls is None:
            return "no controls of equal use"
        if not self.beyond_controls:
            return "no more than random subcomponents of equal use"
        return None if self.worst > 0 else "the adversary undoes it"
