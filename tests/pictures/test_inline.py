"""The browser inside a notebook: the static page, the box that runs the model, and what is shown without a kernel."""

from __future__ import annotations

import builtins
import html
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from spd_lens import Decomposition, decompose, harvest
from spd_lens.models import load_tiny_lm
from spd_lens.pictures import browse
from tests.chromium import chromium, needs_chromium

SITE = "blocks.1.mlp.W_in"


@pytest.fixture(scope="module")
def decomposition() -> Decomposition:
    torch.manual_seed(0)
    return decompose(load_tiny_lm(), {SITE: 32}, gate="shared", gate_width=16)


@pytest.fixture(scope="module")
def browser(decomposition: Decomposition) -> Any:
    tokens = decomposition.model.to_tokens("The whale turned upon the boat, and the captain stood in the bow.")
    return browse(harvest(decomposition, tokens, threshold=0.3), decomposition, max_pages=8)


def page_in(frame: str) -> str:
    found = re.fullmatch(
        r'<iframe sandbox="allow-scripts allow-downloads" srcdoc="([^"]*)" style="[^"]*"></iframe>', frame
    )
    assert found is not None
    return html.unescape(found.group(1))


def test_the_box_runs_the_model_on_a_sentence(browser: Any, decomposition: Decomposition) -> None:
    widget = browser.widget()
    box, button = widget.children[1].children
    box.value = "Call me <b>Ishmael</b>"
    button.click()
    page = page_in(widget.children[2].value)
    assert "<b>Ishmael" not in page.split("<script")[0]
    assert page == browser.run("Call me <b>Ishmael</b>")
    g = decomposition.importance(decomposition.model.to_tokens(box.value))[SITE][0]
    shown = re.findall(r'"active": \[([\d, ]*)\]', page)
    assert [int(v) for v in shown[0].split(",")] == (g > 0.1).sum(-1).tolist()
    box.value = ""
    button.click()
    assert widget.children[2].value == "<pre>the sentence is empty</pre>"


def test_without_a_kernel_the_page_is_shown_and_with_one_the_widget_too(
    browser: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = browser._repr_mimebundle_()
    assert page_in(bundle["text/html"]) == browser.page
    assert "application/vnd.jupyter.widget-view+json" in bundle
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "ipywidgets":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert set(browser._repr_mimebundle_()) == {"text/html", "text/plain"}
    with pytest.raises(ImportError, match=r"needs ipywidgets: pip install 'spd-lens\[notebook\]'"):
        browser.widget()


def test_the_harvest_of_another_decomposition_is_refused(decomposition: Decomposition) -> None:
    other = decompose(load_tiny_lm(), {SITE: 32}, gate="shared", gate_width=16, seed=1)
    found = harvest(decomposition, torch.arange(1, 9)[None], threshold=0.3)
    with pytest.raises(ValueError, match="the harvest is of another decomposition of this target"):
        browse(found, other)
    with pytest.raises(ValueError, match="made without a decomposition"):
        browse(found).run("hello")


@needs_chromium
def test_in_a_frame_the_list_opens_components_and_goes_back(browser: Any, tmp_path: Path) -> None:
    notebook = tmp_path / "notebook.html"
    notebook.write_text(f"<!doctype html><meta charset=utf-8><title>n</title>{browser._repr_html_()}", encoding="utf-8")
    alone = tmp_path / "alone.html"
    alone.write_text(browser.page, encoding="utf-8")
    with chromium(tmp_path / "profile") as tab:
        tab.resize(1200, 800)
        tab.open(notebook)
        assert tab.messages == []
        tab.open(alone)
        tab.key("j")
        tab.key("Enter")
        assert tab.do("document.body.className") == "list comp open"
        assert SITE in tab.do("$('heading').textContent")
        assert "Where it fires" in tab.do("document.body.innerText")
        tab.key("e")
        tab.type("mine")
        tab.key("Escape")
        tab.do("$('back').click()")
        tab.wait("[...document.querySelectorAll('.lab')].some(e=>e.textContent==='mine')")
        assert tab.messages == []
        assert all(request.startswith(("file:", "about:", "data:")) for request in tab.requests)
