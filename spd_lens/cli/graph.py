"""`spd-lens graph`: which subcomponents act on which at one prompt, as a page and as a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from spd_lens.cli.output import JsonFlag, ends_in_words, show
from spd_lens.cli.runs import open_saved
from spd_lens.cli.yaml_file import ConfigError
from spd_lens.graphs import AttributionGraph, attribution_graph
from spd_lens.statistics import Harvest

HELP = """Draw the attribution graph of one prompt: a page that opens from disk, and the JSON of graph viewers.

Every edge is a direct effect to first order; a sample of them is measured by real removals. With a harvest in the
directory, nodes show the texts in which they fire. A prompt begins with the token that begins the run's rows.

Examples:

    spd-lens graph runs/tiny --prompt "The white whale turned upon the" --out graph.html

    spd-lens graph runs/tiny --prompt "The white" --readout " whale" --readout " sea" --file graph.json
"""


@ends_in_words
def command(
    directory: Annotated[Path, typer.Argument(help="A run's directory or a saved decomposition.")],
    prompt: Annotated[str, typer.Option(help="The text.")],
    readout: Annotated[list[str] | None, typer.Option(help="A next token; repeatable; else the likeliest.")] = None,
    model: Annotated[str | None, typer.Option(help="The model, where the directory does not say it.")] = None,
    max_nodes: Annotated[int, typer.Option(min=1, help="Subcomponents at positions, at most.")] = 300,
    importance_above: Annotated[float, typer.Option(min=0.0, max=1.0, help="Where a node counts as on.")] = 0.1,
    labels: Annotated[Path | None, typer.Option(help="Labels that pages exported.")] = None,
    out: Annotated[Path | None, typer.Option(help="The page to write.")] = None,
    file: Annotated[Path | None, typer.Option(help="The JSON to write, for circuit-tracer and Neuronpedia.")] = None,
    json: JsonFlag = False,
) -> None:
    decomposition, run = open_saved(directory, model)
    if getattr(decomposition.model, "tokenizer", None) is None:
        raise ConfigError("this model has no tokenizer to read --prompt with; spd_lens.graphs takes tokens in Python")
    begins = {} if run is None else {"prepend_bos": run.data.prepend_bos}
    found = attribution_graph(
        decomposition,
        decomposition.model.to_tokens(prompt, **begins),
        readouts=readout or None,
        importance_above=importance_above,
        max_nodes=max_nodes,
        generator=torch.Generator().manual_seed(0),
    )
    written = []
    if out is not None:
        own = directory / "harvest"
        harvest = Harvest.load(own) if own.is_dir() else None
        written.append(found.to_html(out, title=prompt, harvest=harvest, labels=labels))
    if file is not None:
        written.append(found.to_json(file, labels=labels))
    paths = [str(path) for path in written]
    show("\n".join([str(found), *(f"written: {path}" for path in paths)]), _values(found, paths), as_json=json)


def _values(found: AttributionGraph, written: list[str]) -> dict[str, Any]:
    check = found.check
    strongest = sorted(found.graph.edges(data="weight"), key=lambda edge: -abs(edge[2]))[:15]
    return {
        "tokens": list(found.tokens),
        "nodes": found.graph.number_of_nodes(),
        "edges": found.graph.number_of_edges(),
        "left_out": found.settings.left_out,
        "checked": {"edges": len(check.edges), "correlation": check.correlation, "slope": check.slope},
        "strongest": [{"from": s, "to": t, "attribution": weight} for s, t, weight in strongest],
        "written": written,
    }
