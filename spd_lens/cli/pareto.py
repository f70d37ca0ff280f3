"""`spd-lens pareto`: one picture of many runs, how little is on against what that costs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from spd_lens.cli.output import JsonFlag, ends_in_words, show
from spd_lens.evaluation import pareto

HELP = """Draw evaluated runs as points: L0 against the KL under random and adversarial masks.

RUNS are directories that `spd-lens evaluate` wrote a report to, or reports.

Examples:

    spd-lens pareto runs/a runs/b runs/c --out pareto.png

    spd-lens pareto runs/*/evaluation.json --json
"""


@ends_in_words
def command(
    runs: Annotated[list[Path], typer.Argument(help="Directories or reports of runs.")],
    out: Annotated[Path, typer.Option(help="The picture.")] = Path("pareto.png"),
    json: JsonFlag = False,
) -> None:
    found = pareto(runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    found.figure().savefig(out, dpi=150)
    points = {name: [asdict(point) for point in own] for name, own in found.points.items()}
    show(f"{found}\nsaved: {out}", {"points": points, "saved": str(out)}, as_json=json)
