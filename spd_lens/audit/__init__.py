"""Audits of single decisions: reasons that anybody can run again.

`explain` gives an `AuditReport` for one input and one decision, `report.save` writes it, `verify` runs every claim of
it again and says where it disagrees."""

from spd_lens.audit.adversary import Budget, worst_claims
from spd_lens.audit.bench import Bench, Choices, judge_places
from spd_lens.audit.candidates import equal_use
from spd_lens.audit.cases import Cases
from spd_lens.audit.decision import Decision
from spd_lens.audit.explaining import explain
from spd_lens.audit.fairness import FairnessView, fairness_view
from spd_lens.audit.fingerprints import digests
from spd_lens.audit.judged import Judged
from spd_lens.audit.page import audit_page
from spd_lens.audit.report import AuditReport, Reason, Withheld, report_schema
from spd_lens.audit.verifying import Verification, verify, verify_page

__all__ = [
    "AuditReport",
    "Bench",
    "Budget",
    "Cases",
    "Choices",
    "Decision",
    "FairnessView",
    "Judged",
    "Reason",
    "Verification",
    "Withheld",
    "audit_page",
    "digests",
    "equal_use",
    "explain",
    "fairness_view",
    "judge_places",
    "report_schema",
    "verify",
    "verify_page",
    "worst_claims",
]
