"""`spd-lens audit`: why the credit model declines an applicant, as a file and a page; or such a file run again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spd_lens.audit import AuditReport, Cases, Verification, audit_page, explain, verify
from spd_lens.cli.output import DONE, FAILED, JsonFlag, ends_in_words, show
from spd_lens.core import Decomposition
from spd_lens.models import CREDIT_DECISIONS, credit_cases, decline_margin, load_credit, load_credit_applicants

HELP = """Audit one decision of the credit model that ships with the package, or run the report of one again.

Nothing is downloaded. The report is REPORT.json in --out, its page REPORT.html. With --verify every claim of a report
is run again; the exit status is 1 on any disagreement.

Examples:

    spd-lens audit

    spd-lens audit --applicant 17 --out runs/audit

    spd-lens audit --verify runs/audit/applicant-17.json
"""


@ends_in_words
def command(
    what: Annotated[str, typer.Argument(help="Only 'demo' so far: the credit model.")] = "demo",
    applicant: Annotated[
        int | None, typer.Option(help="Held-out applicant, from 0; default: the first declined.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory of the report and its page.")] = Path("runs/audit"),
    verify_file: Annotated[Path | None, typer.Option("--verify", help="A report to run again.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="With --verify: other controls and attacks than the report's.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    if what != "demo":
        raise ValueError(f"audit {what!r}; expected 'demo', or spd_lens.audit.explain(...) in Python for other models")
    cases = Cases(**credit_cases())
    if verify_file is not None:
        report = AuditReport.load(verify_file)
        ended = verify(report, _decomposition_of(report), cases=cases, seed=seed)
        show(str(ended), _values(ended), as_json=json)
        raise typer.Exit(FAILED if ended.status else DONE)
    decomposition = load_credit(decomposed=True)
    asked = load_credit_applicants("held_out")
    margins = decline_margin(decomposition.model, asked.tokens)
    chosen = int((margins > 0).nonzero()[0]) if applicant is None else applicant
    if not 0 <= chosen < len(asked):
        raise ValueError(f"applicant {chosen}; there are {len(asked)} held-out applicants, 0..{len(asked) - 1}")
    decision = CREDIT_DECISIONS[int(margins[chosen] > 0)]
    title = f"Applicant {asked.numbers[chosen]}: why {decision}?"
    report = explain(decomposition, asked.tokens[chosen], decision, cases=cases, title=title)
    path = report.save(out / f"applicant-{chosen}.json")
    page = audit_page(report, out / f"applicant-{chosen}.html")
    ended = verify(path, decomposition, cases=cases, inputs=asked.tokens[chosen])
    reasons = [f"    {r.effect:+.2f}  {r.place.words or r.place.name}: {r.place.says}" for r in report.reasons]
    lines = [
        title,
        *reasons,
        f"    {report.rest.value:+.2f}  not explained",
        str(ended),
        f"report: {path}",
        f"page: {page}",
    ]
    values = {"report": str(path), "page": str(page), "decision": decision, **_values(ended)}
    show("\n".join(lines), values, as_json=json)
    raise typer.Exit(FAILED if ended.status else DONE)


def _decomposition_of(report: AuditReport) -> Decomposition:
    """The shipped decomposition of the model that the report names."""
    if report.model_name != "credit":
        raise ValueError(
            f"the report is about the model {report.model_name!r}; this command has the credit model alone: use "
            "spd_lens.audit.verify(report, decomposition, cases=...) in Python"
        )
    return load_credit(decomposed=True)


def _values(ended: Verification) -> dict[str, object]:
    return {
        "verified": bool(ended),
        "claims": ended.claims,
        "held": ended.held,
        "disagreements": list(ended.disagreements),
        "notes": list(ended.notes),
    }
