"""APD on the same targets as SPD: `python experiments/reproduce.py apd_tms_5-2 --seeds 10`.

Run i decomposes the target of SPD's run i, with data and initial values from the same seed. Files are those of the
SPD experiments (`experiments/results/NAME/run-000.json`, `run-000.safetensors`, `summary.json`); a killed run goes on
from its checkpoint in `runs/reproduce/NAME`, and `--recompute` rebuilds JSONs and table from the tensors alone.

Success is that of SPD (`APDReport`): MMCS and ML2R over alive components, one component of its own per feature. Since
APD shortens what it finds, `successes_but_for_length` counts the runs that miss at most the bounds of ML2R.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from experiments.paper import EXPERIMENTS, Experiment, load_target, target_tensors
from experiments.runs import (
    DECOMPOSITION_SEED,
    PROVENANCE,
    RECOVERY,
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
from spd_lens.baselines import (
    APD,
    APD_RESID_MLP_1,
    APD_TMS_5_2,
    APD_TMS_40_10,
    APDConfig,
    APDReport,
    apd_report,
    train_apd,
)
from spd_lens.support import format_table, library_versions, write_json

CRITERION = (
    "over alive components MMCS >= 0.99 and 0.95 <= ML2R <= 1.05, and exactly one active component per feature, of "
    "its own; 'but for length': without the bounds on ML2R"
)


@dataclass(frozen=True)
class APDExperiment:
    """One row of the table: the SPD experiment whose targets are decomposed, and with which settings.

    `runs` by default, `group` of them in one batched program, with a checkpoint every so many steps; `published`: mean
    MMCS and ML2R of the SPD paper's APD.
    """

    name: str
    targets_of: str
    runs: int
    group: int
    config: APDConfig
    published: dict[str, float] = field(default_factory=dict)
    checkpoint_every: int = 500

    @property
    def targets(self) -> Experiment:
        """The SPD experiment on the same targets."""
        if self.targets_of not in EXPERIMENTS:
            raise ValueError(f"{self.name} needs the targets of {self.targets_of}, which is not an experiment")
        return EXPERIMENTS[self.targets_of]

    def settings(self) -> dict[str, Any]:
        """Everything that a result depends on besides the seeds."""
        config = {name: value for name, value in asdict(self.config).items() if name != "seed"}
        return {"method": "APD", "targets": self.targets_of, "config": config}


# The targets are written in the 100 residual directions in use (`experiments/resid_mlp.py`), where matrices have a
# tenth of the published entries. Faithfulness and simplicity are means over entries: a tenth of the published
# coefficients keeps what they weigh beside reconstruction.
_RESID_MLP_1 = APD_RESID_MLP_1.changed(
    faithfulness=0.1 * APD_RESID_MLP_1.faithfulness, simplicity=0.1 * APD_RESID_MLP_1.simplicity
)
_ALL = (
    APDExperiment("apd_tms_5-2", "tms_5-2", 20, 10, APD_TMS_5_2, {"mmcs": 0.998, "ml2r": 0.893}),
    APDExperiment("apd_tms_40-10", "tms_40-10", 3, 1, APD_TMS_40_10, {"mmcs": 0.996, "ml2r": 0.935}),
    APDExperiment("apd_resid_mlp_1", "resid_mlp_1", 1, 1, _RESID_MLP_1),
)
APD_EXPERIMENTS: dict[str, APDExperiment] = {experiment.name: experiment for experiment in _ALL}


def run_apd(
    name: str, *, seeds: int | None, steps: int | None, recompute: bool, results: Path, work: Path
) -> dict[str, Any]:
    """What `reproduce.py NAME` does for an APD experiment; returns the summary."""
    experiment = APD_EXPERIMENTS[name]
    if steps is not None:
        experiment = dataclasses.replace(experiment, config=experiment.config.changed(steps=steps))
    directory = results / name
    if not recompute:
        reproduce_apd(experiment, experiment.runs if seeds is None else seeds, results=directory, work=work)
    return summarise_apd(experiment, directory, recompute=recompute)


# -- training --------------------------------------------------------------------------------------------------------


def reproduce_apd(experiment: APDExperiment, runs: int, *, results: Path, work: Path) -> None:
    """Train what is missing of `runs` runs, in groups, and write their files to `results`.

    Raises ValueError if `results` holds runs with other settings.
    """
    results.mkdir(parents=True, exist_ok=True)
    settings = experiment.settings()
    check_settings(settings, results)
    targets = accepted_targets(experiment.targets, runs, work / "targets")
    write_json(results / "targets.json", {"accepted": targets.seeds, "rejected": targets.rejected})
    for first in range(0, runs, experiment.group):
        group = range(first, min(first + experiment.group, runs))
        if all((results / f"{run_name(i)}.json").is_file() for i in group):
            continue
        out_dir = work / experiment.name / settings_hash(settings) / f"{group[0]:03d}-{group[-1]:03d}"
        with measured_cpu(out_dir / "cpu"):
            configs = [experiment.config.changed(seed=DECOMPOSITION_SEED + i) for i in group]
            models: Any = [targets.models[i] for i in group]
            found = train_apd(
                models, configs, out_dir=out_dir / "checkpoint", checkpoint_every=experiment.checkpoint_every,
                log_every=1_000,
            )  # fmt: skip
        hours = cpu_hours(out_dir / "cpu") / len(group)
        for i, apd in zip(group, found, strict=True):
            provenance = {
                "target_seed": targets.seeds[i],
                "decomposition_seed": apd.config.seed,
                "cpu_hours": hours,
                "settings": settings,
                "versions": library_versions(),
                "command": " ".join(["python", *sys.argv]),
            }
            write_run_tensors(results / f"{run_name(i)}.safetensors", tensors_of(apd))
            write_run(results, i, apd_report(apd), provenance)


# -- files -----------------------------------------------------------------------------------------------------------


def tensors_of(apd: APD) -> dict[str, Any]:
    """The target's weights, V and U."""
    model: nn.Module = apd.model
    tensors = {f"target|{key}": p for key, p in target_tensors(model).items()}
    for side, own in (("V", apd.V), ("U", apd.U)):
        tensors |= {f"{side}|{name}": t for name, t in own.items()}
    return tensors


def write_run(results: Path, i: int, report: APDReport, provenance: Mapping[str, Any]) -> None:
    """`run-i.json`: with it a run is complete."""
    verdict = {
        "success": report.success,
        "success_but_for_length": report.success_but_for_length,
        "problems": report.problems,
    }
    write_at_once(results / f"{run_name(i)}.json", {"run": i, **verdict, **asdict(report), **provenance})


def read_apd(experiment: APDExperiment, results: Path, i: int) -> APD:
    """The trained APD of run i, from its tensors and its seed."""
    seed = read_record(results / f"{run_name(i)}.json")["decomposition_seed"]
    tensors = read_run_tensors(results / f"{run_name(i)}.safetensors")
    model: Any = load_target(experiment.targets, below(tensors, "target|"))
    return APD(model, experiment.config.changed(seed=seed), below(tensors, "V|"), below(tensors, "U|"), [])


# -- the table -------------------------------------------------------------------------------------------------------


def summarise_apd(experiment: APDExperiment, results: Path, *, recompute: bool = False) -> dict[str, Any]:
    """Recompute every run's metrics from its tensors, and write and return `summary.json`.

    Where the tensors of a run are not there its record counts as it stands; with `recompute` that is an error. Means
    and standard deviations (over runs, with n - 1) are over all runs, failed ones too, and `..._of_found` over
    those that succeed but for length, with all c, which is what the published numbers seem to be. Raises ValueError if
    there is no run, or if the runs were made with other settings.
    """
    check_settings(experiment.settings(), results)
    records = []
    for path in finished_runs(results):
        record = read_record(path)
        if recompute or has_tensors(results, record["run"]):
            report = apd_report(read_apd(experiment, results, record["run"]))
            write_run(results, record["run"], report, {key: record[key] for key in PROVENANCE})
        records.append(read_record(path))
    found = [record for record in records if record["success_but_for_length"]]

    def over(among: Sequence[Mapping[str, Any]], figure: str) -> list[float]:
        return [record["recovery"][figure] for record in among]

    summary = summary_of(
        experiment.name,
        records,
        {name: over(records, figure) for name, figure in RECOVERY.items()},
        **(spread("mmcs_of_found", over(found, "mmcs_all")) if found else {}),
        **(spread("ml2r_of_found", over(found, "ml2r_all")) if found else {}),
        successes_but_for_length=len(found),
        criterion=CRITERION,
        published=experiment.published,
        problems={run_name(record["run"]): record["problems"] for record in records if not record["success"]},
        relative_error_of_the_sum=max(max(record["faithfulness"].values()) for record in records),
    )
    if records[0]["contribution_error"] is not None:
        summary |= spread("contribution_error", [record["contribution_error"] for record in records])
    write_json(results / "summary.json", summary)
    return summary


def apd_table(summary: Mapping[str, Any]) -> str:
    """The summary as one readable block."""
    rows = []
    for label, suffix in (
        ("alive", ""),
        ("all c", "_all_c"),
        ("all c, of runs that succeed but for length", "_of_found"),
    ):
        if f"mmcs{suffix}_mean" not in summary:
            continue
        cells = [f"{summary[f'{m}{suffix}_mean']:.4f} +- {summary[f'{m}{suffix}_std']:.4f}" for m in ("mmcs", "ml2r")]
        rows.append((label, *cells))
    if published := summary["published"]:
        rows.append(("published", f"{published['mmcs']:.3f}", f"{published['ml2r']:.3f}"))
    problems = "".join(f"\n{run}: {'; '.join(found)}" for run, found in summary["problems"].items())
    return (
        f"{summary['name']}: {summary['successes']} of {summary['runs']} runs succeed, "
        f"{summary['successes_but_for_length']} but for length; {summary['cpu_hours']} processor hours\n"
        f"{format_table(('components', 'MMCS', 'ML2R'), rows)}{problems}"
    )
