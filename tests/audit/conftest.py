"""One audit that the tests of this folder share: a declined applicant, with small budgets."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from spd_lens.audit import AuditReport, Budget, Cases, Choices, Verification, explain, verify
from spd_lens.core import Decomposition
from spd_lens.models import credit_cases, decline_margin, load_credit, load_credit_applicants
from spd_lens.support import checked_text

SMALL = Choices(n_controls=4, n_draws=16, budget=Budget(steps=4, starts=1))


@dataclass(frozen=True)
class Audited:
    """A decomposition, cases, declined applicants, and the report of the first."""

    decomposition: Decomposition
    cases: Cases
    declined: torch.Tensor
    report: AuditReport

    def explain(self, index: int = 0, **changes: Any) -> AuditReport:
        """The audit of one of the declined applicants."""
        given = {"cases": self.cases, "choices": SMALL, **changes}
        return explain(self.decomposition, self.declined[index], "declined", **given)

    def verify(self, report: AuditReport | Path, **changes: Any) -> Verification:
        """A verification that asks for the budgets of these tests."""
        return verify(report, self.decomposition, **{"cases": self.cases, "standard": SMALL, **changes})


def content(report: AuditReport) -> dict[str, Any]:
    """What the report says, to be changed."""
    return copy.deepcopy(report.model_dump())


def forged(report: AuditReport, change: Callable[[dict[str, Any]], Any], folder: Path) -> Path:
    """The report's file after `change(content)`, with a checksum that fits: a forger has this code too."""
    values = content(report)
    change(values)
    path = folder / "forged.json"
    path.write_text(checked_text(values, format_name="spd_lens audit report", version=3))
    return path


def audited_cases(n: int = 150, **changes: Any) -> Cases:
    """The first training applicants."""
    fields = credit_cases()
    for name in ("tokens", "outcomes", "numbers"):
        fields[name] = fields[name][:n]
    return Cases(**{**fields, **changes})


@pytest.fixture(scope="session")
def audited() -> Audited:
    decomposition = load_credit(decomposed=True)
    tokens = load_credit_applicants("held_out").tokens
    declined = tokens[decline_margin(decomposition.model, tokens) > 0.5]
    cases = audited_cases()
    report = explain(decomposition, declined[0], "declined", cases=cases, choices=SMALL)
    return Audited(decomposition, cases, declined, report)
