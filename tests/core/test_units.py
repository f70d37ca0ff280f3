"""Units: how subcomponents are named, and that everything which takes them means the same by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spd_lens import Decomposition, decompose
from spd_lens.circuits import circuit_of
from spd_lens.core import DELTA, WHOLE, Unit, units_of
from spd_lens.patching import ablation_effects, attribution_patching
from tests.small_models import tiny_transformer, tokens

IN, OUT = "blocks.0.mlp.W_in", "blocks.1.mlp.W_out"
PROMPTS = tokens(3)


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 3] - logits[:, -1, 5]


@pytest.fixture
def decomposition() -> Decomposition:
    return decompose(tiny_transformer(), {"blocks.*.mlp.W_*": 6})


def test_a_label_says_what_and_where_and_a_name_stands_for_it() -> None:
    unit = Unit(((IN, 1), (IN, 3), (OUT, 0)))
    assert str(unit) == f"{IN}[1, 3] + {OUT}[0]"
    assert str(unit.at(5, 7)) == f"{IN}[1, 3] + {OUT}[0] @5, 7"
    named = Unit(unit.members, (5,), name="whale detector")
    assert (named.label, str(named)) == ("whale detector", "whale detector @5")
    assert named == unit.at(5) != unit
    assert len({named, unit.at(5), unit}) == 2
    assert (named.site, named.id, named.position, unit.position) == (IN, 1, 5, None)
    assert str(Unit(((IN, DELTA),), (2,))) == f"{IN}[delta] @2"
    assert str(Unit((("embed", WHOLE),), (2,))) == "embed @2"


def test_ids_may_be_numbers_arrays_or_units(decomposition: Decomposition) -> None:
    wanted = (Unit(((IN, 3),)),)
    for given in (3, np.int64(3), torch.tensor(3), [3], (3,), np.array([3]), torch.tensor([3])):
        assert units_of(decomposition, {IN: given}) == wanted
        (hook,) = decomposition.ablate({IN: given})
        assert hook[0] == "blocks.0.hook_W_in_mask"
    assert units_of(decomposition, wanted[0]) == units_of(decomposition, list(wanted)) == wanted
    assert units_of(decomposition, [wanted[0].at(1), {IN: 3}]) == (wanted[0].at(1), wanted[0])
    assert units_of(decomposition, Unit(((IN, 3),), name="x"))[0].name == "x"
    with pytest.raises(ValueError, match="is named twice"):
        units_of(decomposition, [wanted[0], wanted[0]])
    with pytest.raises(ValueError, match=f"no decomposed site 'blocks.0.mlp.W_inn'; near: '{IN}'"):
        units_of(decomposition, Unit((("blocks.0.mlp.W_inn", 1),)))
    for wrong in (Unit(((IN, 6),)), Unit(((IN, DELTA),))):
        with pytest.raises(ValueError, match=r"expected ids in 0..5"):
            units_of(decomposition, wrong)


def logits(decomposition: Decomposition, hooks: Any) -> Tensor:
    with torch.no_grad(), decomposition.model.hooks(fwd_hooks=hooks):
        return decomposition.model(PROMPTS)


def by_hand(decomposition: Decomposition, cells: list[tuple[int | None, int]], keep: bool) -> Any:
    """A hook on the mask of `IN` that sets it entry by entry, in place."""

    def mask(value: Tensor, hook: Any) -> Tensor:
        value[:] = float(not keep)
        for position, c in cells:
            for p in range(value.shape[1]):
                if position in (None, p):
                    value[:, p, c] = float(keep)
        return value

    hooks: list[Any] = [("blocks.0.hook_W_in_mask", mask)]
    return hooks + ([("blocks.0.hook_W_in_delta_mask", lambda value, hook: 0 * value)] if keep else [])


def test_units_at_positions_are_ablated_and_kept_there_alone(decomposition: Decomposition) -> None:
    units = [Unit(((IN, 3), (IN, 4)), (2, 5)), Unit(((IN, 0),))]
    cells = [(2, 3), (2, 4), (5, 3), (5, 4), (None, 0)]
    for keep, hooks in ((False, decomposition.ablate(units)), (True, decomposition.keep(units))):
        expected = logits(decomposition, by_hand(decomposition, cells, keep))
        torch.testing.assert_close(logits(decomposition, hooks), expected)
        assert not torch.allclose(expected, logits(decomposition, []))
    with pytest.raises(ValueError, match=r"a unit at positions \[40\]"):
        logits(decomposition, decomposition.ablate(Unit(((IN, 3),), (40,))))


def test_effects_of_a_unit_at_positions_are_those_of_its_hooks(decomposition: Decomposition) -> None:
    units = [Unit(((IN, 3),), (2, 5)), Unit(((IN, 3),), (4,)), Unit(((OUT, 1),))]
    got = ablation_effects(decomposition, PROMPTS, metric, units)
    for i, unit in enumerate(units):
        torch.testing.assert_close(got.values[i, 0], metric(logits(decomposition, decomposition.ablate(unit))))
    one = ablation_effects(decomposition, PROMPTS, metric, {IN: 3}, positions=[4])
    torch.testing.assert_close(got.values[1], one.values[0])
    with pytest.raises(ValueError, match="has positions of its own"):
        ablation_effects(decomposition, PROMPTS, metric, units, positions=[4])
    with pytest.raises(ValueError, match=r"positions \[40\]"):
        ablation_effects(decomposition, PROMPTS, metric, Unit(((IN, 3),), (40,)))
    # Attribution patching of such a unit is the sum of its positions'.
    arguments = (decomposition, PROMPTS, tokens(3, seed=5), metric)
    whole = attribution_patching(*arguments, units[0], n_checked=1)
    parts = attribution_patching(*arguments, {IN: 3}, positions=[2, 5], n_checked=1)
    torch.testing.assert_close(whole.effects.effects[0, 0], parts.effects.effects[0].sum())


def test_circuits_are_made_of_units_and_give_them_back(decomposition: Decomposition) -> None:
    circuit = circuit_of(decomposition, {IN: [3, 1], OUT: []})
    assert circuit.units == [Unit(((IN, 1),)), Unit(((IN, 3),))]
    assert circuit_of(decomposition, circuit.units).ids == circuit.ids
    unit = circuit.as_unit("pair")
    assert (unit, unit.label) == (Unit(((IN, 1), (IN, 3))), "pair")
    ablated = logits(decomposition, decomposition.ablate(unit))
    torch.testing.assert_close(logits(decomposition, circuit.without(decomposition)), ablated)
    placed = [Unit(((IN, 1),), (2,)), Unit(((OUT, 0),), (4,))]
    by_position = circuit_of(decomposition, placed, n_positions=12)
    assert by_position.units == placed
    torch.testing.assert_close(
        logits(decomposition, by_position.without(decomposition)), logits(decomposition, decomposition.ablate(placed))
    )
    assert circuit_of(decomposition, {}).n_nodes == 0
    with pytest.raises(ValueError, match="give n_positions"):
        circuit_of(decomposition, placed)
    with pytest.raises(ValueError, match="only a circuit of subcomponents at all positions is one unit"):
        by_position.as_unit()
