"""The fairness view: what a protected attribute does to margins, decisions and subcomponents."""

from __future__ import annotations

import pytest
import torch

from spd_lens.audit import Decision, fairness_view
from tests.audit.conftest import Audited, audited_cases

DECLINED = Decision(1, 0)


def test_changed_and_removed_equal_plain_passes(audited: Audited) -> None:
    view = fairness_view(audited.decomposition, audited.cases, DECLINED, "foreign worker")
    p, tokens = 19, audited.cases.tokens
    values = tokens[:, p].unique()
    other = tokens.clone()
    other[:, p] = torch.where(tokens[:, p] == values[0], values[1], values[0])
    with torch.no_grad():
        before, after = (audited.decomposition.model(t)[:, -1] @ torch.tensor([-1.0, 1.0]) for t in (tokens, other))
    assert view.changed_margin == pytest.approx(float((after - before).abs().mean()), abs=1e-4)
    assert view.changed_decisions == pytest.approx(float(((after > 0) != (before > 0)).float().mean()))
    for group, value in zip(view.groups, values.tolist(), strict=True):
        own = tokens[:, p] == value
        assert group.n == int(own.sum())
        assert group.chosen_share == pytest.approx(float((before[own] > 0).float().mean()))
    assert "decisions change" in str(view)


def test_removing_an_attribute_leaves_no_difference_that_only_it_made(audited: Audited) -> None:
    """Cases that differ at one place alone: with that place at its mean, all margins are equal."""
    tokens = audited.declined[0].repeat(20, 1)
    values = audited.cases.tokens[:, 12].unique()
    tokens[:, 12] = values[torch.arange(20) % len(values)]
    view = fairness_view(audited.decomposition, audited_cases(20, tokens=tokens), DECLINED, "age")
    shares = {round(group.chosen_share_removed, 6) for group in view.groups}
    assert len(shares) == 1
    assert view.changed_margin > 0


def test_groups_can_be_named_and_unknown_ones_are_refused(audited: Audited) -> None:
    place = "personal status and sex"
    texts = sorted({audited.cases.token_text(t) for t in audited.cases.tokens[:, 8].tolist()})
    women = [text for text in texts if ": female" in text]
    groups = {"women": women, "men": [text for text in texts if text not in women]}
    view = fairness_view(audited.decomposition, audited.cases, DECLINED, place, groups=groups)
    assert [group.value for group in view.groups] == ["women", "men"]
    assert sum(group.n for group in view.groups) == len(audited.cases.tokens)
    with pytest.raises(ValueError, match="group 'x' has 'nobody'; near: "):
        fairness_view(audited.decomposition, audited.cases, DECLINED, place, groups={"x": ["nobody"]})
    with pytest.raises(ValueError, match="no place 'gender'; near: "):
        fairness_view(audited.decomposition, audited.cases, DECLINED, "gender")
    with pytest.raises(ValueError, match="a fairness view needs places"):
        fairness_view(audited.decomposition, audited_cases(places=None), DECLINED, "age")
