"""Circuits of the shipped decomposition of the tiny language model, against an adversary and on fresh prompts.

    python experiments/language_model_circuits.py accuracy           what the model can do: seconds
    python experiments/language_model_circuits.py agreement --json   also quotes; minutes

- **agreement**: " but the whales" -> " were", " are", " have". Corrupted: the noun in the other number. Found on some
  beginnings and nouns, held on others of both.
- **quotes**: 24 tokens of the book in which a quotation begins; right: it is closed with the next punctuation mark
  (`."` and its like), wrong: the mark alone. Corrupted: a line break in place of the opening quote. Found on the
  training chapters, held on the held-out ones.
- **induction**: random tokens, repeated. Only its accuracy: the model does not do it.

The honest circuit is searched for under random masks and an adversary, the naive one with masks of importance alone;
both are measured on prompts that they were not found on (`check_circuit`: two starts). Beside them: how many
subcomponents, heads and MLPs, heads and neurons reach the same faithfulness, ranked by attribution, left out at the
corrupted prompt's values.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from experiments.circuits import MASKS, numbers
from spd_lens import Decomposition
from spd_lens.circuits import (
    HeadAndNeuronParts,
    check_circuit,
    compare_parts,
    faithfulness_curve,
    find_circuit,
    smallest_size,
)
from spd_lens.models import load_moby_dick, load_tiny_lm
from spd_lens.objective import PGD
from spd_lens.support import library_versions, write_json
from spd_lens.tasks import Task, induction_task, pair_task

# Singular and plural are single tokens; the second list is for fresh prompts.
NOUNS = (
    [("whale", "whales"), ("ship", "ships"), ("day", "days"), ("hand", "hands"), ("year", "years"), ("man", "men")],
    [("thing", "things"), ("time", "times"), ("vessel", "vessels"), ("nation", "nations"), ("land", "lands")],
)
BEGINNINGS = ((" and the", " but the", " for the", " when the"), (" that the", " as the", " if the"))
VERBS = ([" was", " is", " has"], [" were", " are", " have"])
CLOSED, OPEN = ('!"', '."', '?"', ',"'), ("!", ".", "?", ",")
WINDOW, LEVEL = 24, 0.9


def agreement(tokenizer: Any, fresh: bool) -> Task:
    """Every beginning with every noun in both numbers."""
    clean, corrupted, answers, wrong = [], [], [], []
    for beginning in BEGINNINGS[fresh]:
        for noun in NOUNS[fresh]:
            for number in range(2):
                clean.append(f"{beginning} {noun[number]}")
                corrupted.append(f"{beginning} {noun[1 - number]}")
                answers.append(VERBS[number])
                wrong.append(VERBS[1 - number])
    return pair_task(tokenizer, clean, corrupted, answers, wrong, prepend_bos=True, name="agreement")


def quotes(tokenizer: Any, fresh: bool, n: int = 48) -> Task:
    """Windows of the book between an opening quote and the mark that closes it."""
    text = torch.tensor(tokenizer(load_moby_dick("held_out" if fresh else "train"))["input_ids"])
    ids = {tokenizer.decode([i]): i for i in range(tokenizer.vocab_size)}
    closed, marks = ([ids[token] for token in tokens] for tokens in (CLOSED, OPEN))
    any_quote = torch.tensor([i for token, i in ids.items() if '"' in token])
    is_quote = torch.isin(text, any_quote)
    rows, places = [], []
    for end in torch.isin(text, torch.tensor(closed)).nonzero().flatten().tolist():
        inside = is_quote[end - WINDOW : end].nonzero().flatten().tolist() if end >= WINDOW else []
        if len(inside) == 1 and inside[0] < WINDOW - 3 and int(text[end - WINDOW + inside[0]]) == ids['"']:
            rows.append(text[end - WINDOW : end])
            places.append(inside[0])
    clean = torch.stack(rows[:n])
    corrupted = clean.clone()
    corrupted[torch.arange(len(clean)), torch.tensor(places[:n])] = ids["\n"]
    bos = torch.full((len(clean), 1), tokenizer.bos_token_id)
    answers, wrong = (torch.tensor(tokens).expand(len(clean), -1) for tokens in (closed, marks))
    at = torch.full((len(clean),), WINDOW)
    return Task("quotes", torch.cat([bos, clean], 1), torch.cat([bos, corrupted], 1), answers, wrong, at)


TASKS = {"agreement": agreement, "quotes": quotes}


@torch.no_grad()
def accuracy(model: Any, task: Task) -> dict[str, float]:
    """How often the right answers win, on both kinds of prompts, and the mean log odds."""
    clean, corrupted = (model(tokens) for tokens in (task.clean, task.corrupted))
    above: Tensor = task.logit_difference(clean) > task.logit_difference(corrupted)
    return {
        "prompts": len(task),
        "right": float(task.correct(clean).float().mean()),
        "right_when_corrupted": float(task.correct(corrupted).float().mean()),
        "clean_above_corrupted": float(above.float().mean()),
        "log_odds": float(task.logit_difference(clean).mean()),
        "log_odds_when_corrupted": float(task.logit_difference(corrupted).mean()),
    }


def run(decomposition: Decomposition, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Both circuits of one task, and parts of other kinds at equal faithfulness."""
    tokenizer = decomposition.model.tokenizer
    task, fresh = (TASKS[name](tokenizer, fresh).to(args.device) for fresh in (False, True))
    result: dict[str, Any] = {
        "accuracy": accuracy(decomposition.model, task),
        "accuracy_fresh": accuracy(decomposition.model, fresh),
    }
    for kind, masks in MASKS.items():
        began = time.perf_counter()
        found = find_circuit(
            decomposition, task, masks=masks, steps=args.steps, lr=0.1, pgd=PGD(3, 0.4), prune_tries=12,
            minimality=args.minimality, budgets=(20,), restarts=1, seed=args.seed,
        )  # fmt: skip
        held = check_circuit(decomposition, found.circuit, fresh, budgets=(20, 80), restarts=2, seed=args.seed)
        result[kind] = {
            "found": numbers(found, None),
            "fresh": numbers(held, None),
            "by_site": {site: len(ids) for site, ids in found.circuit.ids.items()},
            "ids": found.circuit.ids,
            "seconds": round(time.perf_counter() - began, 1),
        }
        print(f"{name}, {kind}: {held}", file=sys.stderr)
    result["parts"] = beside(decomposition, task)
    return result


def beside(decomposition: Decomposition, task: Task) -> dict[str, Any]:
    """Parts and their parameters that reach the level, by kind."""
    compared = compare_parts(decomposition, task, level=LEVEL)
    found = {
        kind: {"parts": size, "parameters": compared.parameters[kind], "faithfulness": compared.faithfulness[kind]}
        for kind, size in compared.sizes.items()
    }
    neurons = HeadAndNeuronParts(decomposition, task)
    ranking = faithfulness_curve(neurons).ranking
    size, reached = smallest_size(neurons, ranking, LEVEL)
    parameters = sum(neurons.parameters[i] for i in ranking[:size])
    return found | {"heads and neurons": {"parts": size, "parameters": parameters, "faithfulness": reached}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=("accuracy", *TASKS))
    parser.add_argument("--json", action="store_true", help="print the JSON object (also the default)")
    parser.add_argument("--steps", type=int, default=300, help="of each search")
    parser.add_argument("--minimality", type=float, default=1e-3, help="share of everything off that a node is worth")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if args.name == "accuracy":
        model = load_tiny_lm(args.device)
        tokenizer: Any = model.tokenizer
        tasks = {f"{n}{', fresh' if f else ''}": TASKS[n](tokenizer, f) for n in TASKS for f in (False, True)}
        tasks["induction"] = induction_task(tokenizer, 64, length=8, bos=tokenizer.bos_token_id, seed=args.seed)
        result: dict[str, Any] = {name: accuracy(model, task.to(args.device)) for name, task in tasks.items()}
    else:
        result = run(load_tiny_lm(args.device, decomposed=True), args.name, args)
    name = args.device if args.device == "cpu" else torch.cuda.get_device_name(args.device)
    command = " ".join(["python", "experiments/language_model_circuits.py", *sys.argv[1:]])
    result |= {"seed": args.seed, "device": name, "versions": library_versions(), "command": command}
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
