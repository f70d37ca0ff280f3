"""What each choice of a recipe brings: the same targets and seeds, one thing changed.

    python experiments/ablations.py tms_5-2      also tms_40-10, tms_40-10_id, resid_mlp_1, resid_mlp_2

Run i has the target and the seed of run i of `reproduce.py`, and is judged by the same criterion. A line per variant is
printed and kept in `experiments/results/ablations/NAME.json`; what is there is not trained again, and a run that was
killed continues.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

if __package__ in (None, ""):  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from experiments.paper import EXPERIMENTS, Experiment, Report, Stage
from experiments.reproduce import read_run, train_group
from experiments.runs import (
    RESULTS,
    WORK,
    accepted_targets,
    has_tensors,
    read_record,
    run_name,
    settings_hash,
    write_at_once,
)
from spd_lens.support import format_table, library_versions
from spd_lens.toys import TMSReport

# How many runs every variant has.
RUNS = {"tms_5-2": 16, "tms_40-10": 3, "tms_40-10_id": 3, "resid_mlp_1": 1, "resid_mlp_2": 1}


def variants(name: str) -> dict[str, Experiment]:
    """The experiment as it stands, and with one thing changed, by what is changed."""
    recipe = EXPERIMENTS[name]
    return {"the recipe": recipe, **_CHANGED[name](recipe)}


def _tms_5_2(recipe: Experiment) -> dict[str, Experiment]:
    normal = _random_start(recipe)
    return {
        "gate_lr 3e-3, as lr": _config(recipe, gate_lr=None),
        "lr and gate_lr 1e-3": _config(recipe, lr=1e-3, gate_lr=None),
        "init normal, 200 steps of faithfulness warm-up": normal,
        "the same, lr and gate_lr 3e-3": _config(normal, gate_lr=None),
        "the same, lr and gate_lr 1e-3": _config(normal, lr=1e-3, gate_lr=1e-3),
        "the same, lr 1e-3 and gate_lr 5e-3": _config(normal, lr=1e-3, gate_lr=5e-3),
        "the same, lr 1e-3 and gate_lr 1e-2": _config(normal, lr=1e-3),
        "the same, lr 1e-3, minimality 1e-2": _config(normal, lr=1e-3, minimality=1e-2),
        "the same, lr 1e-3, p annealed 2 to 0.5": _config(normal, lr=1e-3, p_start=2.0, p_end=0.5),
    }


def _tms_40_10(recipe: Experiment) -> dict[str, Experiment]:
    return {
        "init normal, 200 steps of faithfulness warm-up": _random_start(recipe),
        "the same, p annealed 2 to 0.5": _config(_random_start(recipe), p_start=2.0, p_end=0.5),
        "minimality 1e-4": _config(recipe, minimality=1e-4),
    }


def _tms_40_10_id(recipe: Experiment) -> dict[str, Experiment]:
    shorter, many = _config(recipe, steps=4_000), dict.fromkeys(recipe.n_subcomponents, 200)
    stronger = _config(shorter, minimality=3e-4)
    return {
        "4,000 steps": shorter,
        "4,000 steps, minimality 3e-4": stronger,
        "4,000 steps, minimality 3e-4, C 200 for W_id": replace(stronger, n_subcomponents=many),
    }


def _resid_mlp_1(recipe: Experiment) -> dict[str, Experiment]:
    without_start = replace(recipe, start=None, init="exact")
    return {
        "without the second stage": replace(recipe, stages=(recipe.stages[0], recipe.stages[-1])),
        "all sites from the first step, 2e-6": replace(recipe, stages=(Stage("", 1.0, 2e-6),)),
        "all sites from the first step, 1e-5": replace(recipe, stages=(Stage("", 1.0, 1e-5),)),
        "start from init exact": without_start,
        "init exact, all sites from the first step, 1e-5": replace(without_start, stages=(Stage("", 1.0, 1e-5),)),
    }


def _resid_mlp_2(recipe: Experiment) -> dict[str, Experiment]:
    without = tuple(replace(stage, factors={}) for stage in recipe.stages)
    stays = tuple(replace(stage, recruits=False) for stage in recipe.stages)
    return {
        "no factor on W_in in the last stage": replace(recipe, stages=without),
        "nothing starts again between stages": replace(recipe, stages=stays),
    }


_CHANGED = {
    "tms_5-2": _tms_5_2,
    "tms_40-10": _tms_40_10,
    "tms_40-10_id": _tms_40_10_id,
    "resid_mlp_1": _resid_mlp_1,
    "resid_mlp_2": _resid_mlp_2,
}


def _config(experiment: Experiment, **changes: Any) -> Experiment:
    return replace(experiment, config=experiment.config.changed(**changes))


def _random_start(experiment: Experiment) -> Experiment:
    return replace(_config(experiment, faithfulness_warmup=200), init="normal")


# -- running ---------------------------------------------------------------------------------------------------------


def ablate(name: str, runs: int, *, results: Path, work: Path, reproduced: Path = RESULTS) -> dict[str, Any]:
    """Train what is missing, and return and keep what `results/NAME.json` then holds. Runs of the recipe itself are
    read from `reproduced` where `reproduce.py` has left them.

    Raises ValueError if a variant there has other settings or another number of runs.
    """
    path = results / f"{name}.json"
    results.mkdir(parents=True, exist_ok=True)
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"variants": {}}
    found: dict[str, Any] = kept["variants"]
    targets = accepted_targets(EXPERIMENTS[name], runs, work / "targets")
    for label, experiment in variants(name).items():
        settings = json.loads(json.dumps(experiment.settings()))
        if label in found:
            if (found[label]["settings"], found[label]["runs"]) != (settings, runs):
                raise ValueError(f"{path}: {label!r} was made with other settings; move it away, or give --results")
            continue
        reports = _finished(experiment, settings, runs, reproduced / name) or [
            experiment.report(decomposition)
            for decomposition in train_group(
                experiment,
                targets.models,
                range(runs),
                work / "ablations" / f"{name}-{settings_hash(settings)}-{runs}",
            )
        ]
        found[label] = {**_counts(reports), "settings": settings}
        content = {
            "name": name,
            "target_seeds": targets.seeds,
            "variants": found,
            "versions": library_versions(),
            "command": f"python experiments/ablations.py {name}",
        }
        write_at_once(path, content)
    return json.loads(path.read_text(encoding="utf-8"))


def _finished(experiment: Experiment, settings: Mapping[str, Any], runs: int, directory: Path) -> list[Report]:
    """The reports on the first `runs` runs in `directory`, if all are there with their tensors and these settings."""
    paths = [directory / f"{run_name(i)}.json" for i in range(runs)]
    if not all(has_tensors(directory, i) for i in range(runs)):
        return []
    if not all(path.is_file() and read_record(path)["settings"] == settings for path in paths):
        return []
    return [experiment.report(read_run(experiment, directory, i)) for i in range(runs)]


def _counts(reports: Sequence[Report]) -> dict[str, Any]:
    """Successes, mean MMCS and ML2R over alive subcomponents, and per run and site what is alive and how many
    importances are wrong. Of a residual MLP the first two are those of its `W_in`s."""
    sites = [_sites(report) for report in reports]
    recoveries = [r for report in reports for r in _recoveries(report)]
    return {
        "runs": len(reports),
        "successes": sum(report.success for report in reports),
        "mmcs": round(sum(r.mmcs for r in recoveries) / len(recoveries), 4),
        "ml2r": round(sum(r.ml2r for r in recoveries) / len(recoveries), 4),
        "alive": {name: [own[name][0] for own in sites] for name in sites[0]},
        "errors": {name: [own[name][1] for own in sites] for name in sites[0]},
    }


def _recoveries(report: Report) -> list[Any]:
    return [report.recovery] if isinstance(report, TMSReport) else [layer.recovery for layer in report.layers]


def _sites(report: Report) -> dict[str, tuple[int, int]]:
    """Alive subcomponents and wrong importances by site."""
    if isinstance(report, TMSReport):
        features = {"W_enc": report.encoder, "W_dec": report.decoder}
        found = {name: (site.n_alive, site.identity_error) for name, site in features.items()}
        return found if report.identity is None else {**found, "W_id": (report.identity.n_alive, report.identity.error)}
    found = {}
    for i, layer in enumerate(report.layers):
        found[f"W_in {i}"] = (layer.W_in.n_alive, layer.W_in.identity_error)
        found[f"W_out {i}"] = (layer.W_out.n_alive, layer.W_out.error)
    return found


def table(content: Mapping[str, Any]) -> str:
    """A row per variant: means over runs of what is alive, and of wrong importances, site by site."""
    rows = []
    for label, v in content["variants"].items():
        alive, errors = (
            ", ".join(f"{sum(counts) / len(counts):.4g}" for counts in v[key].values()) for key in ("alive", "errors")
        )
        rows.append((label, f"{v['successes']} of {v['runs']}", f"{v['mmcs']:.4f}", f"{v['ml2r']:.4f}", alive, errors))
    sites = ", ".join(next(iter(content["variants"].values()))["alive"])
    return f"{content['name']}; sites: {sites}\n" + format_table(
        ("variant", "succeed", "MMCS", "ML2R", "alive, by site", "errors, by site"), rows
    )


def main(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(_CHANGED)}.")],
    runs: Annotated[int | None, typer.Option(help="Runs of every variant; by default some.")] = None,
    results: Annotated[Path, typer.Option(help="Where results go.")] = RESULTS / "ablations",
    work: Annotated[Path, typer.Option(help="Where checkpoints and targets are kept.")] = WORK,
) -> None:
    """What each choice of a recipe brings."""
    torch.set_num_threads(1)
    if name not in _CHANGED:
        raise typer.BadParameter(f"{name!r}; expected one of {', '.join(_CHANGED)}")
    print(table(ablate(name, RUNS[name] if runs is None else runs, results=results, work=work)))


if __name__ == "__main__":
    typer.run(main)
