"""`verify` says yes to what is true and no to everything else: another model, another cut of it, edited numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from spd_lens.audit import AuditReport, report_schema, verify
from spd_lens.models import load_credit
from tests.audit.conftest import SMALL, Audited, audited_cases, content, forged


def refused(audited: Audited, path: Path) -> str:
    ended = audited.verify(path)
    assert not ended
    assert ended.status == 1
    return str(ended)


def test_a_report_and_its_file_verify(audited: Audited, tmp_path: Path) -> None:
    path = audited.report.save(tmp_path / "report.json")
    assert AuditReport.load(path) == audited.report
    ended = audited.verify(path, inputs=audited.declined[0])
    assert ended
    assert (ended.status, ended.claims, ended.held) == (0, len(audited.report.reasons), len(audited.report.reasons))
    assert str(ended).startswith("Verified: ")


def test_with_a_fresh_seed_claims_are_judged_not_digits(audited: Audited) -> None:
    ended = audited.verify(audited.report, seed=91)
    assert ended.claims == len(audited.report.reasons)
    assert ended.held == ended.claims - len(ended.disagreements)
    turned = content(audited.report)
    for reason in [*turned["reasons_for"], *turned["reasons_against"]]:
        reason["effect"] = -reason["effect"]
    turned["reasons_for"], turned["reasons_against"] = turned["reasons_against"], turned["reasons_for"]
    turned["rest"]["value"] = 0.0
    assert audited.verify(AuditReport.model_validate(turned), seed=91).status == 1


def test_the_file_fits_its_published_schema(audited: Audited, tmp_path: Path) -> None:
    path = audited.report.save(tmp_path / "report.json")
    shipped = json.loads((Path(__file__).parents[2] / "spd_lens" / "audit" / "audit_report.schema.json").read_text())
    assert shipped == json.loads(json.dumps(report_schema()))
    jsonschema.Draft202012Validator.check_schema(shipped)
    whole = json.loads(path.read_text())
    jsonschema.validate(whole, shipped)
    for broken in (
        {**whole, "rest": None},
        {**whole, "start": "nothing"},
        {**whole, "extra": 1},
        {k: v for k, v in whole.items() if k != "adversary"},
        {**whole, "reasons_for": whole["reasons_for"] * 9},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, shipped)


# -- sabotage --------------------------------------------------------------------------------------------------------


def test_a_model_whose_last_layer_was_changed_is_refused(audited: Audited) -> None:
    other = load_credit(decomposed=True)
    with torch.no_grad():
        for name, parameter in other.model.named_parameters():
            if name in ("unembed.W_U", "unembed.weight", "head._original_component.weight"):
                parameter.mul_(1.02)
    ended = verify(audited.report, other, cases=audited.cases, standard=SMALL)
    assert ended.status == 1
    assert "another model: unembed.W_U is not the matrix that the report is about" in str(ended)


def test_a_model_whose_bias_was_changed_is_refused(audited: Audited) -> None:
    other = load_credit(decomposed=True)
    with torch.no_grad():
        for name, parameter in other.model.named_parameters():
            if name.endswith(("mlp.b_out", "fc_out._original_component.bias")):
                parameter.add_(0.3)
    ended = verify(audited.report, other, cases=audited.cases, standard=SMALL)
    assert ended.status == 1
    assert "another model: its matrices are those of the report, other parameters are not" in str(ended)


def test_a_decomposition_of_another_seed_is_refused(audited: Audited) -> None:
    ended = verify(audited.report, load_credit(decomposed=True, seed=1), cases=audited.cases)
    assert ended.status == 1
    assert "another decomposition of the model than the report's" in str(ended)


def test_reasons_shuffled_between_reports_are_refused(audited: Audited, tmp_path: Path) -> None:
    other = audited.explain(1)

    def swap(values: dict[str, Any]) -> None:
        for name in ("reasons_for", "reasons_against", "rest", "start", "coverage"):
            values[name] = content(other)[name]
        values["decision"]["margin"] = other.decision.margin

    assert "the report says" in refused(audited, forged(audited.report, swap, tmp_path))


def test_reasons_in_another_order_of_places_are_refused(audited: Audited, tmp_path: Path) -> None:
    def rename(values: dict[str, Any]) -> None:
        places = [r["place"] for side in ("reasons_for", "reasons_against") for r in values[side]]
        for side in ("reasons_for", "reasons_against"):
            for reason in values[side]:
                reason["place"] = places.pop()

    if len(audited.report.reasons) > 1:
        assert "place" in refused(audited, forged(audited.report, rename, tmp_path))


def test_other_cases_words_and_inputs_are_refused(audited: Audited) -> None:
    def text(**changes: Any) -> str:
        ended = audited.verify(audited.report, **changes)
        assert ended.status == 1
        return str(ended)

    assert "another input than the report's" in text(inputs=audited.declined[1])
    assert "other cases, or other words about them" in text(cases=audited_cases(149))
    assert "other cases, or other words about them" in text(cases=audited_cases(dictionary={"age": "youth"}))


NUMBERS = [
    ("decision", "worst_margin"), ("coverage", "explained"), ("reasons_for", 0, "keep_only"),
    ("reasons_for", 0, "controls", "high"), ("reasons_for", 0, "counterfactual", "measured"), ("withheld", 0, "effect"),
]  # fmt: skip


@pytest.mark.parametrize("path", NUMBERS, ids=lambda path: ".".join(map(str, path)))
def test_an_edited_number_is_refused(audited: Audited, tmp_path: Path, path: tuple[Any, ...]) -> None:
    def edit(values: Any) -> None:
        for key in path[:-1]:
            values = values[key]
        values[path[-1]] -= 0.03

    refused(audited, forged(audited.report, edit, tmp_path))


def test_every_edited_word_and_count_is_refused(audited: Audited, tmp_path: Path) -> None:
    def edits() -> list[Any]:
        def place(v: Any) -> None:
            v["reasons_for"][0]["place"]["words"] = "bad character"

        def member(v: Any) -> None:
            v["reasons_for"][0]["members"][0]["ids"] = [0]

        def name(v: Any) -> None:
            v["places"][3]["says"] = "purpose: yacht"

        def count(v: Any) -> None:
            v["reasons_for"][0]["past"]["same"] += 1

        return [place, member, name, count]

    for edit in edits():
        refused(audited, forged(audited.report, edit, tmp_path))


def test_missing_controls_are_refused_before_anything_runs(audited: Audited, tmp_path: Path) -> None:
    def fewer(values: dict[str, Any]) -> None:
        values["reasons_for"][0]["controls"]["draws"] = 1

    assert "1 control draws of 16" in refused(audited, forged(audited.report, fewer, tmp_path))

    def none(values: dict[str, Any]) -> None:
        values["settings"]["control_cases"] = []

    assert "fewer than two control cases" in refused(audited, forged(audited.report, none, tmp_path))

    def lacking(values: dict[str, Any]) -> None:
        del values["reasons_for"][0]["controls"]

    with pytest.raises(ValueError, match=r"is damaged: reasons_for\.0\.controls: Field required"):
        audited.verify(forged(audited.report, lacking, tmp_path))


# -- files -----------------------------------------------------------------------------------------------------------


def test_a_file_changed_by_hand_is_refused_by_its_checksum(audited: Audited, tmp_path: Path) -> None:
    path = audited.report.save(tmp_path / "report.json")
    whole = json.loads(path.read_text())
    whole["decision"]["worst_margin"] += 1e-6
    path.write_text(json.dumps(whole))
    with pytest.raises(ValueError, match="is damaged or was changed by hand"):
        AuditReport.load(path)


def test_numbers_that_do_not_add_up_are_refused(audited: Audited, tmp_path: Path) -> None:
    def edit(values: dict[str, Any]) -> None:
        values["rest"]["value"] += 1e-6

    with pytest.raises(ValueError, match="do not add up to the margin"):
        AuditReport.load(forged(audited.report, edit, tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is damaged"),
        ("[]", "it holds a list; expected an object"),
        ("[" * 100_000, "is damaged"),
        ('{"format": "spd_lens decomposition", "format_version": 1}', "was not written as a spd_lens audit report"),
        ('{"format": "spd_lens audit report", "format_version": 99}', "format version 99; this spd_lens reads up to 3"),
        ('{"format": "spd_lens audit report", "format_version": 3, "start": NaN}', "is damaged"),
        ('{"format": "spd_lens audit report", "format_version": 3, "start": 1' + "0" * 5_000 + "}", "is damaged"),
        ("\x00\xff", "is damaged"),
    ],
)
def test_a_malicious_or_newer_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        AuditReport.load(path)


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    with path.open("wb") as file:
        file.truncate(1 << 34)
    with pytest.raises(ValueError, match="17,179,869,184 bytes; a report has at most 2,000,000, so this is none"):
        AuditReport.load(path)
    with pytest.raises(ValueError, match="does not exist"):
        AuditReport.load(tmp_path / "nothing.json")


def test_claims_about_inputs_and_places_that_are_not_there_are_refused(audited: Audited, tmp_path: Path) -> None:
    def elsewhere(values: dict[str, Any]) -> None:
        values["settings"]["reasons_at"] = [99]

    def outside(values: dict[str, Any]) -> None:
        values["inputs"][0] = 10_000

    refused(audited, forged(audited.report, elsewhere, tmp_path))
    assert "its input is none of this model" in refused(audited, forged(audited.report, outside, tmp_path))
