"""`experiments/ablations.py`: variants differ, counts are those of `reproduce.py`, nothing is trained twice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from experiments import ablations, reproduce
from experiments.paper import EXPERIMENTS, Experiment
from experiments.runs import settings_hash
from spd_lens import Decomposition
from spd_lens.toys import TMS


@pytest.mark.parametrize("name", sorted(ablations.RUNS))
def test_every_variant_differs_from_all_others(name: str) -> None:
    made = ablations.variants(name)
    assert len({settings_hash(experiment.settings()) for experiment in made.values()}) == len(made) > 1
    assert made["the recipe"].settings() == EXPERIMENTS[name].settings()


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """TMS 5-2 on untrained targets, two steps; one variant."""

    def train_targets(seeds: Sequence[int]) -> list[nn.Module]:
        return [TMS(5, 2, seed=seed) for seed in seeds]

    full = EXPERIMENTS["tms_5-2"]
    experiment = replace(
        full, train_targets=train_targets, target_problems=lambda model: [], config=full.config.changed(steps=2)
    )
    monkeypatch.setitem(EXPERIMENTS, "tms_5-2", experiment)
    changed = {"tms_5-2": lambda recipe: {"ten steps": replace(recipe, config=recipe.config.changed(steps=10))}}
    monkeypatch.setattr(ablations, "_CHANGED", changed)


def test_counts_are_those_of_reproduce(tiny: None, tmp_path: Path) -> None:
    found = ablations.ablate(
        "tms_5-2", 2, results=tmp_path / "found", work=tmp_path / "work", reproduced=tmp_path / "none"
    )
    for label, experiment in ablations.variants("tms_5-2").items():
        results = tmp_path / label
        reproduce.reproduce(experiment, 2, results=results, work=tmp_path / "other")
        records = [json.loads((results / f"run-{i:03d}.json").read_text()) for i in range(2)]
        variant = found["variants"][label]
        assert variant["successes"] == sum(record["success"] for record in records)
        assert variant["mmcs"] == pytest.approx(sum(record["recovery"]["mmcs"] for record in records) / 2, abs=1e-4)
        assert variant["ml2r"] == pytest.approx(sum(record["recovery"]["ml2r"] for record in records) / 2, abs=1e-4)
        assert variant["alive"]["W_dec"] == [record["decoder"]["n_alive"] for record in records]
        assert variant["errors"]["W_enc"] == [record["encoder"]["identity_error"] for record in records]
    assert "ten steps" in ablations.table(found)


def test_runs_of_the_recipe_that_are_there_are_read_and_those_of_other_settings_are_not(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = EXPERIMENTS["tms_5-2"]
    reproduce.reproduce(recipe, 1, results=tmp_path / "there" / "tms_5-2", work=tmp_path / "work")
    trained: list[int] = []

    def counted(experiment: Experiment, *arguments: Any) -> list[Decomposition]:
        trained.append(experiment.config.steps)
        return reproduce.train_group(experiment, *arguments)

    monkeypatch.setattr(ablations, "train_group", counted)
    places = {"work": tmp_path / "work", "reproduced": tmp_path / "there"}
    read = ablations.ablate("tms_5-2", 1, results=tmp_path / "read", **places)
    assert trained == [10]
    again = ablations.ablate("tms_5-2", 1, results=tmp_path / "again", work=tmp_path / "w", reproduced=tmp_path / "no")
    assert trained == [10, 2, 10]
    assert read["variants"] == again["variants"]


def test_what_is_there_is_not_trained_again_and_other_settings_are_refused(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ablations.ablate("tms_5-2", 1, results=tmp_path, work=tmp_path / "work")

    def refuse(*arguments: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(ablations, "train_group", refuse)
    assert ablations.ablate("tms_5-2", 1, results=tmp_path, work=tmp_path / "work") == first
    with pytest.raises(ValueError, match="'the recipe' was made with other settings"):
        ablations.ablate("tms_5-2", 2, results=tmp_path, work=tmp_path / "work")
