"""What the options that save memory save, and what they cost: peak bytes of a training step, and its CPU time.

    OMP_NUM_THREADS=1 python benchmarks/memory.py

Prints a table: for every option the bytes by which memory rises during a step above parameters and Adam's moments
(torch's profiler), and the CPU seconds of a step (the least of three). A random transformer of 4 blocks (width 64,
vocabulary 1,024), its MLPs decomposed (C 128), rows of 64 tokens, a stochastic and a persistent term, the frequency
term; shared gates of width 128, then vector gates of width 8. Seed 0.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.configurations import ProductStep
from benchmarks.measure import peak_memory
from spd_lens import Batch, TrainConfig, decompose
from spd_lens.models import build_transformer
from spd_lens.objective import Persistent
from spd_lens.support import format_table, library_versions
from spd_lens.training import Reconstruction, take_step

TERMS = (Reconstruction(), Reconstruction(0.5, Persistent(), "all"))
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulate 2": {"accumulate": 2},
    "accumulate 8": {"accumulate": 8},
    "recompute gates": {"recompute": "gates"},
    "recompute passes": {"recompute": "passes"},
    "recompute all": {"recompute": "all"},
    "accumulate 8, recompute all": {"accumulate": 8, "recompute": "all"},
}


def measured(gate: str, width: int, options: dict[str, Any], rows: int) -> tuple[int, float]:
    """Peak bytes and CPU seconds of a step."""
    model = build_transformer(
        {"n_layers": 4, "d_model": 64, "n_heads": 4, "d_head": 16, "d_mlp": 256, "d_vocab": 1024, "n_ctx": 64,
         "act_fn": "gelu", "normalization_type": "LN", "seed": 0}
    )  # fmt: skip
    decomposition = decompose(model, {"blocks.*.mlp.W_*": 128}, gate=gate, gate_width=width)  # pyright: ignore[reportArgumentType]
    product = ProductStep(decomposition, TrainConfig(frequency=1e-3, reconstructions=TERMS, **options))
    batch = Batch(torch.randint(0, 1024, (rows, 64), generator=torch.Generator().manual_seed(0)))
    peak = peak_memory(lambda: take_step(product.learner, batch, 0), torch.device("cpu"))
    seconds = []
    for _ in range(3):
        began = time.process_time()
        take_step(product.learner, batch, 0)
        seconds.append(time.process_time() - began)
    return peak, min(seconds)


def main(rows: Annotated[int, typer.Option(help="rows of 64 tokens in a batch")] = 8) -> None:
    """Measure every option with both kinds of gates."""
    table = []
    for gate, width in (("shared", 128), ("vector", 8)):
        plain: tuple[int, float] | None = None
        for name, options in OPTIONS.items():
            peak, seconds = found = measured(gate, width, options, rows)
            plain = plain or found
            ratios = (f"{peak / plain[0]:.2f}", f"{seconds:.2f}", f"{seconds / plain[1]:.2f}")
            print(gate, name, file=sys.stderr)
            table.append((gate, name, f"{peak / 1e6:.0f}", *ratios))
    print(format_table(("gates", "option", "peak MB", "of plain", "CPU s", "of plain"), table))
    print(library_versions())


if __name__ == "__main__":
    typer.run(main)
