"""Pictures: what is drawn, that pages stand alone, and that text from data stays text."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="the extra `plots` is not installed")

from spd_lens.pictures import importance_figure, importance_page, save_importance, strongest

TOKENS = ["The", " whale", "</script><script>document.title='broken'</script>", " $x$ & <b>", "\n"]


@pytest.fixture
def importances() -> dict[str, torch.Tensor]:
    g = torch.zeros(5, 4)
    g[1, 2], g[0, 3], g[4, 0] = 1.0, 0.6, 0.05
    return {"blocks.0.mlp.W_in": g, "blocks.0.mlp.W_out": torch.zeros(5, 3)}


def test_strongest_keeps_what_matters_in_order_of_its_peak(importances: dict[str, torch.Tensor]) -> None:
    assert strongest(importances["blocks.0.mlp.W_in"], 4) == [3, 2]
    assert strongest(importances["blocks.0.mlp.W_in"], 1) == [2]


def test_the_figure_shows_the_importances(importances: dict[str, torch.Tensor]) -> None:
    figure = importance_figure(importances, TOKENS)
    image = figure.axes[0].images[0].get_array()
    assert image is not None
    torch.testing.assert_close(torch.tensor(image.data), importances["blocks.0.mlp.W_in"][:, [3, 2]].T)
    assert "no importance above 0.1" in figure.axes[1].texts[0].get_text()
    assert len(figure.axes[1].get_xticklabels()) == 5


def test_the_page_stands_alone_and_escapes_everything(importances: dict[str, torch.Tensor]) -> None:
    page = importance_page(importances, TOKENS, title="<i>__DATA__ title</i>")
    assert "&lt;i&gt;__DATA__ title&lt;/i&gt;" in page
    assert not re.search(r"""(src|href)\s*=|https?://""", page)
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    content = json.loads(data.group(1))
    assert content["tokens"] == TOKENS
    assert content["sites"][0]["rows"] == [
        {"id": 2, "values": [0.0, 1.0, 0.0, 0.0, 0.0]},
        {"id": 3, "values": [0.6, 0.0, 0.0, 0.0, 0.0]},
    ]
    assert content["sites"][0]["active"] == [1, 1, 0, 0, 0]


def test_both_files_are_written(importances: dict[str, torch.Tensor], tmp_path: Path) -> None:
    picture, page = save_importance(importances, TOKENS, tmp_path / "out", title="t")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert page.stat().st_size > 1000


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium)")
def test_a_browser_shows_the_text_and_the_buttons(importances: dict[str, torch.Tensor], tmp_path: Path) -> None:
    _, page = save_importance(importances, TOKENS, tmp_path, title="Importance")
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "<title>Importance</title>" in dom
    assert dom.count("<button>") == 2
    assert "&lt;/script&gt;" in dom
    assert "background: rgba(122, 31, 107, 0.75)" in dom
