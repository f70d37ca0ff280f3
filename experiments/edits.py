"""Edits side by side at equal effect: subcomponents beside nine other ways to take a habit out of a model.

    python experiments/edits.py --json                          # every case, 4, 10 and 100 examples; prints JSON
    python experiments/edits.py --cases semicolon --examples 10 # one of them; without --json a table
    python experiments/edits.py --smollm2 RUN/decomposition --device cuda --cases smollm2_semicolon --out PARTS
    python experiments/edits.py --figure                        # the table and the picture of the committed results

Every method makes its change from the same examples and the same control text. One number, its strength, is then set
on other prompts, the same for all methods, so that the habit's probability falls by GOAL: what is compared is the cost
at equal effect. What is reported is measured on prompts that nobody has seen: the effect, generations, the KL over the
next five tokens and on unrelated text. Random subcomponents get the scales of ours, not their effect.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from experiments.edit_cases import CASES, SMOLLM2, Case, induction_case, smollm2_cases, tiny_lm_cases
from spd_lens.baselines import (
    Rival,
    component_writes,
    components,
    difference_of_means,
    edit_rival,
    effect_at,
    fine_tuning,
    heads_and_neurons,
    leace,
    lora,
    rank_one,
    strength_for,
    task_vector,
)
from spd_lens.editing import Habit, find, measure, random_edits
from spd_lens.support import format_table, write_json

RESULTS = Path(__file__).parent / "results" / "edits"
GOAL = 0.8


# -- methods -----------------------------------------------------------------------------------------------------------


def methods(case: Case, examples: Habit) -> Iterator[tuple[str, Callable[[], Rival]]]:
    """Every method as a function that makes it from the examples."""
    d, controls, layers, n = case.decomposition, case.controls, case.size.layers, min(16, case.size.n_measured)
    yield "difference of means", lambda: difference_of_means(d, examples, controls, GOAL, layers=layers)
    yield "LEACE", lambda: leace(d, examples, controls, GOAL, layers=layers)
    yield "rank one, key covariance", lambda: rank_one(d, examples, controls, GOAL)
    yield "heads and neurons", lambda: heads_and_neurons(d, examples, controls, GOAL, n_measured=n)
    yield "task vector", lambda: task_vector(d, examples)
    yield "LoRA", lambda: lora(d, case.plain, examples)
    yield "full fine-tuning", lambda: fine_tuning(d, examples)


def run_case(case: Case, n_examples: int, seed: int) -> dict[str, Any]:
    """One case with so many examples: every method's numbers."""
    started = time.time()
    examples, d = case.examples[:n_examples], case.decomposition
    result: dict[str, Any] = {
        "case": case.name,
        "n_examples": len(examples),
        "n_held_out": len(case.held_out),
        "goal": GOAL,
        "probability": float(case.held_out.probability(case.clean).mean()),
        "methods": {},
    }
    found = find(d, examples, case.controls, n_measured=case.size.n_measured, n_checked=4)
    ours, made = components(d, examples, case.controls, GOAL, found)
    result["methods"]["components"] = _measured(case, ours, n_subcomponents=made.n_subcomponents)
    turned, writes = component_writes(d, examples, found)
    result["methods"][turned.name] = _measured(case, turned, n_subcomponents=writes.n_subcomponents)
    agreement = found.agreement
    result["gradients_agree"] = None if agreement is None else agreement.correlation
    result["edit"] = str(made)
    for name, make in methods(case, examples):
        result["methods"][name] = _measured(case, make())
        print(f"{case.name} {n_examples} {name} {time.time() - started:.0f}s", file=sys.stderr, flush=True)
    strength = result["methods"]["components"]["strength"]
    others = [
        _measured(case, edit_rival("random subcomponents", other), strength=strength)
        for other in random_edits(made, case.controls, 2, seed=seed)
    ]
    result["methods"]["random subcomponents"] = {k: _mean([o[k] for o in others]) for k in others[0]}
    result["seconds"] = time.time() - started
    return result


def _measured(case: Case, rival: Rival, strength: float | None = None, **more: Any) -> dict[str, Any]:
    d = case.decomposition
    if strength is None:
        strength = strength_for(d, rival, case.strengths_on, GOAL)
    forward = rival.forward(d, strength)
    effect = measure(case.clean, forward, case.held_out, case.unrelated, n_generated=0)
    if (others := case.neighbours) is not None:
        more["neighbours_before"] = float(others.probability(case.clean).mean())
        more["neighbours_after"] = float(others.probability(forward).mean())
    return {
        "effect": effect.effect,
        "effect_where_set": effect_at(d, rival, case.strengths_on, strength),
        "generation_count_before": case.count_before,
        "generation_count_after": case.counted(forward),
        "kl_at": effect.kl_at,
        "kl_near": effect.kl_near,
        "kl_elsewhere": effect.kl_elsewhere,
        "parameters_changed": rival.parameters_changed,
        "strength": strength,
        **more,
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# -- output ------------------------------------------------------------------------------------------------------------

_HEADER = ("case", "examples", "method", "effect", "count", "KL near", "KL elsewhere", "parameters")


def table(results: Sequence[dict[str, Any]]) -> str:
    """All results, one line a method."""
    rows = []
    for result in results:
        for name, m in result["methods"].items():
            count = f"{m['generation_count_before']:.0f} > {m['generation_count_after']:.0f}"
            kls = [f"{m[k]:.3f}" for k in ("kl_near", "kl_elsewhere")]
            first = (result["case"], str(result["n_examples"]), name)
            rows.append((*first, f"{m['effect']:.1%}", count, *kls, f"{m['parameters_changed']:,.0f}"))
    return format_table(_HEADER, rows)


# Told apart by the colour-blind, with the marks (Okabe and Ito's palette); subcomponents are stars.
_MARKS = {
    "components": ("#D55E00", "*"), "components, trained writes": ("#E69F00", "*"),
    "random subcomponents": ("#999999", "X"),
    "difference of means": ("#56B4E9", "o"), "LEACE": ("#56B4E9", "s"), "rank one, key covariance": ("#009E73", "D"),
    "heads and neurons": ("#CC79A7", "^"), "task vector": ("#0072B2", "v"), "LoRA": ("#0072B2", "P"),
    "full fine-tuning": ("#000000", "o"),
}  # fmt: skip
_LEAST = 1e-5


def figure(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Effect on held-out prompts against the KL on unrelated text, one panel a case, one colour and mark a method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    cases = list(dict.fromkeys(r["case"] for r in results))
    n_rows = -(-len(cases) // 4)
    fig, axes = plt.subplots(n_rows, 4, figsize=(14.5, 3.6 * n_rows), sharey=True, squeeze=False, layout="constrained")
    for axis in axes.flat[len(cases) :]:
        axis.set_visible(False)
    for axis, case in zip(axes.flat, cases, strict=False):
        for r in (r for r in results if r["case"] == case):
            for name, m in r["methods"].items():
                colour, mark = _MARKS[name]
                size = {4: 20, 10: 50}.get(r["n_examples"], 105) * (1.7 if mark == "*" else 1)
                at = max(m["kl_elsewhere"], _LEAST), max(m["effect"], -0.2)
                axis.scatter(*at, s=size, color=colour, marker=mark, alpha=0.8, linewidths=0, label=name)
        axis.set(title=case, xscale="log", xlabel="KL on unrelated text (nats)", ylim=(-0.25, 1.05))
        axis.axhline(GOAL, color="0.8", zorder=0)
        axis.grid(alpha=0.25)
    for line in axes:
        line[0].set_ylabel("share of the probability gone, held out")
    handles = [Line2D([], [], color=c, marker=m, linestyle="", label=name) for name, (c, m) in _MARKS.items()]
    fig.legend(handles=handles, loc="outside right center", fontsize=8,
               title="4, 10, 100 examples:\nlarger marks", title_fontsize=8)  # fmt: skip
    fig.savefig(path, dpi=110)
    plt.close(fig)


def committed() -> list[dict[str, Any]]:
    """The results in the repository, in the order of the cases."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*_*.json"))]
    order = {name: i for i, name in enumerate(CASES)}
    return sorted(found, key=lambda r: (order.get(r["case"], len(CASES)), r["case"], r["n_examples"]))


def main() -> None:
    """Run cases, print them, and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=[c for c in CASES if not c.startswith(SMOLLM2)], choices=CASES)
    parser.add_argument("--smollm2", type=Path, help="a saved decomposition of blocks of SmolLM2, for its cases")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where SmolLM2 runs")
    parser.add_argument("--host", default="hooked", choices=("hooked", "bridge"), help="what SmolLM2 was decomposed in")
    parser.add_argument("--examples", nargs="*", type=int, default=[4, 10, 100])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--out",
        type=Path,
        help="a folder for one JSON file a case and number of examples; one that is there is not run again",
    )
    parser.add_argument("--figure", action="store_true", help="only draw the committed results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    if args.figure:
        figure(committed(), RESULTS / "edits.png")
        print(table(committed()))
        return
    versions = {n: importlib.metadata.version(n) for n in ("torch", "transformer_lens", "peft", "concept-erasure")}
    command = " ".join(["python", "experiments/edits.py", *sys.argv[1:]])
    about: dict[str, Any] = {"seed": args.seed, "versions": versions, "command": command}
    results = []
    cases = [induction_case()] if "induction" in args.cases else []
    if any(not name.startswith(SMOLLM2) and name != "induction" for name in args.cases):
        cases += tiny_lm_cases(args.cases)
    if any(name.startswith(SMOLLM2) for name in args.cases):
        if args.smollm2 is None:
            parser.error("cases of SmolLM2 need --smollm2, a saved decomposition of some of its blocks")
        cases += smollm2_cases(args.cases, args.smollm2, args.device, args.host)
        about["sites"] = sorted(cases[-1].decomposition)
        about["machine"] = torch.cuda.get_device_name() if args.device == "cuda" else "CPU, one thread"
    for n in args.examples:
        for case in cases:
            path = None if args.out is None else args.out / f"{case.name}_{n}.json"
            if path is not None and path.exists():
                results.append(json.loads(path.read_text()))
                continue
            result = run_case(case, n, args.seed) | about
            results.append(result)
            if path is not None:
                write_json(path, result)
    print(json.dumps(results, indent=1) if args.json else table(results))


if __name__ == "__main__":
    main()
