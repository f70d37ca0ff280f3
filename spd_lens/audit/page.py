"""A report as one HTML file that a person who does no research reads in a minute; it needs no script and no network.

Bars are drawn by the template as SVG. Everything that came from data or a dictionary is escaped and its hidden
characters are written out; the policy in the page's head allows styles of its own and nothing else.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from spd_lens.audit.differences import CLIMBING, ROUNDING
from spd_lens.audit.report import AuditReport, Reason
from spd_lens.support.files import given_path, write_text
from spd_lens.support.pages import page_without_script, shortened

# Width of the bars' drawing, and the longest text of a case that is shown.
WIDTH, LONGEST = 200.0, 120


def audit_page(report: AuditReport, path: str | Path) -> Path:
    """Write the page of a report; returns the path."""
    path = given_path(path)
    write_text(path, page_html(report))
    return path


def page_html(report: AuditReport) -> str:
    """The page of a report as text."""
    lines = _lines(report)
    largest = max(abs(value) for _, _, value, _ in lines) or 1.0
    scale = WIDTH / 2 / largest
    rows = [
        {
            "words": words,
            "says": shortened(says, LONGEST),
            "kind": kind,
            "total": i in (0, len(lines) - 1),
            "x": round(WIDTH / 2 + min(0.0, value) * scale, 2),
            "width": round(abs(value) * scale, 2),
            "shown": f"{value:+.2f}",
        }
        for i, (words, says, value, kind) in enumerate(lines)
    ]
    chosen = 1 / (1 + math.exp(-max(-50.0, min(50.0, report.decision.margin))))
    return page_without_script(
        "audit.html",
        title=report.title,
        r=_shown(report),
        rows=rows,
        zero=WIDTH / 2,
        outcome_probability=f"{100 * chosen:.0f} %",
        other_probability=f"{100 * (1 - chosen):.0f} %",
        survives=report.decision.worst_margin > CLIMBING,
    )


def _lines(report: AuditReport) -> list[tuple[str | None, str, float, str]]:
    """Words, text, value and kind of every bar, from the control cases to the margin; they add up."""
    n = len(report.settings.control_cases)
    lines: list[tuple[str | None, str, float, str]] = [
        (None, f"where the {n} cases that are compared stand, on average", report.start, "other")
    ]
    for reason in report.reasons:
        says = reason.place.says
        if reason.place.name not in says and not reason.place.name.startswith("position "):
            says = f"{reason.place.name}: {says}"
        if reason.component is not None:
            says = f"acts most when the input says: {says}"
        side = "for" if reason.effect > 0 else "against"
        lines.append((reason.component or reason.place.words, says, reason.effect, side))
    lines.append((None, "not explained", report.rest.value, "other"))
    name = report.decision.chosen_name
    lines.append((None, f"the decision's margin (above 0: {name})", report.decision.margin, "other"))
    return lines


def _shown(report: AuditReport) -> dict[str, Any]:
    """The report's fields as the template reads them."""
    shown = report.model_dump()
    for side in ("reasons_for", "reasons_against"):
        for own, reason in zip(shown[side], getattr(report, side), strict=True):
            own |= _more(reason)
            own["place"]["says"] = shortened(own["place"]["says"], LONGEST)
    for own in shown["withheld"]:
        own["called"] = own["component"] or own["place"]["words"] or own["place"]["name"]
    shown["reasons"] = [*shown["reasons_for"], *shown["reasons_against"]]
    return shown


def _more(reason: Reason) -> dict[str, Any]:
    sign = 1 if reason.effect > 0 else -1
    told = reason.counterfactual
    # As far as `verify` lets numbers differ, they may not turn what is said about them.
    part = told is not None and not told.agrees and ROUNDING < abs(told.predicted) < abs(told.measured)
    part = part and told is not None and told.predicted * told.measured > 0
    return {
        "called": reason.called,
        "n_members": len({(m.site, i) for m in reason.members for i in m.ids}),
        "worst_signed": sign * reason.worst,
        "carries_a_part": reason.component is not None and part,
    }
