"""`TrainResult`: what a run of `train` leaves."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spd_lens.training.config import TrainConfig


@dataclass(frozen=True)
class TrainResult:
    """What a finished (or stopped) run leaves: steps done, the log, and where its files are."""

    steps: int
    config: TrainConfig
    log: list[dict[str, Any]]
    directory: Path
    interrupted: bool = False

    @property
    def final(self) -> dict[str, Any]:
        """The last line of the log."""
        return self.log[-1] if self.log else {}

    def __repr__(self) -> str:
        shown = ", ".join(f"{name} {self.final[name]:.3g}" for name in ("loss", "L0") if name in self.final)
        stopped = ", interrupted" if self.interrupted else ""
        return (
            f"TrainResult({self.steps:,} of {self.config.steps:,} steps{stopped}; last logged: {shown or 'nothing'}; "
            f"{len(self.log):,} log lines in .log, the last in .final; files in {str(self.directory)!r})"
        )

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(str(name))}</td><td>{value:.4g}</td></tr>"
            for name, value in self.final.items()
            if isinstance(value, (int, float)) and "/" not in name
        )
        return f"<p>{html.escape(repr(self))}</p><table>{rows}</table>"
