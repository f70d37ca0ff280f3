"""`spd-lens audit`: why the credit model declines an applicant, as a file and a page; or such a file run again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from spd_lens.audit import AuditReport, Cases, Verification, audit_page, explain, verify, verify_page
from spd_lens.cli.output import DONE, FAILED, JsonFlag, ends_in_words, refuse_options, show
from spd_lens.cli.yaml_file import ConfigError
from spd_lens.components import Components
from spd_lens.core import Decomposition
from spd_lens.models import CREDIT_DECISIONS, credit_cases, decline_margin, load_credit, load_credit_applicants
from spd_lens.support.pages import visible

HELP = """Audit one decision of the credit model that ships with the package, or run the report of one again.

Nothing is downloaded. The report is applicant-N.json in --out, its page applicant-N.html. With --verify every claim of
a report is run again; the exit status is 1 on any disagreement. With --applicant it has to be about that one, with
--page the page has to be the report's, with --seed its claims also have to hold with other controls and attacks. With
--components the reasons are components (a file that spd_lens.components wrote) instead of attributes, in both cases.

Examples:

    spd-lens audit

    spd-lens audit --applicant 17 --out runs/audit

    spd-lens audit --applicant 17 --components components.json

    spd-lens audit --verify runs/audit/applicant-17.json --page runs/audit/applicant-17.html --applicant 17
"""


@ends_in_words
def command(
    what: Annotated[str, typer.Argument(help="Only 'demo' so far: the credit model.")] = "demo",
    applicant: Annotated[
        int | None, typer.Option(help="Held-out applicant, from 0; default: the first declined.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory of the report and its page.")] = Path("runs/audit"),
    verify_file: Annotated[Path | None, typer.Option("--verify", help="A report to run again.")] = None,
    page: Annotated[Path | None, typer.Option(help="With --verify: the page that should be the report's.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="With --verify: other controls and attacks than the report's.")
    ] = None,
    components: Annotated[
        Path | None, typer.Option(help="components.json: reasons are these components instead of attributes.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    # The credit model's tensors are tiny: more threads only wait for each other.
    torch.set_num_threads(1)
    if what != "demo":
        raise ConfigError(f"audit {what!r}; expected 'demo', or spd_lens.audit.explain(...) in Python for other models")
    if verify_file is not None:
        refuse_options(["out"], "is for a new report; --verify writes nothing")
        ended = _run_again(verify_file, page, applicant, seed, components)
        show(str(ended), _values(ended), as_json=json)
        raise typer.Exit(FAILED if ended.status else DONE)
    if page is not None or seed is not None:
        raise ConfigError("--page and --seed are for --verify; give it a report to run again")
    cases = Cases(**credit_cases())
    decomposition = load_credit(decomposed=True)
    grouped = None if components is None else Components.load(components, decomposition)
    asked = load_credit_applicants("held_out")
    margins = decline_margin(decomposition.model, asked.tokens)
    chosen = int((margins > 0).nonzero()[0]) if applicant is None else _known(applicant)
    decision = CREDIT_DECISIONS[int(margins[chosen] > 0)]
    title = _title(chosen, decision)
    report = explain(decomposition, asked.tokens[chosen], decision, cases=cases, components=grouped, title=title)
    path = report.save(out / f"applicant-{chosen}.json")
    written = audit_page(report, out / f"applicant-{chosen}.html")
    ended = verify(path, decomposition, cases=cases, inputs=asked.tokens[chosen], components=grouped, title=title)
    reasons = [f"    {r.effect:+.2f}  {visible(r.called)}: {visible(r.place.says)}" for r in report.reasons]
    lines = [
        title,
        *reasons,
        f"    {report.rest.value:+.2f}  not explained",
        str(ended),
        f"report: {path}",
        f"page: {written}",
    ]
    values = {"report": str(path), "page": str(written), "decision": decision, **_values(ended)}
    show("\n".join(lines), values, as_json=json)
    raise typer.Exit(FAILED if ended.status else DONE)


def _run_again(
    path: Path, page: Path | None, applicant: int | None, seed: int | None, components: Path | None
) -> Verification:
    """A report of the credit model, verified; its title has to name the applicant whose attributes it has."""
    report = AuditReport.load(path)
    asked, inputs = load_credit_applicants("held_out"), None
    if applicant is not None:
        inputs = asked.tokens[_known(applicant)]
    decomposition = _decomposition_of(report)
    grouped = None if components is None else Components.load(components, decomposition)
    cases = Cases(**credit_cases())
    ended = verify(report, decomposition, cases=cases, inputs=inputs, components=grouped, seed=seed)
    wrong, notes = list(ended.disagreements), list(ended.notes)
    same = [i for i, own in enumerate(asked.tokens.tolist()) if own == report.inputs]
    if report.title in {_title(i, report.decision.chosen_name) for i in same}:
        notes = [note for note in notes if not note.startswith("its title")]
    elif same and report.title.startswith("Applicant "):
        wrong.append(f"its attributes are those of applicant {asked.numbers[same[0]]}, whom its title does not name")
    elif not same:
        notes.append("its attributes are those of no held-out applicant")
    if page is not None:
        wrong += verify_page(report, page).disagreements
    return Verification(tuple(wrong), tuple(notes), ended.claims, ended.held)


def _known(applicant: int) -> int:
    n = len(load_credit_applicants("held_out"))
    if not 0 <= applicant < n:
        raise ConfigError(f"applicant {applicant}; there are {n} held-out applicants, 0..{n - 1}")
    return applicant


def _title(index: int, decision: str) -> str:
    return f"Applicant {load_credit_applicants('held_out').numbers[index]}: why {decision}?"


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
