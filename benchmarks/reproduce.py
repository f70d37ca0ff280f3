"""The paper's experiments: `python benchmarks/reproduce.py tms_5-2 --seeds 100`.

Run i decomposes the i-th accepted target (target seeds 0, 1, 2, ... in order; the rule looks at the target alone)
with masks, data and initialisation from decomposition seed 1000 + i. Nothing is chosen by hand.

    runs/reproduce/            checkpoints and trained targets; a run that was killed continues from here
    benchmarks/results/NAME/   run-000.json and run-000.safetensors for every run, summary.json, pictures

`--recompute` rebuilds every JSON, the table and the pictures from the safetensors alone: they hold the target's
weights, U and V, the gates, and the importances on one-hot inputs.
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.experiments import EXPERIMENTS, Experiment, load_target
from benchmarks.figures import save_figures
from spd_lens import Decomposition
from spd_lens.checkpoint import library_versions
from spd_lens.files import read_tensors, write_json, write_tensors
from spd_lens.many import train_many
from spd_lens.tables import format_table
from spd_lens.toys.features import one_hot_inputs

DECOMPOSITION_SEED = 1000
RESULTS, WORK = Path("benchmarks/results"), Path("runs/reproduce")


def main(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(EXPERIMENTS)}.")],
    seeds: Annotated[int | None, typer.Option(help="Number of runs; by default the experiment's.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps instead of the experiment's.")] = None,
    recompute: Annotated[bool, typer.Option(help="Only recompute table and pictures from the saved tensors.")] = False,
    results: Annotated[Path, typer.Option(help="Where results go.")] = RESULTS,
    work: Annotated[Path, typer.Option(help="Where checkpoints and targets are kept.")] = WORK,
) -> None:
    torch.set_num_threads(1)
    if name not in EXPERIMENTS:
        raise typer.BadParameter(f"{name!r}; expected one of {', '.join(EXPERIMENTS)}")
    experiment = EXPERIMENTS[name]
    if steps is not None:
        experiment = replace(experiment, config=experiment.config.changed(steps=steps))
    directory = results / experiment.name
    if not recompute:
        reproduce(experiment, experiment.runs if seeds is None else seeds, results=directory, work=work)
    summary = summarise(experiment, directory)
    save_figures(directory, read_run(experiment, directory, 0))
    print(table(summary))


# -- training --------------------------------------------------------------------------------------------------------


def reproduce(experiment: Experiment, runs: int, *, results: Path, work: Path) -> None:
    """Train what is missing of `runs` runs, in groups, and write their files to `results`.

    Raises ValueError if `results` holds runs with other settings.
    """
    results.mkdir(parents=True, exist_ok=True)
    check_settings(experiment, results)
    targets = accepted_targets(experiment, runs, work / "targets")
    write_json(results / "targets.json", {"accepted": targets.seeds, "rejected": targets.rejected})
    for first in range(0, runs, experiment.group):
        # A group is trained as a whole, so that its checkpoint is found again.
        group = range(first, min(first + experiment.group, runs))
        if all((results / f"{run_name(i)}.json").is_file() for i in group):
            continue
        out_dir = work / experiment.name / settings_hash(experiment) / f"{group[0]:03d}-{group[-1]:03d}"
        with measured_cpu(out_dir / "cpu"):
            decompositions = train_group(experiment, [targets.models[i] for i in group], group, out_dir)
        hours = cpu_hours(out_dir / "cpu") / len(group)
        for i, decomposition in zip(group, decompositions, strict=True):
            provenance = {
                "target_seed": targets.seeds[i],
                "decomposition_seed": DECOMPOSITION_SEED + i,
                "cpu_hours": hours,
                "settings": experiment.settings(),
                "versions": library_versions(),
                "command": " ".join(["python", *sys.argv]),
            }
            write_run(experiment, results, i, targets.models[i], decomposition, provenance)


def train_group(
    experiment: Experiment, targets: Sequence[nn.Module], runs: Sequence[int], out_dir: Path
) -> list[Decomposition]:
    """The trained decompositions of these runs; continues from the checkpoint in `out_dir`."""
    seeds = [DECOMPOSITION_SEED + i for i in runs]
    decompositions = [
        experiment.decompose(copy.deepcopy(target), seed) for target, seed in zip(targets, seeds, strict=True)
    ]
    configs = [experiment.config.changed(seed=seed) for seed in seeds]
    result = train_many(decompositions, [experiment.features(seed) for seed in seeds], configs, out_dir=out_dir)
    if result.interrupted:
        print(f"stopped after {result.steps} of {experiment.config.steps} steps; the same command continues")
        raise typer.Exit(130)
    return decompositions


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
        learned = [dict(model.named_parameters()) for model in models]
        write_tensors(
            half_written,
            {f"{seed}|{key}": p for seed, own in zip(seeds, learned, strict=True) for key, p in own.items()},
        )
        half_written.replace(path)
    return [load_target(experiment, _below(read_tensors(path), f"{seed}|")) for seed in seeds]


def settings_hash(experiment: Experiment) -> str:
    """Checkpoints of other settings are left where they are, and not continued."""
    return hashlib.sha256(json.dumps(experiment.settings(), sort_keys=True).encode()).hexdigest()[:8]


def check_settings(experiment: Experiment, results: Path) -> None:
    """Runs with other settings must not end up in one table."""
    wanted = json.loads(json.dumps(experiment.settings()))
    for path in sorted(results.glob("run-*.json")):
        if read_record(path)["settings"] != wanted:
            raise ValueError(f"{path} was made with other settings; move {results} away, or give another --results")


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


# -- files -----------------------------------------------------------------------------------------------------------


def run_name(i: int) -> str:
    """Stem of a run's files."""
    return f"run-{i:03d}"


def write_run(
    experiment: Experiment,
    results: Path,
    i: int,
    target: nn.Module,
    decomposition: Decomposition,
    provenance: Mapping[str, Any],
) -> None:
    """`run-i.safetensors`, then `run-i.json`: a run with a JSON is complete."""
    importances = decomposition.importance(one_hot_inputs(experiment.features(0).n_features))
    tensors = {f"target|{key}": p.detach() for key, p in target.named_parameters()}
    tensors |= {f"decomposition|{key}": t for key, t in decomposition.tensors().items()}
    tensors |= {f"importance|{key}": g for key, g in importances.items()}
    write_tensors(results / f"{run_name(i)}.safetensors", tensors)
    write_record(experiment, results, i, decomposition, provenance)


def write_record(
    experiment: Experiment, results: Path, i: int, decomposition: Decomposition, provenance: Mapping[str, Any]
) -> None:
    """`run-i.json`, all at once."""
    report = experiment.report(decomposition)
    record = {"run": i, "success": report.success, "problems": report.problems, **asdict(report), **provenance}
    half_written = results / f".{run_name(i)}.json"
    write_json(half_written, record)
    half_written.replace(results / f"{run_name(i)}.json")


def read_record(path: Path) -> dict[str, Any]:
    """A run's JSON."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_run(experiment: Experiment, results: Path, i: int) -> Decomposition:
    """The trained decomposition of run i, from its tensors alone.

    Raises ValueError if the importances on one-hot inputs are no longer what was saved.
    """
    path = results / f"{run_name(i)}.safetensors"
    tensors = read_tensors(path)
    decomposition = experiment.decompose(load_target(experiment, _below(tensors, "target|")), 0)
    decomposition.load_tensors(_below(tensors, "decomposition|"))
    saved = _below(tensors, "importance|")
    importances = decomposition.importance(one_hot_inputs(experiment.features(0).n_features))
    for name, g in importances.items():
        if not torch.allclose(g, saved[name], atol=1e-4):
            raise ValueError(f"{path}: the gates of {name} no longer give the importances that were saved")
    return decomposition


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


# -- the table -------------------------------------------------------------------------------------------------------

PROVENANCE = ("target_seed", "decomposition_seed", "cpu_hours", "settings", "versions", "command")


def summarise(experiment: Experiment, results: Path) -> dict[str, Any]:
    """Recompute every run's metrics from its tensors, and write and return `summary.json`.

    Means and standard deviations (over runs, with n - 1) are over all runs, failed ones too.
    """
    records = []
    for path in sorted(results.glob("run-*.json")):
        record = read_record(path)
        provenance = {key: record[key] for key in PROVENANCE}
        write_record(experiment, results, record["run"], read_run(experiment, results, record["run"]), provenance)
        records.append(read_record(path))
    if not records:
        raise ValueError(f"{results} holds no finished run; run without --recompute first")
    targets = json.loads((results / "targets.json").read_text(encoding="utf-8"))
    summary = {
        "name": experiment.name,
        "runs": len(records),
        "successes": sum(record["success"] for record in records),
        **_spread("mmcs", [record["recovery"]["mmcs"] for record in records]),
        **_spread("ml2r", [record["recovery"]["ml2r"] for record in records]),
        **_spread("mmcs_all_c", [record["recovery"]["mmcs_all"] for record in records]),
        **_spread("ml2r_all_c", [record["recovery"]["ml2r_all"] for record in records]),
        "published": experiment.published,
        "failures": {run_name(record["run"]): record["problems"] for record in records if not record["success"]},
        "targets_rejected": len(targets["rejected"]),
        "cpu_hours": round(sum(record["cpu_hours"] for record in records), 3),
        "settings": records[0]["settings"],
        "versions": records[0]["versions"],
        "command": records[0]["command"],
    }
    write_json(results / "summary.json", summary)
    return summary


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    tensor = torch.tensor(values, dtype=torch.float64)
    deviation = float(tensor.std()) if len(values) > 1 else 0.0
    return {f"{name}_mean": round(float(tensor.mean()), 5), f"{name}_std": round(deviation, 5)}


def table(summary: Mapping[str, Any]) -> str:
    """The summary as one readable block."""
    rows = []
    for label, suffix in (("alive", ""), ("all c", "_all_c")):
        cells = [f"{summary[f'{m}{suffix}_mean']:.4f} +- {summary[f'{m}{suffix}_std']:.4f}" for m in ("mmcs", "ml2r")]
        rows.append((label, *cells))
    if published := summary["published"]:
        rows.append(("published", f"{published['mmcs']:.3f}", f"{published['ml2r']:.3f}"))
    failures = "".join(f"\n{run}: {'; '.join(problems)}" for run, problems in summary["failures"].items())
    return (
        f"{summary['name']}: {summary['successes']} of {summary['runs']} runs succeed; "
        f"{summary['targets_rejected']} targets rejected; {summary['cpu_hours']} processor hours\n"
        f"{format_table(('subcomponents', 'MMCS', 'ML2R'), rows)}{failures}"
    )


if __name__ == "__main__":
    typer.run(main)
