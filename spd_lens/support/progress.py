"""`tqdm`: progress bars that can be switched off and that leave one line.

Three differences to `tqdm.auto`: the environment variable TQDM_DISABLE switches off every bar, also those that say
`disable=False`; a notebook shows one line of text, updated in place, with or without ipywidgets; a log file gets a line
every ten seconds instead of ten a second.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Any

from tqdm.std import tqdm as _Terminal

LOG_SECONDS = 10.0


class tqdm(_Terminal):
    """A progress bar with the arguments of `tqdm.tqdm`; switch all of them off with TQDM_DISABLE=1."""

    def __init__(self, *args: Any, disable: bool | None = False, **kwargs: Any) -> None:
        self._in_notebook = _has_kernel()
        self._shown: Any = None
        if self._in_notebook:
            kwargs = {"file": io.StringIO(), "ncols": 100, "mininterval": 0.5, **kwargs}
        elif not sys.stderr.isatty():
            kwargs = {"mininterval": LOG_SECONDS, "maxinterval": LOG_SECONDS, **kwargs}
        super().__init__(*args, disable=bool(disable) or _switched_off(), **kwargs)

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        """Show `msg`, by default the bar."""
        if not self._in_notebook:
            return super().display(msg, pos)
        from IPython.display import display

        line = {"text/plain": str(self) if msg is None else msg}
        if self._shown is None:
            self._shown = display(line, raw=True, display_id=True)
        else:
            self._shown.update(line, raw=True)
        return True


def _switched_off() -> bool:
    return os.environ.get("TQDM_DISABLE", "").lower() not in ("", "0", "false")


def _has_kernel() -> bool:
    """Whether a Jupyter kernel runs this process."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None
