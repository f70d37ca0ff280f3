"""One setting for every toy: success over a decade or two of shares, with nothing else fitted to the model.

    python experiments/settings_study.py --rule share --toys tms_5-2 --seeds 3        continues where it was stopped
    python experiments/settings_study.py --rule tolerance --toys tms_5-2,tms_5-2_id,tms_40-10,resid_mlp_1
    python experiments/settings_study.py --table                               only the table of what was run

Both rules divide reconstruction by what everything off costs (`relative_reconstruction`), so that the number named
means the same on every toy:

- `share`: the coefficient, the share of the behaviour that a subcomponent has to be worth;
- `tolerance`: the share of everything off that may be spent; the coefficient starts at `START` and follows.

Everything else is that of `EXPERIMENTS[toy]` (steps, batch, learning rates), but without stages, factors by site or
starts made by hand: every toy starts from `init="exact"` and trains all sites from the first step. Penalty: `power`
with p 1, or `smooth` (smooth L0, gamma from 1 to 0.05).

    experiments/results/settings/runs.jsonl   a line per run: toy, rule, penalty, value, run, verdict, L0, spent
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

if __package__ in (None, ""):  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from experiments.paper import EXPERIMENTS
from experiments.runs import DECOMPOSITION_SEED, RESULTS, WORK, accepted_targets, cpu_hours, measured_cpu, settings_hash
from spd_lens import Decomposition, TrainConfig, decompose
from spd_lens.support import library_versions
from spd_lens.training import train_many

TOYS = ("tms_5-2", "tms_5-2_id", "tms_40-10", "resid_mlp_1")
SHARES = tuple(10 ** (n / 2) for n in (-6, -5, -4, -3, -2, -1))
PENALTIES: dict[str, dict[str, Any]] = {"power": {}, "smooth": {"penalty": "smooth_l0", "gamma_end": 0.05}}
# Where a coefficient that follows a tolerance starts: above what any toy needs, so that it comes down.
START = 0.3
# Logged steps at the end of a run over which what was spent is averaged.
LAST = 10


def configuration(toy: str, rule: str, penalty: str, value: float, seed: int) -> TrainConfig:
    """The toy's own configuration under one of the two rules."""
    named = {"minimality": value} if rule == "share" else {"minimality": START, "tolerance": value}
    config = EXPERIMENTS[toy].config
    log_every = max(1, config.steps // 100)
    return config.changed(seed=seed, relative_reconstruction=True, log_every=log_every, **named, **PENALTIES[penalty])


def decomposed(toy: str, target: Any, seed: int) -> Decomposition:
    """The untrained decomposition, started exact."""
    experiment = EXPERIMENTS[toy]
    counts: dict[str, int | None] = dict(experiment.n_subcomponents)
    return decompose(target, counts, gate="scalar", gate_width=experiment.gate_width, init="exact", seed=seed)


def run_toy(toy: str, rule: str, penalty: str, values: Sequence[float], seeds: int, *, path: Path, work: Path) -> None:
    """Train what is missing, all in one program, and add its lines to `path`."""
    done = {(r["toy"], r["rule"], r["penalty"], r["value"], r["run"]) for r in read(path)}
    jobs = [(v, i) for v in values for i in range(seeds) if (toy, rule, penalty, v, i) not in done]
    if not jobs:
        return
    experiment = EXPERIMENTS[toy]
    targets = accepted_targets(experiment, seeds, work / "targets")
    members = [decomposed(toy, copy.deepcopy(targets.models[i]), DECOMPOSITION_SEED + i) for _, i in jobs]
    configs = [configuration(toy, rule, penalty, v, DECOMPOSITION_SEED + i) for v, i in jobs]
    data = [experiment.features(DECOMPOSITION_SEED + i) for _, i in jobs]
    place = work / "settings" / f"{toy}-{rule}-{penalty}-{settings_hash({'jobs': jobs})}"
    with measured_cpu(place / "cpu"):
        result = train_many(members, data, configs, out_dir=place / "run")
    if result.interrupted:
        raise typer.Exit(130)
    seconds = 3600 * cpu_hours(place / "cpu") / len(jobs)
    lines = [
        _record(toy, rule, penalty, v, i, experiment.report(member), _last(result.log, k), seconds)
        for k, ((v, i), member) in enumerate(zip(jobs, members, strict=True))
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def _last(log: Sequence[dict[str, Any]], member: int) -> dict[str, float]:
    """One member's numbers, averaged over the last logged steps."""
    tail = log[-LAST:]
    return {name: sum(line[name][member] for line in tail) / len(tail) for name in tail[0] if name != "step"}


def _record(
    toy: str, rule: str, penalty: str, value: float, run: int, report: Any, last: dict[str, float], seconds: float
) -> dict[str, Any]:
    spent = last["stochastic_all"] / last["everything_off"]
    named = {"toy": toy, "rule": rule, "penalty": penalty, "value": value, "run": run}
    found = {"success": report.success, "problems": list(report.problems)[:3], "l0": round(last["L0"], 3)}
    measured = {"spent": round(spent, 5), "coefficient": last.get("minimality_coefficient", value)}
    return named | found | measured | {"cpu_seconds": round(seconds, 1), "versions": library_versions()}


def read(path: Path) -> list[dict[str, Any]]:
    """All runs so far."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def table(records: Sequence[dict[str, Any]]) -> str:
    """A row per toy, rule and penalty; in the cells, successes of runs."""
    values = sorted({r["value"] for r in records})
    lines = [
        "| toy | rule | penalty | " + " | ".join(f"{v:.2g}" for v in values) + " |",
        "|---" * (3 + len(values)) + "|",
    ]
    for row in sorted({(r["toy"], r["rule"], r["penalty"]) for r in records}):
        own = [r for r in records if (r["toy"], r["rule"], r["penalty"]) == row]
        cells = [[r["success"] for r in own if r["value"] == v] for v in values]
        shown = [f"{sum(cell)} of {len(cell)}" if cell else "-" for cell in cells]
        lines.append(f"| {' | '.join(row)} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main(
    rule: Annotated[str, typer.Option(help="share or tolerance")] = "share",
    penalty: Annotated[str, typer.Option(help=", ".join(PENALTIES))] = "power",
    toys: Annotated[str, typer.Option(help="names, with commas between")] = ",".join(TOYS),
    values: Annotated[str, typer.Option(help="shares, with commas between")] = ",".join(f"{v:.3g}" for v in SHARES),
    seeds: int = 3,
    only_table: Annotated[bool, typer.Option("--table", help="train nothing")] = False,
    results: Annotated[Path, typer.Option(help="where results go")] = RESULTS / "settings",
    work: Annotated[Path, typer.Option(help="where checkpoints and targets are kept")] = WORK,
) -> None:
    """Success of one setting on every toy."""
    torch.set_num_threads(1)
    chosen = toys.split(",")
    if rule not in ("share", "tolerance") or penalty not in PENALTIES or set(chosen) - EXPERIMENTS.keys():
        raise typer.BadParameter(f"rule {rule!r}, penalty {penalty!r}, toys {toys!r}; see --help")
    path = results / "runs.jsonl"
    if not only_table:
        for toy in chosen:
            run_toy(toy, rule, penalty, [float(v) for v in values.split(",")], seeds, path=path, work=work)
    print(table(read(path)))


if __name__ == "__main__":
    typer.run(main)
