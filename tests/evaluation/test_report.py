"""The report: numbers that follow from numbers, files, and what a notebook shows."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from spd_lens.evaluation import AttackReport, Deletion, EvaluationReport, SiteReport


def report(**changes: Any) -> EvaluationReport:
    """A small report with everything in it."""
    site = SiteReport(20, 16, 1e-3, 0.0, {0.0: 4.0, 0.01: 3.0, 0.1: 2.0, 0.5: 1.0}, 9)
    values: dict[str, Any] = {
        "sites": {"blocks.0.mlp.W_in": site, "<b>": dataclasses.replace(site, alive=5)},
        "divergence": {"all on, no delta": 0.01, "stochastic": 0.05, "all off": 1.0},
        "cross_entropy": {"target": 3.0, "stochastic": 3.2, "all off": 4.0, "PGD 20": 3.5},
        "adversarial": {20: 0.12, 80: 0.2},
        "kind": "kl",
        "positions": 100,
        "texts": 10,
        "attack": AttackReport(0.1, 2, 10, 10, 1),
        "top_changes": {"stochastic": 0.125, "all off": 0.5, "PGD 20": 0.3},
        "unigram_cross_entropy": 5.0,
        "deletion": Deletion({"never needed off": 0.04}, {"blocks.0.mlp.W_in": 11, "<b>": 15}, 100, {"own union": 9.0,
                             "others' union": 9.0}),
        "intervals": {"divergence": {"stochastic": (0.04, 0.06)}},
        "per_text": {"divergence": {"stochastic": ([1.0, 4.0], [50.0, 50.0])}},
        "warnings": ("a note",),
    }  # fmt: skip
    return EvaluationReport(**{**values, **changes})


def test_a_report_survives_json_and_files(tmp_path: Path) -> None:
    original = report()
    assert EvaluationReport.from_json(json.loads(json.dumps(original.to_json(), allow_nan=False))) == original
    assert EvaluationReport.load(original.save(tmp_path / "a.json")) == original
    original.save(tmp_path)
    assert EvaluationReport.load(tmp_path) == original


def test_numbers_that_are_not_finite_are_valid_json() -> None:
    site = dataclasses.replace(report().sites["<b>"], relative_faithfulness=math.nan)
    text = json.dumps(report(sites={"s": site}).to_json(), allow_nan=False)
    assert math.isnan(EvaluationReport.from_json(json.loads(text)).sites["s"].relative_faithfulness)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("positions"),
        lambda c: c.update(odd=1),
        lambda c: c.update(format="something else"),
        lambda c: c.update(format_version=99),
        lambda c: c["sites"]["<b>"].pop("l0"),
        lambda c: c.update(adversarial={"many": 1.0}),
        lambda c: c.update(intervals={"divergence": {"stochastic": [1.0]}}),
        lambda c: c.update(sites=3),
    ],
)
def test_other_json_is_refused(change: Any) -> None:
    content = report().to_json()
    change(content)
    with pytest.raises(ValueError, match="this is no"):
        EvaluationReport.from_json(content)


def test_a_damaged_or_missing_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"format": ')
    with pytest.raises(ValueError, match="damaged"):
        EvaluationReport.load(tmp_path / "a.json")
    with pytest.raises(ValueError, match="missing"):
        EvaluationReport.load(tmp_path / "none.json")


def test_an_edited_number_is_refused(tmp_path: Path) -> None:
    saved = report().save(tmp_path / "a.json")
    content = json.loads(saved.read_text())
    content["divergence"]["stochastic"] /= 2
    saved.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="changed by hand"):
        EvaluationReport.load(saved)


def test_ce_recovered_is_one_for_the_target_and_zero_for_token_frequencies() -> None:
    assert report().ce_recovered == {
        "stochastic": pytest.approx(0.9), "all off": pytest.approx(0.5), "PGD 20": pytest.approx(0.75)
    }  # fmt: skip
    assert report(unigram_cross_entropy=2.0).ce_recovered == {}
    assert report(cross_entropy={}).ce_recovered == {}


def test_log_values_are_flat_and_named() -> None:
    values = report().log_values("eval/")
    expected = {
        "l0": 6.0, "alive": 14, "c_total": 40, "faithfulness": 1e-3, "kl_no_delta": 0.01, "kl_stochastic": 0.05,
        "kl_all_off": 1.0, "kl_pgd20": 0.12, "kl_pgd80": 0.2, "kl_deletion": 0.04, "ce_recovered": 0.9,
        "top_changes": 0.125, "holds": 1.0,
    }  # fmt: skip
    assert values == {f"eval/{name}": pytest.approx(value) for name, value in expected.items()}
    assert "holds" not in report(adversarial={}).log_values()


def test_the_text_states_budget_span_thresholds_and_ends_with_the_verdict() -> None:
    text = str(report())
    for words in (
        "alive: importance above 0.01", "worst of 2 starts, first step 0.1", "one source over 10 rows x 10 positions",
        "0.04 to 0.06", "12.5 %", "90.0 %", "token frequencies alone", "26 of 40 subcomponents", "Note: a note",
    ):  # fmt: skip
        assert words in text, words
    assert text.splitlines()[-1].startswith("Verdict: Holds on this data.")


def test_repr_is_one_line_and_html_escapes_names() -> None:
    assert repr(report()) == (
        "EvaluationReport(2 sites, L0 6.0 of 40, KL 0.05 stochastic, KL 1 all off, PGD 20: 0.12, PGD 80: 0.2; holds)"
    )
    page = report()._repr_html_()
    assert "<table>" in page
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert "Verdict: Holds" in page
