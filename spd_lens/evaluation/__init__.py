"""Judge a decomposition: `evaluate` measures it, `EvaluationReport` says in words what that means."""

from spd_lens.evaluation.evaluating import evaluate, worst_case
from spd_lens.evaluation.report import EvaluationReport, SiteReport, failure_modes

__all__ = ["EvaluationReport", "SiteReport", "evaluate", "failure_modes", "worst_case"]
