"""Whatever is done to a file, the answer is a ValueError that names it, or what was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.fuzz_files import Saved, fuzz, outcome, saved_things


def test_mutated_files_are_refused_or_harmless(tmp_path: Path) -> None:
    counts, wrong = fuzz(150, tmp_path, first_seed=10_000)
    print(f"150 mutated files: {dict(counts)}")
    assert wrong == []
    assert counts["refused"] > 100


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Saved, Any]]:
    scratch = tmp_path_factory.mktemp("fuzz")
    return {name: (saved, saved.expected()) for name, saved in saved_things(scratch).items()}


@pytest.mark.parametrize("kind", ["save", "run", "graph", "evaluation"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_any_mutation_of_a_kind_of_file(kind: str, things: Any, tmp_path_factory: Any, seed: int) -> None:
    saved, expected = things[kind]
    result, what = outcome(saved, expected, seed, tmp_path_factory.mktemp("one"))
    assert result in ("refused", "harmless"), what
