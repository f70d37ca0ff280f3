"""Decisions of language models, audited like a loan: which words made it choose its next token?

    python experiments/audit_language_model.py --json     # writes results/audit/tiny_lm.json, the report and its page
    python experiments/audit_language_model.py scan --json    # results/audit/tiny_lm_scan.json: what any word survives
    python experiments/audit_language_model.py --smollm2 DIR --json    # SmolLM2, a block decomposed by smollm2.py

Prompts are windows of 12 tokens of the held-out chapters of Moby Dick, the cases 200 windows of the training chapters.
The first prompts are audited at which the model is sure (its margin over the second token is above 1). A place is a
word; its cells are the subcomponents of all decomposed matrices that are used there, at the last position those alone
that fewer than half of the control cases use. The report is verified on its own seed and on a fresh one.

`scan` takes the prompts at which the model is surest and asks of the three words that move each decision most how large
an attack their effect survives: the smallest of 16 random masks, then adversaries of 1, 2, 5, 10 and 20 steps.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from spd_lens import Decomposition, pack_tokens
from spd_lens.audit import AuditReport, Bench, Budget, Cases, Choices, audit_page, explain, verify, worst_claims
from spd_lens.models import load_moby_dick, load_smollm2, load_tiny_lm
from spd_lens.support import library_versions, write_json

RESULTS = Path(__file__).resolve().parent / "results" / "audit"
CONTEXT, N_CASES, N_PROMPTS, SURE, N_WORDS = 12, 200, 400, 1.0, 3
# A step of next to nothing leaves random masks.
LADDER = {
    "16 random masks": Budget(steps=1, step_size=1e-9, starts=16),
    **{f"{steps} steps": Budget(steps=steps, starts=1) for steps in (1, 2, 5, 10, 20)},
}


@dataclass(frozen=True)
class Setting:
    """The model, the cases to compare with, and the prompts `[n pos]` with their two strongest next tokens.

    `first`: the first position that is a word, behind a mark of the beginning if there is one.
    """

    name: str
    first: int
    decomposition: Any
    cases: Cases
    vocabulary: list[str]
    prompts: Int[Tensor, "n pos"]
    top: Int[Tensor, "n two"]
    margins: Float[Tensor, " n"]

    def text(self, row: int) -> str:
        """The prompt without the mark of its beginning."""
        return "".join(self.vocabulary[t] for t in self.prompts[row, self.first :].tolist())

    def about(self, arguments: str, seed: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """What goes into the file: how the rows were made, and the rows."""
        given = " --smollm2 DIR" if self.name == "smollm2" else ""
        return {
            "command": f"python experiments/audit_language_model.py {arguments}{given}",
            "versions": library_versions(),
            "seed": seed,
            "sites": list(self.decomposition),
            "context": CONTEXT,
            "cases": len(self.cases.tokens),
            "prompts": rows,
        }


def setting(seed: int, smollm2: Path | None, host: Any, n_cases: int) -> Setting:
    """Windows of the held-out chapters as prompts, of the training chapters as cases.

    `smollm2`: the directory of a decomposition of SmolLM2; None: the tiny language model with its own.
    """
    decomposition: Any
    if smollm2 is None:
        name, first, n_prompts, decomposition = "tiny_lm", 1, N_PROMPTS, load_tiny_lm(decomposed=True)
    else:
        name, first, n_prompts = "smollm2", 0, N_PROMPTS // 4
        decomposition = Decomposition.from_pretrained(smollm2, load_smollm2(host=host))
    model, tokenizer = decomposition.model, decomposition.model.tokenizer
    held_out, training = (
        pack_tokens([load_moby_dick(split)], tokenizer, CONTEXT, prepend_bos=bool(first))
        for split in ("held_out", "train")
    )
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(seed))[:n_cases]
    size = decomposition.host.vocabulary_size()
    vocabulary = [tokenizer.decode([i]) for i in range(min(size, len(tokenizer)))]
    vocabulary += [""] * (size - len(vocabulary))
    with torch.no_grad():
        top = torch.cat([model(part)[:, -1] for part in held_out[:n_prompts].split(50)]).topk(2)
    margins = top.values[:, 0] - top.values[:, 1]
    cases = Cases(training[order], vocabulary)
    return Setting(name, first, decomposition, cases, vocabulary, held_out, top.indices, margins)


def run(told: Setting, choices: Choices, n: int, out: Path, seed: int, keep: bool) -> dict[str, Any]:
    """Audit `n` prompts, written after each; the first one's report and page are kept."""
    command = f"--json --prompts {n} --seed {seed}"
    settings = asdict(choices)
    decomposition, cases, vocabulary, held_out = told.decomposition, told.cases, told.vocabulary, told.prompts
    places = list(range(told.first, CONTEXT))
    asked: Any = {"cases": cases, "reasons_at": places}
    rows = []
    for i, row in enumerate((told.margins > SURE).nonzero().squeeze(1).tolist()[:n]):
        chosen = int(told.top[row, 0])
        started = time.perf_counter()
        title = f"Why {vocabulary[chosen]!r} after {told.text(row)!r}?"
        path = out / f"{told.name}_report.json"
        if keep and i == 0 and path.is_file():
            report = AuditReport.load(path)
        else:
            report = explain(decomposition, held_out[row], chosen, **asked, choices=choices, title=title, seed=seed)
        if i == 0:
            report.save(path)
            audit_page(report, out / f"{told.name}_report.html")
        own = verify(report, decomposition, **asked, standard=choices, title=title)
        fresh = verify(report, decomposition, **asked, standard=choices, seed=seed + 1_000) if report.reasons else own
        rows.append(
            {
                "text": told.text(row),
                "chosen": vocabulary[chosen],
                "other": report.decision.other_name,
                "margin": report.decision.margin,
                "worst_margin": report.decision.worst_margin,
                "start": report.start,
                "reasons": [[r.place.position, r.place.says, r.effect, r.worst, r.flips] for r in report.reasons],
                "withheld": [[w.place.position, w.place.says, w.effect, w.why] for w in report.withheld],
                "rest": report.rest.value,
                "adds_up": report.adds_up(),
                "verified": bool(own),
                "disagreements": list(own.disagreements),
                "held_on_a_fresh_seed": f"{fresh.held} of {fresh.claims}",
                "seconds": round(time.perf_counter() - started, 1),
            }
        )
        write_json(out / f"{told.name}.json", {**told.about(command, seed, rows), "choices": settings})
    return {**told.about(command, seed, rows), "choices": settings}


@torch.no_grad()
def scan(told: Setting, n: int, seed: int) -> dict[str, Any]:
    """What the strongest words of the `n` surest prompts survive."""
    rows = []
    for row in told.margins.argsort(descending=True, stable=True).tolist()[:n]:
        chosen = int(told.top[row, 0])
        choices = Choices(n_controls=8, n_draws=32)
        places = range(told.first, CONTEXT)
        bench = Bench(told.decomposition, told.prompts[row], chosen, told.cases, None, places, choices, seed)
        effects = bench.effects().mean(1)
        strongest = effects.abs().argsort(descending=True, stable=True).tolist()[:N_WORDS]
        claims = [(bench.found[i].cells, float(effects[i])) for i in strongest]
        ladder = {
            name: worst_claims(bench.trials, bench.own.importances, claims, bench.means, budget, bench.generator)
            for name, budget in LADDER.items()
        }
        words = [
            {
                "word": told.vocabulary[bench.ids[bench.found[i].position]],
                "effect": float(effects[i]),
                "smallest": {name: found[k] for name, found in ladder.items()},
            }
            for k, i in enumerate(strongest)
        ]
        margin = {name: found[-1] for name, found in ladder.items()}
        rows.append(
            {
                "text": told.text(row),
                "chosen": told.vocabulary[chosen],
                "margin": bench.margin,
                "smallest_margin": margin,
                "words": words,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    first = [word for row in rows for word in row["words"][:1]]
    return {
        **told.about(f"scan --json --prompts {n} --seed {seed}", seed, rows),
        "strongest_word_survives": {name: sum(w["smallest"][name] > 0 for w in first) for name in LADDER},
        "margin_survives": {name: sum(r["smallest_margin"][name] > 0 for r in rows) for name in LADDER},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["audit", "scan"], nargs="?", default="audit")
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=N_CASES, help="windows to compare with")
    parser.add_argument("--controls", type=int, default=8)
    parser.add_argument("--draws", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20, help="of the adversary")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--json", action="store_true", help="print the whole result")
    parser.add_argument("--smollm2", type=Path, help="directory of a decomposition of SmolLM2 (smollm2.py makes them)")
    parser.add_argument("--keep", action="store_true", help="the first prompt's report is there: only verify it")
    parser.add_argument("--host", choices=["hooked", "bridge"], default="bridge", help="of SmolLM2")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    told = setting(args.seed, args.smollm2, args.host, args.cases)
    if args.command == "scan":
        found = scan(told, args.prompts, args.seed)
        write_json(args.out / f"{told.name}_scan.json", found)
    else:
        choices = Choices(n_controls=args.controls, n_draws=args.draws, budget=Budget(steps=args.steps, starts=1))
        found = run(told, choices, args.prompts, args.out, args.seed, args.keep)
    if args.json:
        print(json.dumps(found, indent=1))
        return
    for row in found["prompts"]:
        told_of = row["words"] if args.command == "scan" else row["reasons"]
        print(f"{row['text']!r} -> {row['chosen']!r}: {told_of}")


if __name__ == "__main__":
    main()
