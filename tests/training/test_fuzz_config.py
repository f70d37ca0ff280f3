"""Configurations under random values: every one is refused in words when it is made, or is what it says."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spd_lens import PGD, Reconstruction, TrainConfig
from spd_lens.circuits import CircuitConfig
from spd_lens.objective import Merged, Persistent

PROPERTY = settings(deadline=None, max_examples=300, derandomize=True, database=None)
NUMBERS = st.one_of(
    st.integers(-3, 10**9), st.floats(allow_nan=True, allow_infinity=True), st.floats(1e-6, 10.0),
    st.sampled_from([np.float32(0.5), np.int64(3), np.bool_(True), 10**400]),
)  # fmt: skip
VALUES = st.one_of(
    NUMBERS, st.booleans(), st.none(), st.text(max_size=6), st.lists(NUMBERS, max_size=2),
    st.sampled_from(["1e-3", "bf16", "kl", "cosine", "smooth_l0", {}, {"*": 1.0}, {"*": "x"}, b"x", Reconstruction]),
    st.sampled_from([(Reconstruction(),), [Reconstruction(masks=PGD(2))], (Reconstruction(masks=Merged()),)]),
    st.sampled_from([(Reconstruction(masks=Persistent(scope="position")),), (Reconstruction(-1.0),), (3,)]),
)  # fmt: skip
TRAIN_FIELDS = [f.name for f in dataclasses.fields(TrainConfig)]
CIRCUIT_FIELDS = [f.name for f in dataclasses.fields(CircuitConfig)]


def made(cls: type[Any], values: dict[str, Any]) -> Any:
    """The configuration, or None if it was refused in words; anything else fails the test."""
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        if "expected" not in str(error) and "near:" not in str(error):
            pytest.fail(f"unclear: {values} -> {error}")
        return None


def check_plain(config: Any) -> None:
    """Numbers are Python's own and finite, counts are whole, and flags are flags."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        assert type(value).__module__ != "numpy", field.name
        assert not isinstance(value, float) or math.isfinite(value), field.name


@PROPERTY
@given(st.dictionaries(st.sampled_from(TRAIN_FIELDS), VALUES, min_size=1, max_size=3))
def test_a_train_config_is_refused_in_words_or_is_what_a_file_gives_back(values: dict[str, Any]) -> None:
    config = made(TrainConfig, values)
    if config is None:
        return
    check_plain(config)
    for step in (0, config.steps - 1):
        assert config.lr_factor(step) >= 0
        config.penalty_at(step)
    if not config.extra_terms:
        assert TrainConfig.from_json(json.loads(json.dumps(config.to_json(), allow_nan=False))) == config


@PROPERTY
@given(st.dictionaries(st.sampled_from(CIRCUIT_FIELDS), VALUES, min_size=1, max_size=3))
def test_a_circuit_config_is_refused_in_words_or_plain(values: dict[str, Any]) -> None:
    config = made(CircuitConfig, values)
    if config is not None:
        check_plain(config)


@PROPERTY
@given(st.text(min_size=1, max_size=12).filter(lambda name: name not in TRAIN_FIELDS))
def test_an_unknown_field_is_an_error_with_near_names(name: str) -> None:
    assert made(TrainConfig, {name: 1}) is None
