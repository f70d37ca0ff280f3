"""The sweep over the tiny language model, from what its runs left in `experiments/results/language_model`.

    python experiments/language_model_results.py                       # table and picture
    python experiments/language_model_results.py compare RUN_A RUN_B   # MMCS of two seeds' saves, with controls

Every run is a folder with the `log.jsonl` of its training and the `evaluation.json` of its end. The folder's name says
coefficient and seed; `C0.5` and `C2`: C at half and twice the recommended; `gate256`: gates twice as wide; `svd` and
`random`: gates alone on such directions; `batch`: gone on with from seed 0 under an adversary with one source for the
whole batch, learning rate .01 or .05.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from experiments.language_model import text_windows
from spd_lens import Decomposition
from spd_lens.evaluation import EvaluationReport, compare, pareto
from spd_lens.models import load_tiny_lm
from spd_lens.support import format_table, library_versions

RESULTS = Path(__file__).parent / "results" / "language_model"
FIXED = {"singular vectors": "svd", "random subcomponents": "random"}


def reports() -> dict[str, EvaluationReport]:
    """Every run's evaluation, by the run's name, sparsest last."""
    found = {
        path.parent.name: EvaluationReport.from_json(json.loads(path.read_text())["report"])
        for path in RESULTS.glob("*/evaluation.json")
    }
    return dict(sorted(found.items(), key=lambda item: -item[1].l0))


def aims_met(report: EvaluationReport) -> int:
    """How many of five: CE recovered at least 90 %, PGD 20 at most three times random masks, L0 at most 5 % of C, KL
    without delta under .01, and deleting what is never needed costs at most what random masks do."""
    v = report.log_values()
    stochastic = v["kl_stochastic"]
    return sum(
        [
            v["ce_recovered"] >= 0.9,
            v["kl_pgd20"] <= 3 * stochastic,
            v["l0"] <= 0.05 * v["c_total"],
            v["kl_no_delta"] < 0.01,
            v["kl_deletion"] <= stochastic,
        ]
    )


def table(found: dict[str, EvaluationReport]) -> str:
    """One line a run."""
    header = [
        "run",
        "L0",
        "alive",
        "all off",
        "stochastic",
        "PGD 20",
        "PGD 80",
        "no delta",
        "CE rec.",
        "deletion",
        "holds",
        "aims",
    ]
    rows = []
    for name, report in found.items():
        v = report.log_values()
        times = v["kl_pgd20"] / v["kl_stochastic"]
        rows.append(
            [
                name,
                f"{v['l0']:.0f}",
                f"{v['alive']:,.0f}",
                f"{v['kl_all_off']:.2f}",
                f"{v['kl_stochastic']:.3f}",
                f"{v['kl_pgd20']:.2f} ({times:.1f} x)",
                f"{v.get('kl_pgd80', float('nan')):.2f}",
                f"{v['kl_no_delta']:.1e}",
                f"{v['ce_recovered']:.1%}",
                f"{v['kl_deletion']:.4f}",
                "yes" if report.verdict.holds else "no",
                f"{aims_met(report)} of 5",
            ]
        )
    return format_table(header, rows)


def picture(found: dict[str, EvaluationReport]) -> Path:
    """The sweep as a Pareto picture, both seeds, with what else was trained."""
    groups: dict[str, list[EvaluationReport]] = {"SPD, seed 0": [], "SPD, seed 1": []}
    for name, report in found.items():
        own = name.split("-")[-1]
        if own in ("s0", "s1"):
            groups[f"SPD, seed {own[1]}"].append(report)
        for title, mark in FIXED.items():
            if own == mark:
                groups.setdefault(title, []).append(report)
    return pareto(groups).save(RESULTS / "pareto.png")


def comparison(a: Path, b: Path) -> dict[str, Any]:
    """MMCS of two saves over what is alive on the held-out chapters."""
    one, other = (Decomposition.from_pretrained(path, load_tiny_lm()) for path in (a, b))
    result = compare(one, other, list(text_windows("held_out")[:64].split(16)))
    print(result, file=sys.stderr)
    values = result.to_json()
    for site in values["sites"].values():
        del site["pairs"]
    return {"runs": [a.name, b.name], "versions": library_versions(), **values}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command")
    comparing = commands.add_parser("compare", help="two saves")
    comparing.add_argument("a", type=Path)
    comparing.add_argument("b", type=Path)
    args = parser.parse_args()
    if args.command == "compare":
        print(json.dumps(comparison(args.a, args.b), indent=1))
        return
    found = reports()
    print(table(found))
    print(picture(found))


if __name__ == "__main__":
    main()
