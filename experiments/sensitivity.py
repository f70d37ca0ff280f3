"""How much the settings matter: the share of runs that succeed over coefficients, learning rates and C, on TMS 5-2.

    python experiments/sensitivity.py                      all maps, then the picture; continues where it was stopped
    python experiments/sensitivity.py --method spd_smooth        (--device cuda: every step a CUDA graph)
    python experiments/sensitivity.py --method spd_smooth --column       one learning rate; without it: the rest
    python experiments/sensitivity.py --method apd --seeds 5
    python experiments/sensitivity.py --plot               only the picture and summary.json, from the saved runs

Each map is centred on the settings with which the method is run elsewhere (`EXPERIMENTS["tms_5-2"]`, `APD_TMS_5_2`):
the coefficient of the loss that makes a decomposition sparse (SPD: minimality; APD: simplicity) over two decades, and a
second setting over one decade. For SPD that is the learning rate, that of the gates scaled along, once for every C; for
APD it is k, which SPD does not have. All else stays as it is. Run i of a cell has the target and the seed of run i of
`reproduce.py`. What `CHANGES` names is mapped at one C and every other learning rate, smooth L0 half a decade higher.

Two verdicts are kept for every run: `success`, the criterion of `reproduce.py`, and `found`, the same without the
bounds on ML2R. APD shortens what it finds, which alone can put the first out of its reach; the picture's colour is
therefore the second, for both, and ML2R stands in the cells.

    experiments/results/sensitivity/   spd.jsonl, apd.jsonl, ... (a line per run), settings.json, summary.json,
                                       map.png, and rules.png: what `CHANGES` makes of the map of SPD, beside APD's
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

if __package__ in (None, ""):  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from experiments.apd_experiments import APD_EXPERIMENTS
from experiments.paper import EXPERIMENTS, Experiment
from experiments.runs import (
    DECOMPOSITION_SEED,
    RESULTS,
    WORK,
    accepted_targets,
    cpu_hours,
    measured_cpu,
    settings_hash,
    write_at_once,
)
from experiments.sensitivity_figure import METHODS, save_map
from spd_lens.baselines import apd_report, train_apd
from spd_lens.objective import PGD
from spd_lens.support import library_versions
from spd_lens.toys import MIN_MMCS, Recovery, TMSReport, tms_report
from spd_lens.training import Reconstruction, train_many

# Steps of half and a quarter of a decade, around the settings used elsewhere.
COEFFICIENT_FACTORS = tuple(10 ** (n / 2) for n in (-2, -1, 0, 1, 2))
SECOND_FACTORS = tuple(10 ** (n / 4) for n in (-2, -1, 0, 1, 2))
C_PER_FEATURE = (1, 2, 4, 8)


# What is changed in a map of SPD, by its name.
CHANGES: dict[str, dict[str, Any]] = {
    "spd": {},
    "spd_falling": {"p_start": 2.0, "p_end": 0.5},
    "spd_smooth": {"penalty": "smooth_l0", "gamma_end": 0.05},
    "spd_adversary": {"reconstructions": (Reconstruction(masks=PGD(1, 1.0)), Reconstruction(routing="layerwise"))},
    "spd_share": {"penalty": "smooth_l0", "gamma_end": 0.05, "relative_reconstruction": True},
    "spd_tolerance": {"penalty": "smooth_l0", "gamma_end": 0.2, "relative_reconstruction": True, "minimality": 0.3},
}
# The field that a map's coefficient is, where it is not minimality, and the middle of it, where it is not that of SPD.
FIELDS = {"spd_tolerance": "tolerance"}
MIDDLES = {"spd_smooth": 3e-3 * 10**0.5, "spd_share": 0.1, "spd_tolerance": 0.01}


# What is trained at once: the target, the seed and the cell of every run.
Jobs = Sequence[tuple[nn.Module, int, Mapping[str, float]]]


@dataclass(frozen=True)
class SPDGrid:
    """Minimality x learning rate, one batched program for every C and seed; `method` names what is changed besides.

    On another `device` than the CPU every step is a CUDA graph, and there are no checkpoints.
    """

    coefficients: tuple[float, ...]
    lrs: tuple[float, ...]
    counts: tuple[int, ...]
    steps: int
    method: str = "spd"
    device: str = "cpu"

    @staticmethod
    def full(method: str = "spd", device: str = "cpu") -> SPDGrid:
        """The whole map; of what is changed only for the C used elsewhere, and at three learning rates of five."""
        experiment = EXPERIMENTS["tms_5-2"]
        config = experiment.config
        counts = tuple(5 * n for n in C_PER_FEATURE) if method == "spd" else (experiment.n_subcomponents["W_enc"],)
        return SPDGrid(
            tuple(MIDDLES.get(method, config.minimality) * f for f in COEFFICIENT_FACTORS),
            tuple(config.lr * f for f in (SECOND_FACTORS if method == "spd" else SECOND_FACTORS[::2])),
            counts,
            config.steps,
            method,
            device,
        )

    @property
    def experiment(self) -> Experiment:
        """TMS 5-2 with the changes of this map."""
        experiment = EXPERIMENTS["tms_5-2"]
        return dataclasses.replace(experiment, config=experiment.config.changed(**CHANGES[self.method]))

    @property
    def programs(self) -> tuple[dict[str, Any], ...]:
        """What is trained together, as the part of a record that its runs share."""
        return tuple({"C": C} for C in self.counts)

    @property
    def cells(self) -> list[dict[str, float]]:
        """The part of a record that tells the runs of a program apart."""
        return [{"coefficient": c, "lr": lr} for c, lr in itertools.product(self.coefficients, self.lrs)]

    def settings(self) -> dict[str, Any]:
        """Everything besides the seeds."""
        settings = self.experiment.settings()
        config = {**settings["config"], "steps": self.steps}
        return {**settings, "config": config, "n_subcomponents": list(self.counts), "cells": self.cells}

    @property
    def column(self) -> list[dict[str, float]]:
        """The cells with the learning rate used elsewhere."""
        return [cell for cell in self.cells if cell["lr"] == self.experiment.config.lr]

    def train(self, jobs: Jobs, program: Mapping[str, Any], out_dir: Path) -> list[dict[str, Any]]:
        """The verdict on every job."""
        experiment = self.experiment
        base = experiment.config
        assert base.gate_lr is not None
        field = FIELDS.get(self.method, "minimality")
        configs = [
            base.changed(
                steps=self.steps, seed=seed, lr=cell["lr"], gate_lr=base.gate_lr * cell["lr"] / base.lr,
                **{field: cell["coefficient"]},
            )
            for _, seed, cell in jobs
        ]  # fmt: skip
        counts = dict.fromkeys(experiment.n_subcomponents, program["C"])
        with_counts = dataclasses.replace(experiment, n_subcomponents=counts)
        members = [with_counts.decompose(copy.deepcopy(target), seed) for target, seed, _ in jobs]
        members = [member.to(torch.device(self.device)) for member in members]
        rows = {seed: experiment.features(seed) for _, seed, _ in jobs}
        data = [rows[seed] for _, seed, _ in jobs]
        place: dict[str, Any] = {"out_dir": out_dir} if self.device == "cpu" else {"cuda_graphs": True}
        result = train_many(members, data, configs, **place)
        members = [member.to(torch.device("cpu")) for member in members]
        if result.interrupted:
            print(f"stopped after {result.steps} of {self.steps} steps; the same command continues")
            raise typer.Exit(130)
        return [_spd_verdict(tms_report(member)) for member in members]


@dataclass(frozen=True)
class APDGrid:
    """Simplicity x k, one batched program for every seed."""

    coefficients: tuple[float, ...]
    ks: tuple[float, ...]
    steps: int

    method = "apd"

    @staticmethod
    def full() -> APDGrid:
        """The whole map."""
        config = APD_EXPERIMENTS["apd_tms_5-2"].config
        return APDGrid(
            tuple(config.simplicity * f for f in COEFFICIENT_FACTORS),
            tuple(config.k * f for f in SECOND_FACTORS),
            config.steps,
        )

    @property
    def programs(self) -> tuple[dict[str, Any], ...]:
        """As `SPDGrid.programs`."""
        return ({"C": APD_EXPERIMENTS["apd_tms_5-2"].config.n_components},)

    @property
    def cells(self) -> list[dict[str, float]]:
        """As `SPDGrid.cells`."""
        return [{"coefficient": c, "k": k} for c, k in itertools.product(self.coefficients, self.ks)]

    def settings(self) -> dict[str, Any]:
        """Everything besides the seeds."""
        settings = APD_EXPERIMENTS["apd_tms_5-2"].settings()
        return {**settings, "config": {**settings["config"], "steps": self.steps}, "cells": self.cells}

    @property
    def column(self) -> list[dict[str, float]]:
        """The cells with the k used elsewhere."""
        return [cell for cell in self.cells if cell["k"] == APD_EXPERIMENTS["apd_tms_5-2"].config.k]

    def train(self, jobs: Jobs, program: Mapping[str, Any], out_dir: Path) -> list[dict[str, Any]]:
        """As `SPDGrid.train`."""
        base = APD_EXPERIMENTS["apd_tms_5-2"].config.changed(steps=self.steps, n_components=program["C"])
        configs = [base.changed(seed=seed, simplicity=cell["coefficient"], k=cell["k"]) for _, seed, cell in jobs]
        targets: list[Any] = [target for target, _, _ in jobs]
        found = train_apd(targets, configs, out_dir=out_dir / "checkpoint", log_every=5_000)
        verdicts = []
        for apd in found:
            report = apd_report(apd)
            alive = report.components.n_alive
            verdicts.append(
                _verdict(report.success, report.success_but_for_length, report.recovery, alive, report.problems)
            )
        return verdicts


Grid = SPDGrid | APDGrid


def _spd_verdict(report: TMSReport) -> dict[str, Any]:
    sites = report.encoder.problems("W_enc") + report.decoder.problems("W_dec")
    found = report.recovery.mmcs >= MIN_MMCS and not sites
    return _verdict(report.success, found, report.recovery, report.encoder.n_alive, report.problems)


def _verdict(success: bool, found: bool, recovery: Recovery, n_alive: int, problems: Sequence[str]) -> dict[str, Any]:
    lengths = {"mmcs": round(recovery.mmcs, 5), "ml2r": round(recovery.ml2r, 5)}
    return {"success": success, "found": found, **lengths, "n_alive": n_alive, "problems": list(problems)}


# -- running ---------------------------------------------------------------------------------------------------------


def run_map(grid: Grid, seeds: int, *, results: Path, work: Path, column: bool = False) -> None:
    """Train what is missing (of one column or of all cells), all of a C together; adds lines to `results/METHOD.jsonl`.

    Raises ValueError if there are runs with other settings.
    """
    results.mkdir(parents=True, exist_ok=True)
    _check_settings(grid, results)
    targets = accepted_targets(EXPERIMENTS["tms_5-2"], seeds, work / "targets")
    tag = settings_hash(grid.settings())
    for program in grid.programs:
        records = read_lines(results / f"{grid.method}.jsonl")
        own = [r for r in records if all(r[key] == value for key, value in program.items())]
        done = [(r["run"], {axis: r[axis] for axis in grid.cells[0]}) for r in own]
        wanted = itertools.product(range(seeds), grid.column if column else grid.cells)
        missing = [one for one in wanted if one not in done]
        if not missing:
            continue
        name = "-".join([f"{key}{value}" for key, value in program.items()] + [settings_hash({"runs": missing})])
        out_dir = work / "sensitivity" / f"{grid.method}-{tag}" / name
        with measured_cpu(out_dir / "cpu"):
            jobs = [(targets.models[i], DECOMPOSITION_SEED + i, cell) for i, cell in missing]
            verdicts = grid.train(jobs, program, out_dir)
        seconds = round(3600 * cpu_hours(out_dir / "cpu") / len(verdicts), 2)
        new = [
            {"run": i, "target_seed": targets.seeds[i], "seed": DECOMPOSITION_SEED + i, **program, **cell, **verdict}
            for (i, cell), verdict in zip(missing, verdicts, strict=True)
        ]
        _write_lines(results / f"{grid.method}.jsonl", [*records, *({**r, "cpu_seconds": seconds} for r in new)])


def _check_settings(grid: Grid, results: Path) -> None:
    path = results / "settings.json"
    saved = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    wanted = json.loads(json.dumps(grid.settings()))
    if saved.get(grid.method, wanted) != wanted:
        raise ValueError(f"{path}: the {grid.method} map there has other settings; give another --results")
    write_at_once(path, {**saved, grid.method: wanted})


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All records so far."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def _write_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    half_written = path.with_name(f".{path.name}")
    half_written.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    half_written.replace(path)


# -- summary ---------------------------------------------------------------------------------------------------------


def summarise_map(results: Path, command: str) -> dict[str, Any]:
    """Write and return `summary.json`: runs, successes, and for every cell how many of how many."""
    settings = json.loads((results / "settings.json").read_text(encoding="utf-8"))
    summary: dict[str, Any] = {}
    for method, of_method in settings.items():
        records = read_lines(results / f"{method}.jsonl")
        if records:
            summary[method] = {
                **_counts(records),
                "by_C": {C: _counts([r for r in records if r["C"] == C]) for C in sorted({r["C"] for r in records})},
                "cpu_hours": round(sum(r["cpu_seconds"] for r in records) / 3600, 3),
                "cells": cells_of(records),
                "settings": of_method,
            }
    summary |= {"versions": library_versions(), "command": command}
    write_at_once(results / "summary.json", summary)
    return summary


def _counts(records: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    return {
        "runs": len(records),
        "found": sum(r["found"] for r in records),
        "successes": sum(r["success"] for r in records),
    }


def cells_of(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Counts of every cell, with the mean ML2R of its runs that found the features (None without any)."""
    axes = [name for name in ("C", "coefficient", "lr", "k") if name in records[0]]
    cells: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for record in records:
        cells.setdefault(tuple(record[name] for name in axes), []).append(record)
    found = []
    for at, runs in sorted(cells.items()):
        lengths = [r["ml2r"] for r in runs if r["found"]]
        ml2r = round(sum(lengths) / len(lengths), 4) if lengths else None
        found.append({**dict(zip(axes, at, strict=True)), **_counts(runs), "ml2r_of_found": ml2r})
    return found


def summary_lines(summary: Mapping[str, Any]) -> str:
    """A line per method and C."""
    lines = []
    for method in METHODS:
        for C, counts in summary.get(method, {}).get("by_C", {}).items():
            lines.append(
                f"{METHODS[method]} C={C}: of {counts['runs']} runs {counts['found']} find one subcomponent "
                f"per feature, {counts['successes']} with the right length too"
            )
    return "\n".join(lines)


def _with_C(summary: Mapping[str, Any], used: Mapping[str, int]) -> dict[str, Any]:
    """Of every map the part with the C used elsewhere."""
    maps = {name: summary[name] for name in METHODS if name in summary}
    return {name: {"cells": [cell for cell in own["cells"] if cell["C"] == used[name]]} for name, own in maps.items()}


def main(
    method: Annotated[str, typer.Option(help="apd, spd, another of CHANGES, or all")] = "all",
    seeds: Annotated[int, typer.Option(help="Runs of every cell.")] = 3,
    device: Annotated[str, typer.Option(help="cpu, or cuda: no checkpoints, every step a CUDA graph")] = "cpu",
    column: Annotated[bool, typer.Option("--column", help="Only the learning rate (APD: k) used elsewhere.")] = False,
    plot: Annotated[bool, typer.Option("--plot", help="Only the picture and the summary of what was run.")] = False,
    results: Annotated[Path, typer.Option(help="Where results go.")] = RESULTS / "sensitivity",
    work: Annotated[Path, typer.Option(help="Where checkpoints and targets are kept.")] = WORK,
) -> None:
    """Sensitivity maps of SPD and APD on TMS 5-2."""
    torch.set_num_threads(1)
    grids: dict[str, Grid] = {**{name: SPDGrid.full(name, device) for name in CHANGES}, "apd": APDGrid.full()}
    if method not in ("all", *grids):
        raise typer.BadParameter(f"--method {method!r}; expected all, {', '.join(grids)}")
    for name, grid in grids.items():
        if not plot and method in ("all", name):
            run_map(grid, seeds, results=results, work=work, column=column)
    summary = summarise_map(results, "python experiments/sensitivity.py" + (f" --seeds {seeds}" if seeds != 3 else ""))
    print(summary_lines(summary))
    used_C = {
        **dict.fromkeys(CHANGES, EXPERIMENTS["tms_5-2"].n_subcomponents["W_enc"]),
        "apd": APD_EXPERIMENTS["apd_tms_5-2"].config.n_components,
    }
    if {"spd", "apd"} & summary.keys():
        print(save_map(results / "map.png", summary, used_C, ("spd", "apd")))
    if summary.keys() & CHANGES.keys() - {"spd"}:
        print(save_map(results / "rules.png", _with_C(summary, used_C), used_C, (*CHANGES, "apd")))


if __name__ == "__main__":
    typer.run(main)
