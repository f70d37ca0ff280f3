"""The experiments on audits: what is planted is planted, and the committed tables say what their command prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.audit import applicants, ask_slice, judged_claims, largest
from experiments.audit_table import OURS, merged, table
from experiments.credit_table import mended
from experiments.discovery import KNOWN, MARKERS, VOCABULARY, patients, planted, rank_of, seeds_of
from experiments.discovery import table as discovery_table
from spd_lens.audit import Budget, Choices, Judged
from tests.conftest import needs_hooked

RESULTS = Path(__file__).parents[2] / "experiments" / "results" / "audit"


def test_the_planted_marker_and_the_known_risks_raise_illness_and_nothing_else_does() -> None:
    tokens, ill = patients(3)
    rates = {}
    for token, text in enumerate(VOCABULARY[:-1]):
        has = (tokens == token).any(1)
        rates[text] = float(ill[has].float().mean() - ill[~has].float().mean())
    causes = {planted(3), *KNOWN}
    assert planted(3) in MARKERS
    assert min(rates[text] for text in causes) > max(v for text, v in rates.items() if text not in causes)


def test_a_rank_is_the_place_among_markers() -> None:
    named = ["age: old", "marker B: weak", "marker B: clear", "marker A: strong"]
    assert rank_of("marker A: strong", named, values=False) == 2
    assert rank_of("marker A: strong", named, values=True) == 3
    assert rank_of("marker B: clear", named, values=False) == 1
    assert rank_of("marker C: weak", named, values=False) is None


def test_the_largest_claims_are_four_of_each_sign() -> None:
    scores = torch.tensor([0.9, -0.8, 0.7, 0.6, 0.5, 0.4, -0.01, 0.0])
    assert list(largest(scores, 1.0)) == [0, 2, 3, 4, 1]


def test_a_claim_in_the_wrong_direction_passes_nothing() -> None:
    own = Judged(position=2, effect=0.5, effects=(0.5,), controls=(-0.1, 0.1), worst=0.2, change=None)
    right, wrong = judged_claims({2: own}, {2: 1.0})[0], judged_claims({2: own}, {2: -1.0})[0]
    assert (right["verified"], right["survives"], right["agrees"]) == (True, True, None)
    assert (wrong["verified"], wrong["survives"]) == (False, False)


def test_only_the_sorted_column_is_taken_from_the_coded_table_and_the_others_have_to_agree() -> None:
    words = [{"age": a, "personal_status_and_sex": s} for a, s in (("20", "x"), ("30", "x"), ("20", "y"))]
    codes = [["1", "A93"], ["2", "A92"], ["1", "A94"]]
    rows = mended(words, codes)
    assert [row["personal_status_and_sex"] for row in rows] == [
        "male : single", "female : divorced/separated/married", "male : married/widowed",
    ]  # fmt: skip
    assert [row["age"] for row in rows] == ["20", "30", "20"]
    with pytest.raises(ValueError, match="column age differs"):
        mended(words, [["1", "A93"], ["1", "A92"], ["1", "A94"]])
    with pytest.raises(ValueError, match="3 readable rows and 2 coded ones"):
        mended(words, codes[:2])


@pytest.mark.parametrize("decomposition", [0, 1])
def test_the_committed_table_has_what_was_promised(decomposition: int) -> None:
    found = json.loads((RESULTS / f"summary-{decomposition}.json").read_text())
    assert found["command"].endswith(f"--decomposition {decomposition} --cases 100:200")
    assert found["cases"] == found["adds_up"] == 100
    for row in (found, *found["baselines"].values()):
        for name in ("reasons", "verified_share", "survive_pgd20_share", "counterfactual_agreement"):
            assert 0 <= row[name] <= (1e4 if name == "reasons" else 1)
    assert {"gradient x input", "integrated gradients", "SHAP"} <= set(found["baselines"])


def test_the_page_says_what_the_tables_say() -> None:
    page = (RESULTS.parents[2] / "docs" / "audit.md").read_text()
    for decomposition in (0, 1):
        found = json.loads((RESULTS / f"summary-{decomposition}.json").read_text())
        for name, row in {OURS: found, **found["baselines"]}.items():
            shares = [row["intervals"][key] for key in ("verified", "survives", "agrees")]
            cells = [f"{100 * s['share']:.0f} % ({100 * s['low']:.0f} to {100 * s['high']:.0f})" for s in shares]
            told = [name, str(row["reasons"]), *cells, f"{row['correlation_with_counterfactual']:.2f}"]
            assert f"| {' | '.join(told)} |" in page
    runs = json.loads((RESULTS.parent / "discovery" / "summary.json").read_text())
    assert runs["seeds"] == list(range(10))
    assert f"| {runs['success']['decomposition']} of 10 | {runs['value_first']['decomposition']} of 10 |" in page


# -- slices ----------------------------------------------------------------------------------------------------------


def slice_of(folder: Path, *numbers: int, **changes: Any) -> Path:
    path = folder / f"slice-{numbers[0]}.json"
    same = {"decomposition": 0, "seed": 0, "choices": {}, "versions": {}}
    path.write_text(json.dumps({**same, **changes, "asked": [{"applicant": n} for n in numbers]}))
    return path


def test_slices_are_merged_in_the_order_of_the_applicants(tmp_path: Path) -> None:
    whole = merged([slice_of(tmp_path, 102, 103), slice_of(tmp_path, 100, 101)])
    assert [one["applicant"] for one in whole["asked"]] == [100, 101, 102, 103]


def test_slices_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    first = slice_of(tmp_path, 100, 101)
    with pytest.raises(ValueError, match="applicant 101 stands in two slices"):
        merged([first, slice_of(tmp_path, 101, 102)])
    with pytest.raises(ValueError, match=r"applicants \[102, 103\] are missing between 100 and 104"):
        merged([first, slice_of(tmp_path, 104)])
    with pytest.raises(ValueError, match="has another decomposition than"):
        merged([first, slice_of(tmp_path, 102, decomposition=1)])
    with pytest.raises(ValueError, match="there are no slices to merge"):
        merged([])


def test_applicants_are_a_range_of_held_out_ones() -> None:
    assert applicants("100:110") == range(100, 110)
    for wrong in ("10", "110:100", "290:301", "a:b", "-1:3"):
        with pytest.raises(ValueError, match=f"--cases '{wrong}'; expected FIRST"):
            applicants(wrong)


@needs_hooked
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The set_:PendingDeprecationWarning")
def test_the_table_does_not_depend_on_the_slices(tmp_path: Path) -> None:
    """40 s: two applicants at once, and one by one, and one slice killed after its first."""
    small = Choices(n_controls=4, n_draws=16, budget=Budget(steps=2, starts=1))

    def rows(folder: str, *parts: range) -> dict[str, Any]:
        (tmp_path / folder).mkdir(exist_ok=True)
        paths = [ask_slice(part, 0, 0, tmp_path / folder, small) for part in parts]
        whole = merged(paths)
        for one in whole["asked"]:
            one["cpu_seconds"] = dict.fromkeys(one["cpu_seconds"], 0.0)
        return table(whole)

    at_once = rows("once", range(100, 102))
    assert at_once["reasons"] > 0
    assert rows("parts", range(101, 102), range(100, 101)) == at_once
    path = tmp_path / "once" / "slice-0-0-100-102.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({**whole, "asked": whole["asked"][:1]}))
    assert rows("once", range(100, 102)) == at_once


def test_runs_of_discovery_are_merged_and_other_settings_refused(tmp_path: Path) -> None:
    def run_of(seed: int, rank: int | None, steps: int = 5) -> Path:
        own = {"seed": seed, "marker": {"tree": rank}, "value": {"tree": None}}
        path = tmp_path / f"seed-{seed}.json"
        path.write_text(json.dumps({"steps": steps, "versions": {}, "run": own}))
        return path

    found = discovery_table([run_of(3, 2), run_of(1, 1), run_of(2, None)])
    assert found["seeds"] == [1, 2, 3]
    assert (found["success"], found["value_first"], found["named_at_all"]) == ({"tree": 1}, {"tree": 0}, {"tree": 2})
    with pytest.raises(ValueError, match="has other steps than"):
        discovery_table([run_of(1, 1), run_of(4, 1, steps=6)])
    with pytest.raises(ValueError, match="there is no run"):
        discovery_table([])
    with pytest.raises(ValueError, match="--seeds '3'; expected FIRST:STOP"):
        seeds_of("3")
