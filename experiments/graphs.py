"""Attribution graphs of the shipped decomposition of the tiny language model: `python experiments/graphs.py [--json]`.

For each prompt: the graph, how its edges agree with real removals (C2), and what happens to the readouts when its most
influential subcomponents are ablated at once, one pass with nothing held, beside what the edges predict. Beside
them as many subcomponents drawn at random from the graph. With Chromium also the pictures of the page in `docs`.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from spd_lens import Decomposition, harvest, pack_tokens
from spd_lens.graphs import AttributionGraph, Removal, attribution_graph
from spd_lens.models import load_moby_dick, load_tiny_lm
from spd_lens.statistics import Harvest
from spd_lens.support import library_versions, write_json

RESULTS = Path(__file__).parent / "results" / "graphs"
DOCS = Path(__file__).parents[1] / "docs"
PROMPTS = ("The white whale turned upon the boat, and the captain of the", "Call me Ishmael. Some years ago")
COUNTS = (1, 3, 10, 30, 100)
SEED = 0


def agreement(removal: Removal) -> dict[str, Any]:
    """Predicted beside measured changes of the readouts."""
    predicted, measured = np.array(removal.predicted), np.array(removal.measured)
    correlation = float(np.corrcoef(predicted, measured)[0, 1]) if len(predicted) > 1 else float("nan")
    return {
        "nodes": len(removal.nodes),
        "correlation": round(correlation, 3),
        "rms_predicted": round(float(np.sqrt((predicted**2).mean())), 3),
        "rms_measured": round(float(np.sqrt((measured**2).mean())), 3),
        "rms_error": round(float(np.sqrt(((predicted - measured) ** 2).mean())), 3),
    }


def measured(decomposition: Decomposition, prompt: str) -> tuple[dict[str, Any], AttributionGraph, Tensor]:
    """The graph of a prompt, its check, and joint removals."""
    tokens = decomposition.model.to_tokens(prompt)
    busy = time.process_time()
    generator = torch.Generator().manual_seed(SEED)
    graph = attribution_graph(decomposition, tokens, max_nodes=200, n_checked=64, generator=generator)
    seconds = time.process_time() - busy
    influence = graph.influence()
    names = sorted(map(str, graph.units), key=lambda name: -influence[name])
    drawn = random.Random(SEED).sample(names, len(names))
    check = graph.check
    found = {
        "prompt": prompt,
        "nodes": graph.graph.number_of_nodes(),
        "edges": graph.graph.number_of_edges(),
        "subcomponents_left_out": graph.settings.left_out,
        "cpu_seconds": round(seconds, 1),
        "edges_checked": len(check.edges),
        "edge_correlation": round(check.correlation, 4),
        "edge_slope": round(check.slope, 4),
        "edge_largest_error_share": round(check.relative_error, 4),
        "total_effect_correlation": round(float(np.corrcoef(check.predicted, check.total)[0, 1]), 3),
        "most_influential": [],
        "at_random": [],
    }
    for n in COUNTS:
        for key, order in (("most_influential", names), ("at_random", drawn)):
            found[key].append(agreement(graph.removal(decomposition, tokens, order[:n])))
    return found, graph, tokens


def pictures(graph: AttributionGraph, found: Harvest, title: str) -> None:
    """`docs/graph.png` and `docs/graph_pinned.png` from the page in Chromium; nothing without it."""
    if shutil.which("chromium") is None:
        return
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.chromium import chromium

    folder = Path(tempfile.mkdtemp())
    page = graph.to_html(folder / "graph.html", title=title, harvest=found)
    with chromium(folder / "profile") as browser:
        browser.resize(1500, 950)
        browser.open(page)
        browser.do("choose(data.edges.find(e=>data.nodes[e[1]].kind==='subcomponent')[1])")
        browser.screenshot(DOCS / "graph.png")
        browser.do(
            "choose(chosen);data.edges.slice(0,14).flatMap(e=>e.slice(0,2)).forEach(i=>{if(!isPinned(i))pin(i)});"
            "document.querySelectorAll('.tick')[0].click();document.querySelectorAll('.tick')[1].click();"
            "$('group').click();$('only').click()"
        )
        browser.dark()
        browser.screenshot(DOCS / "graph_pinned.png")
    shutil.rmtree(folder, ignore_errors=True)


def main(
    write: Annotated[bool, typer.Option("--json", help="write results/graphs/tiny_lm.json and the pictures")] = False,
    rows: Annotated[int, typer.Option(help="rows of 64 held-out tokens that contexts and labels are of")] = 16,
) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    decomposition = load_tiny_lm(decomposed=True)
    result: dict[str, Any] = {"versions": library_versions(), "seed": SEED, "prompts": []}
    for k, prompt in enumerate(PROMPTS):
        found, graph, _ = measured(decomposition, prompt)
        result["prompts"].append(found)
        print(json.dumps(found, indent=1), flush=True)
        if write:
            write_json(RESULTS / "tiny_lm.json", result)
        if write and not k:
            tokens = pack_tokens(
                [load_moby_dick("held_out")], decomposition.model.tokenizer, context=64, prepend_bos=True, max_rows=rows
            )
            pictures(graph, harvest(decomposition, list(tokens.split(8)), max_batches=None), prompt)


if __name__ == "__main__":
    typer.run(main)
