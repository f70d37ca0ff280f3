"""`spd-lens harvest`: which tokens every subcomponent fires on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from spd_lens.cli.output import JsonFlag, ends_in_words, is_main_process, show
from spd_lens.cli.runs import data_for, open_saved
from spd_lens.data import leave_processes
from spd_lens.statistics import harvest

HELP = """Count how often every subcomponent fires, and keep the positions where it fires most.

The same command again goes on where it was stopped.

Examples:

    spd-lens harvest runs/tiny

    spd-lens harvest runs/tiny --top-k 4 --effect-batches 2 --out runs/tiny/effects

    torchrun --nproc-per-node 2 -m spd_lens harvest runs/tiny      (the rows of every batch are shared out)
"""


@ends_in_words
def command(
    directory: Annotated[Path, typer.Argument(help="A run's directory or a saved decomposition.")],
    model: Annotated[str | None, typer.Option(help="The model, where the directory does not say it.")] = None,
    data: Annotated[Path | None, typer.Option(help="A YAML file with the fields of a data section.")] = None,
    max_batches: Annotated[int, typer.Option(min=1, help="Batches to go through.")] = 64,
    top_k: Annotated[int, typer.Option(min=1, help="Examples kept of every subcomponent.")] = 8,
    effect_batches: Annotated[int, typer.Option(min=0, help="Batches on which each is ablated alone.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Where the harvest goes; by default DIRECTORY/harvest.")] = None,
    json: JsonFlag = False,
) -> None:
    decomposition, run = open_saved(directory, model)
    batches = data_for(decomposition, run, data)
    where = out or directory / "harvest"
    found = harvest(
        decomposition,
        batches,
        max_batches=max_batches,
        top_k=top_k,
        effect_batches=effect_batches,
        out_dir=where,
        together=True,
    )
    leave_processes()
    if not is_main_process():
        return
    values: dict[str, Any] = {
        name: {
            "subcomponents": len(site.firing_rate),
            "ever_fire": int((site.firing_rate > 0).sum()),
            "fires_per_position": float(site.firing_rate.sum()),
            "most_used": site.most_used(8),
        }
        for name, site in found.items()
    }
    show(f"{found}\nsaved: {where}", {"sites": values, "saved": str(where)}, as_json=json)
