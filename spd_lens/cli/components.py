"""`spd-lens components`: which subcomponents belong together, by what fires together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spd_lens.cli.output import JsonFlag, ends_in_words, show
from spd_lens.cli.runs import DECOMPOSITION, data_for, open_saved
from spd_lens.cli.yaml_file import ConfigError
from spd_lens.components import Components, merge_subcomponents
from spd_lens.statistics import coactivation

HELP = """Group subcomponents that fire together, over all sites, at the minimum of the description length.

Writes components.json beside the decomposition, where `spd-lens export` takes it along. Names may be changed in it by
hand. That members fire together does not say that they do one thing.

Examples:

    spd-lens components runs/tiny

    spd-lens components runs/tiny --alpha 2 --threshold 0.1 --window row --out components.json
"""


@ends_in_words
def command(
    directory: Annotated[Path, typer.Argument(help="A run's directory or a saved decomposition.")],
    model: Annotated[str | None, typer.Option(help="The model, where the directory does not say it.")] = None,
    data: Annotated[Path | None, typer.Option(help="A YAML file with the fields of a data section.")] = None,
    max_batches: Annotated[int, typer.Option(min=1, help="Batches to count in.")] = 64,
    threshold: Annotated[float, typer.Option(min=0.0, max=1.0, help="Importance from which one fires.")] = 0.01,
    window: Annotated[str, typer.Option(help="Positions of an event, or row.")] = "1",
    alpha: Annotated[float, typer.Option(help="Bits to say what an active member is; small: few large groups.")] = 3.0,
    out: Annotated[Path | None, typer.Option(help="The file, or a directory for components.json.")] = None,
    json: JsonFlag = False,
) -> None:
    if window != "row" and not window.isdecimal():
        raise ConfigError(f"--window {window!r}; expected a number of positions, or row")
    decomposition, run = open_saved(directory, model)
    together = coactivation(
        decomposition,
        data_for(decomposition, run, data),
        max_batches=max_batches,
        threshold=threshold,
        window="row" if window == "row" else int(window),
    )
    merging = merge_subcomponents(together, alpha=alpha)
    found = Components.of(decomposition, merging)
    path = found.save(out or (directory if run is None else directory / DECOMPOSITION))
    values = {
        "components": len(found),
        "of_several": len(found.only_groups()) if any(len(unit.members) > 1 for unit in found) else 0,
        "fire": len(merging.members),
        "events": together.n_seen,
        "bits_per_event": float(merging.description_lengths.min()),
        "saved": str(path),
    }
    show(f"{found}\nsaved: {path}", values, as_json=json)
