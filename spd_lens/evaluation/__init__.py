"""Judge a decomposition: `evaluate` measures it, `EvaluationReport` says in words what that means.

`worst_case` is the adversary alone; `report.verdict` is a `Verdict`."""

from spd_lens.evaluation.attack import LADDER, WorstCase, worst_case
from spd_lens.evaluation.deletion import Deletion
from spd_lens.evaluation.evaluating import evaluate
from spd_lens.evaluation.report import AttackReport, EvaluationReport
from spd_lens.evaluation.site_report import SiteReport, failure_modes
from spd_lens.evaluation.verdict import Verdict, judge

__all__ = [
    "LADDER",
    "AttackReport",
    "Deletion",
    "EvaluationReport",
    "SiteReport",
    "Verdict",
    "WorstCase",
    "evaluate",
    "failure_modes",
    "judge",
    "worst_case",
]
