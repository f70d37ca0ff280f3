"""`CircuitConfig` is checked whole when it is made, and `find_circuit` takes one, or changes to it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from spd_lens.circuits import CircuitConfig, find_circuit
from spd_lens.objective import PGD
from tests.small_models import tokens


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[(name, value) for name in ("steps", "rows_per_step", "restarts") for value in (0, -1, 2.5, True, "3")],
        *[(name, value) for name in ("minimality", "tolerance") for value in (-0.1, np.nan, np.inf, "1e-3", True)],
        *[(name, value) for name in ("p", "lr") for value in (0, -1.0, np.nan, None)],
        ("prune_tries", -1), ("prune_tries", 1.5), ("seed", 0.5), ("seed", None), ("holds_above", np.nan),
        ("by_position", 1), ("by_position", "yes"), ("start", "ones"), ("objective", "mse"), ("pgd", 8), ("pgd", None),
        ("masks", ()), ("masks", "all"), ("masks", ("pgd", "pgd")), ("masks", 3), ("masks", [["pgd"]]),
        ("budgets", 20), ("budgets", (0,)), ("budgets", (2.5,)), ("budgets", "20"),
    ],
)  # fmt: skip
def test_values_that_make_no_sense_are_named(field: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=field):
        CircuitConfig(**{field: value})
    with pytest.raises((ValueError, TypeError), match=field):
        CircuitConfig().changed(**{field: value})


def test_numpy_numbers_and_lists_become_plain_and_every_mistake_is_named() -> None:
    config = CircuitConfig(
        steps=np.int64(5), lr=np.float32(0.5), seed=np.int32(3), masks=["pgd"], budgets=[np.int64(2)], pgd=PGD(2)
    )  # fmt: skip
    assert (type(config.steps), type(config.lr), type(config.seed), type(config.budgets[0])) == (int, float, int, int)
    assert (config.masks, config.budgets, config.pgd) == (("pgd",), (2,), PGD(2))
    assert CircuitConfig(masks="pgd").masks == ("pgd",)
    with pytest.raises(ValueError, match=r"(?s)steps=0.*lr=-1"):
        CircuitConfig(steps=0, lr=-1)
    with pytest.raises(TypeError, match="no field 'stesp'; near: steps"):
        CircuitConfig(stesp=3)  # pyright: ignore[reportCallIssue]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.steps = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_a_search_takes_a_config_or_changes_to_it(planted: Any) -> None:
    config = CircuitConfig(masks="importance", steps=3, budgets=(1,), restarts=1, prune_tries=0, seed=2)
    one = find_circuit(planted, tokens(2), config)
    other = find_circuit(planted, tokens(2), config.changed(steps=9), steps=3)
    assert one.circuit.ids == other.circuit.ids
    assert one.importance == other.importance
    assert one.how == other.how
    assert (one.how["steps"], one.how["masks"], one.how["seed"]) == (3, ("importance",), 2)
    with pytest.raises(TypeError, match="CircuitConfig has no field 'step'; near: steps"):
        find_circuit(planted, tokens(2), step=3)


@pytest.fixture
def planted() -> Any:
    from spd_lens import decompose
    from tests.small_models import tiny_transformer

    return decompose(tiny_transformer(), {"blocks.0.mlp.W_in": 6})
