"""The verdict on the induction model's decomposition from a random start, and what its loss consists of."""

from __future__ import annotations

import pytest

from experiments.random_start import ADVERSARIES, FEW, configuration, known_heads, problems_of

HEADS = {"0.0": 0, "0.3": 20, "1.2": 40}


@pytest.mark.parametrize(
    ("used", "pgd", "said"),
    [
        (HEADS, 0.18, []),
        (HEADS | {"0.0": 2}, 0.18, ["2 subcomponents used outside the two heads"]),
        (HEADS | {"1.2": FEW - 19}, 0.18, [f"{FEW + 1} subcomponents used, more than {FEW}"]),
        (HEADS, 0.2, ["the adversary does 10% of everything off"]),
    ],
)
def test_a_run_succeeds_with_few_in_the_two_heads_and_a_weak_adversary(
    used: dict[str, int], pgd: float, said: list[str]
) -> None:
    known = known_heads({"previous_token_head": (0, 3), "induction_head": [1, 2]})
    assert problems_of(used, known, 2.0, pgd) == said


def test_the_adversaries_of_the_recipe() -> None:
    names = {name: [t.name for t in configuration(1e-3, 100, 0, name, 1e-3).reconstructions] for name in ADVERSARIES}
    assert names == {
        "merged": ["merged_subset"],
        "batch": ["stochastic_subset", "persistent_all"],
        "both": ["merged_subset", "persistent_all"],
    }
