"""How honest audits are: reasons of 100 held-out applicants, ours and those of three usual methods, judged alike.

    python experiments/audit.py --json                  # 100 applicants; results/audit/summary-0.json and its picture
    python experiments/audit.py --cases 100:110 --out runs/look   # a look
    python experiments/audit.py slice --cases 100:110     # a part, in runs/audit_slices: run several at once
    python experiments/audit.py merge --json              # the table of all parts

A killed run goes on where it was. The applicants are held-out numbers 100 to 199: nothing in model,
decompositions or audit was chosen on them.

Every method names at most four reasons for the model's decision on each applicant and four against it, each a place
(an attribute) with a direction. Ours are those of `spd_lens.audit.explain`, which gives fewer where its checks fail;
"effects, unchecked" are the largest replacement effects without the checks. The others, gradient x input, integrated
gradients (from the mean embedding of the control cases) and SHAP (permutations, the control cases as background), name
the largest attributions; "as few" are the strongest of these, as many as ours for the same applicant. All are judged on
a seed that none of them has seen, by the same interventions:

- verified: giving the place's subcomponents the activations of other control cases moves the margin in the claimed
  direction, and further than random subcomponents of equal use do;
- survives PGD 20: an adversary of 20 steps within the importances does not undo that;
- counterfactual agrees: changing the attribute in the input (no decomposition needed) moves the margin as claimed.

The judge of the first two is the decomposition that ours come from; the third knows nothing of it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from experiments.attributions import Asked, gradient_x_input, integrated_gradients, shap_values
from experiments.audit_table import OURS, about, merged, picture, table
from spd_lens.audit import Cases, Choices, Judged, explain, judge_places
from spd_lens.core import Decomposition
from spd_lens.models import (
    CREDIT_ATTRIBUTES,
    CREDIT_DECISIONS,
    credit_cases,
    decline_margin,
    load_credit,
    load_credit_applicants,
)
from spd_lens.support import tqdm, write_json

RESULTS = Path(__file__).resolve().parent / "results" / "audit"
N_REASONS, SMALLEST = 4, 0.02
# What is added to the seed of the methods to get the judge's.
FRESH = 1_000
Claims = dict[int, float]


def largest(scores: Tensor, margin: float) -> Claims:
    """At most four of each sign, none below the share of the margin that an audit looks at."""
    order = scores.abs().argsort(descending=True).tolist()
    large = [p for p in order if abs(float(scores[p])) >= SMALLEST * abs(margin)]
    kept = [[p for p in large if (float(scores[p]) > 0) == side][:N_REASONS] for side in (True, False)]
    return {p: float(scores[p]) for p in [*kept[0], *kept[1]]}


def judged_claims(found: Mapping[int, Judged], claims: Claims) -> list[dict[str, Any]]:
    """For every claim the three judgements."""
    rows = []
    for position, claimed in claims.items():
        own = found.get(position)
        after = own.change if own is not None else None
        rows.append(
            {
                "position": position,
                "claimed": claimed,
                "effect": None if own is None else own.effect,
                "verified": own is not None and own.beyond_controls and own.effect * claimed > 0,
                "survives": own is not None and own.worst > 0 and own.effect * claimed > 0,
                "agrees": None if after is None else after.measured * claimed > 0,
                "measured": None if after is None else after.measured,
            }
        )
    return rows


@dataclass(frozen=True)
class Asker:
    """What every applicant is asked with."""

    decomposition: Decomposition
    model: Any
    cases: Cases
    seed: int
    choices: Choices

    def ask(self, tokens: Tensor, margin: float) -> dict[str, Any]:
        """One applicant: `rows` of judged claims and `cpu_seconds` by method, and what our report says."""
        sign, decision = (1.0 if margin > 0 else -1.0), CREDIT_DECISIONS[int(margin > 0)]
        started = time.process_time()
        report = explain(self.decomposition, tokens, decision, cases=self.cases, choices=self.choices, seed=self.seed)
        spent = time.process_time() - started
        fresh = self.seed + FRESH
        judged = judge_places(self.decomposition, tokens, decision, cases=self.cases, choices=self.choices, seed=fresh)
        ours = {r.place.position: r.effect for r in report.reasons}
        scores = torch.zeros(len(CREDIT_ATTRIBUTES))
        for x in [*report.reasons, *report.withheld]:
            scores[x.place.position] = x.effect
        rows = {
            OURS: judged_claims(judged, ours),
            "effects, unchecked": judged_claims(judged, largest(scores, abs(margin))),
        }
        seconds = dict.fromkeys(rows, spent)
        one = Asked(tokens, sign, self.cases.tokens[report.settings.control_cases])
        others: dict[str, Callable[[Any, Asked], Tensor]] = {
            "gradient x input": gradient_x_input,
            "integrated gradients": integrated_gradients,
            "SHAP": lambda model, one: shap_values(model, one, self.seed),
        }
        for name, method in others.items():
            started = time.process_time()
            claims = largest(method(self.model, one)[: len(scores)], abs(margin))
            seconds[name] = seconds[f"{name}, as few"] = time.process_time() - started
            strongest = dict(sorted(claims.items(), key=lambda item: -abs(item[1]))[: len(ours)])
            rows[name] = judged_claims(judged, claims)
            rows[f"{name}, as few"] = judged_claims(judged, strongest)
        return {
            "rows": rows,
            "cpu_seconds": seconds,
            "adds_up": report.adds_up(),
            "necessary": any(r.flips for r in report.reasons_for),
            "explained": report.coverage.explained,
            "withheld": [w.why for w in report.withheld],
        }


def applicants(text: str) -> range:
    """`"100:110"` as a range of held-out applicants. Raises ValueError for anything else."""
    n = len(load_credit_applicants("held_out"))
    parts = text.split(":")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise ValueError(f"--cases {text!r}; expected FIRST:STOP, held-out applicants of 0:{n}, for example 100:200")
    found = range(int(parts[0]), int(parts[1]))
    if not found or found.stop > n:
        raise ValueError(f"--cases {text!r}; expected FIRST below STOP, and both in 0..{n}")
    return found


def ask_slice(numbers: range, decomposition: int, seed: int, folder: Path, choices: Choices | None = None) -> Path:
    """All methods on these held-out applicants, written after each; a killed slice goes on where it was.

    What is asked of one applicant does not depend on the others.
    """
    choices = choices or Choices()
    told = about(decomposition, seed, choices)
    path = folder / f"slice-{decomposition}-{seed}-{numbers.start}-{numbers.stop}.json"
    asked: list[dict[str, Any]] = []
    if path.is_file():
        kept = json.loads(path.read_text())
        if any(kept[name] != told[name] for name in told):
            raise ValueError(f"{path} is of other settings or versions; move it away, or give another --slices")
        asked = kept["asked"]
    shipped, model = load_credit(decomposed=True, seed=decomposition), load_credit(host="hooked")
    asker = Asker(shipped, model, Cases(**credit_cases()), seed, choices)
    held_out = load_credit_applicants("held_out").tokens
    margins = decline_margin(asker.model, held_out).tolist()
    for i in tqdm(numbers[len(asked) :], desc="applicants"):
        asked.append({"applicant": i, **asker.ask(held_out[i], margins[i])})
        write_json(path, {**told, "asked": asked})
    return path


def written(slices: list[Path], out: Path) -> dict[str, Any]:
    """The table and the picture of slices; returns the table."""
    found = table(merged(slices))
    write_json(out / f"summary-{found['decomposition_seed']}.json", found)
    picture(found, out / f"methods-{found['decomposition_seed']}.png")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["all", "slice", "merge"], nargs="?", default="all")
    parser.add_argument("--cases", default="100:200", help="held-out applicants, FIRST:STOP")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--decomposition", type=int, default=0, help="seed of the shipped decomposition")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--slices", type=Path, default=Path("runs/audit_slices"), help="directory of what was asked")
    parser.add_argument("--json", action="store_true", help="print the whole result")
    args = parser.parse_args()
    if args.command == "merge":
        slices = sorted(args.slices.glob(f"slice-{args.decomposition}-{args.seed}-*.json"))
    else:
        args.slices.mkdir(parents=True, exist_ok=True)
        slices = [ask_slice(applicants(args.cases), args.decomposition, args.seed, args.slices)]
    if args.command == "slice":
        print(slices[0])
        return
    found = written(slices, args.out)
    if args.json:
        print(json.dumps(found, indent=1))
        return
    for name, row in {OURS: found, **found["baselines"]}.items():
        shares = [row[k] for k in ("verified_share", "survive_pgd20_share", "counterfactual_agreement")]
        shown = "  ".join("   -" if s is None else f"{s:5.1%}" for s in shares)
        print(f"{name:28} {row['reasons']:4} reasons  {shown}")


if __name__ == "__main__":
    main()
