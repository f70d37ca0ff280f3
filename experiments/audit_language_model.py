"""One decision of the tiny language model, audited like a loan: which words made it choose its next token?

    python experiments/audit_language_model.py --json     # writes results/audit/tiny_lm.json, the report and its page

Prompts are windows of 12 tokens of the held-out chapters of Moby Dick, the cases 200 windows of the training chapters.
The first prompts are audited at which the model is sure (its margin over the second token is above 1). A place is a
word; its cells are the subcomponents of all twelve matrices that are used there, at the last position those alone
that fewer than half of the control cases use. The report is verified on its own seed and on a fresh one.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from spd_lens import pack_tokens
from spd_lens.audit import Budget, Cases, Choices, audit_page, explain, verify
from spd_lens.models import load_moby_dick, load_tiny_lm
from spd_lens.support import library_versions, write_json

RESULTS = Path(__file__).resolve().parent / "results" / "audit"
CONTEXT, N_CASES, SURE = 12, 200, 1.0


def run(n: int, out: Path, seed: int) -> dict[str, Any]:
    """Audit `n` prompts; the first one's report and page are written."""
    decomposition: Any = load_tiny_lm(decomposed=True)
    model, tokenizer = decomposition.model, decomposition.model.tokenizer
    held_out, training = (
        pack_tokens([load_moby_dick(split)], tokenizer, CONTEXT, prepend_bos=True) for split in ("held_out", "train")
    )
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(seed))[:N_CASES]
    vocabulary = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    vocabulary += [""] * (decomposition.host.vocabulary_size() - len(vocabulary))
    cases = Cases(training[order], vocabulary)
    with torch.no_grad():
        top = model(held_out[:400])[:, -1].topk(2)
    sure = (top.values[:, 0] - top.values[:, 1] > SURE).nonzero().squeeze(1).tolist()[:n]
    choices = Choices(n_controls=8, n_draws=32, budget=Budget(steps=20, starts=1))
    rows = []
    for i, row in enumerate(sure):
        chosen = int(top.indices[row, 0])
        started = time.perf_counter()
        title = f"Why {vocabulary[chosen]!r} after {tokenizer.decode(held_out[row, 1:])!r}?"
        places = list(range(1, CONTEXT))
        report = explain(
            decomposition,
            held_out[row],
            chosen,
            cases=cases,
            reasons_at=places,
            choices=choices,
            title=title,
            seed=seed,
        )
        if i == 0:
            report.save(out / "tiny_lm_report.json")
            audit_page(report, out / "tiny_lm_report.html")
        own = verify(report, decomposition, cases=cases)
        fresh = verify(report, decomposition, cases=cases, seed=seed + 1_000)
        rows.append(
            {
                "text": tokenizer.decode(held_out[row, 1:]),
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
                "held_on_a_fresh_seed": f"{fresh.held} of {fresh.claims}",
                "seconds": round(time.perf_counter() - started, 1),
            }
        )
    return {
        "command": f"python experiments/audit_language_model.py --json --prompts {n} --seed {seed}",
        "versions": library_versions(),
        "seed": seed,
        "context": CONTEXT,
        "cases": N_CASES,
        "prompts": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--json", action="store_true", help="print the whole result")
    args = parser.parse_args()
    found = run(args.prompts, args.out, args.seed)
    write_json(args.out / "tiny_lm.json", found)
    if args.json:
        print(json.dumps(found, indent=1))
        return
    for row in found["prompts"]:
        print(f"{row['text']!r} -> {row['chosen']!r}: {row['reasons']}, rest {row['rest']:+.2f}")


if __name__ == "__main__":
    main()
