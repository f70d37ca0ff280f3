"""What decompositions of models from 124M to 70B would cost, calculated by `plan`; nothing is run.

    python experiments/plans.py --json experiments/results/plans/plans.json

Steps of 64 rows of 512 tokens, or as many as fit, in bf16 with shared gates and C = 1.5 times the rank, and one term of
stochastic masks, on H100s of 80 GB at 30 % of their rated rate. GPU-hours are those of 10,000 times 64 rows. "local"
is a model of one block without a vocabulary, which is what training on the block's own output needs.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from spd_lens import TrainConfig
from spd_lens.support import library_versions, write_json
from spd_lens.training import DEVICES, SHAPES, ModelShape, plan

MODELS = {"124M": "gpt2", "1B": "llama-3.2-1b", "8B": "llama-3-8b", "70B": "llama-3-70b"}
ROWS, CONTEXT, STEPS, DEVICE, UTILISATION = 64, 512, 10_000, "h100", 0.3


def cases(shape: ModelShape) -> dict[str, tuple[ModelShape, dict[str, int | None], int, bool]]:
    """What is planned of a model: shape, sites, ranks, and whether passes start at the first decomposed block."""
    middle = shape.n_layers // 2
    block = replace(shape, n_layers=1, d_vocab=1)
    return {
        "MLP of the middle block, 1 GPU": (shape, {f"blocks.{middle}.mlp.W_*": None}, 1, True),
        "MLP of the middle block, 8 GPUs": (shape, {f"blocks.{middle}.mlp.W_*": None}, 8, True),
        "all matrices of all blocks, 8 GPUs": (shape, {"blocks.*": None}, 8, False),
        "all matrices of all blocks, 8 GPUs, sharded": (shape, {"blocks.*": None}, 8, False),
        "a job for every block, local, 1 GPU each": (block, {"blocks.0.*": None}, 1, True),
    }


def row(name: str, what: str) -> dict[str, Any]:
    """One row of the table."""
    shape, sites, gpus, cached = cases(SHAPES[MODELS[name]])[what]
    bf16 = TrainConfig(precision="bf16", shard="sharded" in what)
    one = plan(shape, sites, bf16, batch_size=gpus, context=CONTEXT, gpus=gpus, target_bytes=2, cached=cached,
               device=DEVICE, utilisation=UTILISATION)  # fmt: skip
    rows = max(1, min(ROWS // gpus, one.largest_batch or 1)) * gpus
    found = plan(shape, sites, bf16, batch_size=rows, context=CONTEXT, gpus=gpus, target_bytes=2, cached=cached,
                 device=DEVICE, utilisation=UTILISATION)  # fmt: skip
    assert found.tokens_per_second is not None
    jobs = SHAPES[MODELS[name]].n_layers if "job" in what else 1
    hours = STEPS * ROWS * CONTEXT / found.tokens_per_second / 3600
    return {
        "model": name, "shape": MODELS[name], "what": what, "trained": found.n_trained, "jobs": jobs,
        "gigabytes_with_one_row": one.bytes / 1e9, "largest_batch": found.largest_batch,
        "fits": one.bytes <= DEVICES[DEVICE].memory, "tokens_per_second": found.tokens_per_second,
        "gpu_hours": hours * gpus * jobs,
    }  # fmt: skip


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of the docs."""
    lines = [
        "| model | what | trained parameters | GB a GPU, one row | rows that fit | tokens a second | GPU-hours |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        jobs = f" x {r['jobs']} jobs" if r["jobs"] > 1 else ""
        fits = f"{r['largest_batch']:,}" if r["fits"] else "does not fit"
        rate, hours = (f"{r['tokens_per_second']:,.0f}", f"{r['gpu_hours']:,.1f}") if r["fits"] else ("-", "-")
        trained, memory = f"{r['trained'] / 1e6:,.0f}M{jobs}", f"{r['gigabytes_with_one_row']:,.0f}"
        lines.append(f"| {r['model']} | {r['what']} | {trained} | {memory} | {fits} | {rate} | {hours} |")
    return "\n".join(lines)


def main(json: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None) -> None:
    rows = [row(name, what) for name in MODELS for what in cases(SHAPES[MODELS[name]])]
    print(markdown(rows))
    if json is not None:
        choices = {"rows": ROWS, "context": CONTEXT, "steps": STEPS, "device": DEVICE, "utilisation": UTILISATION}
        write_json(json, {"calculated": True, **choices, "plans": rows, "versions": library_versions()})


if __name__ == "__main__":
    typer.run(main)
