"""Circuits of subcomponents, checked by an adversary; prints one JSON object, and writes it with `--out`.

    python experiments/circuits.py induction --json
    python experiments/circuits.py smollm2 --decomposition demo_output/decomposition --json
    python experiments/circuits.py smollm2 --decomposition RUN/decomposition --host hooked --tasks induction --json

**induction**: the toy model with a previous-token head in layer 0 and an induction head in layer 1, all eight attention
matrices decomposed (as shipped; `--train` makes a new one, `--decomposition` loads any). Two circuits for the
predictable positions of repeated sequences, `naive` (masks of importance alone) and the honest one at the top level
(random masks and an adversary), both measured on sequences that they were not found on: KL and accuracy with the
circuit alone, under random and adversarial masks outside of it, and with it knocked out; how many nodes lie in the two
heads. A third, `naive_by_position`, is as naive, for eight prompts, with a node for every subcomponent and position.
Then curves and a comparison with whole heads at equal faithfulness, on two tasks that corrupt different things:
`value` (another token to be copied, `induction_task`) and `context` (other tokens in the whole first half, so that
nothing repeats).

**smollm2**: SmolLM2-135M-Instruct with the blocks that the saved decomposition has (`make demo` writes one): induction,
indirect object, greater-than and agreement, where the model does them. Both circuits are also measured on fresh prompts
(`fresh`: other draws from the same lists of words, two starts of the adversary).

`cpr`, `cmd`: of the subcomponents ranked by attribution, deltas left out, on `context` (smollm2: on the task itself).
Cost: induction two to three CPU-minutes, and two for `--train`; smollm2 several minutes. Needs transformer_lens 3.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.toy_transformers import fit, head_shares, start
from spd_lens import PGD, Decomposition, Reconstruction, TrainConfig, decompose
from spd_lens.circuits import (
    BUDGETS,
    CircuitReport,
    SubcomponentParts,
    check_circuit,
    compare_parts,
    faithfulness_curve,
    find_circuit,
)
from spd_lens.models import (
    BOS,
    D_VOCAB,
    RepeatedSequences,
    head_roles,
    induction_accuracy,
    load_induction,
    load_induction_decomposition,
    load_smollm2,
    predictable,
)
from spd_lens.objective import Persistent
from spd_lens.patching import ablation_effects
from spd_lens.support import write_json
from spd_lens.tasks import Task, agreement_task, greater_than_task, indirect_object_task, induction_task

FOUND_ON, TEST_SEED, LEVEL = 77, 1_000_003, 0.9
MASKS: dict[str, Any] = {"naive": "importance", "honest": ("stochastic", "pgd")}


def numbers(report: CircuitReport, accuracy: str | None) -> dict[str, Any]:
    """The report in flat names; `accuracy` is the user metric that holds it (None: the task's own)."""

    def right(measured: Any) -> Any:
        return measured.accuracy if accuracy is None else measured.metrics[accuracy]

    return {
        "nodes": report.n_nodes,
        "of_nodes": report.n_candidates,
        "subcomponents": report.n_subcomponents,
        "parameters": report.n_parameters,
        "kl_importance": report.importance.kl,
        "kl_stochastic": report.stochastic.kl,
        **{f"kl_pgd{steps}": m.kl for steps, m in report.adversarial.items()},
        "kl_without_circuit": report.knocked_out.kl,
        "kl_everything_off": report.off.kl,
        "recovered_importance": report.importance.recovered,
        "recovered_stochastic": report.stochastic.recovered,
        **{f"recovered_pgd{steps}": m.recovered for steps, m in report.adversarial.items()},
        "accuracy_full": right(report.target),
        "accuracy_circuit": right(report.importance),
        "accuracy_stochastic": right(report.stochastic),
        **{f"accuracy_pgd{steps}": right(m) for steps, m in report.adversarial.items()},
        "accuracy_without_circuit": right(report.knocked_out),
        "is_circuit": report.is_circuit,
        "verdict": report.verdict,
        "adversary": {"step_size": report.step_size, "scope": "batch", "worst_of_starts": report.restarts},
    }


# -- induction -------------------------------------------------------------------------------------------------------


def induction_decomposition(args: Namespace) -> tuple[Decomposition, float]:
    """All attention matrices of the induction model, loaded or trained, and the CPU seconds of training."""
    if args.decomposition is not None:
        return Decomposition.from_pretrained(args.decomposition, load_induction()), 0.0
    if not args.train:
        return load_induction_decomposition(), 0.0
    decomposition = decompose(
        load_induction(), {"blocks.*.attn.W_[QKVO]": 64}, gate="attention", gate_width=32, seed=args.seed
    )
    start(decomposition, "singular", args.seed)
    # The recipe of experiments/toy_transformers.py induction.
    terms = (
        Reconstruction(),
        Reconstruction(routing="subset"),
        Reconstruction(masks=Persistent(warm_steps=1), coefficient=args.adversary),
    )
    config = TrainConfig(
        steps=args.train_steps, lr=2e-3, gate_lr=1e-2, minimality=5e-3, faithfulness=0.0,
        reconstructions=terms if args.adversary > 0 else terms[:2], checkpoint_every=None, log_every=100,
        seed=args.seed,
    )  # fmt: skip
    seconds = fit(decomposition, RepeatedSequences(16, seed=args.seed), config)
    return decomposition, seconds


def context_task(n: int, length: int, seed: int) -> Task:
    """`[bos] r1 ... rL r1 ... rk` -> `r(k+1)`; corrupted: other tokens s1 ... sL first, so that nothing repeats."""
    generator, k = torch.Generator().manual_seed(seed), length // 2
    tokens = torch.stack([torch.randperm(D_VOCAB - 1, generator=generator)[: 2 * length] + 1 for _ in range(n)])
    r, s, bos = tokens[:, :length], tokens[:, length:], torch.full((n, 1), BOS)
    clean, corrupted = (torch.cat([bos, first, r[:, :k]], dim=1) for first in (r, s))
    at = torch.full((n,), clean.shape[1] - 1)
    return Task("induction, other context", clean, corrupted, r[:, k : k + 1], s[:, k : k + 1], at)


def by_head(decomposition: Decomposition, report: CircuitReport, heads: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """How many nodes belong to each head (most of the squared norm of `U_c`, of `V_c` for `W_O`)."""
    counts: dict[str, dict[str, int]] = {}
    inside, n_heads = 0, decomposition.model.cfg.n_heads
    for site, ids in report.circuit.ids.items():
        layer = int(site.split(".")[1])
        for c in ids:
            head = int(head_shares(decomposition, site, c, n_heads).argmax())
            own = counts.setdefault(f"{layer}.{head}", {})
            own[site[-3:]] = own.get(site[-3:], 0) + 1
            inside += (layer, head) in heads
    return {"nodes_by_head": counts, "nodes_in_the_two_heads": inside, "share": inside / max(1, report.n_nodes)}


def run_induction(args: Namespace) -> dict[str, Any]:
    """Find both circuits, check them on other sequences, and compare subcomponents with heads."""
    decomposition, training = induction_decomposition(args)
    rows, others = RepeatedSequences(32, seed=FOUND_ON).batch(0), RepeatedSequences(32, seed=TEST_SEED).batch(0)
    roles = head_roles(decomposition.model, others)
    heads = (roles.previous_token_head, roles.induction_head)
    found: dict[str, Any] = {}
    for name, masks in MASKS.items():
        started = time.process_time()
        report = find_circuit(
            decomposition, rows, position_mask=predictable(rows), masks=masks, budgets=(20,), restarts=1,
            seed=args.seed, minimality=1e-3, rows_per_step=16, tolerance=0.005, prune_tries=12,
        )  # fmt: skip
        seconds = time.process_time() - started
        checked = check_circuit(
            decomposition, report.circuit, others, position_mask=predictable(others), budgets=BUDGETS, restarts=2,
            seed=args.seed,
            metrics={"accuracy": lambda logits: induction_accuracy(logits, others)},
        )  # fmt: skip
        found[name] = numbers(checked, "accuracy") | by_head(decomposition, report, heads)
        found[name] |= {"masks": masks, "search_cpu_seconds": round(seconds, 1), "ids": report.circuit.ids}
        found[name]["recovered_pgd20_where_it_was_found"] = report.adversarial[20].recovered
    few = induction_task(D_VOCAB, 8, length=8, bos=BOS, seed=args.seed)
    by_position = find_circuit(
        decomposition, few, masks="importance", by_position=True, start="all", minimality=1e-3, steps=150,
        budgets=BUDGETS, restarts=2, seed=args.seed,
    )  # fmt: skip
    tasks = {
        "value": induction_task(range(1, D_VOCAB), 32, length=10, bos=BOS, seed=args.seed),
        "context": context_task(32, 10, args.seed),
    }
    compared = {name: comparison(decomposition, task) for name, task in tasks.items()}
    curve = compared["context"]["corrupted"]["parts"]["subcomponents"]
    return {
        **found["honest"],
        "cpr": curve["cpr"],
        "cmd": curve["cmd"],
        "naive": found["naive"],
        "naive_by_position": numbers(by_position, None) | {"masks": "importance", "found_and_checked_on": few.name},
        "previous_token_head": roles.previous_token_head,
        "induction_head": roles.induction_head,
        "comparison": compared,
        "training_cpu_seconds": round(training, 1),
        "seeds": {"training": args.seed, "found_on": FOUND_ON, "checked_on": TEST_SEED, "tasks": args.seed},
    }


def comparison(decomposition: Decomposition, task: Task) -> dict[str, Any]:
    """`compare_parts` under both ablations."""
    return {
        outside: compare_parts(decomposition, task, level=LEVEL, outside=outside).to_json()  # pyright: ignore
        for outside in ("corrupted", "zero")
    }


# -- a real model ----------------------------------------------------------------------------------------------------


def language_tasks(tokenizer: Any, n: int, seed: int) -> dict[str, Task]:
    """Few and short prompts: one core needs five seconds for 256 tokens."""
    return {
        "induction": induction_task(tokenizer, n, length=8, seed=seed, bos=tokenizer.bos_token_id),
        "indirect_object": indirect_object_task(tokenizer, n, seed=seed),
        "greater_than": greater_than_task(tokenizer, n, seed=seed),
        "agreement": agreement_task(tokenizer, n, seed=seed),
    }


def run_smollm2(args: Namespace) -> dict[str, Any]:
    """Each task that the model does: effects, both circuits, faithfulness."""
    if args.decomposition is None:
        raise SystemExit("smollm2 needs --decomposition DIRECTORY; `make demo` writes demo_output/decomposition")
    decomposition = Decomposition.from_pretrained(args.decomposition, load_smollm2(host=args.host))
    tasks, fresh = (
        language_tasks(decomposition.model.tokenizer, args.rows, seed) for seed in (args.seed, args.seed + TEST_SEED)
    )
    results = {name: on_task(decomposition, tasks[name], fresh[name], args) for name in args.tasks or tasks}
    return {
        "sites": {name: weight.n_subcomponents for name, weight in decomposition.items()},
        "rows": args.rows,
        "tasks": results,
        "seeds": {"tasks": args.seed, "fresh": args.seed + TEST_SEED},
    }


def on_task(decomposition: Decomposition, task: Task, fresh: Task, args: Namespace) -> dict[str, Any]:
    """Numbers of one task; circuits are found on `task` and measured on both."""
    started = time.process_time()
    with torch.no_grad():
        clean, corrupted = (decomposition.model(tokens) for tokens in (task.clean, task.corrupted))
        values: dict[str, Any] = {
            "accuracy_full": float(task.correct(clean).float().mean()),
            "logit_difference_clean": float(task.logit_difference(clean).mean()),
            "logit_difference_corrupted": float(task.logit_difference(corrupted).mean()),
        }
    if values["logit_difference_clean"] <= values["logit_difference_corrupted"]:
        return values | {"left_out": "the model does not tell clean from corrupted prompts in the right direction"}
    parts = SubcomponentParts(decomposition, task, deltas=False)
    curve = faithfulness_curve(parts)
    by_attribution = {site: [] for site in decomposition}
    for i in curve.ranking[:10]:
        site, c = parts.labels[i].rstrip("]").rsplit("[", 1)
        by_attribution[site].append(int(c))
    ids = {site: chosen for site, chosen in by_attribution.items() if chosen}
    effects = ablation_effects(decomposition, task.clean, task.logit_difference, ids)
    values |= {
        "curve": curve.to_json(),
        "cpr": curve.cpr,
        "cmd": curve.cmd,
        "ablation_effects": [
            {"unit": str(e.unit), "effect": e.effect, "standard_error": e.standard_error} for e in effects.top(5)
        ],
    }
    for name in args.searches:
        report = find_circuit(
            decomposition, task, masks=MASKS[name], steps=args.steps, lr=0.1, pgd=PGD(3, 0.4), prune_tries=4,
            minimality=args.minimality, budgets=(20, 40), restarts=1, seed=args.seed,
        )  # fmt: skip
        values[name] = numbers(report, None)
        values[name] |= {"faithfulness_circuit": report.importance.faithfulness}
        values[name] |= {"faithfulness_without_circuit": report.knocked_out.faithfulness}
        checked = check_circuit(
            decomposition, report.circuit, fresh, budgets=(20, 40), restarts=2, seed=args.seed + 1
        )  # fmt: skip
        sizes = {site: len(own) for site, own in report.circuit.ids.items()}
        values[name] |= {"fresh": numbers(checked, None), "nodes_by_site": sizes, "ids": report.circuit.ids}
        print(f"{task.name}, {name}: {report}\nfresh prompts: {checked}", file=sys.stderr)
    return values | {"cpu_seconds": round(time.process_time() - started, 1)}


def main() -> None:
    """Run one of the two and print its JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("name", choices=("induction", "smollm2"))
    parser.add_argument("--json", action="store_true", help="print the JSON object (also the default)")
    parser.add_argument("--decomposition", type=Path, help="a saved one; induction has one that ships")
    parser.add_argument("--train", action="store_true", help="induction: train one instead")
    parser.add_argument("--train-steps", type=int, default=800, help="induction: training steps")
    parser.add_argument("--adversary", type=float, default=0.5, help="induction: its coefficient in training; 0: none")
    parser.add_argument("--host", choices=("bridge", "hooked"), default="bridge", help="smollm2: how it is loaded")
    parser.add_argument("--minimality", type=float, default=1e-4, help="smollm2: what a node has to be worth")
    parser.add_argument("--rows", type=int, default=4, help="smollm2: prompts per task")
    parser.add_argument("--steps", type=int, default=20, help="smollm2: steps of each search")
    parser.add_argument("--tasks", nargs="*", help="smollm2: some of induction indirect_object greater_than agreement")
    parser.add_argument("--searches", nargs="*", choices=MASKS, default=list(MASKS), help="smollm2: which searches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    result = run_induction(args) if args.name == "induction" else run_smollm2(args)
    result["versions"] = {n: importlib.metadata.version(n) for n in ("torch", "transformer_lens")}
    result["command"] = " ".join(["python", "experiments/circuits.py", *sys.argv[1:]])
    if args.out is not None:
        write_json(args.out, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
