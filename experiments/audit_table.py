"""What `audit.py` asked, as one table and one picture; slices of the applicants put together."""

from __future__ import annotations

import importlib.metadata
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from spd_lens.audit import Choices
from spd_lens.evaluation import bootstrap_intervals
from spd_lens.support import library_versions

OURS = "spd_lens audit"
# What has to be equal in slices of one table.
SAME = ("decomposition", "seed", "choices", "versions")


def about(decomposition: int, seed: int, choices: Choices) -> dict[str, Any]:
    """What a slice's numbers depend on, besides the applicants."""
    return {
        "decomposition": decomposition,
        "seed": seed,
        "choices": asdict(choices),
        "versions": {**library_versions(), "shap": importlib.metadata.version("shap")},
    }


def merged(slices: Sequence[Path]) -> dict[str, Any]:
    """Slices of the same run as one, in the order of the applicants.

    Raises ValueError for slices of other settings or versions, for applicants asked twice, and for gaps between them.
    """
    if not slices:
        raise ValueError("there are no slices to merge; run `audit.py slice --cases A:B --slices DIR` first")
    found = [json.loads(path.read_text()) for path in slices]
    for path, own in zip(slices, found, strict=True):
        odd = [name for name in SAME if own[name] != found[0][name]]
        if odd:
            raise ValueError(f"{path} has another {odd[0]} than {slices[0]}; merge slices of one run")
    asked = sorted((one for own in found for one in own["asked"]), key=lambda one: one["applicant"])
    numbers = [one["applicant"] for one in asked]
    if not numbers:
        raise ValueError(f"{slices[0]} and the others hold no applicant yet")
    if len(set(numbers)) < len(numbers):
        twice = next(a for a, b in pairwise(numbers) if a == b)
        raise ValueError(f"applicant {twice} stands in two slices")
    missing = sorted(set(range(numbers[0], numbers[-1] + 1)) - set(numbers))
    if missing:
        raise ValueError(f"applicants {missing[:10]} are missing between {numbers[0]} and {numbers[-1]}")
    return {**{name: found[0][name] for name in SAME}, "asked": asked}


def table(whole: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that was found, as it goes into the file."""
    asked, decomposition, seed = whole["asked"], whole["decomposition"], whole["seed"]
    methods = {
        name: summary_of([one["rows"][name] for one in asked], sum(one["cpu_seconds"][name] for one in asked))
        for name in asked[0]["rows"]
    }
    ours = methods.pop(OURS)
    first, last = asked[0]["applicant"], asked[-1]["applicant"]
    return {
        "command": (
            f"python experiments/audit.py --json --seed {seed} --decomposition {decomposition} "
            f"--cases {first}:{last + 1}"
        ),
        "versions": whole["versions"],
        "seed": seed,
        "decomposition_seed": decomposition,
        "choices": whole["choices"],
        "cases": len(asked),
        **ours,
        "adds_up": sum(one["adds_up"] for one in asked),
        "mean_explained": sum(one["explained"] for one in asked) / len(asked),
        "cases_with_a_necessary_reason": sum(one["necessary"] for one in asked),
        "withheld": dict(sorted(Counter(why for one in asked for why in one["withheld"]).items())),
        "baselines": methods,
    }


def share_with_interval(per_case: list[list[bool]], seed: int = 0) -> dict[str, Any]:
    """The share of true, with a bootstrap interval over applicants."""
    total = sum(map(len, per_case))
    if not total:
        return {"share": None, "low": None, "high": None, "n": 0}
    sums, counts = [float(sum(case)) for case in per_case], [float(len(case)) for case in per_case]
    (interval,) = bootstrap_intervals([(sums, counts)], seed=seed)
    low, high = interval if interval is not None else (None, None)
    return {"share": sum(sums) / total, "low": low, "high": high, "n": total}


def summary_of(per_case: list[list[dict[str, Any]]], cpu_seconds: float) -> dict[str, Any]:
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
        "cpu_seconds": round(cpu_seconds, 1),
    }


def _correlation(pairs: list[tuple[float, float]]) -> float | None:
    return float(torch.corrcoef(torch.tensor(pairs).T)[0, 1]) if len(pairs) > 1 else None


def picture(found: Mapping[str, Any], path: Path) -> None:
    """The three shares of every method, with intervals over applicants."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    methods = {OURS: found, **found["baselines"]}
    titles = {"verified": "verified on a fresh seed", "survives": "survives PGD 20", "agrees": "counterfactual agrees"}
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.9), sharey=True, constrained_layout=True)
    for ax, (key, title) in zip(axes, titles.items(), strict=True):
        for y, (name, row) in enumerate(reversed(methods.items())):
            own = row["intervals"][key]
            if own["share"] is None:
                continue
            colour = "#b2472f" if name == OURS else "#8b929c"
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
