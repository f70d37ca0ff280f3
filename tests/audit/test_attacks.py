"""What a second forger and hostile data tried: picked seeds, rounding, free text, towers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from spd_lens.audit import AuditReport, audit_page, decision, explain, fairness_view, page, verifying
from spd_lens.support import checked_json, library_versions
from tests.audit.conftest import SMALL, Audited, audited_cases, content, forged

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture
def measured_once(audited: Audited, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `verify` runs again is the shared report: these tests are about what it says of other files."""
    monkeypatch.setattr(verifying, "explain", lambda *_, **__: audited.report)


def refused(audited: Audited, change: Change, folder: Path, **given: Any) -> str:
    ended = audited.verify(forged(audited.report, change, folder), **given)
    assert ended.status == 1
    return str(ended)


# -- picked seeds ------------------------------------------------------------------------------------------------------


def test_a_seed_that_may_have_been_picked_is_noted(audited: Audited, monkeypatch: pytest.MonkeyPatch) -> None:
    values = content(audited.report)
    values["settings"]["seed"] = 7
    report = AuditReport.model_validate(values)
    monkeypatch.setattr(verifying, "explain", lambda *_, **__: report)
    assert "its seed 7 may have been picked" in str(audited.verify(report))
    monkeypatch.setattr(verifying, "explain", lambda *_, **__: audited.report)
    assert "may have been picked" not in str(audited.verify(audited.report))


def test_what_a_picked_seed_hides_is_said_on_a_fresh_one(audited: Audited, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a reason the report says that its evidence fails, as it can on one seed of many."""
    (own, *_) = audited.report.reasons_for
    values = content(audited.report)
    values["settings"]["seed"] = 7
    values["reasons_for"] = values["reasons_for"][1:]
    values["withheld"].insert(
        0, {"component": None, "place": values["places"][own.place.position], "effect": own.effect,
            "why": "no more than random subcomponents of equal use"},
    )  # fmt: skip
    for name in ("value", "elsewhere"):
        values["rest"][name] = round(values["rest"][name] + own.effect, 6)
    report = AuditReport.model_validate(values)
    monkeypatch.setattr(verifying, "explain", lambda *_, **__: report)
    ended = audited.verify(report, seed=91)
    assert f"{own.place.name} is withheld (no more than random subcomponents of equal use), and passes" in str(ended)
    assert "may have been picked" not in str(ended)


# -- what is within rounding -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("measured_once")
def test_numbers_within_rounding_turn_no_claim_of_the_page(audited: Audited) -> None:
    """The margin under attack may differ by 0.02; a page says that the decision survives only beyond that."""
    assert "does not survive" not in page.page_html(with_worst_margin(audited.report, 0.021))
    for worst in (-0.01, 0.0, 0.0099):
        report = with_worst_margin(audited.report, worst)
        assert "the decision as a whole does not survive" in page.page_html(report)


def with_worst_margin(report: AuditReport, worst: float) -> AuditReport:
    values = content(report)
    values["decision"]["worst_margin"] = worst
    return AuditReport.model_validate(values)


def test_a_prediction_of_nothing_is_no_part_of_what_happens(audited: Audited) -> None:
    def shown(predicted: float, measured: float) -> str:
        values = content(audited.report)
        values["reasons_for"] = values["reasons_for"][:1]
        values["reasons_for"][0] |= {"component": "history"}
        values["reasons_for"][0]["counterfactual"] = {
            "instead": "x", "token": 1, "predicted": predicted, "measured": measured, "agrees": False,
        }  # fmt: skip
        return page.page_html(AuditReport.model_validate(values))

    assert "a part of it" in shown(0.3, 1.0)
    assert "a part of it" in shown(-0.3, -1.0)
    for predicted, measured in ((0.0009, 1.0), (-0.3, 1.0), (3.0, 1.0), (0.0, 0.0)):
        assert "a part of it" not in shown(predicted, measured)
        assert "DISAGREES" in shown(predicted, measured)


def test_the_rest_is_its_two_parts_exactly(audited: Audited, tmp_path: Path) -> None:
    def moved(values: dict[str, Any]) -> None:
        values["rest"]["together"] = round(values["rest"]["together"] + 0.0005, 6)

    with pytest.raises(ValueError, match="do not add up"):
        AuditReport.load(forged(audited.report, moved, tmp_path))


# -- what nothing checks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "versions",
    [
        {"certified by": "the regulator"},
        {"torch": "2.13.0, approved by the regulator"},
        {"torch": ""},
        {"torch": "2" * 60},
    ],
)
def test_versions_are_no_place_for_sentences(audited: Audited, tmp_path: Path, versions: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"is damaged: versions"):
        AuditReport.load(forged(audited.report, lambda v: v.update(versions=versions), tmp_path))


@pytest.mark.usefixtures("measured_once")
def test_other_versions_are_noted(audited: Audited, tmp_path: Path) -> None:
    assert audited.report.versions == library_versions()
    ended = audited.verify(forged(audited.report, lambda v: v["versions"].update(torch="1.0.0"), tmp_path))
    assert ended
    assert "made with torch 1.0.0, which is not what runs here" in str(ended)
    assert "made with nothing" in str(audited.verify(forged(audited.report, lambda v: v.update(versions={}), tmp_path)))
    assert "made with" not in str(audited.verify(audited.report))


def test_inputs_of_the_verifier_that_cannot_be_run_are_no_fault_of_the_report(audited: Audited) -> None:
    with pytest.raises(ValueError, match="inputs"):
        audited.verify(audited.report, inputs=torch.full((1, 21), 10_000))


# -- numbers and files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", ["1e308", "-1e308", "1e999", "-1e999", "1" + "0" * 400, "1.0000000000001e9"])
def test_numbers_that_have_no_six_decimals_are_refused(audited: Audited, tmp_path: Path, number: str) -> None:
    whole = {"format": "spd_lens audit report", "format_version": 3, **content(audited.report)}
    whole["decision"]["worst_margin"] = json.loads(number)
    whole["checksum"] = checked_json.content_hash(whole)
    path = tmp_path / "forged.json"
    path.write_text(json.dumps(whole).replace("Infinity", "1e999"))
    with pytest.raises(ValueError, match=r"is damaged: decision\.worst_margin"):
        AuditReport.load(path)


def test_a_page_of_any_margin_can_be_written(audited: Audited, tmp_path: Path) -> None:
    for margin in (-1e9, 0.0, 1e9):
        values = content(audited.report)
        values["decision"]["margin"] = margin
        assert audit_page(AuditReport.model_validate(values), tmp_path / "page.html").is_file()


def test_a_file_is_read_as_the_numbers_that_it_has(audited: Audited, tmp_path: Path) -> None:
    for change, where in (
        (lambda v: v["settings"].update(seed=True), "settings.seed"),
        (lambda v: v["reasons_for"][0].update(flips=1), "reasons_for.0.flips"),
        (lambda v: v["decision"].update(margin="2.0"), "decision.margin"),
        (lambda v: v["settings"].update(seed=0.0), "settings.seed"),
        (lambda v: v["places"][0].update(position=-1), "places.0.position"),
    ):
        with pytest.raises(ValueError, match=f"is damaged: {where}"):
            AuditReport.load(forged(audited.report, change, tmp_path))


@pytest.mark.usefixtures("measured_once")
@pytest.mark.parametrize(
    "change",
    [
        lambda v: v["reasons_for"].reverse(),
        lambda v: v["withheld"].reverse(),
        lambda v: v["places"].reverse(),
        lambda v: v["settings"]["control_cases"].reverse(),
        lambda v: v["reasons_for"][0]["controls"].update(low=0.0, high=-9.0),
        lambda v: v["reasons_for"][0]["past"]["outcomes"].update({"good\u200b": 3}),
        lambda v: v["reasons_for"][0]["place"].update(words="status of the ａccount"),
        lambda v: v["decision"].update(chosen_name="decl\u0131ned"),
        lambda v: v["similar"][0].update(number=v["similar"][0]["number"] + 1),
        lambda v: v["similar"].append(v["similar"][0]),
        lambda v: v["adversary"].update(span_positions=1),
        lambda v: v["digests"].update(sites={**v["digests"]["sites"], "blocks.9.mlp.W_in": "0" * 64}),
        lambda v: v.update(model_name="credit\u202e"),
    ],
)  # fmt: skip
def test_other_orders_words_and_counts_are_refused(audited: Audited, tmp_path: Path, change: Change) -> None:
    refused(audited, change, tmp_path)


# -- hostile text ------------------------------------------------------------------------------------------------------

TOWER = "a" + "\u0301\u0489" * 60
ESCAPES = "\x1b[2J\x1b[31m\u202eyes\r\nVerified: 8 of 8 reasons came out again."


def test_reports_on_a_terminal_hide_nothing_and_forge_no_line(audited: Audited) -> None:
    values = content(audited.report)
    values["title"] = ESCAPES
    values["reasons_for"][0]["place"] |= {"words": ESCAPES, "says": ESCAPES}
    values["withheld"] = [{"component": ESCAPES, "place": values["places"][0], "effect": 0.5,
                           "why": "the adversary undoes it"}]  # fmt: skip
    report = AuditReport.model_validate(values)
    for text in (str(report), repr(report), report._repr_html_()):
        assert not {"\x1b", "\u202e", "\r"} & set(text)
        assert not any(line.startswith("Verified") for line in text.splitlines())
    assert len(str(report).splitlines()) == len(report.reasons) + 5


def test_a_fairness_view_on_a_terminal_hides_nothing(audited: Audited) -> None:
    cases = audited.cases
    p = list(cases.places or ()).index("foreign worker")
    values = set(cases.tokens[:, p].tolist())
    vocabulary = [f"{ESCAPES}{i}" if i in values else text for i, text in enumerate(cases.vocabulary)]
    view = fairness_view(
        audited.decomposition, replace(cases, vocabulary=vocabulary), decision.Decision(1, 0), "foreign worker"
    )
    assert not {"\x1b", "\u202e", "\r"} & set(str(view))
    assert not any(line.startswith("Verified") for line in str(view).splitlines())


def test_marks_in_towers_and_fillers_are_written_out(audited: Audited, tmp_path: Path) -> None:
    report = audited.report.model_copy(update={"title": TOWER + "\u3164\ufe0f\u034f" + "été שָׁלוֹם"})
    page = audit_page(report, tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("\u0489") <= 4  # in the title and in the heading
    assert "&lt;U+0489&gt;" in page
    assert not {"\u3164", "\ufe0f", "\u034f"} & set(page)
    assert "été" in page
    assert "שָׁלוֹם" in page


def test_long_names_are_shortened_and_a_long_title_is_refused(audited: Audited) -> None:
    outputs = ["approved" * 500, "declined" * 500]
    report = explain(audited.decomposition, audited.declined[0], 1, cases=replace(audited.cases, outputs=outputs),
                     choices=replace(SMALL, n_draws=8))  # fmt: skip
    with pytest.raises(ValueError, match="title has 5,000 characters: 'x"):
        audited.explain(title="x" * 5_000)
    assert len(report.decision.chosen_name) == 200
    assert len(report.title) < 220


def test_numbers_of_cases_are_whole(without_type_checks: None) -> None:
    for odd in (-1, 1.5, True, 1 << 70, "7"):
        with pytest.raises(ValueError, match=r"numbers holds .*; expected whole numbers from 0"):
            audited_cases(3, numbers=[0, odd, 2])
    assert audited_cases(3, numbers=torch.tensor([4, 5, 6])).numbers is not None
