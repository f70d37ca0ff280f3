"""The language model's training step: launched kernel by kernel, compiled, as a CUDA graph, and both, on one card.

    python benchmarks/cuda_graphs.py --rows 16 --rows 64

Prints JSON: milliseconds a step (median over blocks of steps, device synchronised at each block's end), tokens a second
and peak memory, for ordinary steps, for `compile="inductor"` (with the seconds until its first block was done), and for
`GraphedStep` of either. `--way` takes some of them only. Needs a CUDA device; `--device cpu` for ordinary steps.
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
from spd_lens.support import Backend, library_versions
from spd_lens.training import GraphedStep, make_learner, take_step

BLOCKS, STEPS_PER_BLOCK = 7, 10
# Backend of `torch.compile`, and whether the step is recorded.
WAYS: dict[str, tuple[Backend, bool]] = {
    "plain": ("none", False),
    "compiled": ("inductor", False),
    "graph": ("none", True),
    "compiled graph": ("inductor", True),
}


def milliseconds(step: Callable[[int], object], device: torch.device) -> tuple[float, float]:
    """Of one step: the median over blocks, and of those of the first block, which is none of them."""
    times = []
    for block in range(BLOCKS + 1):
        began = time.perf_counter()
        for k in range(STEPS_PER_BLOCK):
            step(block * STEPS_PER_BLOCK + k)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - began) / STEPS_PER_BLOCK * 1000)
    # The first block makes optimiser states, handles, kernels and the recording.
    return statistics.median(times[1:]), times[0]


def measured(rows: int, way: str, device: torch.device) -> dict[str, Any]:
    """One way to take the step, from a fresh decomposition."""
    backend, graphs = WAYS[way]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    decomposition = decomposed(0, 1.0, device=str(device))
    for p in decomposition.model.parameters():
        p.requires_grad_(False)
    for p in decomposition.subcomponent_parameters() + decomposition.gate_parameters():
        p.requires_grad_(True)
    learner = make_learner(decomposition, configuration(4e-4, 6500, 0).changed(compile=backend))
    batch = Batch(text_windows("train")[:rows]).to(device)
    graphed = GraphedStep(learner, steps_per_capture=100) if graphs else None
    taken, first = milliseconds(lambda k: graphed(batch, k) if graphed else take_step(learner, batch, k), device)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
    return {
        "rows": rows,
        "way": way,
        "milliseconds": round(taken, 2),
        "first_block_seconds": round(first * STEPS_PER_BLOCK / 1000, 1),
        "tokens_per_second": round(rows * CONTEXT / taken * 1000),
        "peak_gib": round(peak, 2),
    }


def main(
    rows: Annotated[list[int], typer.Option(help="rows of 128 tokens in a batch")] = [16, 64],  # noqa: B006
    way: Annotated[list[str], typer.Option(help=f"of {', '.join(WAYS)}; repeatable")] = list(WAYS),  # noqa: B006
    device: Annotated[str, typer.Option()] = "cuda",
) -> None:
    """Measure every number of rows in every way."""
    place = torch.device(device)
    results = [measured(n, one, place) for n in rows for one in way]
    card = torch.cuda.get_device_name() if place.type == "cuda" else "no card"
    print(json.dumps({"card": card, "versions": library_versions(), "results": results}, indent=2))


if __name__ == "__main__":
    typer.run(main)
