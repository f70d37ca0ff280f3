"""What every experiment over seeds needs: targets by seed, processor time over interruptions, names, means.

Run i takes the i-th accepted target (target seeds 0, 1, 2, ... in order; the rule looks at the target alone) and seed
`DECOMPOSITION_SEED + i` for everything else, whatever decomposes it: SPD and APD get the same targets.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.paper import Experiment, load_target, target_tensors
from spd_lens.support import read_tensors, write_json, write_tensors

DECOMPOSITION_SEED = 1000
RESULTS, WORK = Path("experiments/results"), Path("runs/reproduce")
# What a record keeps when its metrics are recomputed.
PROVENANCE = ("target_seed", "decomposition_seed", "cpu_hours", "settings", "versions", "command")


# -- targets ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Targets:
    """Accepted targets with their seeds, and the rejected seeds with the reasons."""

    models: list[nn.Module]
    seeds: list[int]
    rejected: dict[int, list[str]]


def accepted_targets(experiment: Experiment, count: int, cache: Path) -> Targets:
    """The first `count` accepted targets of seeds 0, 1, 2, ...; trained ones are kept in `cache`."""
    targets = Targets([], [], {})
    seed = 0
    while len(targets.models) < count:
        for model in _trained_targets(experiment, seed, cache):
            if len(targets.models) < count:
                if problems := experiment.target_problems(model):
                    targets.rejected[seed] = list(problems)
                else:
                    targets.models.append(model)
                    targets.seeds.append(seed)
            seed += 1
    return targets


def _trained_targets(experiment: Experiment, first: int, cache: Path) -> list[nn.Module]:
    """The targets of one file, from seed `first` on."""
    path = cache / f"{experiment.targets}-{first:04d}.safetensors"
    seeds = range(first, first + experiment.targets_per_file)
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        models = experiment.train_targets(seeds)
        half_written = path.with_suffix(".tmp")
        learned = [target_tensors(model) for model in models]
        write_tensors(
            half_written,
            {f"{seed}|{key}": p for seed, own in zip(seeds, learned, strict=True) for key, p in own.items()},
        )
        half_written.replace(path)
    return [load_target(experiment, below(read_tensors(path), f"{seed}|")) for seed in seeds]


# -- processor time, over interruptions ------------------------------------------------------------------------------


@contextmanager
def measured_cpu(directory: Path, every: float = 5.0) -> Iterator[None]:
    """Write the processor seconds of the block to a file of its own, also while it runs: it may be killed."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{time.time_ns()}.txt"
    started, done = time.process_time(), threading.Event()

    def write() -> None:
        path.write_text(f"{time.process_time() - started:.1f}")

    def keep_writing() -> None:
        while not done.wait(every):
            write()

    thread = threading.Thread(target=keep_writing, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        write()


def cpu_hours(directory: Path) -> float:
    """The sum of what `measured_cpu` wrote there."""
    texts = [path.read_text() for path in directory.glob("*.txt")]
    return sum(float(text) for text in texts if text) / 3600


# -- files and numbers -----------------------------------------------------------------------------------------------


def run_name(i: int) -> str:
    """Stem of a run's files."""
    return f"run-{i:03d}"


def has_tensors(results: Path, i: int) -> bool:
    """Whether the tensors of run i are there; few of them are kept in the repository."""
    return (results / f"{run_name(i)}.safetensors").is_file()


def read_record(path: Path) -> dict[str, Any]:
    """A run's JSON."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_at_once(path: Path, content: Mapping[str, Any]) -> None:
    """JSON that is there as a whole or not at all."""
    half_written = path.with_name(f".{path.name}")
    write_json(half_written, content)
    half_written.replace(path)


def check_settings(settings: Mapping[str, Any], results: Path) -> None:
    """Runs with other settings must not end up in one table. Raises ValueError."""
    wanted = json.loads(json.dumps(settings))
    for path in sorted(results.glob("run-*.json")):
        if read_record(path)["settings"] != wanted:
            raise ValueError(f"{path} was made with other settings; move {results} away, or give another --results")


def settings_hash(settings: Mapping[str, Any]) -> str:
    """Names a directory: checkpoints of other settings are left where they are, and not continued."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Mean and standard deviation over runs (with n - 1), as `NAME_mean` and `NAME_std`."""
    tensor = torch.tensor(values, dtype=torch.float64)
    deviation = float(tensor.std()) if len(values) > 1 else 0.0
    return {f"{name}_mean": round(float(tensor.mean()), 5), f"{name}_std": round(deviation, 5)}


def summary_of(
    name: str, records: Sequence[Mapping[str, Any]], figures: Mapping[str, Sequence[float]], **more: Any
) -> dict[str, Any]:
    """What every `summary.json` has: counts, mean and deviation of each of `figures` over all runs (failed ones too),
    `more`, and where it comes from."""
    first = records[0]
    spreads: dict[str, float] = {}
    for figure, values in figures.items():
        spreads |= spread(figure, values)
    return {
        "name": name,
        "runs": len(records),
        "successes": sum(record["success"] for record in records),
        **spreads,
        **more,
        "cpu_hours": round(sum(record["cpu_hours"] for record in records), 3),
        "settings": first["settings"],
        "versions": first["versions"],
        "command": first["command"],
    }


def finished_runs(results: Path) -> list[Path]:
    """The JSONs of the runs in `results`, in order. Raises ValueError if there is none."""
    paths = sorted(results.glob("run-*.json"))
    if not paths:
        raise ValueError(f"{results} holds no finished run; run without --recompute first")
    return paths


# Figures of `Recovery` by the name that they have in a summary.
RECOVERY = {"mmcs": "mmcs", "ml2r": "ml2r", "mmcs_all_c": "mmcs_all", "ml2r_all_c": "ml2r_all"}
