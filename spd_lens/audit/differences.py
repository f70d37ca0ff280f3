"""What differs between a report and the same audit run again, in words.

Numbers of plain passes may differ by `ROUNDING`, what an adversary found by `CLIMBING` (of its size, where that is
above 1): sign steps can turn at a rounding. All else has to be equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from spd_lens.audit.report import AuditReport, Reason
from spd_lens.support.pages import shortened, visible

ROUNDING, CLIMBING = 1e-3, 2e-2
# Numbers that an adversary finds.
_CLIMBED = ("worst", "worst_margin")
# What says which code and which machine made a report; noted, not judged.
_NOTED = ("versions", "spd_lens_audit", "title", "digests")


def differences(then: Any, now: Any, where: str = "") -> Iterator[str]:
    """What differs between two reports or parts of them. Digests are compared before anything is run."""
    if hasattr(then, "model_dump") and (now is None or hasattr(now, "model_dump")):
        then, now = then.model_dump(), None if now is None else now.model_dump()
    if isinstance(then, dict) and isinstance(now, dict):
        for key in [*then, *(k for k in now if k not in then)]:
            if where or key not in _NOTED:
                yield from differences(then.get(key), now.get(key), f"{where}.{said(key)}" if where else said(key))
    elif isinstance(then, list) and isinstance(now, list):
        if len(then) != len(now):
            yield f"{where}: the report has {len(then)}, running it again gives {len(now)}"
        for i, (a, b) in enumerate(zip(then, now, strict=False)):
            yield from differences(a, b, f"{where}[{i}]")
    elif isinstance(then, float) and isinstance(now, (int, float)):
        climbed = where.rsplit(".", 1)[-1] in _CLIMBED
        allowed = CLIMBING * max(1.0, abs(now)) if climbed else ROUNDING
        if not abs(then - now) <= allowed:
            yield f"{where}: the report says {then:g}, running it again gives {now:g}"
    elif then != now:
        yield f"{where}: the report says {brief(then)}, running it again gives {brief(now)}"


def paired(report: AuditReport, again: AuditReport) -> Iterator[tuple[Reason, Reason | None]]:
    """Every reason with the one of equal place or component and equal direction in another report, or None."""
    new = {(r.key, r.effect > 0): r for r in again.reasons}
    for reason in report.reasons:
        yield reason, new.get((reason.key, reason.effect > 0))


def brief(value: Any) -> str:
    """A value in at most 80 characters."""
    return "nothing" if value is None else shortened(repr(value), 80)


def said(text: str) -> str:
    """Text out of a file for a terminal: short, and nothing in it that could hide or forge other lines."""
    return shortened(visible(text), 80)
