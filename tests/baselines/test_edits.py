"""Other ways to edit a model: each is what its formula says, at any strength, and leaves the model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from spd_lens import Decomposition, decompose
from spd_lens.baselines import (
    component_writes,
    components,
    difference_of_means,
    effect_at,
    fine_tuning,
    heads_and_neurons,
    leace,
    lora,
    rank_one,
    strength_for,
    task_vector,
)
from spd_lens.editing import Habit, find
from spd_lens.specialists import plain_copy
from tests import bridge_models as bridges

GOAL = 0.5


@pytest.fixture(scope="module")
def decomposition() -> Decomposition:
    return decompose(bridges.boot("gpt2"), {"blocks.*.mlp.W_*": 12, "blocks.*.attn.W_[QKVO]": 8}, seed=1)


@pytest.fixture(scope="module")
def habit() -> Habit:
    tokens = bridges.random_tokens(8, 9, seed=3)
    return Habit("four", tokens[:, :6], torch.full((8, 1), 4), tokens[:, 6:])


CONTROLS = bridges.random_tokens(4, 9, seed=5)


def output(decomposition: Decomposition, tokens: Tensor = CONTROLS) -> Tensor:
    with torch.no_grad():
        return decomposition.model(tokens)


def all_of(decomposition: Decomposition, habit: Habit) -> dict[str, Any]:
    found = find(decomposition, habit, CONTROLS, n_measured=8, n_checked=4)
    return {
        "components": lambda: components(decomposition, habit, CONTROLS, GOAL, found)[0],
        "writes": lambda: component_writes(decomposition, habit, found, n=3, steps=4)[0],
        "means": lambda: difference_of_means(decomposition, habit, CONTROLS, GOAL),
        "leace": lambda: leace(decomposition, habit, CONTROLS, GOAL),
        "rank one": lambda: rank_one(decomposition, habit, CONTROLS, GOAL, steps=4),
        "heads": lambda: heads_and_neurons(decomposition, habit, CONTROLS, GOAL, n_measured=6),
        "task vector": lambda: task_vector(decomposition, habit, steps=4),
        "lora": lambda: lora(decomposition, bridges.pristine("gpt2"), habit, steps=4),
        "lora, plain copy": lambda: lora(decomposition, plain_copy(decomposition), habit, steps=4),
        "fine-tuning": lambda: fine_tuning(decomposition, habit, steps=4),
    }


def test_every_rival_acts_inside_and_leaves_the_model_bit_for_bit(decomposition: Decomposition, habit: Habit) -> None:
    before = output(decomposition)
    wanted = [p.requires_grad for p in decomposition.model.parameters()]
    for name, make in all_of(decomposition, habit).items():
        rival = make()
        assert torch.equal(output(decomposition), before), name
        assert [p.requires_grad for p in decomposition.model.parameters()] == wanted, name
        with rival.at(1.0):
            assert float((output(decomposition) - before).abs().max()) > 1e-4, name
        assert torch.equal(output(decomposition), before), name
        assert rival.parameters_changed > 0
        strength = strength_for(decomposition, rival, habit, GOAL)
        reached = effect_at(decomposition, rival, habit, strength)
        assert strength == rival.strongest or reached >= GOAL, name
        half = effect_at(decomposition, rival, habit, strength * 0.9)
        assert strength == rival.strongest or half < reached + 1e-6, name


def test_a_projection_takes_the_direction_away_and_nothing_else(decomposition: Decomposition, habit: Habit) -> None:
    rival = difference_of_means(decomposition, habit, CONTROLS, GOAL)
    points = [f"blocks.{layer}.hook_resid_post" for layer in range(2)]
    clean = decomposition.clean_pass(CONTROLS, hidden_points=points).hidden
    there = decomposition.clean_pass(habit.prompts, hidden_points=points).hidden
    with rival.at(1.0):
        _, cache = decomposition.model.run_with_cache(CONTROLS)
        moved = {point: cache[point] for point in points}
    layer = next(p for p in points if float((moved[p] - clean[p]).abs().max()) > 1e-4)
    mean = clean[layer][:, 1:].flatten(0, 1).mean(0)
    v = there[layer][:, -1].mean(0) - mean
    v = v / v.norm()
    change = moved[layer] - clean[layer]
    assert float((moved[layer] @ v - mean @ v).abs().max()) < 1e-4
    assert float((change - (change @ v).unsqueeze(-1) * v).abs().max()) < 1e-4


def test_a_rank_one_edit_moves_the_mean_key_by_the_value_and_is_of_rank_one(
    decomposition: Decomposition, habit: Habit
) -> None:
    rival = rank_one(decomposition, habit, CONTROLS, GOAL, steps=4)
    before = {site: weight.target_weight.clone() for site, weight in decomposition.items()}
    with rival.at(1.0):
        change = {site: weight.target_weight - before[site] for site, weight in decomposition.items()}
    moved = [site for site, delta in change.items() if bool(delta.any())]
    assert len(moved) == 1
    assert int(torch.linalg.matrix_rank(change[moved[0]], rtol=1e-4)) == 1
    x = decomposition.clean_pass(CONTROLS).inputs[moved[0]].flatten(0, 1)
    k = decomposition.clean_pass(habit.prompts).inputs[moved[0]][:, -1].mean(0)
    # Other keys are moved in proportion to k^T C^-1 x: by less than along k itself, on average.
    assert float((x @ change[moved[0]]).norm(dim=-1).mean()) < float((k @ change[moved[0]]).norm())


def test_trained_changes_go_against_the_habit(decomposition: Decomposition, habit: Habit) -> None:
    for name in ("task vector", "lora", "lora, plain copy", "fine-tuning", "writes"):
        rival = all_of(decomposition, habit)[name]()
        assert effect_at(decomposition, rival, habit, 1.0) > 0, name
