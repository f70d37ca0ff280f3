"""`spd-lens harvest`: which tokens every subcomponent fires on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from spd_lens.cli.output import JsonFlag, ends_in_words, show
from spd_lens.cli.runs import data_for, open_saved
from spd_lens.statistics import Harvest, harvest
from spd_lens.support.files import write_json

HELP = """Count how often every subcomponent fires, and keep the positions where it fires most.

Examples:

    spd-lens harvest runs/tiny

    spd-lens harvest runs/tiny --top-k 4 --out runs/tiny/harvest.json
"""


@ends_in_words
def command(
    directory: Annotated[Path, typer.Argument(help="A run's directory or a saved decomposition.")],
    model: Annotated[str | None, typer.Option(help="The model, where the directory does not say it.")] = None,
    data: Annotated[Path | None, typer.Option(help="A YAML file with the fields of a data section.")] = None,
    max_batches: Annotated[int, typer.Option(min=1, help="Batches to go through.")] = 64,
    top_k: Annotated[int, typer.Option(min=1, help="Examples kept of every subcomponent.")] = 8,
    out: Annotated[Path | None, typer.Option(help="A JSON file with everything, examples as text.")] = None,
    json: JsonFlag = False,
) -> None:
    decomposition, run = open_saved(directory, model)
    batches = data_for(decomposition, run, data)
    found = harvest(decomposition, batches, max_batches=min(max_batches, batches.per_epoch), top_k=top_k)
    if out is not None:
        write_json(out, {"sites": harvest_json(found, decomposition.model.tokenizer)})
    values: dict[str, Any] = {
        name: {
            "subcomponents": len(site.firing_rate),
            "ever_fire": int((site.firing_rate > 0).sum()),
            "fires_per_position": float(site.firing_rate.sum()),
            "most_used": site.most_used(8),
        }
        for name, site in found.items()
    }
    saved = "" if out is None else f"\nsaved: {out}"
    show(f"{found}{saved}", {"sites": values, "saved": None if out is None else str(out)}, as_json=json)


def harvest_json(found: Harvest, tokenizer: Any) -> Mapping[str, Any]:
    """Everything that was found, in plain values; tokens of examples as text where there is a tokenizer."""
    sites = {}
    for name, site in found.items():
        subcomponents = []
        for c in range(len(site.firing_rate)):
            examples = [
                {
                    "tokens": example.tokens if tokenizer is None else [tokenizer.decode([t]) for t in example.tokens],
                    "at": example.at,
                    "importance": example.importance,
                    "activation": example.activation,
                }
                for example in site.examples(c)
            ]
            rate, mean = float(site.firing_rate[c]), float(site.mean_importance[c])
            subcomponents.append({"id": c, "firing_rate": rate, "mean_importance": mean, "examples": examples})
        sites[name] = subcomponents
    return sites
