"""`find`: which subcomponents, and components, a habit hangs on, and which of them other text does not need.

Gradients say quickly which of thousands are worth a try; those are then ablated one by one, exactly, on the habit's
prompts and on control text. The estimate's agreement with what was measured stands beside the result.

Cost: one forward and backward pass over the prompts; `n_measured` passes over the prompts and over the controls.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.inputs import checked_decomposition
from spd_lens.core.units import Ids, Unit, units_of
from spd_lens.editing.findings import Findings, MeasuredUnit
from spd_lens.editing.habit import Habit, check_other_text, checked_habit
from spd_lens.objective.divergences import divergence_per_position, log_probs
from spd_lens.patching.ablation import ablation_effects
from spd_lens.patching.arguments import checked_input
from spd_lens.patching.attribution import attribution_patching
from spd_lens.support.given import given_whole
from spd_lens.tasks.task import Task

# Prompts that the gradients are taken on; more would only cost memory.
_ESTIMATED_ON = 64


def find(
    decomposition: Decomposition,
    behaviour: Habit | Task,
    controls: Int[Tensor, "row pos"],
    ids: Ids = None,
    *,
    n_measured: int = 48,
    n_checked: int = 32,
    per_pass: int | None = None,
) -> Findings:
    """Units ranked by the measured effect of ablating them: on the behaviour, against that on control text.

    - `behaviour`: a `Habit`, or a `Task` (its answers after its clean prompts).
    - `controls`: tokens of text that is to stay as it is.
    - `ids`: what is looked at, as everywhere (`units_of`): None is every subcomponent; a list of units also components.
      Units of several subcomponents are all measured; of the others the `n_measured` with the largest estimates.

    Raises ValueError for unknown sites, ids, for prompts and controls that the model cannot run, and for controls that
    are the behaviour's own prompts.
    """
    checked_decomposition(decomposition, "find")
    habit = checked_habit(behaviour, "find", decomposition)
    controls = checked_input(decomposition, controls, "controls")
    check_other_text(habit, controls, "controls")
    n_measured = given_whole("n_measured", n_measured, least=1)
    units = units_of(decomposition, ids)
    few = habit[:_ESTIMATED_ON]
    lead = few.prompts.shape
    # A run whose activations are all 0: to patch it in is to ablate a subcomponent.
    nothing = {decomposition[s].site.point_names()[0]: torch.zeros(*lead, 1) for u in units for s in u.sites}
    estimates = attribution_patching(
        decomposition,
        few.prompts,
        nothing,
        few.log_odds,
        units,
        positions=None,
        n_checked=n_checked,
        per_pass=per_pass,
    )
    drops = -estimates.effects.effects[:, 0]
    order = drops.argsort(descending=True, stable=True).tolist()
    singles = [i for i in order if len(units[i].members) == 1][:n_measured]
    chosen = [i for i in order if len(units[i].members) > 1] + singles
    tried = [units[i] for i in chosen]
    on_habit = ablation_effects(decomposition, habit.prompts, habit.log_odds, tried, per_pass=per_pass)
    costs = _costs(decomposition, controls, tried, per_pass)
    measured = -on_habit.effects[:, 0]
    errors = on_habit.standard_error[:, 0] if len(habit) > 1 else torch.zeros(len(tried))
    scores = measured / (costs + costs.median().clamp_min(1e-9))
    clear = measured > 2 * errors
    ranking = sorted(range(len(tried)), key=lambda k: (not bool(clear[k]), -float(scores[k])))
    candidates = tuple(
        MeasuredUnit(
            unit=tried[k],
            drop=float(measured[k]),
            standard_error=float(errors[k]),
            cost=float(costs[k]),
            estimate=float(drops[chosen[k]]),
            score=float(scores[k]),
        )
        for k in ranking
    )
    return Findings(decomposition, habit, candidates, estimates.agreement, len(units))


def _costs(
    decomposition: Decomposition, controls: Tensor, units: Sequence[Unit], per_pass: int | None
) -> Float[Tensor, " unit"]:
    """Mean KL from the target on the controls without each unit."""
    with torch.no_grad():
        clean = log_probs(decomposition.clean_pass(controls).output)

    def kl(logits: Tensor) -> Tensor:
        return divergence_per_position(clean, logits, clean_is_log_probs=True).mean(-1)

    return ablation_effects(decomposition, controls, kl, units, per_pass=per_pass).effects[:, 0].to(torch.float32)
