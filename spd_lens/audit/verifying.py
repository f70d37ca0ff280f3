"""`verify`: every claim of a report is run again, on the model, the decomposition and the data that it names.

Two ways. With the report's own seed every number has to come out again, within rounding: `ROUNDING` for what is a plain
forward pass, `CLIMBING` for what an adversary found (sign steps can turn at a rounding). With a fresh seed other
controls are drawn and other climbs started, and what has to hold is each claim: the effect's sign, that it is outside
what random subcomponents of equal use do, and that the adversary does not undo it.

A report about another model, decomposition, data set or input is refused before anything is run, and so is one that
lacks what an audit has to show. Another version of this code is no disagreement by itself; it is noted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spd_lens.audit.adversary import Budget
from spd_lens.audit.bench import N_REASONS, Choices, Judged, judge_places
from spd_lens.audit.cases import Cases
from spd_lens.audit.decision import Decision
from spd_lens.audit.explaining import code_digest, digests, explain
from spd_lens.audit.report import AuditReport, Reason
from spd_lens.core.decomposition import Decomposition
from spd_lens.core.inputs import checked_decomposition, checked_tokens

# Largest differences that count as rounding: of passes, and of what an adversary reaches.
ROUNDING, CLIMBING = 1e-3, 2e-2
# Numbers that an adversary finds.
_CLIMBED = ("worst", "worst_margin")
# What says which code and which machine made a report; noted, not judged.
_NOTED = ("versions", "spd_lens_audit", "title")


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


def verify(
    report: AuditReport | str | Path,
    decomposition: Decomposition,
    *,
    cases: Cases,
    inputs: Any = None,
    seed: int | None = None,
) -> Verification:
    """Run a report, or the file of one, again; `seed=None` is the report's own, see the module.

    `inputs`: the input that the report should be about, `[pos]` or `[1 pos]`; None: the one that stands in it. Raises
    ValueError for files that are no report.
    """
    checked_decomposition(decomposition, "verify")
    if not isinstance(report, AuditReport):
        report = AuditReport.load(report)
    given: Any = [report.inputs] if inputs is None else inputs
    try:
        tokens = checked_tokens(
            given[None] if getattr(given, "ndim", 2) == 1 else given, decomposition.host, name="inputs"
        )
    except ValueError as error:
        return Verification((f"its input is none of this model: {error}",), (), len(report.reasons), 0)
    other = list(_other_things(report, decomposition, tokens, cases))
    lacking = list(_lacking(report))
    if other or lacking:
        return Verification(tuple(other + lacking), (), len(report.reasons), 0)
    made = report.decision
    decision = Decision(made.chosen, made.other, made.position, made.chosen_name, made.other_name)
    try:
        if seed is not None:
            found = judge_places(
                decomposition,
                tokens,
                decision,
                cases=cases,
                reasons_at=report.settings.reasons_at,
                choices=_choices(report),
                seed=seed,
            )
            failed = [text for own in report.reasons if (text := _undone(own, found)) is not None]
            held = len(report.reasons) - len(failed)
            return Verification(tuple(failed), tuple(_notes(report)), len(report.reasons), held)
        again = explain(
            decomposition,
            tokens,
            decision,
            cases=cases,
            reasons_at=report.settings.reasons_at,
            choices=_choices(report),
            title=report.title,
            seed=report.settings.seed,
        )
    except ValueError as error:
        return Verification((f"it cannot be run again: {error}",), (), len(report.reasons), 0)
    wrong = list(_differences(report, again))
    held = sum(not any(_differences(own, new, "reason")) for own, new in _paired(report, again))
    return Verification(tuple(wrong), tuple(_notes(report)), len(report.reasons), held)


def _choices(report: AuditReport) -> Choices:
    settings, adversary = report.settings, report.adversary
    return Choices(
        n_reasons=N_REASONS,
        n_controls=settings.n_controls,
        n_draws=settings.n_draws,
        smallest_effect=settings.smallest_effect,
        budget=Budget(adversary.steps, adversary.step_size, adversary.starts),
    )


# -- before anything is run --------------------------------------------------------------------------------------------


def _other_things(report: AuditReport, decomposition: Decomposition, tokens: Any, cases: Cases) -> Iterator[str]:
    then, now = report.digests, digests(decomposition, cases, tokens)
    changed = [name for name, digest in now.sites.items() if then.sites.get(name) != digest]
    if changed or then.sites.keys() != now.sites.keys():
        odd = changed or sorted(then.sites.keys() ^ now.sites.keys())
        yield f"another model: {', '.join(odd[:3])} is not the matrix that the report is about"
    elif then.host == now.host and then.model != now.model:
        yield "another model: its matrices are those of the report, other parameters are not"
    if then.decomposition != now.decomposition:
        yield "another decomposition of the model than the report's"
    if then.cases != now.cases:
        yield "other cases, or other words about them, than the report's"
    if then.input != now.input:
        yield "another input than the report's"


def _lacking(report: AuditReport) -> Iterator[str]:
    if not report.adds_up():
        yield "start, reasons and rest do not add up to the margin"
    for reason in report.reasons:
        if reason.controls.draws < report.settings.n_draws:
            yield f"{reason.place.name}: {reason.controls.draws} control draws of {report.settings.n_draws}"
    if len(set(report.settings.control_cases)) < 2:
        yield "fewer than two control cases"
    for sign, reasons in ((1, report.reasons_for), (-1, report.reasons_against)):
        for reason in reasons:
            if reason.effect * sign <= 0:
                side = "for" if sign > 0 else "against"
                yield f"{reason.place.name} is among the reasons {side} the decision and has the effect {reason.effect}"


def _notes(report: AuditReport) -> Iterator[str]:
    if report.spd_lens_audit != code_digest():
        yield "the report was made by another version of spd_lens.audit"


# -- what comes out --------------------------------------------------------------------------------------------------


def _paired(report: AuditReport, again: AuditReport) -> Iterator[tuple[Reason, Reason | None]]:
    new = {(r.place.position, r.effect > 0): r for r in again.reasons}
    for reason in report.reasons:
        yield reason, new.get((reason.place.position, reason.effect > 0))


def _differences(then: Any, now: Any, where: str = "") -> Iterator[str]:
    """What differs between two reports or parts of them, each in words."""
    if hasattr(then, "model_dump") and (now is None or hasattr(now, "model_dump")):
        then, now = then.model_dump(), None if now is None else now.model_dump()
    if isinstance(then, dict) and isinstance(now, dict):
        for key in [*then, *(k for k in now if k not in then)]:
            if where or key not in _NOTED:
                yield from _differences(then.get(key), now.get(key), f"{where}.{key}" if where else key)
    elif isinstance(then, list) and isinstance(now, list):
        if len(then) != len(now):
            yield f"{where}: the report has {len(then)}, running it again gives {len(now)}"
        for i, (a, b) in enumerate(zip(then, now, strict=False)):
            yield from _differences(a, b, f"{where}[{i}]")
    elif isinstance(then, float) and isinstance(now, (int, float)):
        climbed = where.rsplit(".", 1)[-1] in _CLIMBED
        allowed = CLIMBING * max(1.0, abs(now)) if climbed else ROUNDING
        if not abs(then - now) <= allowed:
            yield f"{where}: the report says {then:g}, running it again gives {now:g}"
    elif then != now:
        yield f"{where}: the report says {_brief(then)}, running it again gives {_brief(now)}"


def _brief(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _undone(reason: Reason, found: dict[int, Judged]) -> str | None:
    """Why a reason does not hold on a fresh seed, or None."""
    new = found.get(reason.place.position)
    if new is None:
        return f"{reason.place.name}: this place does nothing here"
    if new.effect * reason.effect <= 0:
        return f"{reason.place.name}: its effect was {reason.effect:g} and is {new.effect:g} with other controls"
    return None if new.why_not is None else f"{reason.place.name}: {new.why_not}"
