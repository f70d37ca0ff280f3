"""How honest audits are: reasons of 100 held-out applicants, ours and those of three usual methods, judged alike.

    python experiments/audit.py --json            # 100 applicants; writes results/audit/summary-0.json and the picture
    python experiments/audit.py --cases 10        # a look
    python experiments/audit.py --json --keep RUN # a killed run goes on where it was

The applicants are held-out numbers 100 to 199: nothing in model, decompositions or audit was chosen on them.

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
import importlib.metadata
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from experiments.attributions import Asked, gradient_x_input, integrated_gradients, shap_values
from spd_lens.audit import Cases, Choices, Judged, explain, judge_places
from spd_lens.core import Decomposition
from spd_lens.evaluation import bootstrap_intervals
from spd_lens.models import (
    CREDIT_ATTRIBUTES,
    CREDIT_DECISIONS,
    credit_cases,
    decline_margin,
    load_credit,
    load_credit_applicants,
)
from spd_lens.support import library_versions, tqdm, write_json

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


def share_with_interval(per_case: list[list[bool]], seed: int = 0) -> dict[str, Any]:
    """The share of true, with a bootstrap interval over applicants."""
    total = sum(map(len, per_case))
    if not total:
        return {"share": None, "low": None, "high": None, "n": 0}
    sums, counts = [float(sum(case)) for case in per_case], [float(len(case)) for case in per_case]
    (interval,) = bootstrap_intervals([(sums, counts)], seed=seed)
    low, high = interval if interval is not None else (None, None)
    return {"share": sum(sums) / total, "low": low, "high": high, "n": total}


def summary_of(per_case: list[list[dict[str, Any]]], seconds: float) -> dict[str, Any]:
    """The row of one method in the table."""

    def share(name: str) -> dict[str, Any]:
        return share_with_interval([[bool(r[name]) for r in case if r[name] is not None] for case in per_case])

    pairs = [(r["claimed"], r["measured"]) for case in per_case for r in case if r["measured"] is not None]
    return {
        "reasons": sum(map(len, per_case)),
        "reasons_per_case": sum(map(len, per_case)) / max(1, len(per_case)),
        "cases_without_any": sum(not case for case in per_case),
        "verified_share": share("verified")["share"],
        "survive_pgd20_share": share("survives")["share"],
        "counterfactual_agreement": share("agrees")["share"],
        "intervals": {name: share(name) for name in ("verified", "survives", "agrees")},
        "correlation_with_counterfactual": _correlation(pairs),
        "seconds": round(seconds, 1),
    }


def _correlation(pairs: list[tuple[float, float]]) -> float | None:
    return float(torch.corrcoef(torch.tensor(pairs).T)[0, 1]) if len(pairs) > 1 else None


@dataclass(frozen=True)
class Asker:
    """What every applicant is asked with."""

    decomposition: Decomposition
    model: Any
    cases: Cases
    seed: int

    def ask(self, tokens: Tensor, margin: float) -> dict[str, Any]:
        """All methods on one applicant: `rows` of judged claims and `seconds` by method, and what the report says."""
        sign, decision = (1.0 if margin > 0 else -1.0), CREDIT_DECISIONS[int(margin > 0)]
        started = time.perf_counter()
        report = explain(self.decomposition, tokens, decision, cases=self.cases, seed=self.seed)
        spent = time.perf_counter() - started
        fresh = self.seed + FRESH
        judged = judge_places(self.decomposition, tokens, decision, cases=self.cases, seed=fresh)
        ours = {r.place.position: r.effect for r in report.reasons}
        scores = torch.zeros(len(CREDIT_ATTRIBUTES))
        for x in [*report.reasons, *report.withheld]:
            scores[x.place.position] = x.effect
        rows = {
            "spd_lens audit": judged_claims(judged, ours),
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
            started = time.perf_counter()
            claims = largest(method(self.model, one)[: len(scores)], abs(margin))
            seconds[name] = seconds[f"{name}, as few"] = time.perf_counter() - started
            strongest = dict(sorted(claims.items(), key=lambda item: -abs(item[1]))[: len(ours)])
            rows[name] = judged_claims(judged, claims)
            rows[f"{name}, as few"] = judged_claims(judged, strongest)
        return {
            "rows": rows,
            "seconds": seconds,
            "adds_up": report.adds_up(),
            "necessary": any(r.flips for r in report.reasons_for),
            "explained": report.coverage.explained,
            "withheld": [w.why for w in report.withheld],
        }


def table(asked: list[dict[str, Any]], command: str, seed: int, decomposition_seed: int) -> dict[str, Any]:
    """Everything that was found, as it goes into the file."""
    methods = {
        name: summary_of([one["rows"][name] for one in asked], sum(one["seconds"][name] for one in asked))
        for name in asked[0]["rows"]
    }
    ours = methods.pop("spd_lens audit")
    return {
        "command": f"{command} --cases {len(asked)}",
        "versions": {**library_versions(), "shap": importlib.metadata.version("shap")},
        "seed": seed,
        "decomposition_seed": decomposition_seed,
        "budget": vars(Choices().budget),
        "cases": len(asked),
        **ours,
        "adds_up": sum(one["adds_up"] for one in asked),
        "mean_explained": sum(one["explained"] for one in asked) / len(asked),
        "cases_with_a_necessary_reason": sum(one["necessary"] for one in asked),
        "withheld": Counter(why for one in asked for why in one["withheld"]),
        "baselines": methods,
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All methods on the chosen held-out applicants; the table is written every ten."""
    seed, out = args.seed, args.out
    asker = Asker(
        load_credit(decomposed=True, seed=args.decomposition), load_credit(host="hooked"), Cases(**credit_cases()), seed
    )
    tokens = load_credit_applicants("held_out").tokens[args.first : args.first + args.cases]
    margins = decline_margin(asker.model, tokens).tolist()
    command = (
        f"python experiments/audit.py --json --seed {seed} --decomposition {args.decomposition} --first {args.first}"
    )
    kept = None if args.keep is None else args.keep / f"audit-{args.decomposition}-{args.first}-{seed}.json"
    asked: list[dict[str, Any]] = json.loads(kept.read_text())["asked"] if kept is not None and kept.is_file() else []
    for i in tqdm(range(len(asked), len(tokens)), desc="applicants"):
        asked.append(asker.ask(tokens[i], margins[i]))
        if kept is not None:
            write_json(kept, {"asked": asked})
        if (i + 1) % 10 == 0:
            write_json(out / f"summary-{args.decomposition}.json", table(asked, command, seed, args.decomposition))
    found = table(asked[: len(tokens)], command, seed, args.decomposition)
    write_json(out / f"summary-{args.decomposition}.json", found)
    return found


def picture(found: Mapping[str, Any], path: Path) -> None:
    """The three shares of every method, with intervals over applicants."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    methods = {"spd_lens audit": found, **found["baselines"]}
    titles = {"verified": "verified on a fresh seed", "survives": "survives PGD 20", "agrees": "counterfactual agrees"}
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.9), sharey=True, constrained_layout=True)
    for ax, (key, title) in zip(axes, titles.items(), strict=True):
        for y, (name, row) in enumerate(reversed(methods.items())):
            own = row["intervals"][key]
            if own["share"] is None:
                continue
            colour = "#b2472f" if name == "spd_lens audit" else "#8b929c"
            ax.barh(y, own["share"], color=colour)
            if own["low"] is not None:
                ax.plot([own["low"], own["high"]], [y, y], color="black", lw=1)
            ax.text(0.02, y, f"{own['share']:.0%} of {own['n']}", va="center", fontsize=8, color="white")
        ax.set_title(title, fontsize=10)
        ax.set_xlim(0, 1)
        ax.set_yticks(range(len(methods)), list(reversed(methods)), fontsize=9)
    figure.suptitle(f"Reasons for decisions on {found['cases']} held-out applicants", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=100, help="number of the first held-out applicant")
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--decomposition", type=int, default=0, help="seed of the shipped decomposition")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--keep", type=Path, help="directory of what was asked so far; a killed run goes on from there")
    parser.add_argument("--json", action="store_true", help="print the whole result")
    args = parser.parse_args()
    found = run(args)
    picture(found, args.out / f"methods-{args.decomposition}.png")
    if args.json:
        print(json.dumps(found, indent=1))
        return
    for name, row in {"spd_lens audit": found, **found["baselines"]}.items():
        shares = [row[k] for k in ("verified_share", "survive_pgd20_share", "counterfactual_agreement")]
        shown = "  ".join("   -" if s is None else f"{s:5.1%}" for s in shares)
        print(f"{name:24} {row['reasons']:4} reasons  {shown}")


if __name__ == "__main__":
    main()
