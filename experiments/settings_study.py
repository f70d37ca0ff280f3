"""One setting for every toy: success over several decades of one number, with nothing else fitted to the model.

    python experiments/settings_study.py --rule share --penalty smooth --toys tms_5-2     continues where it was stopped
    python experiments/settings_study.py --rule tolerance --adversary
    python experiments/settings_study.py --rule share --device cuda                       minutes on a large GPU
    python experiments/settings_study.py --table                                only table and picture of what was run

What the number means is the rule:

- `absolute`: the coefficient of minimality, against the divergence as it is;
- `share`: the coefficient with reconstruction divided by what everything off costs (`relative_reconstruction`), so the
  share of the behaviour that a subcomponent has to be worth;
- `tolerance`: the share of everything off that may be spent; the coefficient starts at `--starts` and follows. With
  several starts, a run is the sparsest of what they lead to: they all spend the same, so the one that needs the fewest
  subcomponents for it is the better minimum, whatever the right answer may be (`sparsest`).

Penalties: `power` (p 1), `falling` (p from 2 to .5), `smooth` (smooth L0, gamma from 1 to .05), `wide` (the same to .2,
which keeps a slope at 1: of two subcomponents for one thing, one still goes). With `--adversary` the
pass over all sites is under a one-step adversary instead of random masks, as in the maps of `sensitivity.py`.

Everything else is that of `EXPERIMENTS[toy]` (steps, batch, learning rates), but without stages, factors by site or
starts made by hand: every toy starts from `init="exact"` and trains all sites from the first step. `--steps` caps the
steps of the longest.

    experiments/results/settings/runs.jsonl   a line per run: what was asked for, verdict, L0, what was spent
    experiments/results/settings/basins.png   successes over the number, a row per toy, a panel per rule
"""

from __future__ import annotations

import copy
import itertools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

if __package__ in (None, ""):  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from experiments.paper import EXPERIMENTS
from experiments.runs import DECOMPOSITION_SEED, RESULTS, WORK, accepted_targets, cpu_hours, measured_cpu, settings_hash
from experiments.settings_figure import save_basins
from spd_lens import Decomposition, Reconstruction, TrainConfig, decompose
from spd_lens.objective import PGD
from spd_lens.support import format_table, library_versions
from spd_lens.training import train_many

TOYS = ("tms_5-2", "tms_5-2_id", "tms_40-10", "resid_mlp_1", "resid_mlp_2")
# Half decades, over which the rules' numbers are tried.
VALUES = {
    "share": tuple(10 ** (n / 2) for n in range(-8, 2)),
    "tolerance": tuple(10 ** (n / 2) for n in range(-8, 1)),
    "absolute": tuple(10 ** (n / 2) for n in range(-12, -1)),
}
PENALTIES: dict[str, dict[str, Any]] = {
    "power": {},
    "falling": {"p_start": 2.0, "p_end": 0.5},
    "smooth": {"penalty": "smooth_l0", "gamma_end": 0.05},
    "wide": {"penalty": "smooth_l0", "gamma_end": 0.2},
}
ADVERSARY = (Reconstruction(masks=PGD(1, 1.0)), Reconstruction(routing="layerwise"))
# Where a coefficient that follows a tolerance starts, unless `--starts` says otherwise: above what any toy needs, so
# that it comes down.
START = 0.3
# A run has kept to its tolerance if the pass over all sites spends at most so many times as much. (What is held to the
# tolerance is the mean over all terms; the pass over all sites costs more than that over one.)
KEPT = 2.0
# Logged steps at the end of a run over which what was spent is averaged.
LAST = 10


@dataclass(frozen=True)
class How:
    """Where runs are trained, and at most how many steps."""

    device: str
    steps: int | None


@dataclass(frozen=True)
class Variant:
    """What a run's number means, what importances cost, and who attacks."""

    rule: str
    penalty: str
    adversary: bool

    def configuration(
        self, toy: str, value: float, seed: int, steps: int | None = None, start: float = START
    ) -> TrainConfig:
        """The toy's own configuration under the rule, with at most `steps` steps; `start` counts under a tolerance."""
        config = EXPERIMENTS[toy].config
        steps = config.steps if steps is None else min(steps, config.steps)
        named: dict[str, Any] = {"minimality": start, "tolerance": value}
        if self.rule != "tolerance":
            named = {"minimality": value}
        if self.adversary:
            named["reconstructions"] = ADVERSARY
        relative = self.rule != "absolute"
        common = {"steps": steps, "seed": seed, "log_every": max(1, steps // 100), "relative_reconstruction": relative}
        return config.changed(**common, **named, **PENALTIES[self.penalty])


def decomposed(toy: str, target: Any, seed: int) -> Decomposition:
    """The untrained decomposition, started exact."""
    experiment = EXPERIMENTS[toy]
    counts: dict[str, int | None] = dict(experiment.n_subcomponents)
    return decompose(target, counts, gate="scalar", gate_width=experiment.gate_width, init="exact", seed=seed)


def run_toy(
    toy: str,
    variant: Variant,
    values: Sequence[float],
    seeds: int,
    *,
    path: Path,
    work: Path,
    how: How,
    starts: Sequence[float] = (START,),
) -> None:
    """Train what is missing, all in one program, and add its lines to `path`."""
    of = (variant.rule, variant.penalty, variant.adversary)
    done = {(r["toy"], r["rule"], r["penalty"], r["adversary"], r["value"], r["run"], r["start"]) for r in read(path)}
    wanted = itertools.product(values, range(seeds), starts if variant.rule == "tolerance" else (START,))
    jobs = [(v, i, start) for v, i, start in wanted if (toy, *of, v, i, start) not in done]
    if not jobs:
        return
    experiment = EXPERIMENTS[toy]
    targets = accepted_targets(experiment, seeds, work / "targets")
    members = [decomposed(toy, copy.deepcopy(targets.models[i]), DECOMPOSITION_SEED + i) for _, i, _ in jobs]
    configs = [variant.configuration(toy, v, DECOMPOSITION_SEED + i, how.steps, start) for v, i, start in jobs]
    features = [experiment.features(DECOMPOSITION_SEED + i) for i in range(seeds)]
    data = [features[i] for _, i, _ in jobs]
    began = time.perf_counter()
    if how.device == "cpu":
        place = work / "settings" / f"{toy}-{'-'.join(map(str, of))}-{settings_hash({'jobs': jobs, 'n': how.steps})}"
        with measured_cpu(place / "cpu"):
            result = train_many(members, data, configs, out_dir=place / "run")
        seconds = {"cpu_seconds": round(3600 * cpu_hours(place / "cpu") / len(jobs), 1)}
    else:
        members = [member.to(torch.device(how.device)) for member in members]
        result = train_many(members, data, configs, cuda_graphs=True)
        members = [member.to(torch.device("cpu")) for member in members]
        seconds = {"seconds": round((time.perf_counter() - began) / len(jobs), 2)}
    if result.interrupted:
        raise typer.Exit(130)
    named = {"toy": toy, "rule": variant.rule, "penalty": variant.penalty, "adversary": variant.adversary}
    machine = {"steps": configs[0].steps, "device": device_name(how.device), **seconds, "versions": library_versions()}
    lines = [
        {
            **named, "value": v, "run": i, "start": start,
            **_found(experiment.report(m), _last(result.log, k), variant), **machine,
        }
        for k, ((v, i, start), m) in enumerate(zip(jobs, members, strict=True))
    ]  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def _last(log: Sequence[dict[str, Any]], member: int) -> dict[str, float]:
    """One member's numbers, averaged over the last logged steps."""
    tail = log[-LAST:]
    return {name: sum(line[name][member] for line in tail) / len(tail) for name in tail[0] if name != "step"}


def _found(report: Any, last: dict[str, float], variant: Variant) -> dict[str, Any]:
    """A run's verdict and its last numbers."""
    found = {"success": report.success, "problems": list(report.problems)[:3], "l0": round(last["L0"], 3)}
    reconstruction = last["pgd_all" if variant.adversary else "stochastic_all"]
    found["spent"] = round(reconstruction / last.get("everything_off", 1.0), 7)
    if "minimality_coefficient" in last:
        found["coefficient"] = last["minimality_coefficient"]
    return found


def read(path: Path) -> list[dict[str, Any]]:
    """All runs so far."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [{"adversary": False, "start": START, **json.loads(line)} for line in lines]


def sparsest(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of runs of one tolerance that differ in where their coefficient started, the one with the lowest L0.

    Runs that did not keep to the tolerance (`KEPT`) count only if none did; then the one that spends least. Nothing of
    the right answer is looked at: this choice can be made where there is none. It is that of
    `ManyResult.sparsest`, made from what `runs.jsonl` keeps of runs that were not all trained in one program.
    """
    kept = [r for r in records if r["spent"] <= KEPT * r["value"]]
    return min(kept, key=lambda r: r["l0"]) if kept else min(records, key=lambda r: r["spent"])


def one_per_run(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record for every run: the sparsest of its starts, in the order of the first of each."""
    same: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for r in records:
        same.setdefault((*_row(r), rounded(r["value"]), r["run"]), []).append(r)
    return [sparsest(own) if len(own) > 1 else own[0] for own in same.values()]


def rows_of(records: Sequence[dict[str, Any]]) -> dict[tuple[str, str, bool, str], dict[float, list[bool]]]:
    """Verdicts by value, of every rule, penalty, adversary and toy."""
    found: dict[tuple[str, str, bool, str], dict[float, list[bool]]] = {}
    order = sorted(records, key=lambda r: (r["rule"], r["penalty"], r["adversary"], list(EXPERIMENTS).index(r["toy"])))
    for r in order:
        row = found.setdefault(_row(r), {})
        row.setdefault(rounded(r["value"]), []).append(r["success"])
    return {row: dict(sorted(cells.items())) for row, cells in found.items()}


def rounded(value: float) -> float:
    """A value as it is shown, so that the same half decade is the same column."""
    return float(f"{value:.2g}")


def choice(records: Sequence[dict[str, Any]]) -> str:
    """How often the sparsest start is a right one, where the starts of a run disagree and where any is right."""
    runs: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for r in records:
        runs.setdefault((*_row(r), rounded(r["value"]), r["run"]), []).append(r)
    several = [own for own in runs.values() if len(own) > 1]
    solvable = [own for own in several if any(r["success"] for r in own)]
    split = [own for own in solvable if not all(r["success"] for r in own)]
    right = [sum(sparsest(own)["success"] for own in some) for some in (solvable, split)]
    return (
        f"runs with several starts: {len(several)}; some start succeeds in {len(solvable)}, the sparsest in {right[0]} "
        f"of these; starts disagree in {len(split)}, the sparsest is right in {right[1]} of these"
    )


def _row(record: dict[str, Any]) -> tuple[str, str, bool, str]:
    return record["rule"], record["penalty"], record["adversary"], record["toy"]


def by_start(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of runs with several starts, the start in the name of their penalty."""
    starts: dict[tuple[Any, ...], set[float]] = {}
    for r in records:
        starts.setdefault(_row(r), set()).add(r["start"])
    several = [r for r in records if len(starts[_row(r)]) > 1]
    return [{**r, "penalty": f"{r['penalty']} from {r['start']:g}"} for r in several]


def table(records: Sequence[dict[str, Any]]) -> str:
    """A table per rule, a row per penalty, adversary and toy; in the cells, successes of runs.

    Where runs have several starts, the row counts the sparsest of each, and one for every start follows.
    """
    parts = []
    rows = rows_of([*one_per_run(records), *by_start(records)])
    for rule in VALUES:
        own = {row[1:]: cells for row, cells in rows.items() if row[0] == rule}
        values = sorted({v for cells in own.values() for v in cells})
        if not own:
            continue
        shown = [
            [penalty + (", adversary" if adversary else ""), toy]
            + [f"{sum(cells[v])}/{len(cells[v])}" if v in cells else "-" for v in values]
            for (penalty, adversary, toy), cells in own.items()
        ]
        parts.append(format_table([rule, "toy", *(f"{v:.2g}" for v in values)], shown))
    return "\n\n".join(parts)


def device_name(device: str) -> str:
    """The card's name, or "cpu"."""
    return device if device == "cpu" else torch.cuda.get_device_name(device)


def main(
    rule: Annotated[str, typer.Option(help=", ".join(VALUES))] = "share",
    penalty: Annotated[str, typer.Option(help=", ".join(PENALTIES))] = "smooth",
    adversary: Annotated[bool, typer.Option("--adversary", help="one step against the masks of all sites")] = False,
    toys: Annotated[str, typer.Option(help="names, with commas between")] = ",".join(TOYS),
    values: Annotated[str | None, typer.Option(help="numbers, with commas between; by default the rule's")] = None,
    starts: Annotated[str, typer.Option(help="where coefficients under a tolerance start, with commas")] = f"{START}",
    seeds: int = 3,
    steps: Annotated[int | None, typer.Option(help="at most so many steps")] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda: no checkpoints, every step a CUDA graph")] = "cpu",
    only_table: Annotated[bool, typer.Option("--table", help="train nothing")] = False,
    results: Annotated[Path, typer.Option(help="where results go")] = RESULTS / "settings",
    work: Annotated[Path, typer.Option(help="where checkpoints and targets are kept")] = WORK,
) -> None:
    """Success of one setting on every toy."""
    torch.set_num_threads(1)
    chosen = toys.split(",")
    if rule not in VALUES or penalty not in PENALTIES or set(chosen) - EXPERIMENTS.keys():
        raise typer.BadParameter(f"rule {rule!r}, penalty {penalty!r}, toys {toys!r}; see --help")
    path = results / "runs.jsonl"
    if not only_table:
        numbers = [float(v) for v in values.split(",")] if values else [rounded(v) for v in VALUES[rule]]
        for toy in chosen:
            variant = Variant(rule, penalty, adversary)
            from_ = [float(start) for start in starts.split(",")]
            run_toy(toy, variant, numbers, seeds, path=path, work=work, how=How(device, steps), starts=from_)
    records = read(path)
    print(table(records), choice(records), sep="\n\n")
    if records:
        print(save_basins(results / "basins.png", rows_of(one_per_run(records))))


if __name__ == "__main__":
    typer.run(main)
