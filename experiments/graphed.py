"""Training with every step a CUDA graph, for the experiments that a large GPU does in minutes."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable
from pathlib import Path

from tqdm import trange

from spd_lens import Batch, Decomposition, TrainConfig
from spd_lens.training import GraphedStep, make_learner


def train_graphed(
    decomposition: Decomposition, batches: Iterable[Batch], config: TrainConfig, out: Path, steps_per_capture: int = 100
) -> dict[str, float]:
    """`train` for a GPU, with every step a CUDA graph: log and result, no checkpoints. Returns the log's last line."""
    out.mkdir(parents=True, exist_ok=True)
    for p in decomposition.model.parameters():
        p.requires_grad_(False)
    for p in decomposition.subcomponent_parameters() + decomposition.gate_parameters():
        p.requires_grad_(True)
    graphed = GraphedStep(make_learner(decomposition, config), steps_per_capture=steps_per_capture)
    line: dict[str, float] = {}
    began = time.perf_counter()
    with (out / "log.jsonl").open("w") as log:
        for step, batch in zip(trange(config.steps), batches, strict=False):
            losses, active, norms = graphed(batch.to(decomposition.device), step)
            if step % 100 == 0 or step == config.steps - 1:
                line = {name: float(value) for name, value in {**losses, **norms}.items()}
                line |= {f"L0/{name}": float(mean) for name, mean in active.items()}
                line["L0"] = sum(v for k, v in line.items() if k.startswith("L0/"))
                line |= {"step": step, "seconds": round(time.perf_counter() - began, 1)}
                if not all(map(math.isfinite, line.values())):
                    raise ValueError(f"a loss became NaN or infinite before step {step}: {line}")
                print(json.dumps(line), file=log, flush=True)
    record = {"config": config.to_json(), "steps": config.steps, "final": line, "cuda_graphs": True}
    decomposition.training_record = record
    decomposition.save_pretrained(out / "decomposition")
    return line
