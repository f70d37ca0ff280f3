"""Names in error messages: what a mistyped name may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def near_names(given: str, known: Iterable[str]) -> str:
    """Names close to `given` in single quotes, or the first few where none is close."""
    known = list(known)
    close = difflib.get_close_matches(given, known, n=4, cutoff=0.5)
    chosen = close or known[:8]
    return ", ".join(repr(name) for name in chosen) + ("" if close or len(known) <= 8 else ", ...")
