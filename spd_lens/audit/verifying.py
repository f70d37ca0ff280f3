"""`verify`: every claim of a report is run again, on the model, the decomposition and the data that it names.

Whoever verifies says what an audit has to show; the report does not. Before anything is run a report is refused that is
about another model, decomposition, data set, input, decision, choice of places or components, that attacked less, drew
fewer controls or looked at less than `standard` asks, that lacks a control, or that does not add up.

Then it is run again with its own seed, and every number has to come out, within rounding. With `seed=` also other
controls are drawn and other climbs started, and what has to hold then is each claim: the effect's sign, that it is
outside what random subcomponents of equal use do, and that the adversary does not undo it.

Another version of this code is no disagreement by itself; it is noted. So is a title, which is free text, a seed that
may have been picked, and what a report withholds although it passes on the fresh seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spd_lens.audit.adversary import Budget
from spd_lens.audit.bench import Bench, Choices, checked_seed
from spd_lens.audit.candidates import Key, key_of, named_units
from spd_lens.audit.cases import Cases
from spd_lens.audit.differences import differences, paired, said
from spd_lens.audit.explaining import explain
from spd_lens.audit.fingerprints import code_digest, digests
from spd_lens.audit.judged import Judged
from spd_lens.audit.page import page_html
from spd_lens.audit.report import LARGEST_FILE, AuditReport, Reason
from spd_lens.core.decomposition import Decomposition
from spd_lens.core.inputs import checked_decomposition, checked_tokens
from spd_lens.core.units import Unit
from spd_lens.support.files import given_path
from spd_lens.support.shown import text_html
from spd_lens.support.versions import library_versions


@dataclass(frozen=True)
class Verification:
    """What running a report again gave. True if nothing disagrees.

    - `disagreements`: in words, one for each; `notes`: what differs and is no disagreement.
    - `claims`, `held`: reasons that were run again, and how many of these came out.
    """

    disagreements: tuple[str, ...]
    notes: tuple[str, ...]
    claims: int
    held: int

    @property
    def status(self) -> int:
        """0 if nothing disagrees, else 1: the exit status of a program that verifies."""
        return int(bool(self.disagreements))

    def __bool__(self) -> bool:
        return not self.disagreements

    def __str__(self) -> str:
        first = (
            f"Verified: {self.held} of {self.claims} reasons came out again."
            if self
            else f"DOES NOT VERIFY: {len(self.disagreements)} disagreements; {self.held} of {self.claims} reasons hold."
        )
        return "\n".join(
            [first, *(f"- {text}" for text in self.disagreements), *(f"  ({text})" for text in self.notes)]
        )

    _repr_html_ = text_html


def verify(
    report: AuditReport | str | Path,
    decomposition: Decomposition,
    *,
    cases: Any,
    inputs: Any = None,
    decision: Any = None,
    position: int | None = None,
    reasons_at: Sequence[int] | None = None,
    components: Any = None,
    standard: Choices | None = None,
    title: str | None = None,
    seed: int | None = None,
) -> Verification:
    """Run a report, or the file of one, again.

    - `cases`: the `Cases` of the report. `inputs`: what it should be about, `[pos]` or `[1 pos]`; None: what stands in
      it. `title`: as `inputs`.
    - `decision`, `position`, `reasons_at`: as in `explain`, and with its defaults: the report's chosen output against
      the strongest other, at the last position; all places.
    - `components`: those of the report, by the names that they have in it; None: its reasons have to be places.
    - `standard`: the least that the report may have measured; None: what `explain` measures unless told otherwise.
    - `seed`: other controls and climbs, besides the report's own.

    Raises ValueError for files that are no report, for `inputs` that the model cannot run and for the report's own seed
    as another; TypeError for what are no cases or no decomposition.
    """
    checked_decomposition(decomposition, "verify")
    if not isinstance(cases, Cases):
        raise TypeError(f"cases is a {type(cases).__name__}; expected spd_lens.audit.Cases")
    if not isinstance(report, AuditReport):
        report = AuditReport.load(report)
    if seed is not None:
        checked_seed(seed)
        if seed == report.settings.seed:
            raise ValueError(
                f"seed={seed} is the report's own, whose controls and attacks come out again anyway; give another one"
            )
    n = len(report.reasons)
    given: Any = [report.inputs] if inputs is None else inputs
    try:
        tokens = checked_tokens(
            given[None] if getattr(given, "ndim", 2) == 1 else given, decomposition.host, name="inputs"
        )
    except ValueError as error:
        if inputs is not None:
            raise
        return Verification((f"its input is none of this model: {error}",), (), n, 0)
    units = named_units(decomposition, components, tokens.shape[1])
    other = [*_other_things(report, decomposition, tokens, cases, units), *_lacking(report, standard or Choices())]
    if title is not None and title != report.title:
        other.append(f"its title is {said(report.title)!r}, not {said(title)!r}")
    if other:
        return Verification(tuple(other), (), n, 0)
    asked: dict[str, Any] = {
        "cases": cases,
        "position": position,
        "reasons_at": reasons_at,
        "components": units or None,
        "choices": _choices(report),
    }
    made = report.decision.chosen if decision is None else decision
    passed: list[str] = []
    try:
        again = explain(decomposition, tokens, made, **asked, title=title or "", seed=report.settings.seed)
        wrong = list(differences(report, again))
        lost = [own for own, new in paired(report, again) if any(differences(own, new, "reason"))]
        if not wrong and seed is not None:
            found = _judged_anew(decomposition, tokens, made, **asked, seed=seed)
            undone = [(own, text) for own in report.reasons if (text := _undone(own, found)) is not None]
            wrong, lost = [text for _, text in undone], [own for own, _ in undone]
            passed = list(_passed_now(report, found))
    except ValueError as error:
        return Verification((f"it cannot be run again: {error}",), (), n, 0)
    notes = [*_notes(report, decomposition, again.title if title is None else title, seed), *passed]
    return Verification(tuple(wrong), tuple(notes), n, n - len(lost))


def verify_page(report: AuditReport | str | Path, page: str | Path) -> Verification:
    """Whether a page is what `audit_page` writes for this report, character for character.

    Raises ValueError for files that are no report, and for a page that is absent, far too large or no text.
    """
    if not isinstance(report, AuditReport):
        report = AuditReport.load(report)
    path = given_path(page)
    if not path.is_file():
        raise ValueError(f"{path} is no file; expected the page of a report")
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes; a page has at most {LARGEST_FILE:,}")
    try:
        same = path.read_text(encoding="utf-8") == page_html(report)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text: {error}") from error
    wrong = () if same else ("the page is not the one that this report gives",)
    return Verification(wrong, (), len(report.reasons), len(report.reasons) if same else 0)


def _choices(report: AuditReport) -> Choices:
    settings, adversary = report.settings, report.adversary
    return Choices(
        n_reasons=settings.n_reasons,
        n_controls=settings.n_controls,
        n_draws=settings.n_draws,
        smallest_effect=settings.smallest_effect,
        budget=Budget(adversary.steps, adversary.step_size, adversary.starts),
    )


# -- before anything is run --------------------------------------------------------------------------------------------


def _other_things(
    report: AuditReport, decomposition: Decomposition, tokens: Any, cases: Cases, units: Sequence[Unit]
) -> Iterator[str]:
    then, now = report.digests, digests(decomposition, cases, tokens, units or None)
    changed = [name for name, digest in now.sites.items() if then.sites.get(name) != digest]
    if changed or then.sites.keys() != now.sites.keys():
        odd = changed or sorted(then.sites.keys() ^ now.sites.keys())
        yield f"another model: {', '.join(map(said, odd[:3]))} is not the matrix that the report is about"
    elif then.host == now.host and then.model != now.model:
        yield "another model: its matrices are those of the report, other parameters are not"
    if then.decomposition != now.decomposition:
        yield "another decomposition of the model than the report's"
    if then.cases != now.cases:
        yield "other cases, or other words about them, than the report's"
    if then.components != now.components:
        yield (
            "its reasons are components: give the ones that it was made with"
            if now.components is None
            else "other components, or other names of them, than the report's"
        )
    if then.input != now.input:
        yield "another input than the report's"


def _lacking(report: AuditReport, standard: Choices) -> Iterator[str]:
    if not report.adds_up():
        yield "start, reasons and rest do not add up to the margin"
    settings, adversary, budget = report.settings, report.adversary, standard.budget
    for name in ("n_reasons", "n_controls", "n_draws"):
        if getattr(settings, name) < getattr(standard, name):
            yield f"{name} is {getattr(settings, name)}; the standard asks for at least {getattr(standard, name)}"
    if settings.smallest_effect > standard.smallest_effect:
        least = f"{settings.smallest_effect:g} of the margin; the standard is {standard.smallest_effect:g}"
        yield f"it leaves out effects below {least}"
    reach = adversary.steps * adversary.step_size
    if adversary.steps < budget.steps or adversary.starts < budget.starts or reach < budget.steps * budget.step_size:
        own = f"{adversary.steps} steps of {adversary.step_size:g} from {adversary.starts} starts"
        yield (
            f"its adversary has {own}; the standard asks for {budget.steps} of {budget.step_size:g} from "
            f"{budget.starts}"
        )
    for reason in report.reasons:
        if reason.controls.draws < settings.n_draws:
            yield f"{_name(reason)}: {reason.controls.draws} control draws of {settings.n_draws}"
    if len(set(settings.control_cases)) < 2:
        yield "fewer than two control cases"
    for sign, reasons in ((1, report.reasons_for), (-1, report.reasons_against)):
        for reason in reasons:
            if reason.effect * sign <= 0:
                side = "for" if sign > 0 else "against"
                yield f"{_name(reason)} is among the reasons {side} the decision and has the effect {reason.effect}"


def _notes(report: AuditReport, decomposition: Decomposition, title: str, seed: int | None) -> Iterator[str]:
    if report.spd_lens_audit != code_digest():
        yield "the report was made by another version of spd_lens.audit"
    here: dict[str, str] = library_versions()
    other = [f"{name} {v}" for name, v in report.versions.items() if here.get(name) != v]
    if other or not report.versions:
        yield f"it says that it was made with {', '.join(other) or 'nothing'}, which is not what runs here"
    if seed is None and report.settings.seed != 0:
        yield f"its seed {report.settings.seed} may have been picked; verify(seed=...) shows what hangs on it"
    if report.digests.host != decomposition.host.provenance().host:
        yield "it was made on another kind of host, whose other parameters cannot be compared by their digest"
    if report.title != title:
        yield f"its title is free text that nothing checks: {said(report.title)!r}"


# -- what comes out --------------------------------------------------------------------------------------------------


@torch.no_grad()
def _judged_anew(
    decomposition: Decomposition,
    tokens: Any,
    decision: Any,
    *,
    cases: Cases,
    position: int | None,
    reasons_at: Sequence[int] | None,
    components: Any,
    choices: Choices,
    seed: int,
) -> dict[Key, Judged]:
    bench = Bench(decomposition, tokens, decision, cases, position, reasons_at, choices, seed, components)
    return {own.key: own for own in bench.all_judged()}


def _undone(reason: Reason, found: dict[Key, Judged]) -> str | None:
    """Why a reason does not hold on a fresh seed, or None."""
    new, name = found.get(reason.key), _name(reason)
    if new is None:
        return f"{name}: it does nothing here"
    if new.effect * reason.effect <= 0:
        return f"{name}: its effect was {reason.effect:g} and is {new.effect:g} with other controls"
    return None if new.why_not is None else f"{name}: {new.why_not}"


def _passed_now(report: AuditReport, found: Mapping[Key, Judged]) -> Iterator[str]:
    """What a report withholds for its evidence, and passes on a fresh seed: seeds can be picked to hide reasons."""
    for held in report.withheld:
        new = found.get(key_of(held.component, held.place.position))
        if held.why != "as many stronger reasons are given" and new is not None and new.why_not is None:
            yield f"{said(held.component or held.place.name)} is withheld ({held.why}), and passes on this seed"


def _name(reason: Reason) -> str:
    return said(reason.component or reason.place.name)
