"""The induction model decomposed from a random start: its verdict, what its loss consists of, and that it resumes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from experiments.random_start import ADVERSARIES, FEW, configuration, decomposed, fit, known_heads, problems_of
from spd_lens.models import RepeatedSequences

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


def test_a_killed_run_goes_on_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configuration(2e-3, 4, 0, "merged", 2e-3).changed(checkpoint_every=2)
    whole, killed, again = (decomposed("global", 128, 0, "cpu") for _ in range(3))
    fit(whole, config, 2, "cpu", tmp_path / "whole")
    asked: list[int] = []

    def batch(self: RepeatedSequences, index: int) -> torch.Tensor:
        asked.append(index)
        if index == 3 and asked.count(3) == 1:
            raise RuntimeError("killed")
        return draw(self, index)

    draw = RepeatedSequences.batch
    monkeypatch.setattr(RepeatedSequences, "batch", batch)
    with pytest.raises(RuntimeError, match="killed"):
        fit(killed, config, 2, "cpu", tmp_path / "again")
    log = tmp_path / "again" / "log.jsonl"
    first = log.read_text().splitlines()[0]
    seconds = fit(again, config, 2, "cpu", tmp_path / "again")
    assert log.read_text().splitlines()[0] == first  # with its time: the first step was not run again
    for ours, theirs in zip(again.subcomponent_parameters(), whole.subcomponent_parameters(), strict=True):
        assert torch.equal(ours, theirs)
    parts = [float(path.read_text()) for path in (tmp_path / "again" / "cpu").glob("*.txt")]
    assert len(parts) == 2
    assert seconds == pytest.approx(sum(parts))
