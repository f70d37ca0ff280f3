"""Text that means to break out of a page or picture is shown as text, whatever page or picture it is."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import unicodedata
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import networkx as nx
import pytest
import torch

from spd_lens.core import Unit
from spd_lens.editing import EditEffect, EditReport
from spd_lens.graphs import AttributionCheck, AttributionGraph, Context, GraphSettings, Removal
from spd_lens.patching import Effects
from spd_lens.pictures import effects_heatmap, importance_figure, importance_page
from spd_lens.support import visible

SET = "document.title='broken'"
PAYLOADS = [
    f"<script>{SET}</script>", f"</script><script>{SET}</script>", f"</SCRIPT ><script>{SET}</script>",
    f"<!--<script>{SET}", "<!--", "-->", "]]>", "<![CDATA[", f'<img src=x onerror="{SET}">', f"<svg onload={SET}>",
    f"<iframe srcdoc='<script>{SET}</script>'>", f"</title><script>{SET}</script>", f"</style><script>{SET}</script>",
    f"</textarea><script>{SET}</script>", f'"><img src=x onerror={SET}>', f"'><img src=x onerror={SET}>",
    f'" onmouseover="{SET}', f"' onfocus='{SET}' autofocus='", f"javascript:{SET}", f'<a href="javascript:{SET}">x</a>',
    "<meta http-equiv=refresh content='0;url=about:blank'>", "<base href='https://example.org/'>", "<b>bold</b>",
    "<style>*{display:none}</style>", "<link rel=stylesheet href=x.css>", "<form action=x><button>", "&lt;b&gt;",
    "&#60;b&#62;", "&amp;", "{{ 7 * 7 }}", "{% raw %}", "{% endraw %}{{ data }}", "{# note #}",
    "${7*7}", "`${7*7}`", "$\\frac{1}{0}$",
    "$x$ and $y$", "\\$5", "%{x}%{z}", "__DATA__", "\u202egnp.exe", "\u2066a\u2069\u2067b", "\u200f\u05d0\u05d1 1",
    "a\x00b", "\u2028\u2029", "\ufeff\u200b", "\ud800", "x" * 20_000,
]  # fmt: skip
SITE = "blocks.0.mlp.W_in"


def graph_of(text: str) -> AttributionGraph:
    """Two nodes and an edge; every string is `text`."""
    inner = nx.DiGraph()
    common = {"importance": 0.5, "probability": None, "readout_weight": None, "from_unshown": 0.25, "activation": 1.5,
              "position": 0, "token": text, "label": text, "predicts": text}  # fmt: skip
    inner.add_node("s", **{**common, "kind": "subcomponent", "site": text, "subcomponent": 3, "number": 3, "row": 1})
    inner.add_node(text, **{**common, "kind": "readout", "site": "", "subcomponent": -1, "number": 9, "row": 2,
                            "importance": None, "readout_weight": 1.0})  # fmt: skip
    inner.add_edge("s", text, weight=float("nan"))
    check = AttributionCheck(
        edges=(("s", text),), predicted=(2.0,), measured=(2.0,), total=(1.0,), n_strongest=1, frozen=text
    )
    return AttributionGraph(inner, check, (text,), GraphSettings(model=text))


def graph_page(text: str, folder: Path) -> str:
    contexts = {(text, 3): [Context([text], [float("nan")])]}
    return graph_of(text).to_html(folder / "g.html", title=text, contexts=contexts).read_text(encoding="utf-8")


def text_page(text: str, folder: Path) -> str:
    g = torch.zeros(2, 4)
    g[0, 2] = 0.9
    return importance_page({text: g}, [text, "end"], title=text)


def graph_table(text: str, folder: Path) -> str:
    return graph_of(text)._repr_html_()


def effects_table(text: str, folder: Path) -> str:
    return effects_of(text)._repr_html_()


def effects_of(text: str) -> Effects:
    units = (Unit(((text, 1),)), Unit(((SITE, 4),), name=text))
    return Effects(text, units, (0, 1), torch.ones(2, 2, 1), torch.zeros(1))


def edit_page(text: str, folder: Path) -> str:
    effect = EditEffect(before=0.5, after=0.1, count_before=3, count_after=1, kl_at=0.1, kl_near=0.1, kl_elsewhere=0.0)
    made = EditReport(
        habit=text, lines=(text, text), n_prompts=1, n_generated=4, here=effect, wordings={text: effect},
        random=(effect,), parameters_changed={text: 3}, ranks={text: 1}, baked_difference=None, largest_change=1.0,
        relearning=None,
    )  # fmt: skip
    return made.to_html(folder / "edit.html", title=text).read_text(encoding="utf-8")


def removal_table(text: str, folder: Path) -> str:
    return Removal((text,), (text,), (1.0,), (0.5,), (float("nan"),))._repr_html_()


Page = Callable[[str, Path], str]
PAGES: list[Page] = [graph_page, text_page, edit_page, graph_table, effects_table, removal_table]


class Elements(HTMLParser):
    """The elements of a page with their attributes' names, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[str, ...]]] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, tuple(name for name, _ in attrs)))
        self.links += [str(value) for name, value in attrs if name in ("src", "href", "action", "srcdoc")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("payload", PAYLOADS, ids=range(len(PAYLOADS)))
def test_no_text_adds_an_element_or_reorders_a_page(page: Page, payload: str, tmp_path: Path) -> None:
    hostile, harmless = Elements(page(payload, tmp_path)), Elements(page("harmless", tmp_path))
    assert hostile.found == harmless.found
    assert hostile.links == []
    # Outside of the data, which scripts write with the same care, no character reorders or hides others.
    written = page(payload, tmp_path).split('<script type="application/json"')[0]
    assert not [c for c in html.unescape(written) if unicodedata.category(c) in ("Cf", "Cs") or c == "\0"]


@pytest.mark.parametrize("page", [graph_page, text_page, edit_page])
@pytest.mark.parametrize("payload", PAYLOADS, ids=range(len(PAYLOADS)))
def test_data_comes_back_as_it_was_and_only_the_pages_own_scripts_run(page: Page, payload: str, tmp_path: Path) -> None:
    written = page(payload, tmp_path)
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', written, re.DOTALL)
    assert found is not None
    content = json.loads(found.group(1))
    assert (content["lines"] if page is edit_page else content["tokens"])[0] == payload
    policy = re.search(r'http-equiv="Content-Security-Policy" content="(.*?)"', written)
    assert policy is not None
    assert re.fullmatch(
        r"default-src 'none'; script-src 'sha256-[\w+/=]+'; style-src 'unsafe-inline'; base-uri 'none'; "
        "form-action 'none'",
        policy.group(1),
    )


@pytest.mark.parametrize("payload", PAYLOADS, ids=range(len(PAYLOADS)))
def test_figures_draw_text_as_it_stands(payload: str) -> None:
    plt = pytest.importorskip("matplotlib.pyplot", reason="the extra `plots` is not installed")
    g = torch.zeros(2, 4)
    g[0, 2] = 0.9
    figure = importance_figure({payload: g}, [payload, "end"])
    figure.canvas.draw()  # an unfinished formula raises here, a character without a glyph warns
    label, title = figure.axes[0].get_xticklabels()[0].get_text(), figure.axes[0].get_title(loc="left")
    plt.close(figure)
    assert len(label) <= 14
    if payload.isascii() and payload.isprintable() and len(payload) <= 14:
        assert (label, title) == (payload, f"{payload}: 1 strongest of 4")


@pytest.mark.parametrize("payload", PAYLOADS, ids=range(len(PAYLOADS)))
def test_heat_maps_escape_tags_and_formulas(payload: str) -> None:
    pytest.importorskip("plotly", reason="the extra `plots` is not installed")
    figure = effects_heatmap(effects_of(payload), payload, [payload, payload])
    for text in (figure.layout.title.text, *figure.data[0].x):
        assert not set("<$") & set(text)
        assert not re.search(r"&(?!amp;|lt;|gt;|quot;|#x27;|#36;)", text)
    assert len({*figure.data[0].x}) == 2
    assert html.unescape(figure.layout.title.text) == f"{visible(payload)}: {visible(payload)}"


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium)")
@pytest.mark.parametrize("kind", ["graph", "text", "edit"])
def test_a_browser_shows_all_of_them_and_runs_none(kind: str, tmp_path: Path) -> None:
    if kind == "graph":
        made = graph_of("plain")
        for i, text in enumerate(PAYLOADS):
            data = {**made.graph.nodes["s"], "label": text, "token": text, "subcomponent": 10 + i, "position": i % 6}
            made.graph.add_node(f"{i} {text}", **data)
            made.graph.add_edge(f"{i} {text}", "plain", weight=1.0 + i)
        made = AttributionGraph(made.graph, made.check, tuple(PAYLOADS[:6]), GraphSettings())
        path = made.to_html(tmp_path / "page.html", title="harmless")
    elif kind == "edit":
        effect = EditEffect(0.5, 0.1, 3, 1, 0.1, 0.1, 0.0)
        many = dict.fromkeys(PAYLOADS, 1)
        report = EditReport(
            habit=PAYLOADS[0], lines=tuple(PAYLOADS), n_prompts=1, n_generated=4, here=effect,
            wordings=dict.fromkeys(PAYLOADS, effect), random=(), parameters_changed=many, ranks=many,
            baked_difference=None, largest_change=1.0, relearning=None,
        )  # fmt: skip
        path = report.to_html(tmp_path / "page.html", title="harmless")
    else:
        g = torch.rand(len(PAYLOADS), 4, generator=torch.Generator().manual_seed(0))
        path = tmp_path / "page.html"
        path.write_text(importance_page(dict.fromkeys(PAYLOADS, g), PAYLOADS, title="harmless"), encoding="utf-8")
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    dom = Elements(done.stdout)
    assert "<title>harmless</title>" in done.stdout
    assert not {"img", "iframe", "a", "b", "base", "link", "form"} & {tag for tag, _ in dom.found}
    for text in PAYLOADS[:-1]:
        assert visible(text).strip() in dom.text, text
