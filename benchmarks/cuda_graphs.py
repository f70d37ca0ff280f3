"""The language model's training step, launched kernel by kernel and as a CUDA graph, in one run on one card.

    python benchmarks/cuda_graphs.py --rows 16 --rows 64

Prints JSON: milliseconds a step (median over blocks of steps, device synchronised at each block's end), tokens a second
and peak memory, for ordinary steps and for `GraphedStep`. Needs a CUDA device.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from experiments.language_model import CONTEXT, configuration, decomposed, text_windows
from spd_lens.data import Batch
from spd_lens.support import library_versions
from spd_lens.training import GraphedStep, make_learner, take_step

BLOCKS, STEPS_PER_BLOCK = 7, 10


def milliseconds(step: Callable[[int], object]) -> float:
    """Of one step: the median over blocks."""
    times = []
    for block in range(BLOCKS + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for k in range(STEPS_PER_BLOCK):
            step(block * STEPS_PER_BLOCK + k)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began) / STEPS_PER_BLOCK * 1000)
    # The first block makes optimiser states, handles and the recording.
    return statistics.median(times[1:])


def measured(rows: int, graphs: bool) -> dict[str, Any]:
    """One way to take the step, from a fresh decomposition."""
    torch.cuda.reset_peak_memory_stats()
    decomposition = decomposed(0, 1.0, device="cuda")
    for p in decomposition.model.parameters():
        p.requires_grad_(False)
    for p in decomposition.subcomponent_parameters() + decomposition.gate_parameters():
        p.requires_grad_(True)
    learner = make_learner(decomposition, configuration(4e-4, 6500, 0))
    batch = Batch(text_windows("train")[:rows]).to(torch.device("cuda"))
    graphed = GraphedStep(learner, steps_per_capture=100) if graphs else None
    taken = milliseconds(lambda k: graphed(batch, k) if graphed else take_step(learner, batch, k))
    return {
        "rows": rows,
        "cuda_graphs": graphs,
        "milliseconds": round(taken, 2),
        "tokens_per_second": round(rows * CONTEXT / taken * 1000),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }


def main(rows: Annotated[list[int], typer.Option(help="rows of 128 tokens in a batch")] = [16, 64]) -> None:  # noqa: B006
    """Measure every number of rows both ways."""
    results = [measured(n, graphs) for n in rows for graphs in (False, True)]
    card = torch.cuda.get_device_name()
    print(json.dumps({"card": card, "versions": library_versions(), "results": results}, indent=2))


if __name__ == "__main__":
    typer.run(main)
