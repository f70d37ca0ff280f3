"""The experiments on audits: what is planted is planted, and the committed tables say what their command prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from experiments.audit import judged_claims, largest
from experiments.credit_table import mended
from experiments.discovery import KNOWN, MARKERS, VOCABULARY, patients, planted, rank_of
from spd_lens.audit import Judged

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


def test_the_committed_table_has_what_was_promised() -> None:
    found = json.loads((RESULTS / "summary-0.json").read_text())
    assert found["command"].endswith(f"--first 100 --cases {found['cases']}")
    assert found["cases"] == found["adds_up"] >= 20
    for row in (found, *found["baselines"].values()):
        for name in ("reasons", "verified_share", "survive_pgd20_share", "counterfactual_agreement"):
            assert 0 <= row[name] <= (1e4 if name == "reasons" else 1)
    assert {"gradient x input", "integrated gradients", "SHAP"} <= set(found["baselines"])
