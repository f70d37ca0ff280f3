"""How the settings of the README's example were chosen, and how they do on text that had no part in it.

    python experiments/readme_example.py --json

For every minimality of a grid the example's decomposition (the MLP of block 1 of the tiny language model) is trained
with the example's other settings on the first nine tenths of the whaling book's training chapters, and evaluated on the
last tenth of them. Chosen is the largest minimality whose verdict holds there: the sparsest of those that hold. The
chosen one alone is then evaluated on the held-out chapters, which neither training nor the choice has seen: on the rows
that the README's `evaluate` takes, and on as many more. One seed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

if __package__ in (None, ""):  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.machine import provenance
from spd_lens import (
    PGD,
    Decomposition,
    Reconstruction,
    TokenBatches,
    cache_residuals,
    decompose_layer,
    evaluate,
    pack_tokens,
    train,
)
from spd_lens.models import load_moby_dick, load_tiny_lm

RESULTS = Path(__file__).parent / "results" / "readme_example"
GRID = (5e-4, 8e-4, 1.2e-3)
SETTINGS: dict[str, Any] = {
    "steps": 600,
    "lr": 5e-3,
    "faithfulness": 200.0,
    "reconstructions": (Reconstruction(masks=PGD(steps=1, step_size=1.0)),),
}


def windows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of 64 tokens: to train on, to choose by, and held out."""
    tokenizer = load_tiny_lm().tokenizer
    train_rows, held_out = (
        pack_tokens([load_moby_dick(part)], tokenizer, context=64, prepend_bos=True) for part in ("train", "held_out")
    )
    n = len(train_rows) * 9 // 10
    return train_rows[:n], train_rows[n:], held_out


def trained(rows: torch.Tensor, minimality: float, steps: int) -> Decomposition:
    """The README's decomposition, trained on these rows."""
    decomposition = decompose_layer(load_tiny_lm(), layer=1, gate="shared", gate_width=128, init="exact")
    batches = cache_residuals(decomposition, TokenBatches(rows, batch_size=8))
    with tempfile.TemporaryDirectory() as folder:
        settings = {**SETTINGS, "steps": steps, "minimality": minimality}
        train(decomposition, batches, **settings, checkpoint_every=None, out_dir=Path(folder) / "run")
    return decomposition


def measured(decomposition: Decomposition, rows: torch.Tensor, max_batches: int = 2) -> dict[str, Any]:
    """What the README's `evaluate` finds on these rows."""
    report = evaluate(decomposition, TokenBatches(rows, batch_size=16), max_batches=max_batches)
    return {
        "rows": 16 * max_batches,
        "holds": report.verdict.holds,
        "verdict": str(report.verdict),
        "divergence": dict(report.divergence),
        "adversarial": {str(n): value for n, value in report.adversarial.items()},
        "faithfulness": {name: site.relative_faithfulness for name, site in report.sites.items()},
    }


def choose(grid: tuple[float, ...], steps: int) -> dict[str, Any]:
    """Train and judge the grid, and judge the chosen one on the held-out chapters."""
    train_rows, choosing_rows, held_out = windows()
    runs: dict[float, dict[str, Any]] = {}
    found: dict[float, Decomposition] = {}
    for minimality in grid:
        began = time.process_time()
        found[minimality] = trained(train_rows, minimality, steps)
        seconds = time.process_time() - began
        runs[minimality] = {"training_cpu_seconds": seconds, **measured(found[minimality], choosing_rows)}
        print(f"minimality {minimality:g}: {runs[minimality]['verdict']}", file=sys.stderr)
    holding = [minimality for minimality in grid if runs[minimality]["holds"]]
    chosen = max(holding) if holding else None
    result: dict[str, Any] = {"grid": {f"{m:g}": run for m, run in runs.items()}, "chosen": chosen}
    if chosen is not None:
        result["held_out"] = measured(found[chosen], held_out)
        result["held_out_more"] = measured(found[chosen], held_out, max_batches=4)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minimality", type=float, nargs="*", default=GRID)
    parser.add_argument("--steps", type=int, default=SETTINGS["steps"])
    parser.add_argument("--json", action="store_true", help=f"write {RESULTS.name}/result.json, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = choose(tuple(args.minimality), args.steps)
    result |= {"seed": 0, "steps": args.steps, "command": "python experiments/readme_example.py --json"}
    result |= provenance(torch.device("cpu"))
    print(json.dumps(result, indent=2))
    if args.json:
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / "result.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
