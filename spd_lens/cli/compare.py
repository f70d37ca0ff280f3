"""`spd-lens compare`: do two decompositions of the same weights find the same subcomponents?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spd_lens.cli.output import JsonFlag, ends_in_words, refuse_options, show
from spd_lens.cli.runs import data_for, open_saved
from spd_lens.evaluation import compare

HELP = """Compare two decompositions of the same model: MMCS of V, U and the rank-one matrices, with random controls.

Only subcomponents that are alive on the first run's data are compared, or all with --all.

Examples:

    spd-lens compare runs/seed0 runs/seed1

    spd-lens compare runs/seed0 runs/seed1 --all --json
"""


@ends_in_words
def command(
    first: Annotated[Path, typer.Argument(help="A run's directory or a saved decomposition.")],
    second: Annotated[Path, typer.Argument(help="Another of the same model.")],
    model: Annotated[str | None, typer.Option(help="The model, where the directories do not say it.")] = None,
    data: Annotated[Path | None, typer.Option(help="A YAML file with the fields of a data section.")] = None,
    all: Annotated[bool, typer.Option("--all", help="Compare all subcomponents, without data.")] = False,
    max_batches: Annotated[int, typer.Option(min=1, help="Batches that say what is alive.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the random controls.")] = 0,
    json: JsonFlag = False,
) -> None:
    if all:
        refuse_options(["data", "max_batches"], "says what is alive; --all compares all")
    a, run = open_saved(first, model)
    b, _ = open_saved(second, model)
    batches = None if all else data_for(a, run, data)
    found = compare(a, b, batches, max_batches=max_batches, seed=seed)
    show(str(found), found.to_json(), as_json=json)
