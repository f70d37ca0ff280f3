"""SPD against what a sceptic would ask for, and against APD: `python experiments/baselines.py --json`.

**Subcomponents.** Do trained gates make sense of any subcomponents that sum to W? On the first accepted targets of TMS
5-2, with the settings, seeds and criterion of `reproduce.py`: singular vectors, random subcomponents, the rows of W
(which are the known solution), each held fixed while gates are trained; and SPD, which trains both. `error` is the
reconstruction loss with every mask set to the importance, over the mean square of the target's outputs, on inputs that
were not trained on.

**Cost.** A training step of SPD (as `train` takes it) and of APD on the same rows: `--batch` draws of the paper's data,
without those that have no active feature, which APD always leaves out. C and everything else are those of `EXPERIMENTS`
and `APD_EXPERIMENTS`. CPU time of one thread, medians over rounds in which the two take turns; `ratio` is the median of
paired ratios, SPD's time over APD's. Memory is the peak above what is held between steps, and what is held: parameters
with Adam's moments, and SPD's workspace. With `--members` more than 1 both run that many seeds in one batched program
(`train_many`, `train_apd`), and all numbers are per member. Targets are untrained here: costs do not depend on values.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import shlex
import statistics
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import typer
from torch import nn

if __package__ in (None, ""):  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.configurations import ProductStep
from benchmarks.machine import Clock, provenance, rounded
from benchmarks.measure import alternate, drop_workspace, kept_workspace, paired_ratio, peak_memory
from experiments.apd_experiments import APD_EXPERIMENTS
from experiments.paper import EXPERIMENTS, Experiment
from experiments.runs import DECOMPOSITION_SEED, WORK, accepted_targets
from spd_lens import Decomposition
from spd_lens.baselines import APDLearner, FixedKind, decompose_fixed, train_gates
from spd_lens.core import SiteMask
from spd_lens.data import Batch
from spd_lens.support import format_table
from spd_lens.toys import TMSReport, tms_report
from spd_lens.training import MemberLearner, train_many

NAMES = {"rows": "rows of W, gates trained", "svd": "singular vectors, gates trained"}
NAMES |= {"random": "random subcomponents, gates trained", "spd": "SPD"}
# A batch of the data that no training reaches.
HELD_OUT = 10**6


# -- subcomponents ---------------------------------------------------------------------------------------------------


def compare_subcomponents(experiment: Experiment, targets: Sequence[nn.Module]) -> dict[str, dict[str, Any]]:
    """Verdicts for fixed subcomponents with trained gates and for SPD, on the same targets and seeds."""
    seeds = range(DECOMPOSITION_SEED, DECOMPOSITION_SEED + len(targets))
    configs = [experiment.config.changed(seed=seed) for seed in seeds]
    batches = [experiment.features(seed) for seed in seeds]
    fixed: dict[str, list[Decomposition]] = {
        subcomponents: [
            decompose_fixed(
                copy.deepcopy(target),
                experiment.n_subcomponents,
                subcomponents,
                gate_width=experiment.gate_width,
                seed=seed,
            )
            for target, seed in zip(targets, seeds, strict=True)
        ]
        for subcomponents in get_args(FixedKind)
    }
    train_gates([d for of in fixed.values() for d in of], batches * len(fixed), configs * len(fixed))
    free = [experiment.decompose(copy.deepcopy(target), seed) for target, seed in zip(targets, seeds, strict=True)]
    train_many(free, batches, configs)
    order = ("svd", "random", "rows")
    return {
        subcomponents: _verdicts(experiment, of)
        for subcomponents, of in {**{p: fixed[p] for p in order}, "spd": free}.items()
    }


def _verdicts(experiment: Experiment, decompositions: Sequence[Decomposition]) -> dict[str, Any]:
    reports: list[TMSReport] = [tms_report(d) for d in decompositions]
    means = {
        "mmcs": [r.recovery.mmcs for r in reports],
        "ml2r": [r.recovery.ml2r for r in reports],
        "alive_encoder": [r.encoder.n_alive for r in reports],
        "alive_decoder": [r.decoder.n_alive for r in reports],
        "identity_errors": [r.encoder.identity_error + r.decoder.identity_error for r in reports],
        "error": [importance_error(d, experiment.features(DECOMPOSITION_SEED).batch(HELD_OUT)) for d in decompositions],
    }
    return {
        "runs": len(reports),
        "successes": sum(r.success for r in reports),
        **{name: statistics.mean(values) for name, values in means.items()},
        "problems": [list(r.problems) for r in reports],
    }


@torch.no_grad()
def importance_error(decomposition: Decomposition, x: torch.Tensor) -> float:
    """`|f(x) - f(x; mask = importance, delta off)|^2 / |f(x)|^2`."""
    clean = decomposition.clean_pass(x).output
    masks = {name: SiteMask(g, torch.zeros(len(x))) for name, g in decomposition.importance(x).items()}
    return float((decomposition.masked_forward(x, masks) - clean).square().sum() / clean.square().sum())


# -- cost ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """A step that can be taken again and again, and the bytes that are held between steps."""

    step: Any
    held: int
    n_parameters: int


def compare_cost(name: str, *, batch: int, rounds: int, members: int) -> dict[str, Any]:
    """Time and memory per step of SPD and APD on the target of an experiment."""
    experiment, apd_config = EXPERIMENTS[name], APD_EXPERIMENTS[f"apd_{name}"].config.changed(batch_size=batch)
    target: Any = experiment.new_target()
    learner = APDLearner([target] * members, [apd_config] * members)
    x = learner.batch(0)
    clock = Clock(torch.device("cpu"))
    drop_workspace()
    both = {"spd": spd_step(experiment, target, x), "apd": apd_step(learner, x)}
    times = alternate({method: measured.step for method, measured in both.items()}, rounds, clock)
    result: dict[str, Any] = {
        "rows": x.shape[1],
        "members": members,
        "ratio": paired_ratio(times["spd"], times["apd"]),
        "C": {"spd": experiment.n_subcomponents, "apd": apd_config.n_components},
    }
    for method, measured in both.items():
        workspace = kept_workspace() if method == "spd" else 0
        result[method] = {
            "step_ms": 1e3 * statistics.median(times[method]) / members,
            "peak_mb": peak_memory(measured.step, clock.device) / 1e6 / members,
            "held_mb": (measured.held + workspace) / 1e6 / members,
            "parameters": measured.n_parameters // members,
        }
    return result


def spd_step(experiment: Experiment, target: nn.Module, x: torch.Tensor) -> Measured:
    """As `train` takes it for one member, as `train_many` does for more."""
    decompositions = [experiment.decompose(copy.deepcopy(target), seed) for seed in range(len(x))]
    if len(x) == 1:
        product, batch = ProductStep(decompositions[0], experiment.config), Batch(x[0])
        parameters = decompositions[0].subcomponent_parameters() + decompositions[0].gate_parameters()
        return _measured(lambda: product.step(batch), parameters)
    batched = MemberLearner(decompositions, [experiment.config] * len(x))
    return _measured(lambda: batched.step(x, 0), list(batched.stack.parameters.values()))


def apd_step(learner: APDLearner, x: torch.Tensor) -> Measured:
    """The step of `train_apd` without drawing its data, which SPD's does not do either."""
    return _measured(lambda: learner.step(x, learner.config.steps // 2), list(learner.parameters.values()))


def _measured(step: Any, parameters: Sequence[torch.Tensor]) -> Measured:
    # Each number with Adam's two moments.
    n = sum(p.numel() for p in parameters)
    return Measured(step, 3 * sum(p.nbytes for p in parameters), n)


# -- command ---------------------------------------------------------------------------------------------------------


def subcomponents_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """A row per kind of subcomponents; numbers are means over runs."""
    header = (
        "subcomponents",
        "succeed",
        "MMCS",
        "ML2R",
        "alive enc, dec",
        "identity errors",
        "error, importance as mask",
    )
    rows = [
        (
            NAMES[subcomponents],
            f"{v['successes']} of {v['runs']}",
            f"{v['mmcs']:.4f}",
            f"{v['ml2r']:.4f}",
            f"{v['alive_encoder']:.1f}, {v['alive_decoder']:.1f}",
            f"{v['identity_errors']:.1f}",
            f"{v['error']:.1e}",
        )
        for subcomponents, v in found.items()
    ]
    return format_table(header, rows)


def cost_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """A row per target and method."""
    header = ("step on", "rows", "ms", "peak MB", "held MB", "parameters", "SPD's time over APD's")
    rows = []
    for name, result in found.items():
        for method in ("spd", "apd"):
            v = result[method]
            numbers = (f"{v['step_ms']:.2f}", f"{v['peak_mb']:.2f}", f"{v['held_mb']:.2f}", f"{v['parameters']:,}")
            ratio = f"{result['ratio']:.2f}" if method == "apd" else ""
            rows.append((f"{name}, {method.upper()}", f"{result['rows']}", *numbers, ratio))
    return format_table(header, rows)


def main(
    targets: Annotated[int, typer.Option(help="Targets for the table of subcomponents; 0 leaves it out.")] = 5,
    subcomponents_of: Annotated[str, typer.Option(help="TMS experiment of the table of subcomponents.")] = "tms_5-2",
    steps: Annotated[int | None, typer.Option(help="Training steps instead of the experiment's.")] = None,
    cost_of: Annotated[str, typer.Option(help="Experiments to time, separated by commas; '' for none.")] = ",".join(
        name.removeprefix("apd_") for name in APD_EXPERIMENTS
    ),
    rounds: Annotated[int, typer.Option(help="Timed steps of each.")] = 15,
    batch: Annotated[int, typer.Option(help="Rows drawn for a timed step.")] = 2048,
    members: Annotated[int, typer.Option(help="Seeds in one batched program, for the times.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    work: Annotated[Path, typer.Option(help="Where trained targets are kept.")] = WORK,
) -> None:
    """The table of subcomponents and that of costs."""
    timed = [name for name in cost_of.split(",") if name]
    for name in [subcomponents_of, *timed]:
        if name not in EXPERIMENTS:
            raise typer.BadParameter(f"{name!r}; expected one of {', '.join(EXPERIMENTS)}")
    if without := [name for name in timed if f"apd_{name}" not in APD_EXPERIMENTS]:
        raise typer.BadParameter(f"{without[0]!r} has no APD experiment; there are {', '.join(APD_EXPERIMENTS)}")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    experiment = EXPERIMENTS[subcomponents_of]
    if steps is not None:
        experiment = dataclasses.replace(experiment, config=experiment.config.changed(steps=steps))
    result: dict[str, Any] = {}
    with contextlib.redirect_stdout(sys.stderr):
        if targets:
            models = accepted_targets(experiment, targets, work / "targets").models
            result["subcomponents"] = compare_subcomponents(experiment, models)
        result["cost"] = {name: compare_cost(name, batch=batch, rounds=rounds, members=members) for name in timed}
    command = shlex.join(["python", "experiments/baselines.py", *sys.argv[1:]])
    result |= {
        "subcomponents_of": subcomponents_of,
        "settings": experiment.settings(),
        "rounds": rounds,
        **provenance(torch.device("cpu")),
        "command": command,
    }
    if as_json:
        print(json.dumps(rounded(result)))
        return
    if targets:
        print(f"{subcomponents_of}\n{subcomponents_table(result['subcomponents'])}\n")
    print(cost_table(result["cost"]))


if __name__ == "__main__":
    typer.run(main)
