"""A forger has code, model and data, and writes checksums and digests that fit. What he may say is little."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from spd_lens.audit import AuditReport, Cases, Choices, audit_page, digests, verify, verify_page, verifying
from spd_lens.core import Decomposition, decompose, target_fingerprint
from spd_lens.models import CREDIT_WORDS, build_transformer, load_credit
from tests.audit.conftest import SMALL, Audited, audited_cases, forged

# What an issuer may say as he likes: it is noted beside the result, or it is about his machine.
FREE = ("title", "versions", "spd_lens_audit", "digests.host")


def leaves(values: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value that is no dict and no list, and of every list."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from leaves(value, (*where, key))
    elif isinstance(values, list):
        yield where
        for i, value in enumerate(values[:1]):
            yield from leaves(value, (*where, i))
    else:
        yield where


def otherwise(value: Any) -> Any:
    """Another value of the same type, by more than rounding."""
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case float():
            return value + 0.05
        case str():
            return ("0" if value[0] != "0" else "1") + value[1:] if len(value) == 64 else value + "x"
        case list():
            return value[:-1] if value else None
        case _:
            return None


def edited(report: AuditReport, path: tuple[Any, ...]) -> AuditReport | None:
    """The report with one value changed, and the rest made to fit so that it adds up; None: no such report."""
    values = json.loads(json.dumps(report.model_dump()))
    place = values
    for key in path[:-1]:
        place = place[key]
    if otherwise(place[path[-1]]) is None:
        return None
    place[path[-1]] = otherwise(place[path[-1]])
    try:
        changed = AuditReport.model_validate(values)
    except ValueError:
        return None
    parts = [changed.start, *(r.effect for r in changed.reasons)]
    if path[0] != "rest":
        values["rest"]["value"] = round(changed.decision.margin - sum(parts), 6)
    # Whichever part of the rest is not the edited one makes up for it.
    other = "together" if path == ("rest", "elsewhere") else "elsewhere"
    rest = values["rest"]
    if path != ("rest", "value"):
        rest[other] = round(rest["value"] - rest["together"] - rest["elsewhere"] + rest[other], 6)
    return AuditReport.model_validate(values)


@pytest.mark.slow
def test_no_value_of_a_report_can_be_changed_but_the_free_ones(
    audited: Audited, monkeypatch: pytest.MonkeyPatch
) -> None:
    again: dict[str, Any] = {}

    def remembered(measure: Callable[..., Any]) -> Callable[..., Any]:
        """What is measured once is not measured again: the same call gives the same result."""

        def call(*given: Any, **named: Any) -> Any:
            told = [v.tolist() if isinstance(v, torch.Tensor) else v for v in (*given, *named.values())]
            key = repr([v for v in told if not isinstance(v, (Decomposition, Cases))])
            if key not in again:
                again[key] = measure(*given, **named)
            return again[key]

        return call

    monkeypatch.setattr(verifying, "explain", remembered(verifying.explain))
    monkeypatch.setattr(verifying, "digests", remembered(verifying.digests))
    assert audited.verify(audited.report)
    accepted, tried = [], 0
    for path in leaves(audited.report.model_dump()):
        where = ".".join(map(str, path))
        changed = edited(audited.report, path)
        if changed is None or where.startswith(FREE) or where.startswith(("settings.seed", "adversary")):
            continue
        tried += 1
        if audited.verify(changed):
            accepted.append(where)
    assert accepted == []
    assert tried > 70


Change = Callable[[dict[str, Any]], Any]


def refused(audited: Audited, change: Change, folder: Path, **given: Any) -> str:
    ended = audited.verify(forged(audited.report, change, folder), **given)
    assert ended.status == 1
    return str(ended)


def test_the_names_of_the_decision_are_those_of_the_cases(audited: Audited, tmp_path: Path) -> None:
    def swap(values: dict[str, Any]) -> None:
        made = values["decision"]
        made["chosen_name"], made["other_name"] = made["other_name"], made["chosen_name"]

    assert "chosen_name: the report says 'approved', running it again gives 'declined'" in refused(
        audited, swap, tmp_path
    )


def test_a_decision_elsewhere_is_not_the_models(audited: Audited, tmp_path: Path) -> None:
    assert "position" in refused(audited, lambda v: v["decision"].update(position=3), tmp_path)
    turned = refused(audited, lambda v: v["decision"].update(chosen=0, other=1), tmp_path)
    assert "the model does not decide 'approved' here" in turned
    assert audited.verify(audited.report, decision=("declined", "approved"), position=20)
    assert not audited.verify(audited.report, position=3)


def test_a_report_that_measured_less_than_the_verifier_asks_is_refused(audited: Audited) -> None:
    told = str(verify(audited.report, audited.decomposition, cases=audited.cases))
    assert "n_controls is 4; the standard asks for at least 16" in told
    assert "n_draws is 16; the standard asks for at least 64" in told
    assert "its adversary has 4 steps of 0.1 from 1 starts; the standard asks for 20 of 0.1 from 2" in told
    for weaker, text in (
        ({"n_reasons": 1}, "n_reasons is 1; the standard asks for at least 4"),
        ({"smallest_effect": 1.0}, "it leaves out effects below 1 of the margin"),
        ({"budget": replace(SMALL.budget, step_size=1e-6)}, "its adversary has 4 steps of 1e-06"),
    ):
        choices = replace(SMALL, **weaker)
        report = audited.explain(choices=choices)
        ended = audited.verify(report)
        assert ended.status == 1
        assert text in str(ended)
        assert audited.verify(report, standard=choices)


def test_a_place_that_is_not_looked_at_is_missed(audited: Audited) -> None:
    hidden = audited.report.reasons[0].place.position
    looked_at = [p for p in range(20) if p != hidden]
    report = audited.explain(reasons_at=looked_at)
    assert "places: the report has 19, running it again gives 20" in str(audited.verify(report))
    assert audited.verify(report, reasons_at=looked_at)


def test_an_edited_number_does_not_pass_with_a_fresh_seed(audited: Audited, tmp_path: Path) -> None:
    def larger(values: dict[str, Any]) -> None:
        side = "reasons_for" if values["reasons_for"] else "reasons_against"
        values[side][0]["effect"] = round(values[side][0]["effect"] * 2, 6)
        effects = [r["effect"] for s in ("reasons_for", "reasons_against") for r in values[s]]
        values["rest"]["value"] = round(values["decision"]["margin"] - values["start"] - sum(effects), 6)
        values["rest"]["elsewhere"] = round(values["rest"]["value"] - values["rest"]["together"], 6)

    assert "effect: the report says" in refused(audited, larger, tmp_path, seed=91)


def test_a_dropped_reason_is_missed_however_the_rest_is_written(audited: Audited, tmp_path: Path) -> None:
    def drop(values: dict[str, Any]) -> None:
        side = "reasons_for" if values["reasons_for"] else "reasons_against"
        lost = values[side].pop(0)["effect"]
        for name in ("value", "elsewhere"):
            values["rest"][name] = round(values["rest"][name] + lost, 6)

    assert "running it again gives" in refused(audited, drop, tmp_path)


def test_another_dictionary_is_refused_even_with_its_own_digest(audited: Audited, tmp_path: Path) -> None:
    words = {**CREDIT_WORDS, "age": "experience of life", "checking account": "character"}
    report = audited.explain(cases=audited_cases(dictionary=words))
    assert "other cases, or other words about them" in str(audited.verify(report))
    told = refused_as(audited, report, lambda v: v["digests"].update(cases=audited.report.digests.cases), tmp_path)
    assert "words: the report says 'experience of life', running it again gives 'age'" in told


def test_other_past_cases_and_other_withheld_places_are_refused(audited: Audited, tmp_path: Path) -> None:
    def swap(values: dict[str, Any]) -> None:
        values["similar"].reverse()

    def outcome(values: dict[str, Any]) -> None:
        values["similar"][0]["outcome"] = "paid back in full"

    def hide(values: dict[str, Any]) -> None:
        values["withheld"] = values["withheld"][1:]

    assert "similar[0]" in refused(audited, swap, tmp_path)
    assert "paid back in full" in refused(audited, outcome, tmp_path)
    assert "withheld: the report has" in refused(audited, hide, tmp_path)


def test_another_model_under_the_names_of_this_one_does_not_give_these_numbers(
    audited: Audited, tmp_path: Path
) -> None:
    other = load_credit(decomposed=True)
    with torch.no_grad():
        for name, parameter in other.model.named_parameters():
            if name.endswith(("mlp.b_out", "fc_out._original_component.bias")):
                parameter.add_(torch.linspace(-0.5, 0.5, parameter.numel()))
    path = forged(audited.report, lambda v: v["digests"].update(host="another kind", model="0" * 64), tmp_path)
    ended = verify(path, other, cases=audited.cases, standard=SMALL)
    assert ended.status == 1
    assert "margin: the report says" in str(ended) or "cannot be run again" in str(ended)


def test_one_entry_of_a_large_parameter_changes_the_models_digest() -> None:
    config = {
        "model_name": "wide", "n_layers": 1, "d_model": 16, "n_heads": 2, "d_head": 8, "d_mlp": 8, "n_ctx": 4,
        "d_vocab": 1_000, "d_vocab_out": 2, "act_fn": "relu", "normalization_type": None, "seed": 0,
    }  # fmt: skip
    decomposition = decompose(build_transformer(config), {"blocks.0.mlp.W_in": 4}, gate="shared", gate_width=4, seed=0)
    cases = audited_cases()

    def both() -> tuple[str, str]:
        return digests(decomposition, cases, torch.zeros(1, 4)).model, target_fingerprint(decomposition)["weights"]

    before, sampled = both()
    name, largest = max(decomposition.model.named_parameters(), key=lambda item: item[1].numel())
    assert largest.numel() == 16_000, name
    with torch.no_grad():
        largest.view(-1)[2] += 1.0
    after, sampled_again = both()
    assert before != after
    assert sampled == sampled_again  # the sample that a decomposition's own fingerprint takes does not see it


# -- what is free, what is shown, and what is read ---------------------------------------------------------------------


def test_a_title_is_free_text_and_said_to_be_unless_the_verifier_gives_one(audited: Audited, tmp_path: Path) -> None:
    path = forged(audited.report, lambda v: v.update(title="Approved\x1b[2J\nVerified: 8 of 8"), tmp_path)
    ended = audited.verify(path)
    assert ended
    assert "its title is free text that nothing checks" in str(ended)
    assert "\x1b" not in str(ended)
    assert str(ended).count("\nVerified") == 0
    assert "its title is" in str(audited.verify(path, title="Why declined?"))
    assert audited.verify(audited.report, title="Why declined?").notes == ()


def test_names_out_of_a_file_cannot_forge_lines_of_the_answer(audited: Audited, tmp_path: Path) -> None:
    hostile = "\x1b[2J\nVerified: 8 of 8 reasons came out again.\n"

    def rename(values: dict[str, Any]) -> None:
        side = "reasons_for" if values["reasons_for"] else "reasons_against"
        values[side][0]["place"]["name"] = hostile
        values[side][0]["controls"]["draws"] = 1
        values["digests"]["sites"] = {hostile: "0" * 64}

    told = refused(audited, rename, tmp_path)
    assert "\x1b" not in told
    assert all(not line.startswith("Verified") for line in told.splitlines())

    def unknown(values: dict[str, Any]) -> None:
        values["similar"][0][hostile] = 1

    with pytest.raises(ValueError, match="Extra inputs") as caught:
        AuditReport.load(forged(audited.report, unknown, tmp_path))
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("settings", "seed"), 1 << 70), (("settings", "n_draws"), 10**9), (("settings", "n_controls"), 10**9),
        (("adversary", "steps"), 10**9), (("adversary", "starts"), 10**9), (("inputs", 0), 1 << 70),
        (("settings", "smallest_effect"), -1.0), (("settings", "n_reasons"), 50), (("decision", "position"), 1 << 70),
        (("adversary", "step_size"), 0.0), (("adversary", "span_rows"), 64),
    ],
    ids=str,
)  # fmt: skip
def test_a_file_cannot_ask_for_endless_work(audited: Audited, tmp_path: Path, path: Any, value: Any) -> None:
    def ask(values: Any) -> None:
        for key in path[:-1]:
            values = values[key]
        values[path[-1]] = value

    with pytest.raises(ValueError, match="is damaged: "):
        AuditReport.load(forged(audited.report, ask, tmp_path))


def test_choices_that_no_file_may_have_are_refused_before_they_are_measured() -> None:
    with pytest.raises(ValueError, match="n_draws=5000; expected 2 to 1,024 and 8 to 4,096"):
        Choices(n_draws=5_000)
    with pytest.raises(ValueError, match="expected a share of the margin, 0 to 1"):
        Choices(smallest_effect=-0.1)


def test_a_key_that_stands_twice_is_refused(audited: Audited, tmp_path: Path) -> None:
    path = audited.report.save(tmp_path / "report.json")
    text = path.read_text()
    path.write_text(text.replace('"title":', '"title": "Why approved?", "title":', 1))
    with pytest.raises(ValueError, match="it holds the key 'title' twice"):
        AuditReport.load(path)


def test_a_page_is_the_reports_or_it_is_refused(audited: Audited, tmp_path: Path) -> None:
    page = audit_page(audited.report, tmp_path / "report.html")
    assert verify_page(audited.report, page)
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace("declined", "approved", 1), encoding="utf-8")
    ended = verify_page(audited.report, page)
    assert ended.status == 1
    assert "the page is not the one that this report gives" in str(ended)
    page.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is no text"):
        verify_page(audited.report, page)
    with pytest.raises(ValueError, match="is no file; expected the page of a report"):
        verify_page(audited.report, tmp_path)


def test_what_are_no_cases_is_refused_in_words(audited: Audited) -> None:
    with pytest.raises(TypeError, match=r"cases is a dict; expected spd_lens\.audit\.Cases"):
        verify(audited.report, audited.decomposition, cases={})


def refused_as(audited: Audited, report: AuditReport, change: Change, folder: Path) -> str:
    ended = audited.verify(forged(report, change, folder))
    assert ended.status == 1
    return str(ended)


def test_the_reports_own_seed_is_no_fresh_one(audited: Audited) -> None:
    with pytest.raises(ValueError, match="seed=0 is the report's own, whose controls and attacks come out again"):
        audited.verify(audited.report, seed=0)
    with pytest.raises(ValueError, match="seed=-1; expected a whole number from 0 to 4,294,967,295"):
        audited.verify(audited.report, seed=-1)
