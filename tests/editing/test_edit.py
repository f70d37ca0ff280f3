"""What an edit is, as hooks: right where it acts, gone afterwards, and refused where it makes no sense."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from spd_lens import Decomposition, decompose
from spd_lens.components import Components
from spd_lens.core import Unit
from spd_lens.editing import Above, Rewrite, edit
from tests.oracle import assert_close, assert_differs
from tests.small_models import TiedAutoencoder, tiny_transformer, tokens

W_IN, W_OUT, W_Q = "blocks.0.mlp.W_in", "blocks.1.mlp.W_out", "blocks.0.attn.W_Q"
SITES = {W_IN: 6, W_OUT: 5, W_Q: 4}


@pytest.fixture
def decomposition() -> Decomposition:
    return decompose(tiny_transformer(), SITES, seed=1)


def run(model: Any, batch: Tensor) -> Tensor:
    with torch.no_grad():
        return model(batch)


def test_taking_away_is_ablating(decomposition: Decomposition) -> None:
    batch = tokens(2)
    with torch.no_grad(), decomposition.model.hooks(fwd_hooks=decomposition.ablate({W_IN: [1, 4], W_OUT: [0]})):
        expected = decomposition.model(batch)
    for given in (
        {W_IN: [1, 4], W_OUT: [0]},
        {W_IN: {(1, 4): 0.0}, W_OUT: {0: 0}},
        Unit(((W_IN, 1), (W_IN, 4), (W_OUT, 0))),
        [Unit(((W_IN, 1),)), Unit(((W_IN, 4), (W_OUT, 0)))],
    ):
        assert torch.equal(edit(decomposition, given).logits(batch), expected)
    assert_differs(expected, run(decomposition.model, batch), 1e-3)


@pytest.mark.parametrize("broken", [False, True])
def test_the_model_is_exactly_as_before_when_the_edit_ends(decomposition: Decomposition, broken: bool) -> None:
    model, batch = decomposition.model, tokens(2)
    before, state = run(model, batch), copy.deepcopy(model.state_dict())
    hooks = {name: len(point._forward_hooks) for name, point in model.hook_dict.items()}
    made = edit(
        decomposition, {W_IN: {0: 0.0, 1: Rewrite(reads=torch.ones(16))}, W_OUT: {2: Rewrite(writes=torch.ones(16))}}
    )
    try:
        with made.applied():
            assert_differs(run(model, batch), before, 1e-3)
            if broken:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert torch.equal(run(model, batch), before)
    assert {name: len(point._forward_hooks) for name, point in model.hook_dict.items()} == hooks
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    decomposition.remove()
    assert torch.equal(run(model, batch), before)


def test_a_clean_pass_inside_an_edit_is_the_targets(decomposition: Decomposition) -> None:
    batch = tokens(2)
    clean = run(decomposition.model, batch)
    made = edit(decomposition, {W_IN: {0: 0.0}, W_OUT: {2: Rewrite(writes=torch.ones(16))}})
    with made.applied():
        assert torch.equal(decomposition.clean_pass(batch).output, clean)


def test_an_edit_and_other_hooks_add_up(decomposition: Decomposition) -> None:
    batch = tokens(2)
    both = edit(decomposition, {W_IN: [1, 2]}).logits(batch)
    hooks = decomposition.ablate({W_IN: [2]}) + edit(decomposition, {W_IN: [1]}).hooks()
    with decomposition.model.hooks(fwd_hooks=hooks):
        assert_close(run(decomposition.model, batch), both, 1e-5)


def test_a_conditional_edit_acts_where_the_clean_importance_is_above(decomposition: Decomposition) -> None:
    batch = tokens(3)
    g = decomposition.importance(batch)
    threshold = float(g[W_IN][..., 2].median())
    mask = torch.ones_like(g[W_IN])
    mask[..., 2] = torch.where(g[W_IN][..., 2] > threshold, 0.25, 1.0)
    with decomposition.model.hooks(fwd_hooks=decomposition.mask({W_IN: mask})):
        expected = run(decomposition.model, batch)
    made = edit(decomposition, {W_IN: {2: 0.25}}, when=Above(threshold))
    assert 0 < float((mask < 1).float().mean()) < 1
    assert_close(made.logits(batch), expected, 1e-6)
    assert_differs(expected, edit(decomposition, {W_IN: {2: 0.25}}).logits(batch), 1e-4)
    with made.applied(batch) as model:
        assert_close(run(model, batch), expected, 1e-6)


def test_a_rewrite_may_be_conditional_on_another_unit(decomposition: Decomposition) -> None:
    batch, new = tokens(3), torch.linspace(-1, 1, 16)
    g = decomposition.importance(batch)[W_Q][..., 1]
    threshold = float(g.median())
    x, weight = decomposition.clean_pass(batch).inputs[W_OUT], decomposition[W_OUT]
    moved = (x @ weight.V[:, 3]).unsqueeze(-1) * (new - weight.U[3]) * (g > threshold).unsqueeze(-1)
    with torch.no_grad(), decomposition.model.hooks(fwd_hooks=[(weight.site.output.name, lambda y, hook: y + moved)]):
        expected = decomposition.model(batch)
    made = edit(decomposition, {W_OUT: {3: Rewrite(writes=new)}}, when=Above(threshold, of=Unit(((W_Q, 1),))))
    assert_close(made.logits(batch), expected, 1e-5)


def test_strength_scales_what_is_added(decomposition: Decomposition) -> None:
    made = edit(decomposition, {W_IN: {1: 0.0, 2: 3.0}, W_OUT: {0: Rewrite(writes=torch.ones(16), scale=2.0)}})
    for site in made.sites:
        A, B = made.factors(site)
        half_A, half_B = made.scaled(0.5).factors(site)
        torch.testing.assert_close(half_A @ half_B, 0.5 * A @ B, atol=1e-6, rtol=1e-6)
    assert made.rank(W_IN) == 2
    assert made.rank(W_OUT) == 1


def test_units_keep_their_names(decomposition: Decomposition) -> None:
    made = edit(decomposition, {Unit(((W_IN, 1), (W_OUT, 2)), name="commas"): 0.5})
    assert str(made) == "edit of 2 subcomponents\n  commas: x 0.5"


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"blocks.0.mlp.W_inn": {1: 0}}, ValueError, r"no decomposed site 'blocks.0.mlp.W_inn'; near: .*W_in"),
        ({W_IN: {6: 0}}, ValueError, r"subcomponents \[6\] of blocks.0.mlp.W_in: expected ids in 0..5"),
        ({W_IN: {"3": 0}}, TypeError, r"expected integer ids in 0..5"),
        ({W_IN: 0.5}, TypeError, r"names no subcomponent; expected \{ids: 0.5\}"),
        ({W_IN: {1: "off"}}, TypeError, "expected a number"),
        ({W_IN: {1: float("nan")}}, ValueError, "expected a finite number"),
        ({W_IN: {1: 0, (1, 2): 0.5}}, ValueError, r"blocks.0.mlp.W_in\[1\] is named twice"),
        ({}, ValueError, "names no subcomponent at all"),
        (Unit(((W_IN, 9),)), ValueError, "expected ids in 0..5"),
        (Unit((("blocks.7.mlp.W_in", 0),)), ValueError, "no decomposed site 'blocks.7.mlp.W_in'"),
        (Unit(((W_IN, 1),), (3,)), ValueError, "weights are the same at every position"),
        ({W_IN: {1: 1.0, (2, 3): 1}}, ValueError, "this edit changes nothing"),
        ({W_IN: {1: Rewrite(writes=torch.ones(5))}}, ValueError, r"writes for .* is \(5,\); expected .*\(32,\)"),
        ({W_IN: {1: Rewrite(scale=2.0)}}, ValueError, "neither writes nor reads"),
        ({W_IN: {(1, 2): Rewrite(writes=torch.ones(32))}}, ValueError, "has 2 subcomponents"),
        ("commas", TypeError, "an edit is a str"),
        ([{W_IN: [1]}], TypeError, "the edit's list holds a dict; expected units"),
    ],
)
def test_an_edit_that_makes_no_sense_is_refused(
    decomposition: Decomposition, without_type_checks: None, given: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        edit(decomposition, given)


def test_a_subcomponent_that_is_zero_cannot_be_taken_away(decomposition: Decomposition) -> None:
    with torch.no_grad():
        decomposition[W_IN].U[3] = 0
    with pytest.raises(ValueError, match="changes nothing"):
        edit(decomposition, {W_IN: [3]})


def test_a_removed_decomposition_cannot_be_edited(decomposition: Decomposition, without_type_checks: None) -> None:
    made = edit(decomposition, {W_IN: [1]})
    decomposition.remove()
    for act in (lambda: edit(decomposition, {W_IN: [1]}), lambda: made.logits(tokens(1)), made.hooks, made.bake):
        with pytest.raises(ValueError, match="was removed from its model"):
            act()
    with pytest.raises(ValueError, match="was removed"), made.applied():
        pass


def test_components_of_another_decomposition_are_refused(decomposition: Decomposition) -> None:
    """All of them, and one of them, although its sites and ids exist here, too."""
    other = decompose(tiny_transformer(), SITES, seed=2)
    components = Components.of(other, [{W_IN: [1, 2], W_OUT: [0]}, {W_Q: [3]}], names=["commas", "colons"])
    assert edit(other, components["commas"]).sites
    with pytest.raises(ValueError, match="these components belong to another decomposition"):
        edit(decomposition, components)
    one = components["commas"]
    for given in (one, {one: 0.5}, [one], {one.at(): 0.0}, [components.rename({"colons": "dots"})["dots"]]):
        with pytest.raises(ValueError, match=r"is a component of another decomposition \(V and U of blocks"):
            edit(decomposition, given)
    by_hand = Unit(one.members, name="commas")
    assert edit(decomposition, by_hand).sites == edit(other, one).sites


def test_a_component_of_a_decomposition_that_was_trained_further_is_refused(decomposition: Decomposition) -> None:
    one = Components.of(decomposition, [{W_IN: [1, 2]}])[0]
    with torch.no_grad():
        decomposition[W_Q].U.mul_(1.1)  # not one of its sites
    assert edit(decomposition, one).sites == (W_IN,)
    with torch.no_grad():
        decomposition[W_IN].V.mul_(1.1)
    with pytest.raises(ValueError, match="component 0 is a component of another decomposition"):
        edit(decomposition, one)


def test_what_is_no_decomposition_is_named(without_type_checks: None) -> None:
    with pytest.raises(TypeError, match=r"edit was given a .*; expected a Decomposition"):
        edit(tiny_transformer(), {W_IN: [1]})  # pyright: ignore


def test_conditions_are_checked(decomposition: Decomposition, without_type_checks: None) -> None:
    with pytest.raises(ValueError, match=r"importance is in \[0, 1\]"):
        edit(decomposition, {W_IN: [1]}, when=Above(1.5))
    with pytest.raises(TypeError, match="expected Above"):
        edit(decomposition, {W_IN: [1]}, when=0.5)  # pyright: ignore
    with pytest.raises(ValueError, match="no decomposed site"):
        edit(decomposition, {W_IN: [1]}, when=Above(0.5, of=Unit((("nowhere", 0),))))
    with pytest.raises(ValueError, match=r"has positions.*give unit\.at\(\)"):
        edit(decomposition, {W_IN: [1]}, when=Above(0.5, of=Unit(((W_IN, 2),), (3,))))
    with pytest.raises(TypeError, match=r"Above\(of=...\) is .*expected a Unit"):
        edit(decomposition, {W_IN: [1]}, when=Above(0.5, of=[Unit(((W_IN, 2),))]))  # pyright: ignore
    made = edit(decomposition, {W_IN: [1]}, when=Above(0.5))
    with pytest.raises(ValueError, match="give the tokens"):
        made.hooks()


def test_masks_cannot_express_a_direction(decomposition: Decomposition) -> None:
    with pytest.raises(ValueError, match=r"use `with edit.applied\(\):`"):
        edit(decomposition, {W_IN: {1: Rewrite(reads=torch.ones(16))}}).hooks()


def test_a_model_without_tokens_can_be_edited() -> None:
    decomposition = decompose(TiedAutoencoder(), {"encoder.W": 4, "decoder.W": 4}, seed=0)
    x = torch.rand(3, 5)
    V, U, W = decomposition["encoder.W"].V, decomposition["encoder.W"].U, decomposition.model.W
    hidden = x @ (W - torch.outer(V[:, 2], U[2]))
    expected = torch.relu(hidden @ W.T + decomposition.model.b)
    torch.testing.assert_close(edit(decomposition, {"encoder.W": [2]}).logits(x), expected.detach())
