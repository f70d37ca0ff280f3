"""What is audited: one decision at one position, as a margin between two outputs.

The margin is `logit[chosen] - logit[other]` at the position. It is above 0 exactly where the model prefers `chosen`, so
every claim of an audit is a number of the margin's unit (natural log of odds).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens.support.names import near_names


@dataclass(frozen=True)
class Decision:
    """`chosen` against `other`, numbers of outputs, at `position`; the names are for people.

    >>> Decision(1, 0, chosen_name="declined", other_name="approved").margin(torch.tensor([[[0.5, 2.0]]]))
    tensor([1.5000])
    """

    chosen: int
    other: int
    position: int = -1
    chosen_name: str = ""
    other_name: str = ""

    def margin(self, logits: Float[Tensor, "batch pos out"]) -> Float[Tensor, " batch"]:
        """Logit of the chosen output minus logit of the other."""
        own = logits[:, self.position]
        return own[:, self.chosen] - own[:, self.other]


def the_decision(
    given: Any, logits: Float[Tensor, "1 pos out"], names: Sequence[str] | None, position: int | None = None
) -> Decision:
    """The decision that `given` names, checked against what the model says.

    - a name out of `names`, or the number of an output: against the strongest other output.
    - a pair of these: the first against the second.
    - a `Decision`.

    Raises TypeError for anything else; ValueError for outputs and positions that the model does not have, and for a
    decision that it does not make: where another output is stronger.
    """
    at = position if position is not None else (given.position if isinstance(given, Decision) else -1)
    n_pos, n_out = logits.shape[1:]
    if isinstance(at, bool) or not isinstance(at, Integral) or not -n_pos <= at < n_pos:
        raise ValueError(f"position={at!r}; expected a position of the input, {-n_pos}..{n_pos - 1}")
    at = int(at) % n_pos
    if isinstance(given, Decision):
        chosen, other = _output(given.chosen, n_out, None), _output(given.other, n_out, None)
    elif isinstance(given, (tuple, list)) and len(given) == 2:
        chosen, other = (_output(item, n_out, names) for item in given)
    else:
        chosen = _output(given, n_out, names)
        others = logits[0, at].detach().clone()
        others[chosen] = -torch.inf
        other = int(others.argmax())
    if chosen == other:
        raise ValueError(f"the decision sets output {chosen} against itself; expected two different outputs")
    shown = [names[i] if names is not None else f"output {i}" for i in (chosen, other)]
    if isinstance(given, Decision):
        shown = [given.chosen_name or shown[0], given.other_name or shown[1]]
    decision = Decision(chosen, other, at, *shown)
    margin = float(decision.margin(logits))
    if not margin > 0:
        best = int(logits[0, at].argmax())
        says = names[best] if names is not None else f"output {best}"
        raise ValueError(
            f"the model does not decide {shown[0]!r} here: its margin over {shown[1]!r} is {margin:.3g}; it says "
            f"{says!r}. Audit that decision, or choose an input where the model decides so"
        )
    return decision


def _output(given: Any, n_out: int, names: Sequence[str] | None) -> int:
    if isinstance(given, str):
        if names is None:
            raise ValueError(
                f"decision {given[:80]!r} is a name, but the outputs have none; give outputs=[...], or a number"
            )
        if given not in names:
            raise ValueError(f"the model has no decision {given[:80]!r}; near: {near_names(given[:80], names)}")
        return list(names).index(given)
    if isinstance(given, bool) or not isinstance(given, Integral):
        raise TypeError(
            f"decision is a {type(given).__name__}; expected the number or the name of an output, a pair of them "
            "(the first against the second), or a Decision"
        )
    number = int(given)
    if not 0 <= number < n_out:
        raise ValueError(f"decision {number}; the model has outputs 0..{n_out - 1}")
    return number
