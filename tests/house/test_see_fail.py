"""The table of `see_fail.py` points at code and tests that are there; running it takes too long for the suite."""

from __future__ import annotations

import ast

import pytest

from tests.house.see_fail import MENDS, ROOT, Mend


@pytest.mark.parametrize("mend", MENDS, ids=lambda mend: f"{mend.kind}-{mend.file}")
def test_the_mend_and_its_test_are_where_the_table_says(mend: Mend) -> None:
    assert (ROOT / "spd_lens" / mend.file).read_text().count(mend.before) == 1
    file, _, name = mend.test.partition("::")
    tests = {node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)}
    assert not name or name.partition("[")[0] in tests


def test_every_kind_has_a_mend() -> None:
    assert {mend.kind for mend in MENDS} == set(range(1, 18))
