"""The README's example runs as it stands, and its own verdict calls the decomposition good."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.tutorial
def test_the_example_gives_a_decomposition_that_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"<!-- example -->\n```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 16
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    report = names["evaluate"](names["decomposition"], names["TokenBatches"](names["held_out"], 16), max_batches=2)
    assert report.verdict.holds, str(report.verdict)
    assert all(site.relative_faithfulness < 0.03 for site in report.sites.values())


def test_every_link_of_the_readme_leads_somewhere() -> None:
    links = re.findall(r"\]\(((?!https?:)[^)#\s]+)", README)
    assert len(links) > 20
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_readme_shows_its_picture_and_no_badge() -> None:
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert pictures == ["docs/subcomponents.png"]
    for line in README.splitlines():
        if line.startswith("- "):
            assert len(re.findall(r"\d[\d.,]*", line)) <= 8, line
