"""How honest audits are: reasons of 100 held-out applicants, ours and those of three usual methods, judged alike.

    python experiments/audit.py --json            # 100 applicants; writes results/audit/summary.json and the picture
    python experiments/audit.py --cases 10        # a look

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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from spd_lens.audit import AuditReport, Cases, Choices, Judged, explain, judge_places
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
N_REASONS, SMALLEST, IG_STEPS = 4, 0.02, 32
Claims = dict[int, float]


@dataclass(frozen=True)
class Asked:
    """One applicant: tokens `[21]`, the sign of the decision's margin, and the control cases `[n 21]` of the audit."""

    tokens: Tensor
    sign: float
    controls: Tensor


def margin_of(model: Any, tokens: Tensor, sign: float) -> Tensor:
    """The decision's margin for every row."""
    logits = model(tokens)[:, -1]
    return sign * (logits[:, 1] - logits[:, 0])


def largest(scores: Tensor, margin: float) -> Claims:
    """At most four of each sign, none below the share of the margin that an audit looks at."""
    order = scores.abs().argsort(descending=True).tolist()
    large = [p for p in order if abs(float(scores[p])) >= SMALLEST * abs(margin)]
    kept = [[p for p in large if (float(scores[p]) > 0) == side][:N_REASONS] for side in (True, False)]
    return {p: float(scores[p]) for p in [*kept[0], *kept[1]]}


def embedding_gradients(model: Any, tokens: Tensor, sign: float, embedding: Tensor) -> Tensor:
    """d margin / d embedding for rows whose embeddings are given."""
    leaf = embedding.clone().requires_grad_(True)
    hooks = [("hook_embed", lambda value, hook: leaf)]
    total = sign * model.run_with_hooks(tokens, fwd_hooks=hooks)[:, -1]
    return torch.autograd.grad((total[:, 1] - total[:, 0]).sum(), leaf)[0]


def embeddings(model: Any, tokens: Tensor) -> Tensor:
    """What `hook_embed` gives."""
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter="hook_embed")
    return cache["hook_embed"]


def gradient_x_input(model: Any, asked: Asked) -> Tensor:
    own = embeddings(model, asked.tokens[None])
    return (embedding_gradients(model, asked.tokens[None], asked.sign, own) * own).sum(-1)[0]


def integrated_gradients(model: Any, asked: Asked) -> Tensor:
    own = embeddings(model, asked.tokens[None])
    base = embeddings(model, asked.controls).mean(0, keepdim=True)
    at = (torch.arange(IG_STEPS) + 0.5) / IG_STEPS
    path = base + at[:, None, None] * (own - base)
    rows = asked.tokens.expand(IG_STEPS, -1)
    return (embedding_gradients(model, rows, asked.sign, path).mean(0) * (own - base)[0]).sum(-1)


def shap_values(model: Any, asked: Asked, seed: int) -> Tensor:
    import shap

    n_places = len(asked.tokens) - 1

    def margin(rows: Any) -> Any:
        tokens = torch.cat([torch.as_tensor(rows).long(), asked.tokens[-1:].expand(len(rows), 1)], dim=1)
        with torch.no_grad():
            return margin_of(model, tokens, asked.sign).numpy()

    maskers: Any = shap.maskers  # pyright: ignore[reportAttributeAccessIssue]
    masker = maskers.Independent(asked.controls[:, :-1].numpy(), max_samples=len(asked.controls))
    explainer = shap.explainers.Permutation(margin, masker, seed=seed)
    found: Any = explainer(asked.tokens[None, :-1].numpy(), max_evals=4 * (2 * n_places + 1), silent=True)
    return torch.tensor(found.values[0], dtype=torch.float32)


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


class Tally:
    """What was found so far, over applicants."""

    def __init__(self, seed: int, decomposition_seed: int) -> None:
        self.seed, self.decomposition_seed = seed, decomposition_seed
        self.rows: dict[str, list[list[dict[str, Any]]]] = {}
        self.seconds: dict[str, float] = {}
        self.adds_up = self.necessary = 0
        self.explained: list[float] = []

    def add_report(self, report: AuditReport) -> None:
        """Keep what is reported of whole reports."""
        self.adds_up += report.adds_up()
        self.necessary += any(r.flips for r in report.reasons_for)
        self.explained.append(report.coverage.explained)

    def add(self, name: str, judged: list[dict[str, Any]], seconds: float) -> None:
        """One method's reasons for one applicant."""
        self.rows.setdefault(name, []).append(judged)
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def found(self) -> dict[str, Any]:
        """The table, as it goes into the file."""
        n_cases = len(self.explained)
        table = {name: summary_of(per_case, self.seconds[name]) for name, per_case in self.rows.items()}
        ours = table.pop("spd_lens audit")
        return {
            "command": f"python experiments/audit.py --json --cases {n_cases} --seed {self.seed} "
            f"--decomposition {self.decomposition_seed}",
            "versions": {**library_versions(), "shap": importlib.metadata.version("shap")},
            "seed": self.seed,
            "decomposition_seed": self.decomposition_seed,
            "budget": vars(Choices().budget),
            "cases": n_cases,
            **ours,
            "adds_up": self.adds_up,
            "mean_explained": sum(self.explained) / n_cases,
            "cases_with_a_necessary_reason": self.necessary,
            "baselines": table,
        }


def run(n_cases: int, seed: int, decomposition_seed: int, out: Path) -> dict[str, Any]:
    """All methods on the first `n_cases` held-out applicants; the table is written every twenty."""
    decomposition: Decomposition = load_credit(decomposed=True, seed=decomposition_seed)
    model: Any = load_credit(host="hooked")
    cases, asked = Cases(**credit_cases()), load_credit_applicants("held_out")
    margins = decline_margin(model, asked.tokens)
    others: dict[str, Callable[[Any, Asked], Tensor]] = {
        "gradient x input": gradient_x_input,
        "integrated gradients": integrated_gradients,
        "SHAP": lambda model, one: shap_values(model, one, seed),
    }
    tally = Tally(seed, decomposition_seed)
    for i in tqdm(range(n_cases), desc="applicants"):
        sign, margin = (1.0 if margins[i] > 0 else -1.0), abs(float(margins[i]))
        decision = CREDIT_DECISIONS[int(margins[i] > 0)]
        started = time.perf_counter()
        report = explain(decomposition, asked.tokens[i], decision, cases=cases, seed=seed)
        spent = time.perf_counter() - started
        tally.add_report(report)
        judged = judge_places(decomposition, asked.tokens[i], decision, cases=cases, seed=seed + 1_000)
        ours = {r.place.position: r.effect for r in report.reasons}
        tally.add("spd_lens audit", judged_claims(judged, ours), spent)
        scores = torch.zeros(len(CREDIT_ATTRIBUTES))
        for x in [*report.reasons, *report.withheld]:
            scores[x.place.position] = x.effect
        tally.add("effects, unchecked", judged_claims(judged, largest(scores, margin)), spent)
        one = Asked(asked.tokens[i], sign, cases.tokens[report.settings.control_cases])
        for name, method in others.items():
            started = time.perf_counter()
            claims = largest(method(model, one)[: len(scores)], margin)
            spent = time.perf_counter() - started
            tally.add(name, judged_claims(judged, claims), spent)
            strongest = dict(sorted(claims.items(), key=lambda item: -abs(item[1]))[: len(ours)])
            tally.add(f"{name}, as few", judged_claims(judged, strongest), spent)
        if (i + 1) % 20 == 0 or i + 1 == n_cases:
            write_json(out / f"summary-{decomposition_seed}.json", tally.found())
    return tally.found()


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
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--decomposition", type=int, default=0, help="seed of the shipped decomposition")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--json", action="store_true", help="print the whole result")
    args = parser.parse_args()
    found = run(args.cases, args.seed, args.decomposition, args.out)
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
