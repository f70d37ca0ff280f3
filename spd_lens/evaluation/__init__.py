"""Judge a decomposition: `evaluate` measures it, `EvaluationReport` says in words what that means.

`worst_case` is the adversary alone; `report.verdict` is a `Verdict`. `compare` sets two decompositions side by side,
`pareto` many. The rest are the parts that these are made of."""

from spd_lens.evaluation.attack import LADDER, Attack, WorstCase, WorstMasks, climb, worst_case
from spd_lens.evaluation.comparison import Comparison, compare
from spd_lens.evaluation.deletion import Deletion, Needs, needed_at
from spd_lens.evaluation.evaluating import evaluate
from spd_lens.evaluation.held import Held, Passes
from spd_lens.evaluation.intervals import Tally, bootstrap_intervals, mean_per_position
from spd_lens.evaluation.pareto_front import Pareto, ParetoPoint, pareto
from spd_lens.evaluation.report import AttackReport, EvaluationReport
from spd_lens.evaluation.site_report import SiteReport, failure_modes
from spd_lens.evaluation.verdict import Verdict, judge

__all__ = [
    "LADDER",
    "Attack",
    "AttackReport",
    "Comparison",
    "Deletion",
    "EvaluationReport",
    "Held",
    "Needs",
    "Pareto",
    "ParetoPoint",
    "Passes",
    "SiteReport",
    "Tally",
    "Verdict",
    "WorstCase",
    "WorstMasks",
    "bootstrap_intervals",
    "climb",
    "compare",
    "evaluate",
    "failure_modes",
    "judge",
    "mean_per_position",
    "needed_at",
    "pareto",
    "worst_case",
]
