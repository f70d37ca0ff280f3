"""The code of the pages runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from spd_lens.toys import TMS

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_on_extending_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "extending.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 4
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks:
        exec(block, names)


def test_the_setting_for_several_models_runs_as_pasted() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / "settings.md").read_text(encoding="utf-8"), re.DOTALL)
    assert "steps=4_000" in block
    names: dict = {"tms": TMS(5, 2)}
    exec(block.replace("steps=4_000", "steps=20"), names)
    assert names["decomposition"] in names["members"]
    assert names["result"].steps == 20
