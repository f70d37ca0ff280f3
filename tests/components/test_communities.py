"""Leiden communities of the graph of what fires together."""

from __future__ import annotations

import builtins
import itertools
from typing import Any

import numpy as np
import pytest

from spd_lens.components import leiden
from spd_lens.statistics import CoActivation
from tests.components.test_ensembles import mechanisms


def test_planted_mechanisms_are_communities() -> None:
    found = leiden(CoActivation.of({"a": mechanisms()[:, :12], "b": mechanisms()[:, 12:]}))
    names = [("a", c) for c in range(12)] + [("b", c) for c in range(12)]
    planted = {frozenset(names[3 * m : 3 * m + 3]) for m in range(8)}
    assert {frozenset(group) for group in found.groups} == planted


def test_the_quality_is_inner_jaccard_weight_minus_resolution_per_pair() -> None:
    fires = mechanisms(n=4)
    found = leiden(CoActivation.of({"W": fires}), resolution=0.2)
    total = 0.0
    for i, j in itertools.combinations(range(fires.shape[1]), 2):
        if found.labels[i] == found.labels[j]:
            both, either = (fires[:, i] & fires[:, j]).sum(), (fires[:, i] | fires[:, j]).sum()
            total += both / either - 0.2
    assert found.quality == pytest.approx(total)


def test_bad_arguments_and_a_missing_library_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    together = CoActivation.of({"W": mechanisms()})
    with pytest.raises(ValueError, match="resolution=2; expected a number above 0 and at most 1"):
        leiden(together, resolution=2.0)
    with pytest.raises(ValueError, match="nothing fires"):
        leiden(CoActivation.of({"W": np.zeros((4, 3), bool)}))
    real = builtins.__import__

    def absent(name: str, *arguments: Any, **named: Any) -> Any:
        if name in ("leidenalg", "igraph"):
            raise ModuleNotFoundError(name)
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "spd-lens\[components\]"'):
        leiden(together)
