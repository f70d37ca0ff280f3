"""The induction model decomposed from a random start, with a global or attention gate and an adversary.

    python experiments/random_start.py --seed 0        prints one JSON object; a killed run goes on where it was
    python experiments/random_start.py --device cuda --out RUN.json                    every step a CUDA graph
    python experiments/random_start.py --table RESULTS                                 a line per JSON file there

`toy_transformers.py induction` starts from singular vectors, which nearly are the answer. Here subcomponents start as
random ones that add up to the matrices (`init="exact"`), and the loss is the recipe of `language_model.py`: smooth L0
with its frequency term, relative faithfulness, and one pass in which half of the rows is under a persistent adversary.
With `--adversary batch` random masks, and a persistent adversary with one source for the whole batch in a pass of its
own; `both`: the two together.

A run succeeds if nothing is used outside the two heads that are known to do it, at most `FEW` subcomponents are used,
and an adversary of 20 steps does less than a tenth of what everything off does.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

if __package__ in (None, ""):  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from experiments.graphed import train_graphed
from experiments.runs import cpu_hours, measured_cpu
from experiments.toy_checks import summary
from experiments.toy_transformers import TEST_SEED, check_induction
from spd_lens import Decomposition, Reconstruction, TrainConfig, decompose, train
from spd_lens.data import Batch
from spd_lens.models import RepeatedSequences, load_induction
from spd_lens.objective import Merged, Persistent
from spd_lens.support import format_table, library_versions, write_json

SITES = "blocks.*.attn.W_[QKVO]"
GATES: dict[str, dict[str, Any]] = {
    "global": {"gate_width": 64, "gate_options": {"n_blocks": 1, "n_heads": 4}},
    "attention": {"gate_width": 32},
}
# The start from singular vectors ends with 58, singular vectors alone need 64.
FEW, SHARE_OF_OFF = 96, 0.1
MERGED = Reconstruction(
    masks=Merged(0.5, Persistent(warm_steps=1, lr=0.01, scope="position", lr_warmup=0.025)), routing="subset"
)
BATCH = Reconstruction(masks=Persistent(warm_steps=1, lr=0.01))
ADVERSARIES = {"merged": (MERGED,), "batch": (Reconstruction(routing="subset"), BATCH), "both": (MERGED, BATCH)}


def decomposed(gate: str, n_subcomponents: int, seed: int, device: str) -> Decomposition:
    """The untrained decomposition of all eight attention matrices."""
    options: dict[str, Any] = {"gate": gate, **GATES[gate]}
    return decompose(load_induction(device), {SITES: n_subcomponents}, init="exact", seed=seed, **options)


def configuration(coefficient: float, steps: int, seed: int, adversary: str, lr: float) -> TrainConfig:
    """The recipe for one coefficient of minimality."""
    return TrainConfig(
        steps=steps, lr=lr, lr_end=0.1, lr_warmup=100, clip_subcomponents=1.0, clip_gates=1.0, faithfulness=1e3,
        relative_faithfulness=True, minimality=coefficient, penalty="smooth_l0", frequency=coefficient / 2,
        frequency_reference=32_768, reconstructions=ADVERSARIES[adversary], seed=seed, log_every=100,
        checkpoint_every=100,
    )  # fmt: skip


def fit(decomposition: Decomposition, config: TrainConfig, rows: int, device: str, work: Path) -> float:
    """Train on fresh sequences, on a CPU from the last checkpoint in `work` on; returns seconds: on a CPU those of the
    processor in all parts of the run, else those of the clock."""
    data, began = RepeatedSequences(rows, seed=config.seed), time.perf_counter()
    if device != "cpu":
        train_graphed(decomposition, map(Batch, data), config, work)
        return time.perf_counter() - began
    place: dict[str, Any] = {"resume_from" if (work / "checkpoints").exists() else "out_dir": work}
    with measured_cpu(work / "cpu"):
        result = train(decomposition, data, config, **place)
    if result.interrupted:
        print(f"stopped after {result.steps} of {config.steps} steps; the same command continues")
        raise typer.Exit(130)
    return 3600 * cpu_hours(work / "cpu")


def judged(decomposition: Decomposition) -> dict[str, Any]:
    """What is used and where, what the adversary does, and the verdict."""
    check = check_induction(decomposition)
    measured = summary(decomposition, [RepeatedSequences(64, seed=TEST_SEED).batch(i) for i in range(2)])
    by_head = {head: sum(own["used"].values()) for head, own in check["heads"].items()}
    problems = problems_of(by_head, known_heads(check), measured["divergence"]["all off"], measured["adversarial"][20])
    return {"success": not problems, "problems": problems, "used_by_head": by_head, "check": check, **measured}


def problems_of(used_by_head: Mapping[str, int], known: Collection[str], off: float, pgd: float) -> list[str]:
    """Why a run is no success; empty if it is one."""
    problems = []
    used, elsewhere = sum(used_by_head.values()), sum(n for head, n in used_by_head.items() if head not in known)
    if elsewhere:
        problems.append(f"{elsewhere} subcomponents used outside the two heads")
    if used > FEW:
        problems.append(f"{used} subcomponents used, more than {FEW}")
    if pgd >= SHARE_OF_OFF * off:
        problems.append(f"the adversary does {pgd / off:.0%} of everything off")
    return problems


def known_heads(check: Mapping[str, Any]) -> set[str]:
    """The two heads as `check_induction` names those of a model: `"0.3"`."""
    return {".".join(map(str, check[role])) for role in ("previous_token_head", "induction_head")}


def table(results: Path) -> str:
    """A line per run."""
    header = ["run", "success", "used", "elsewhere", "L0", "random masks", "PGD 20", "PGD 80", "all off"]
    rows = []
    for path in sorted(results.glob("*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        used = run["used_by_head"]
        kl, pgd = run["divergence"], run["adversarial"]
        two = known_heads(run["check"])
        rows.append(
            [path.stem, "yes" if run["success"] else "no", str(sum(used.values()))]
            + [str(sum(n for head, n in used.items() if head not in two)), f"{sum(run['L0'].values()):.1f}"]
            + [f"{value:.3f}" for value in (kl["stochastic"], pgd["20"], pgd["80"], kl["all off"])]
        )
    return format_table(header, rows)


def main(
    gate: Annotated[str, typer.Option(help=", ".join(GATES))] = "global",
    coefficient: Annotated[float, typer.Option(help="of minimality")] = 2e-3,
    adversary: Annotated[str, typer.Option(help=", ".join(ADVERSARIES))] = "merged",
    steps: int = 3000,
    rows: Annotated[int, typer.Option(help="sequences in a batch")] = 16,
    lr: float = 2e-3,
    n_subcomponents: Annotated[int, typer.Option("-C", help="at each matrix")] = 128,
    seed: int = 0,
    device: Annotated[str, typer.Option(help="cpu, or cuda: every step a CUDA graph")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="JSON file to write")] = None,
    save: Annotated[Path | None, typer.Option(help="directory for the decomposition")] = None,
    work: Annotated[Path, typer.Option(help="where logs and checkpoints are kept")] = Path("runs/random_start"),
    only_table: Annotated[Path | None, typer.Option("--table", help="show the runs of a directory")] = None,
) -> None:
    """One run, or the table of those that were made."""
    torch.set_num_threads(1)
    if only_table is not None:
        print(table(only_table))
        return
    if gate not in GATES or adversary not in ADVERSARIES:
        raise typer.BadParameter(f"gate {gate!r}, adversary {adversary!r}; see --help")
    decomposition = decomposed(gate, n_subcomponents, seed, device)
    config = configuration(coefficient, steps, seed, adversary, lr)
    run = f"{gate}-c{coefficient:g}-{adversary}-s{seed}-n{steps}-r{rows}-lr{lr:g}-C{n_subcomponents}"
    seconds = fit(decomposition, config, rows, device, work / run)
    decomposition.to(torch.device("cpu"))
    if save is not None:
        decomposition.save_pretrained(save)
    name = device if device == "cpu" else torch.cuda.get_device_name(device)
    result = {
        "command": " ".join(["python", "experiments/random_start.py", *sys.argv[1:]]),
        **judged(decomposition), "gate": gate, "adversary": adversary, "rows": rows, "seconds": round(seconds, 1),
        "device": name, "settings": config.to_json(), "versions": library_versions(),
    }  # fmt: skip
    if out is not None:
        write_json(out, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    typer.run(main)
