"""`CircuitConfig`: every choice of a circuit search, frozen, and checked as a whole when it is made."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal, TypeAlias, get_args

from annotated_types import Le
from pydantic import BeforeValidator

from spd_lens.circuits.behaviour import Objective
from spd_lens.circuits.check import BUDGETS
from spd_lens.circuits.circuit_report import HOLDS_ABOVE
from spd_lens.objective.adversary import PGD
from spd_lens.support.validated import (
    Count,
    CountOrZero,
    Flag,
    NonNegative,
    Positive,
    Seed,
    as_tuple,
    unknown_field,
    validated,
)

CircuitMasks: TypeAlias = Literal["importance", "stochastic", "pgd", "persistent"]


def _mask_kinds(value: Any) -> Any:
    chosen = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, (list, tuple)) else ()
    known = get_args(CircuitMasks)
    if not chosen or len(set(map(str, chosen))) < len(chosen) or any(kind not in known for kind in chosen):
        raise ValueError(f"expected one or several different ones of {', '.join(map(repr, known))}")
    return chosen


@validated
class CircuitConfig:
    """All choices of `find_circuit`.

    What is kept
    - `objective`: `"kl"` to the target's whole distribution, or `"answer"`: `-log p(answers)` of a task.

    How
    - `masks`: one mask source or several: `"importance"` (outside and delta 0), `"stochastic"` (K1), `"pgd"` (a fresh
      adversary in every step, of budget `pgd`), `"persistent"` (K4, cheaper: its sources are kept, one ascent a step).
    - `by_position`: a node is a subcomponent at one position; for prompts of one template.
    - `start`: from the gates' largest importance on the prompts, or with all nodes on.
    - `minimality`: what a node has to be worth, as a share of the behaviour; `p`: exponent of L2. `steps`, `lr` of
      Adam, cosine to 0; `rows_per_step`: random rows in every step (None: all).
    - `tolerance`: how far pruning may raise the distance under the same mask sources, as a share of the behaviour;
      `prune_tries`: how many times the second round of pruning may measure.

    The report
    - `budgets`, `restarts`, `holds_above`: as in `check_circuit`. `seed`: of everything that is drawn.

    Raises ValueError for values that make no sense, TypeError for unknown fields, when it is made.
    """

    objective: Objective = "kl"
    masks: Annotated[tuple[CircuitMasks, ...], BeforeValidator(_mask_kinds)] = ("stochastic", "pgd")
    by_position: Flag = False
    start: Literal["gates", "all"] = "gates"
    minimality: NonNegative = 2e-3
    p: Positive = 1.0
    steps: Count = 200
    lr: Positive = 0.05
    pgd: PGD = PGD(8, 0.2, "batch")
    rows_per_step: Count | None = None
    tolerance: NonNegative = 0.02
    prune_tries: CountOrZero = 60
    budgets: Annotated[tuple[Count, ...], as_tuple] = BUDGETS
    restarts: Count = 3
    holds_above: Annotated[float, Positive, Le(1)] = HOLDS_ABOVE
    seed: Seed = 0

    def changed(self, **changes: Any) -> CircuitConfig:
        """A copy with some fields changed, checked again."""
        known = {field.name for field in dataclasses.fields(self)}  # pyright: ignore[reportArgumentType]
        unknown = [name for name in changes if name not in known]
        if unknown:
            raise unknown_field(CircuitConfig, unknown[0])
        return dataclasses.replace(self, **changes)  # pyright: ignore[reportType]
