"""The paper's experiments: `python experiments/reproduce.py tms_5-2 --seeds 100`.

Run i decomposes the i-th accepted target (target seeds 0, 1, 2, ... in order; the rule looks at the target alone)
with masks, data and initialisation from decomposition seed 1000 + i. Nothing is chosen by hand.

    runs/reproduce/            checkpoints and trained targets; a run that was killed continues from here
    experiments/results/NAME/   run-000.json for every run, summary.json, pictures; run-000.safetensors and tensors.json

MMCS and ML2R of a residual MLP are those of its `W_in`s over features, the mean over blocks; the summary also counts
what is alive in every block. `spd_lens.toys` (`TMSReport`, `ResidMLPReport`) says what a success is.

`--recompute` rebuilds every JSON, the table and the pictures from the safetensors alone: they hold the target's
weights, U and V, the gates, and the importances on one-hot inputs. The repository keeps few of these files
(`experiments/tensor_files.py`); the others are made again with `--results runs/again`.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.apd_experiments import APD_EXPERIMENTS, apd_table, run_apd
from experiments.figures import save_figures
from experiments.paper import EXPERIMENTS, Experiment, load_target, target_tensors
from experiments.runs import (
    DECOMPOSITION_SEED,
    PROVENANCE,
    RECOVERY,
    RESULTS,
    WORK,
    accepted_targets,
    below,
    check_settings,
    cpu_hours,
    finished_runs,
    has_tensors,
    measured_cpu,
    read_record,
    run_name,
    settings_hash,
    spread,
    summary_of,
    write_at_once,
)
from experiments.tensor_files import read_run_tensors, write_run_tensors
from spd_lens import Decomposition, train
from spd_lens.support import format_table, library_versions, write_json
from spd_lens.toys import one_hot_inputs
from spd_lens.training import train_many

# Added to the seed of the data from one stage of training to the next.
STAGE_SEED = 1_000_000


def main(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join([*EXPERIMENTS, *APD_EXPERIMENTS])}.")],
    seeds: Annotated[int | None, typer.Option(help="Number of runs; by default the experiment's.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps instead of the experiment's.")] = None,
    recompute: Annotated[bool, typer.Option(help="Only recompute table and pictures from the saved tensors.")] = False,
    results: Annotated[Path, typer.Option(help="Where results go.")] = RESULTS,
    work: Annotated[Path, typer.Option(help="Where checkpoints and targets are kept.")] = WORK,
) -> None:
    torch.set_num_threads(1)
    if name in APD_EXPERIMENTS:
        print(apd_table(run_apd(name, seeds=seeds, steps=steps, recompute=recompute, results=results, work=work)))
        return
    if name not in EXPERIMENTS:
        raise typer.BadParameter(f"{name!r}; expected one of {', '.join([*EXPERIMENTS, *APD_EXPERIMENTS])}")
    experiment = EXPERIMENTS[name]
    if steps is not None:
        experiment = replace(experiment, config=experiment.config.changed(steps=steps))
    directory = results / experiment.name
    if not recompute:
        reproduce(experiment, experiment.runs if seeds is None else seeds, results=directory, work=work)
    summary = summarise(experiment, directory, recompute=recompute)
    if has_tensors(directory, 0) or recompute:
        save_figures(directory, read_run(experiment, directory, 0))
    else:
        print(f"the pictures in {directory} are as they were: the tensors of run 0 are not there")
    print(table(summary))


# -- training --------------------------------------------------------------------------------------------------------


def reproduce(experiment: Experiment, runs: int, *, results: Path, work: Path) -> None:
    """Train what is missing of `runs` runs, in groups, and write their files to `results`.

    Raises ValueError if `results` holds runs with other settings.
    """
    results.mkdir(parents=True, exist_ok=True)
    check_settings(experiment.settings(), results)
    targets = accepted_targets(experiment, runs, work / "targets")
    write_json(results / "targets.json", {"accepted": targets.seeds, "rejected": targets.rejected})
    for first in range(0, runs, experiment.group):
        # A group is trained as a whole, so that its checkpoint is found again.
        group = range(first, min(first + experiment.group, runs))
        if all((results / f"{run_name(i)}.json").is_file() for i in group):
            continue
        out_dir = work / experiment.name / settings_hash(experiment.settings()) / f"{group[0]:03d}-{group[-1]:03d}"
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
    if experiment.stages:
        pairs = zip(targets, seeds, strict=True)
        return [train_in_stages(experiment, target, seed, out_dir / str(seed)) for target, seed in pairs]
    decompositions = [
        experiment.decompose(copy.deepcopy(target), seed) for target, seed in zip(targets, seeds, strict=True)
    ]
    configs = [experiment.config.changed(seed=seed) for seed in seeds]
    result = train_many(decompositions, [experiment.features(seed) for seed in seeds], configs, out_dir=out_dir)
    stop_if_interrupted(result.interrupted, result.steps, experiment.config.steps)
    return decompositions


def train_in_stages(experiment: Experiment, target: nn.Module, seed: int, out_dir: Path) -> Decomposition:
    """The decomposition that the last stage leaves; every stage continues from its own checkpoint in `out_dir`."""
    learned: dict[str, Tensor] = {}
    for number, stage in enumerate(experiment.stages):
        decomposition = experiment.decompose(copy.deepcopy(target), seed, stage.sites)
        own = decomposition.tensors()
        decomposition.load_tensors({name: learned.get(name, start) for name, start in own.items()})
        config = stage.config(experiment.config, len(decomposition)).changed(seed=seed)
        place = out_dir / f"stage-{number}"
        started = (place / "config.json").is_file()
        if stage.recruits and not started:
            assert experiment.recruit is not None
            experiment.recruit(decomposition, experiment.features(seed), seed)
        result = train(
            decomposition,
            experiment.features(seed + STAGE_SEED * number),
            config,
            out_dir=None if started else place,
            resume_from=place if started else None,
        )
        stop_if_interrupted(result.interrupted, result.steps, config.steps)
        learned |= decomposition.tensors()
    return decomposition


def stop_if_interrupted(interrupted: bool, done: int, steps: int) -> None:
    """Leave after Ctrl-C: the checkpoints are there, the files of the run are not."""
    if interrupted:
        print(f"stopped after {done} of {steps} steps; the same command continues")
        raise typer.Exit(130)


# -- files -----------------------------------------------------------------------------------------------------------


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
    tensors = {f"target|{key}": tensor for key, tensor in target_tensors(target).items()}
    tensors |= {f"decomposition|{key}": t for key, t in decomposition.tensors().items()}
    tensors |= {f"importance|{key}": g for key, g in importances.items()}
    write_run_tensors(results / f"{run_name(i)}.safetensors", tensors)
    write_record(experiment, results, i, decomposition, provenance)


def write_record(
    experiment: Experiment, results: Path, i: int, decomposition: Decomposition, provenance: Mapping[str, Any]
) -> None:
    """`run-i.json`, all at once."""
    report = experiment.report(decomposition)
    record = {"run": i, "success": report.success, "problems": report.problems, **asdict(report), **provenance}
    write_at_once(results / f"{run_name(i)}.json", record)


def read_run(experiment: Experiment, results: Path, i: int) -> Decomposition:
    """The trained decomposition of run i, from its tensors alone.

    Raises ValueError if the importances on one-hot inputs are no longer what was saved, FileNotFoundError where the
    tensors are not kept.
    """
    path = results / f"{run_name(i)}.safetensors"
    tensors = read_run_tensors(path)
    decomposition = experiment.decompose(load_target(experiment, below(tensors, "target|")), 0)
    decomposition.load_tensors(below(tensors, "decomposition|"))
    saved = below(tensors, "importance|")
    importances = decomposition.importance(one_hot_inputs(experiment.features(0).n_features))
    for name, g in importances.items():
        if not torch.allclose(g, saved[name], atol=1e-4):
            raise ValueError(f"{path}: the gates of {name} no longer give the importances that were saved")
    return decomposition


# -- the table -------------------------------------------------------------------------------------------------------


def summarise(experiment: Experiment, results: Path, *, recompute: bool = False) -> dict[str, Any]:
    """Recompute every run's metrics from its tensors, and write and return `summary.json`.

    Where the tensors of a run are not there its record counts as it stands; with `recompute` that is an error. Means
    and standard deviations (over runs, with n - 1) are over all runs, failed ones too.
    """
    records = []
    for path in finished_runs(results):
        record = read_record(path)
        if recompute or has_tensors(results, record["run"]):
            provenance = {key: record[key] for key in PROVENANCE}
            write_record(experiment, results, record["run"], read_run(experiment, results, record["run"]), provenance)
        records.append(read_record(path))
    targets = json.loads((results / "targets.json").read_text(encoding="utf-8"))
    summary = summary_of(
        experiment.name,
        records,
        {name: [recovered(record, figure) for record in records] for name, figure in RECOVERY.items()},
        **_of_layers(records),
        published=experiment.published,
        failures={run_name(record["run"]): record["problems"] for record in records if not record["success"]},
        targets_rejected=len(targets["rejected"]),
    )
    write_json(results / "summary.json", summary)
    return summary


def recovered(record: Mapping[str, Any], figure: str) -> float:
    """A figure of `Recovery`; of a residual MLP that of its `W_in`s, the mean over blocks."""
    parts = record.get("layers", [record])
    return sum(part["recovery"][figure] for part in parts) / len(parts)


def _of_layers(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """For residual MLPs: the mean error of neuron contributions, and what is alive in every run, block by block."""
    if "layers" not in records[0]:
        return {}
    errors = [[layer["contribution_error"] for layer in record["layers"]] for record in records]
    return {
        **spread("contribution_error", [sum(own) / len(own) for own in errors]),
        "alive_W_in": [[layer["W_in"]["n_alive"] for layer in record["layers"]] for record in records],
        "identity_error_W_in": [[layer["W_in"]["identity_error"] for layer in record["layers"]] for record in records],
        "alive_W_out": [[layer["W_out"]["n_alive"] for layer in record["layers"]] for record in records],
        "always_on_W_out": [[layer["W_out"]["n_always_on"] for layer in record["layers"]] for record in records],
    }


def table(summary: Mapping[str, Any]) -> str:
    """The summary as one readable block."""
    rows = []
    for label, suffix in (("alive", ""), ("all c", "_all_c")):
        cells = [f"{summary[f'{m}{suffix}_mean']:.4f} +- {summary[f'{m}{suffix}_std']:.4f}" for m in ("mmcs", "ml2r")]
        rows.append((label, *cells))
    if published := summary["published"]:
        rows.append(("published", f"{published['mmcs']:.3f}", f"{published['ml2r']:.3f}"))
    layers = "".join(
        f"\n{name.replace('_', ' ', 1)} (run by run, block by block): {summary[name]}"
        for name in ("alive_W_in", "alive_W_out")
        if name in summary
    )
    failures = "".join(f"\n{run}: {'; '.join(problems)}" for run, problems in summary["failures"].items())
    return (
        f"{summary['name']}: {summary['successes']} of {summary['runs']} runs succeed; "
        f"{summary['targets_rejected']} targets rejected; {summary['cpu_hours']} processor hours\n"
        f"{format_table(('subcomponents', 'MMCS', 'ML2R'), rows)}{layers}{failures}"
    )


if __name__ == "__main__":
    typer.run(main)
