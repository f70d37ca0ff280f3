"""The verdict: what it accepts, what it rejects, and in which words."""

from __future__ import annotations

from typing import Any

import pytest

from spd_lens.evaluation import Verdict, judge

GOOD: dict[str, Any] = {
    "kind": "kl", "divergence": {"stochastic": 0.05, "all off": 1.0}, "adversarial": {20: 0.12}, "l0": 9.0,
    "n_subcomponents": 200, "rank": 100, "deletion": 0.04,
}  # fmt: skip


def _judge(**changes: Any) -> Verdict:
    return judge(**{**GOOD, **changes})


def test_a_good_decomposition_holds_and_says_at_which_budget() -> None:
    verdict = _judge()
    assert verdict.holds
    assert verdict.judged
    assert str(verdict).startswith("Holds on this data.")
    assert "20 steps reaches 0.12: 12% of everything off, 2.4 times random masks" in str(verdict)
    assert "Budgets above 20 steps were not tried" in str(verdict)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adversarial": {20: 1.3}}, "does more damage (1.3 of KL) than removing the sites"),
        ({"adversarial": {20: 0.4}}, "a quarter of everything off or 3 times random masks would do"),
        ({"divergence": {"stochastic": 0.4, "all off": 1.0}}, "at most 25% would do"),
        ({"l0": 60.0}, "nothing is separated yet"),
        ({"deletion": 0.2}, "some of it is needed after all"),
    ],
)
def test_what_fails_is_said_first(changes: dict[str, Any], words: str) -> None:
    verdict = _judge(**changes)
    assert verdict.judged
    assert not verdict.holds
    assert verdict.sentences[0] == "DOES NOT HOLD."
    assert words in verdict.sentences[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"adversarial": {20: 0.24}},  # under a quarter of everything off
        {"divergence": {"stochastic": 0.2, "all off": 1.0}, "adversarial": {20: 0.55}, "deletion": 0.1},  # 3 times
        {"divergence": {"stochastic": 1e-4, "all off": 1.0}, "deletion": 9e-3},  # as good as nothing
        {"deletion": None},
    ],
)
def test_either_mark_is_enough(changes: dict[str, Any]) -> None:
    assert _judge(**changes).holds


def test_the_smallest_budget_is_judged_and_the_larger_are_told() -> None:
    verdict = _judge(adversarial={20: 0.12, 80: 0.3, 160: 2.0})
    assert verdict.holds
    assert "From 160 steps on the adversary does more damage than removing the sites" in str(verdict)
    assert "With 80 steps it reaches 0.2, 20% of everything off" in str(_judge(adversarial={20: 0.1, 80: 0.2}))


def test_without_an_adversary_nothing_holds() -> None:
    verdict = _judge(adversarial={})
    assert not verdict.judged
    assert not verdict.holds
    assert "no adversary was tried" in str(verdict)


def test_an_adversary_of_no_steps_is_none() -> None:
    assert not _judge(adversarial={0: 0.05}).judged
    assert not _judge(adversarial={0: 0.05, 20: 0.9}).holds
    assert _judge(adversarial={0: 0.05, 20: 0.12}) == _judge(adversarial={20: 0.12})


def test_sites_that_do_not_matter_are_not_judged() -> None:
    verdict = _judge(divergence={"stochastic": 0.0, "all off": 0.0})
    assert not verdict.judged
    assert not bool(verdict)
