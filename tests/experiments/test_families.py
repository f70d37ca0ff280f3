"""Every family: loaded from its own format, decomposed, held against the weight oracle, trained for one step."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from experiments.families import FAMILIES, TOLERANCE, table, tried, write_checkpoint

ROOT = Path(__file__).parents[2]


def test_the_table_of_the_docs_is_the_one_that_was_printed() -> None:
    results = json.loads((ROOT / "experiments" / "results" / "families" / "families.json").read_text())["families"]
    assert list(results) == list(FAMILIES)
    assert table(results) in (ROOT / "docs" / "hosts.md").read_text()


@pytest.mark.parametrize(
    "family", ["GPT-2", *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES if f != "GPT-2")]
)
def test_a_family_is_decomposed_exactly_and_trained_on_a_bridge(family: str, tmp_path: Path) -> None:
    found = tried(write_checkpoint(family, tmp_path / "checkpoint"), "bridge")
    assert "refused" not in found
    assert found["refused sites"] == {}
    assert found["oracle"] < TOLERANCE
    assert math.isfinite(found["loss"])
