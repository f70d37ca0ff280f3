"""The adversary of a claim: it finds worse masks than chance does, and cannot touch what has importance 1."""

from __future__ import annotations

import pytest
import torch

from spd_lens.audit import Budget, Choices, judge_places
from spd_lens.core import SiteMask
from tests.audit.conftest import SMALL, Audited


def random_margins(audited: Audited, n: int) -> torch.Tensor:
    """The margin of the first applicant under `n` draws of masks that its importances allow."""
    tokens = audited.declined[:1]
    importances = audited.decomposition.importance(tokens)
    generator = torch.Generator().manual_seed(5)
    found = []
    for _ in range(n):
        masks = {}
        for name, g in importances.items():
            # One source for all positions, as the adversary has.
            source = torch.rand(g.shape[-1] + 1, generator=generator)
            masks[name] = SiteMask(g + (1 - g) * source[:-1], source[-1].expand(g.shape[:2]))
        with torch.no_grad():
            logits = audited.decomposition.masked_forward(tokens, masks)[0, -1]
        found.append(float(logits[1] - logits[0]))
    return torch.tensor(found)


def test_twenty_steps_find_a_lower_margin_than_random_masks(audited: Audited) -> None:
    report = audited.explain(choices=Choices(n_controls=4, n_draws=8, budget=Budget(steps=20, starts=1)))
    by_chance = random_margins(audited, 40)
    assert report.decision.worst_margin < float(by_chance.min())
    assert report.decision.worst_margin < report.decision.margin


def test_a_budget_that_makes_no_sense_is_refused() -> None:
    for budget in (
        {"steps": 0},
        {"starts": 0},
        {"step_size": 0.0},
        {"step_size": 2.0},
        {"steps": 1_001},
        {"starts": 65},
    ):
        with pytest.raises(ValueError, match="expected 1 to 1,000 steps, 1 to 64 starts and 0 < step_size <= 1"):
            Budget(**budget)
    with pytest.raises(ValueError, match="n_reasons=9; expected 1 to 4"):
        Choices(n_reasons=9)


def test_judging_places_and_explaining_say_the_same_about_a_reason(audited: Audited) -> None:
    """On one seed the control cases are the same, so the effects are."""
    judged = judge_places(audited.decomposition, audited.declined[0], 1, cases=audited.cases, choices=SMALL)
    for reason in audited.report.reasons:
        own = judged[reason.place.position]
        assert own.effect == pytest.approx(reason.effect, abs=1e-5)
        assert own.change is not None
        assert reason.counterfactual is not None
        assert own.change.measured == pytest.approx(reason.counterfactual.measured, abs=1e-5)
