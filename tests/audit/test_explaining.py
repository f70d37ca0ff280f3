"""What an audit says is what happens: every number against arithmetic or a plain pass of its own."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest
import torch

from spd_lens.audit import AuditReport, Budget, Reason, explain
from spd_lens.models import load_credit
from tests.audit.arithmetic import pass_by_hand
from tests.audit.conftest import SMALL, Audited, audited_cases


def test_the_margin_and_what_removing_a_reason_does_equal_arithmetic(audited: Audited) -> None:
    report, decomposition, tokens = audited.report, audited.decomposition, audited.declined[0]
    assert pass_by_hand(decomposition, tokens)[0] == pytest.approx(report.decision.margin, abs=1e-4)
    used = {name: g[0] > 0.01 for name, g in decomposition.importance(tokens[None]).items()}
    assert report.reasons
    for reason in report.reasons:
        p = reason.place.position
        removed = {m.site: [(p, c) for c in m.ids if used[m.site][p, c]] for m in reason.members}
        without, _ = pass_by_hand(decomposition, tokens, removed=removed)
        assert report.decision.margin - without == pytest.approx(reason.remove, abs=1e-4)
        assert reason.flips == (without < 0)


def test_start_reasons_and_rest_add_up_to_the_margin_exactly(audited: Audited) -> None:
    for report in (audited.report, audited.explain(1), audited.explain(2, seed=3)):
        parts = [report.start, *(r.effect for r in report.reasons), report.rest.value]
        assert sum(Decimal(repr(v)) for v in parts) == Decimal(repr(report.decision.margin))
        assert report.adds_up()
        assert report.rest.together + report.rest.elsewhere == pytest.approx(report.rest.value, abs=1e-9)


def test_the_start_is_the_mean_margin_of_cases_that_are_decided_the_other_way(audited: Audited) -> None:
    tokens = audited.cases.tokens[audited.report.settings.control_cases]
    with torch.no_grad():
        logits = audited.decomposition.model(tokens)[:, -1]
    margins = logits[:, 1] - logits[:, 0]
    assert bool((margins < 0).all())
    assert float(margins.mean()) == pytest.approx(audited.report.start, abs=1e-4)


def test_a_counterfactual_is_a_plain_pass_over_the_changed_input(audited: Audited) -> None:
    seen = 0
    for reason in audited.report.reasons:
        told = reason.counterfactual
        if told is None:
            continue
        changed = audited.declined[0].clone()
        changed[reason.place.position] = told.token
        with torch.no_grad():
            logits = audited.decomposition.model(changed[None])[0, -1]
        assert audited.report.decision.margin - float(logits[1] - logits[0]) == pytest.approx(told.measured, abs=1e-4)
        seen += 1
    assert seen


def test_a_reason_has_passed_every_check(audited: Audited) -> None:
    report = audited.report
    for side, sign in ((report.reasons_for, 1), (report.reasons_against, -1)):
        assert len(side) <= 4
        for reason in side:
            assert reason.effect * sign > 0
            assert not reason.controls.low <= reason.effect <= reason.controls.high
            assert reason.worst > 0
            assert reason.controls.draws == SMALL.n_draws
            assert reason.place.words is not None
    given = {r.place.position for r in report.reasons}
    assert not given & {w.place.position for w in report.withheld}


def test_the_adversary_is_never_kinder_than_no_adversary_and_more_starts_never_help_a_claim(audited: Audited) -> None:
    """Its first start is what the one start was, so its worst is at most that."""
    assert audited.report.decision.worst_margin < audited.report.decision.margin
    for reason in audited.report.reasons:
        assert reason.worst <= abs(reason.effect_low) + abs(reason.effect_high)
    two = audited.explain(choices=replace(SMALL, budget=Budget(steps=4, starts=4)))
    assert two.decision.worst_margin <= audited.report.decision.worst_margin + 0.05


def test_everything_irrelevant_when_no_place_says_anything_new(audited: Audited) -> None:
    """Cases that are all equal to each other but for one place: only that place can be a reason."""
    tokens = audited.declined[0].repeat(30, 1)
    decision_place = 0
    values = audited.cases.tokens[:, decision_place].unique()
    tokens[:, decision_place] = values[torch.arange(30) % len(values)]
    cases = audited_cases(30, tokens=tokens)
    report = audited.explain(cases=cases)
    found = {r.place.position for r in report.reasons} | {w.place.position for w in report.withheld}
    assert found <= {decision_place}


def test_the_same_seed_gives_the_same_report_and_the_model_is_untouched(audited: Audited) -> None:
    before = audited.decomposition.model(audited.declined[:3])
    again = audited.explain(0)
    assert again == audited.report
    assert torch.equal(audited.decomposition.model(audited.declined[:3]), before)


@pytest.mark.slow  # three whole reports
def test_a_decision_as_pair_name_and_number_is_the_same(audited: Audited) -> None:
    def run(decision: Any) -> AuditReport:
        return explain(audited.decomposition, audited.declined[:1], decision, cases=audited.cases, choices=SMALL)

    assert run("declined") == run(1) == run((1, 0)) == run(("declined", "approved"))


def test_words_come_from_the_dictionary_and_coverage_is_their_share(audited: Audited) -> None:
    text = audited.report.places[1].says
    cases = audited_cases(dictionary={text: "this very loan", "duration": "length", "age": "age"})
    report = audited.explain(cases=cases)
    assert report.places[1].words == "this very loan"
    assert report.places[2].words is None
    assert report.coverage.words == pytest.approx(2 / 20)


def test_on_a_bridge_the_numbers_are_the_same(audited: Audited) -> None:
    bridge = load_credit(host="bridge", decomposed=True)
    again = explain(bridge, audited.declined[0], "declined", cases=audited.cases, choices=SMALL)
    assert [r.place.position for r in again.reasons] == [r.place.position for r in audited.report.reasons]
    for own, other in zip(audited.report.reasons, again.reasons, strict=True):
        assert isinstance(other, Reason)
        assert other.effect == pytest.approx(own.effect, abs=1e-4)


# -- what makes no sense ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("decision", "kind", "message"),
    [
        ("approved", ValueError, "the model does not decide 'approved' here: its margin over 'declined' is -"),
        ("refused", ValueError, "the model has no decision 'refused'; near: "),
        (2, ValueError, "decision 2; the model has outputs 0..1"),
        ((1, 1), ValueError, "sets output 1 against itself"),
        (1.0, TypeError, "decision is a float; expected the number or the name of an output"),
    ],
)
def test_a_decision_that_the_model_does_not_make_is_refused(
    audited: Audited, decision: Any, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        explain(audited.decomposition, audited.declined[0], decision, cases=audited.cases)


def test_inputs_and_cases_that_do_not_fit_are_refused(audited: Audited) -> None:
    def run(inputs: Any, cases: Any = audited.cases, **more: Any) -> None:
        explain(audited.decomposition, inputs, 1, cases=cases, **more)

    outside = audited.declined[0].clone()
    outside[3] = 87
    with pytest.raises(ValueError, match=r"token ids run from \d+ to 87, but the vocabulary is 0..86"):
        run(outside)
    with pytest.raises(ValueError, match="the input has 20 tokens and the cases have 21"):
        run(audited.declined[0][:20])
    with pytest.raises(ValueError, match=r"inputs has shape \(2, 21\)"):
        run(audited.declined[:2])
    with pytest.raises(ValueError, match="the vocabulary has 3 texts; the model has 87 tokens"):
        run(audited.declined[0], audited_cases(vocabulary=["a", "b", "c"]))
    with pytest.raises(ValueError, match="position=21; expected a position of the input"):
        run(audited.declined[0], position=21)
    with pytest.raises(TypeError, match=r"cases is a dict; expected spd_lens\.audit\.Cases"):
        run(audited.declined[0], {})


def test_cases_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="3 outcomes for 150 cases"):
        audited_cases(outcomes=["a", "b", "c"])
    with pytest.raises(ValueError, match=r"dictionary\['age'\] has 5000 characters; expected 1 to 200"):
        audited_cases(dictionary={"age": "x" * 5_000})
    with pytest.raises(TypeError, match="dictionary holds 'age': 3; expected text for text"):
        audited_cases(dictionary={"age": 3})
    with pytest.raises(ValueError, match="25 places for 21 positions"):
        audited_cases(places=[str(i) for i in range(25)])
