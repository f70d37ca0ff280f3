"""Components as reasons, and the random cells that every reason has to beat."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from spd_lens.audit import AuditReport, Bench, Judged, Reason, audit_page, digests, equal_use, explain, verify
from spd_lens.components import Components
from spd_lens.core import Decomposition, Unit
from spd_lens.models import CREDIT_ATTRIBUTES, load_credit
from tests.audit.arithmetic import pass_by_hand
from tests.audit.conftest import SMALL, Audited, audited_cases, forged

HOSTILE = "</td><script>1</script>\u202e"


def grouped(audited: Audited) -> Components:
    """Components as somebody would name them: all that acts at some attributes, and a few subcomponents anywhere."""
    everything = tuple((name, c) for name, w in audited.decomposition.items() for c in range(w.n_subcomponents))
    at = CREDIT_ATTRIBUTES.index
    few = ("embed.W_E", 19), ("blocks.0.attn.W_V", 13), ("blocks.0.attn.W_V", 23)
    units = [
        Unit(everything, (at("checking account"), at("savings")), "money at hand"),
        Unit(everything, (at("duration"), at("amount"), at("purpose")), "this loan"),
        Unit(few, None, HOSTILE),
    ]
    return Components.of(audited.decomposition, units)


@pytest.fixture(scope="module")
def components(audited: Audited) -> Components:
    return grouped(audited)


@pytest.fixture(scope="module")
def report(audited: Audited, components: Components) -> AuditReport:
    found = audited.explain(components=components)
    assert len(found.reasons) == 3
    return found


def cells_of(decomposition: Decomposition, reason: Reason) -> dict[str, torch.Tensor]:
    """The reason's members as `[pos C]`, out of the file alone."""
    cells = {name: torch.zeros(21, weight.n_subcomponents, dtype=torch.bool) for name, weight in decomposition.items()}
    for members in reason.members:
        for position in members.positions:
            cells[members.site][position, members.ids] = True
    return cells


def test_what_a_component_does_equals_arithmetic(audited: Audited, report: AuditReport) -> None:
    """Its effect, what removing it does, and what changing its place predicts, in plain arithmetic on the weights."""
    decomposition, tokens = audited.decomposition, audited.declined[0]
    used = {name: g > 0.01 for name, g in decomposition.importance(tokens[None]).items()}
    controls = audited.cases.tokens[report.settings.control_cases]
    of_controls = {name: g > 0.01 for name, g in decomposition.importance(controls).items()}
    for reason in report.reasons:
        cells, effects = cells_of(decomposition, reason), []
        assert len({position for m in reason.members for position in m.positions}) > 1
        for k, other in enumerate(controls):
            _, values = pass_by_hand(decomposition, other)
            where = {name: cells[name] & (used[name][0] | of_controls[name][k]) for name in cells}
            margin, _ = pass_by_hand(decomposition, tokens, replaced={n: (where[n], values[n]) for n in cells})
            effects.append(report.decision.margin - margin)
        assert reason.effect == pytest.approx(sum(effects) / len(effects), abs=1e-4)
        assert (reason.effect_low, reason.effect_high) == pytest.approx((min(effects), max(effects)), abs=1e-4)
        gone = {name: (cells[name] & used[name][0]).nonzero().tolist() for name in cells}
        margin, _ = pass_by_hand(decomposition, tokens, removed=gone)  # pyright: ignore[reportArgumentType]
        assert reason.remove == pytest.approx(report.decision.margin - margin, abs=1e-4)
        told = reason.counterfactual
        assert told is not None
        changed = tokens.clone()
        changed[reason.place.position] = told.token
        _, values = pass_by_hand(decomposition, changed)
        margin, _ = pass_by_hand(decomposition, tokens, replaced={n: (cells[n], values[n]) for n in cells})
        assert told.predicted == pytest.approx(report.decision.margin - margin, abs=1e-4)


def test_members_are_the_components_own(components: Components, report: AuditReport) -> None:
    for reason in report.reasons:
        assert reason.component is not None
        assert {(m.site, c) for m in reason.members for c in m.ids} <= set(components[reason.component].members)
    assert report.adds_up()


def test_a_component_of_all_that_is_at_a_place_is_that_place(audited: Audited) -> None:
    everything = tuple((name, c) for name, w in audited.decomposition.items() for c in range(w.n_subcomponents))
    units = [Unit(everything, (p - 21,), f"all at {p}") for p in range(20)]
    again = audited.explain(components=units)
    assert len(again.reasons) == len(audited.report.reasons)
    for own, other in zip(audited.report.reasons, again.reasons, strict=True):
        assert other.component == f"all at {own.place.position}"
        for name in ("members", "effect", "remove", "keep_only", "controls", "worst", "flips"):
            assert getattr(other, name) == getattr(own, name)
    assert again.rest == audited.report.rest


# -- verified ----------------------------------------------------------------------------------------------------------


def test_a_report_about_components_verifies_with_them_alone(
    audited: Audited, components: Components, report: AuditReport, tmp_path: Path
) -> None:
    path = report.save(tmp_path / "report.json")
    assert audited.verify(path, components=components, inputs=audited.declined[0])
    assert "its reasons are components: give the ones that it was made with" in str(audited.verify(path))
    assert "other components, or other names of them" in str(audited.verify(audited.report, components=components))
    shuffled = components.chosen([2, 0, 1])
    assert digests(audited.decomposition, audited.cases, audited.declined[:1], shuffled) == report.digests


def test_other_members_and_other_names_are_refused(
    audited: Audited, components: Components, report: AuditReport
) -> None:
    first = components[0]
    fewer = [replace(first, members=first.members[1:]), *components[1:]]
    placed = [replace(first, positions=(3,)), *components[1:]]
    renamed = components.rename({"money at hand": "being a woman"})
    for others in (fewer, placed, renamed, components.chosen([0, 1])):
        ended = audited.verify(report, components=others)
        assert ended.status == 1
        assert "other components, or other names of them, than the report's" in str(ended)


def test_altered_membership_with_digests_that_fit_is_refused(
    audited: Audited, components: Components, report: AuditReport, tmp_path: Path
) -> None:
    """The forger's verifier has the true components, or the forger's own: neither accepts."""

    def refused(change: Any, given: Any) -> str:
        ended = audited.verify(forged(report, change, tmp_path), components=given)
        assert ended.status == 1
        return str(ended)

    def member(values: dict[str, Any]) -> None:
        values["reasons_for"][0]["members"][0]["ids"] = values["reasons_for"][0]["members"][0]["ids"][:-1] or [0]

    def position(values: dict[str, Any]) -> None:
        values["reasons_for"][0]["members"][0]["positions"].append(20)

    def called(values: dict[str, Any]) -> None:
        values["reasons_for"][0]["component"] = "being a woman"

    assert "reasons_for[0].members[0].ids" in refused(member, components)
    assert "reasons_for[0].members[0].positions" in refused(position, components)
    assert "reasons_for[0].component: the report says 'being a woman'" in refused(called, components)
    one = report.reasons_for[0]
    gone = (one.members[0].site, one.members[0].ids[0])
    others = [
        replace(u, members=tuple(m for m in u.members if m != gone)) if u.name == one.component else u
        for u in components
    ]
    fits = digests(audited.decomposition, audited.cases, audited.declined[:1], others).components

    def cut_anew(values: dict[str, Any]) -> None:
        values["digests"]["components"] = fits

    assert "other components" in refused(cut_anew, components)
    assert "running it again gives" in refused(cut_anew, others)


def test_with_a_fresh_seed_components_are_found_by_their_names(
    audited: Audited, components: Components, report: AuditReport
) -> None:
    ended = audited.verify(report, components=components, seed=5)
    assert ended.claims == len(report.reasons)
    assert ended.held == ended.claims - len(ended.disagreements)
    assert not any("it does nothing here" in text for text in ended.disagreements)


# -- shown -------------------------------------------------------------------------------------------------------------


def test_the_page_calls_components_by_their_names(audited: Audited, report: AuditReport, tmp_path: Path) -> None:
    page = audit_page(report, tmp_path / "report.html").read_text(encoding="utf-8")
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", page.split("</style>")[1]))
    assert "named by people" in text
    for reason in report.reasons:
        assert reason.component == HOSTILE or text.count(str(reason.component)) >= 3
        assert f"most through {reason.place.words}" in text
    assert {r.component for r in report.reasons} == {"money at hand", "this loan", HOSTILE}
    assert "named by people" not in audit_page(audited.report, tmp_path / "places.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "\u202e" not in page


# -- what makes no sense -----------------------------------------------------------------------------------------------


def test_components_that_make_no_sense_are_refused(
    audited: Audited, components: Components, without_type_checks: None
) -> None:
    def run(given: Any) -> None:
        explain(audited.decomposition, audited.declined[0], 1, cases=audited.cases, components=given, choices=SMALL)

    unit = components[0]
    with pytest.raises(ValueError, match="two components are called 'a'; a reason is told by its name"):
        run([replace(unit, name="a"), replace(components[1], name="a")])
    with pytest.raises(ValueError, match=r"a component's name has 300 characters: 'x+'; expected 1 to 200"):
        run([replace(unit, name="x" * 300)])
    with pytest.raises(ValueError, match=r"is at position 30; the input has positions -21\.\.20"):
        run([replace(unit, positions=(30,))])
    with pytest.raises(ValueError, match=r"no decomposed site 'blocks\.0\.mlp\.W_inn'; near: "):
        run([Unit((("blocks.0.mlp.W_inn", 0),), name="a")])
    with pytest.raises(TypeError, match="ids is 'money at hand'; expected"):
        run("money at hand")
    other = load_credit(decomposed=True, seed=1)
    with pytest.raises(ValueError, match="these components belong to another decomposition"):
        explain(other, audited.declined[0], 1, cases=audited.cases, components=components, choices=SMALL)
    with pytest.raises(ValueError, match="these components belong to another decomposition"):
        verify(audited.report, other, cases=audited.cases, components=components, standard=SMALL)


# -- controls ----------------------------------------------------------------------------------------------------------


def test_controls_have_as_many_cells_and_none_that_is_barred() -> None:
    """Also where the nearest are few: a set smaller than the reason's would be beaten too easily."""
    generator = torch.Generator().manual_seed(0)
    rates = {"a": torch.rand(5, 12, generator=generator).double() + 0.01, "b": torch.ones(5, 3).double()}
    rates["a"][4] = 0.0
    own = {name: torch.zeros_like(rate, dtype=torch.bool) for name, rate in rates.items()}
    own["a"][1], own["b"][1] = True, True
    wanted = {"a": own["a"].clone(), "b": torch.zeros_like(own["b"])}
    half = {"a": own["a"] & (torch.arange(12) < 6), "b": own["b"]}
    drawn = equal_use(own, [wanted, half], rates, 40, generator)
    assert drawn is not None
    for i, cells in enumerate(drawn):
        assert (int(cells["a"].sum()), int(cells["b"].sum())) == ((12, 0), (6, 3))[i % 2]
        assert not bool((cells["a"] & (own["a"] | (rates["a"] == 0))).any())
        assert not bool((cells["b"] & own["b"]).any())
    assert len({tuple(cells["a"].flatten().tolist()) for cells in drawn}) > 20


def test_controls_are_used_about_as_often() -> None:
    """Of 400 cells of all rates only those near 0.2 are drawn for one of 0.2."""
    rates = {"a": torch.linspace(0.01, 1.0, 400).double().view(4, 100)}
    own = {"a": torch.zeros(4, 100, dtype=torch.bool)}
    own["a"][0, 77] = True
    drawn = equal_use(own, [own], rates, 64, torch.Generator().manual_seed(1))
    assert drawn is not None
    found = torch.stack([rates["a"][cells["a"]] for cells in drawn])
    assert float((found - rates["a"][0, 77]).abs().max()) < 0.03


def test_too_few_cells_of_equal_use_are_none() -> None:
    rates = {"a": torch.ones(2, 3).double()}
    own = {"a": torch.tensor([[True] * 3, [False] * 3])}
    assert equal_use(own, [own], rates, 8, torch.Generator()) is not None
    rates["a"][1, 0] = 0.0
    assert equal_use(own, [own], rates, 8, torch.Generator()) is None


def test_how_often_a_cell_is_used_is_not_read_off_the_first_cases_of_sorted_data(audited: Audited) -> None:
    """300 cases: the first 256 are one and the same applicant, the others are all that differ."""
    own = audited_cases()
    sorted_ones = torch.cat([own.tokens[:1].expand(256, -1), own.tokens[1:45]])
    cases = replace(own, tokens=sorted_ones, outcomes=None, numbers=None)
    with torch.no_grad():
        bench = Bench(audited.decomposition, audited.declined[0], 1, cases, None, None, SMALL, 0)
    assert any(bool((rate > 0).any()) for rate in bench.rates.values())


def test_less_than_random_cells_do_is_no_reason_though_it_is_outside_of_theirs() -> None:
    def beyond(effect: float, low: float, high: float) -> bool:
        return Judged(0, effect, (effect,), (low, high), 1.0, None).beyond_controls

    assert beyond(0.3, -0.1, 0.2)
    assert beyond(-0.3, -0.1, 0.2)
    assert beyond(-0.01, 0.1, 0.2)
    assert not beyond(0.05, 0.1, 0.2)
    assert not beyond(-0.05, -0.2, -0.1)
    assert not beyond(0.15, 0.1, 0.2)


def test_a_model_in_bfloat16_is_audited(audited: Audited) -> None:
    other = load_credit(decomposed=True)
    other.model.to(torch.bfloat16)
    found = explain(other, audited.declined[0], 1, cases=audited.cases, choices=SMALL)
    assert found.adds_up()
    assert found.reasons[0].place == audited.report.reasons[0].place
    assert found.reasons[0].effect == pytest.approx(audited.report.reasons[0].effect, rel=0.1)
