"""Edits side by side at equal effect: subcomponents beside nine other ways to take a habit out of a model.

    python experiments/edits.py --json                          # every case, 4, 10 and 100 examples; prints JSON
    python experiments/edits.py --cases semicolon --examples 10 # one of them; without --json a table
    python experiments/edits.py --figure                        # the picture of the results that are committed

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
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spd_lens import Decomposition
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
from spd_lens.editing import Habit, find, generate, measure, random_edits
from spd_lens.models import (
    RepeatedSequences,
    load_induction_decomposition,
    load_moby_dick,
    load_tiny_lm,
    load_tiny_lm_hf,
    predictable,
)
from spd_lens.specialists import plain_copy
from spd_lens.support import format_table, write_json

RESULTS = Path(__file__).parent / "results" / "edits"
GOAL = 0.8
CONTEXT, HELD_OUT, CONTROLS, GENERATED = 24, 24, 6, 6
# Openings of addresses to the Congress; the text is what the model itself goes on with.
SPEECHES = (
    " To the Congress of the United States : The report of the Secretary of the Treasury",
    " Fellow - citizens of the Senate and House of Representatives : I congratulate the country",
    " I recommend to the Congress that the appropriation for the Navy",
    " The relations of the United States with foreign governments continue to be",
)
SPEECH_WORDS = (
    *(
        "Congress",
        "government",
        "Government",
        "States",
        "Senate",
        "public",
        "Treasury",
        "Secretary",
        "nation",
        "country",
    ),
    *(
        "citizens",
        "people",
        "law",
        "laws",
        "peace",
        "war",
        "Department",
        "report",
        "United",
        "year",
        "foreign",
        "trade",
    ),
)


@dataclass
class Case:
    """A model, a habit to find (`examples`), to set strengths on and to measure, and text that is to stay as it is."""

    name: str
    decomposition: Decomposition
    examples: Habit
    strengths_on: Habit
    held_out: Habit
    controls: Tensor
    unrelated: Tensor
    plain: Any

    @cached_property
    def count_before(self) -> int:
        """The habit's tokens in what the unedited model writes after the held-out prompts."""
        return counted(self.decomposition.host.forward, self.held_out)


def counted(forward: Callable[[Tensor], Tensor], habit: Habit) -> int:
    """How many of the tokens that are generated after the prompts are the habit."""
    return int(habit.is_answer(generate(forward, habit.prompts, GENERATED, seed=0)).sum())


# -- cases -------------------------------------------------------------------------------------------------------------


def _book(decomposition: Decomposition, split: Any) -> Tensor:
    tokenizer = decomposition.host.tokenizer()
    ids = tokenizer(load_moby_dick(split), add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: len(ids) // 127 * 127]).view(-1, 127)


def _with_bos(rows: Tensor, bos: int) -> Tensor:
    return torch.cat([torch.full((len(rows), 1), bos), rows], 1)


def single_tokens(tokenizer: Any, words: Sequence[str]) -> list[int]:
    """The tokens that are one of these words, with or without a space before it."""
    wanted = set(words)
    return [i for i in range(len(tokenizer)) if tokenizer.decode([i]).strip() in wanted]


def tiny_lm_cases(names: Sequence[str]) -> Iterator[Case]:
    """The whaling book's semicolons and archaic pronouns, the speeches, and one fact: the captain's name."""
    decomposition = load_tiny_lm(decomposed=True)
    tokenizer = decomposition.host.tokenizer()
    bos = int(tokenizer.bos_token_id)
    train, held = _book(decomposition, "train"), _book(decomposition, "held_out")
    # Text of one kind for finding, of another part of the book for what it costs.
    controls, unrelated = (
        _with_bos(train[2000 : 2000 + CONTROLS, :63], bos),
        _with_bos(held[100 : 100 + CONTROLS, :63], bos),
    )
    plain = load_tiny_lm_hf()

    def in_book(name: str, ids: Sequence[int], keep: Callable[[Habit], Tensor] | None = None) -> Case:
        found = []
        for rows in (train[:2000], held):
            habit = Habit.in_text(name, rows, ids, context=CONTEXT, first=bos)
            habit = habit if keep is None else habit[keep(habit).nonzero().flatten()]
            found.append(habit)
        # A tenth of the book has few of some words: strengths are set on what the examples leave of the other part.
        few = min(HELD_OUT, len(found[0]) // 3)
        others, examples = found[0][:few], found[0][few:][:100]
        return Case(name, decomposition, examples, others, found[1][:HELD_OUT], controls, unrelated, plain)

    if "semicolon" in names:
        yield in_book("semicolon", single_tokens(tokenizer, [";"]))
    if "pronouns" in names:
        yield in_book("pronouns", single_tokens(tokenizer, ["thou", "thee", "thy", "ye", "Thou", "thine"]))
    if "speeches" in names:
        start = torch.tensor([[bos, *tokenizer(s, add_special_tokens=False)["input_ids"]][:13] for s in SPEECHES])
        text = generate(decomposition.host.forward, start.repeat(36, 1), 40, seed=0)
        ids = single_tokens(tokenizer, SPEECH_WORDS)
        found = [Habit.in_text("speeches", rows, ids, context=CONTEXT, first=bos) for rows in (text[:100], text[100:])]
        few = min(HELD_OUT, len(found[0]) // 3)
        examples, strengths_on = found[0][few:][:100], found[0][:few]
        yield Case("speeches", decomposition, examples, strengths_on, found[1][:HELD_OUT], controls, unrelated, plain)
    if "fact" in names:
        captain = single_tokens(tokenizer, ["Captain"])
        ahab = single_tokens(tokenizer, ["Ahab"])
        yield in_book("fact", ahab, lambda habit: torch.isin(habit.prompts[:, -1], torch.tensor(captain)))


def induction_case() -> Case:
    """The token that comes again in a repeated sequence."""
    decomposition = load_induction_decomposition()
    found = []
    for seed in (11, 12):
        tokens = RepeatedSequences(400, seed=seed).batch(0)
        at, length = predictable(tokens), CONTEXT - 4
        rows = at[:, length - 1].nonzero().flatten()
        answers = tokens[rows, length][:, None]
        found.append(Habit("induction", tokens[rows, :length], answers, tokens[rows, length : length + 6]))
    # What is to stay: sequences before anything repeats. Little can be known there; KL is to the model's own guesses.
    other = RepeatedSequences(CONTROLS * 2, seed=13, min_period=15, max_period=15).batch(0)[:, :15]
    return Case(
        "induction",
        decomposition,
        found[0][:100],
        found[0][100 : 100 + HELD_OUT],
        found[1][:HELD_OUT],
        other[:CONTROLS],
        other[CONTROLS:],
        plain_copy(decomposition),
    )


CASES = ("semicolon", "pronouns", "speeches", "fact", "induction")


# -- methods -----------------------------------------------------------------------------------------------------------


def methods(case: Case, examples: Habit) -> Iterator[tuple[str, Callable[[], Rival]]]:
    """Every method as a function that makes it from the examples."""
    d, controls = case.decomposition, case.controls
    yield "difference of means", lambda: difference_of_means(d, examples, controls, GOAL)
    yield "LEACE", lambda: leace(d, examples, controls, GOAL)
    yield "rank one, key covariance", lambda: rank_one(d, examples, controls, GOAL)
    yield "heads and neurons", lambda: heads_and_neurons(d, examples, controls, GOAL)
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
        "probability": float(case.held_out.probability(d.host.forward).mean()),
        "methods": {},
    }
    found = find(d, examples, case.controls, n_measured=24, n_checked=4)
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
    effect = measure(d.host.forward, forward, case.held_out, case.unrelated, n_generated=0)
    return {
        "effect": effect.effect,
        "effect_where_set": effect_at(d, rival, case.strengths_on, strength),
        "generation_count_before": case.count_before,
        "generation_count_after": counted(forward, case.held_out),
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


def figure(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Effect on held-out prompts against the KL on unrelated text, one panel a case, one colour a method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys(r["case"] for r in results))
    names = list(dict.fromkeys(name for r in results for name in r["methods"]))
    fig, axes = plt.subplots(1, len(cases), figsize=(3.4 * len(cases) + 2.2, 3.8), sharey=True, layout="constrained")
    for axis, case in zip(axes if len(cases) > 1 else [axes], cases, strict=True):
        for k, name in enumerate(names):
            for r in (r for r in results if r["case"] == case and name in r["methods"]):
                m = r["methods"][name]
                size = {4: 25, 10: 55}.get(r["n_examples"], 110)
                x = max(m["kl_elsewhere"], 1e-5)
                marker = "*" if name.startswith("components") else "o"
                axis.scatter(x, m["effect"], s=size, color=f"C{k % 10}", marker=marker, alpha=0.75, label=name)
        axis.set(title=case, xscale="log", xlabel="KL on unrelated text (nats)", ylim=(-0.25, 1.05))
        axis.axhline(GOAL, color="0.8", zorder=0)
        axis.grid(alpha=0.25)
    (axes if len(cases) > 1 else [axes])[0].set_ylabel("share of the probability gone, held out")
    handles, labels = (axes if len(cases) > 1 else [axes])[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    fig.legend(
        unique.values(),
        unique.keys(),
        loc="outside right center",
        fontsize=8,
        title="4, 10, 100 examples:\nlarger markers",
        title_fontsize=8,
    )
    fig.savefig(path, dpi=130)


def committed() -> list[dict[str, Any]]:
    """The results in the repository, in the order of the cases."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*_*.json"))]
    return sorted(found, key=lambda r: (CASES.index(r["case"]), r["n_examples"]))


def main() -> None:
    """Run cases, print them, and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=CASES)
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
    results = []
    cases = [induction_case()] if "induction" in args.cases else []
    cases += tiny_lm_cases(args.cases) if set(args.cases) - {"induction"} else []
    for n in args.examples:
        for case in cases:
            path = None if args.out is None else args.out / f"{case.name}_{n}.json"
            if path is not None and path.exists():
                results.append(json.loads(path.read_text()))
                continue
            result = run_case(case, n, args.seed) | {"seed": args.seed, "versions": versions, "command": command}
            results.append(result)
            if path is not None:
                write_json(path, result)
    print(json.dumps(results, indent=1) if args.json else table(results))


if __name__ == "__main__":
    main()
