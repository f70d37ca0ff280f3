"""Progress bars: switched off by TQDM_DISABLE, one line in a notebook, few lines in a log."""

from __future__ import annotations

import io
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from spd_lens.support import tqdm

PACKAGE = Path(__file__).parents[2] / "spd_lens"


def test_tqdm_disable_switches_off_also_what_says_it_is_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    for _ in tqdm(range(3), disable=False):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("TQDM_DISABLE", "0")
    for _ in tqdm(range(3), desc="seen"):
        pass
    assert "seen" in capsys.readouterr().err


def test_a_log_file_is_not_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    log = io.StringIO()
    with tqdm(total=10_000, file=log) as bar:
        for _ in range(10_000):
            bar.update()
    assert log.getvalue().count("\r") < 5


def test_a_notebook_without_widgets_shows_one_line_for_each_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    cell = nbformat.v4.new_code_cell(
        "import time\nfrom spd_lens.support import tqdm\n"
        "with tqdm(total=40, desc='outer') as bar:\n"
        "    for _ in range(40):\n        time.sleep(0.03)\n        bar.update()\n"
        "    for _ in tqdm(range(3), desc='inner', leave=False):\n        pass\n"
    )
    notebook = nbformat.v4.new_notebook(cells=[cell])
    NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    # Beside the bars only what importing warns of.
    lines = [output["data"]["text/plain"] for output in notebook.cells[0].outputs if "data" in output]
    assert len(lines) == 2
    assert "40/40" in lines[0]
    assert lines[1] == ""  # a bar that is not to stay leaves nothing


def test_every_bar_of_the_package_is_this_one() -> None:
    others = [
        path
        for path in PACKAGE.rglob("*.py")
        if re.search(r"^\s*(?:from|import) tqdm", path.read_text(), re.MULTILINE) and path.name != "progress.py"
    ]
    assert others == []
