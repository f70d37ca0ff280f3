"""The graph page in a browser: what it shows at first, on a click, of pins and groups, and as files."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

from spd_lens.graphs import AttributionCheck, AttributionGraph, GraphSettings, removal
from tests.chromium import Browser, chromium, needs_chromium
from tests.graphs.test_export import CONTEXTS, HOSTILE, hostile_graph

SITES = ["blocks.0.mlp.W_in", "blocks.0.mlp.W_out", "blocks.1.mlp.W_in"]
N_POSITIONS, PER_CELL, N_READOUTS = 12, 4, 5


def random_graph(seed: int = 0) -> AttributionGraph:
    """576 or so edges of random weights; the last readouts get little, as unlikely tokens do."""
    import random

    draw, inner = random.Random(seed), nx.DiGraph()
    common = {"importance": None, "probability": None, "readout_weight": None, "from_unshown": 0.0, "predicts": None}
    for t in range(N_POSITIONS):
        inner.add_node(f"e @{t}", **common, kind="embedding", label="token embedding", site="embed", subcomponent=-1,
                       number=-1, position=t, token=f" word{t}", row=0, activation=None)  # fmt: skip
        for row, site in enumerate(SITES, start=1):
            for c in range(PER_CELL):
                values = {**common, "importance": draw.random(), "activation": draw.gauss(0, 1)}
                inner.add_node(f"{site}[{c}] @{t}", **values, kind="subcomponent", label=f"{site}[{c}]", site=site,
                               subcomponent=c, number=c, position=t, token=f" word{t}", row=row)  # fmt: skip
    for r in range(N_READOUTS):
        values = {
            **common,
            "probability": 10.0**-r,
            "readout_weight": 10.0**-r,
            "predicts": f" t{r}",
            "activation": 3.0,
        }
        inner.add_node(f"readout {r}", **values, kind="readout", label=f"logit of ' t{r}'", site="", subcomponent=-1,
                       number=r, position=N_POSITIONS - 1, token=f" word{N_POSITIONS - 1}", row=4)  # fmt: skip
    nodes = list(inner.nodes(data=True))
    for s, a in nodes:
        for t, b in nodes:
            if a["row"] < b["row"] and a["position"] <= b["position"] and draw.random() < 0.08:
                inner.add_edge(s, t, weight=draw.gauss(0, 1))
    check = AttributionCheck(edges=(), predicted=(), measured=(), total=(), n_strongest=0, frozen="all")
    tokens = tuple(f" word{t}" for t in range(N_POSITIONS))
    return AttributionGraph(inner, check, tokens, GraphSettings(sites=tuple(SITES), readout_position=N_POSITIONS - 1))


@pytest.fixture(scope="module")
def graph() -> AttributionGraph:
    return random_graph()


@pytest.fixture(scope="module")
def folder(graph: AttributionGraph, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("pages")
    labels = {SITES[0]: {1: "given label"}}
    graph.to_html(made / "random.html", title="Random", labels=labels)
    hostile_graph().to_html(made / "hostile.html", title="Graph", contexts=CONTEXTS)
    return made


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as tab:
        tab.resize(1300, 900)
        yield tab


@pytest.fixture
def tab(browser: Browser, folder: Path) -> Browser:
    browser.messages.clear()
    browser.requests.clear()
    browser.open("about:blank")
    browser.open(folder / "random.html")
    return browser


def shown(tab: Browser) -> set[tuple[str, str]]:
    """The edges that are drawn and not hidden, as names of nodes."""
    found = tab.do(
        "[...paths].filter(([i,p])=>p.style.display!=='none')"
        ".map(([i])=>[data.nodes[data.edges[i][0]].name,data.nodes[data.edges[i][1]].name])"
    )
    assert len(found) == tab.do(
        "[...document.querySelectorAll('path.edge')].filter(p=>p.style.display!=='none').length"
    )
    return {(s, t) for s, t in found}


def click(tab: Browser, name: str, **keys: bool) -> None:
    place = f"data.nodes.findIndex(n=>n.name==={json.dumps(name)})"
    event = json.dumps({"bubbles": True, **keys})
    tab.do(f"document.querySelectorAll('g.node')[{place}].dispatchEvent(new MouseEvent('click',{event}))")


@needs_chromium
def test_at_first_every_readout_has_edges_and_the_others_are_those_with_most_influence(
    tab: Browser, graph: AttributionGraph
) -> None:
    edges = shown(tab)
    assert 150 <= len(edges) <= 150 + 3 * N_READOUTS < graph.graph.number_of_edges()
    weights = {(s, t): abs(d["weight"]) for s, t, d in graph.graph.edges(data=True)}
    for r in range(N_READOUTS):
        own = sorted((e for e in weights if e[1] == f"readout {r}"), key=lambda e: -weights[e])
        assert len(own) > 3
        assert set(own[:3]) <= edges
    # An edge's influence, by walking all paths from its receiver to the readouts.
    sums = {t: sum(weights[e] for e in graph.graph.in_edges(t)) for t in graph.graph}

    def reach(name: str) -> float:
        onward = sum(weights[name, t] / sums[t] * reach(t) for _, t in graph.graph.out_edges(name))
        return onward + (graph.graph.nodes[name]["readout_weight"] or 0.0)

    influence = {(s, t): weights[s, t] / sums[t] * reach(t) for s, t in weights}
    least = sorted(influence.values(), reverse=True)[149]
    assert {e for e in edges if e[1] not in {f"readout {r}" for r in range(N_READOUTS)}} == {
        e for e, v in influence.items() if v >= least and not e[1].startswith("readout")
    }
    assert min(influence[e] for e in edges) < least  # the readouts' own are beyond it
    assert tab.do("$('count').textContent").startswith(f"{len(edges)} of {len(weights)}")
    assert tab.messages == []


@needs_chromium
def test_a_chosen_node_shows_all_its_edges_whatever_the_slider_says(tab: Browser, graph: AttributionGraph) -> None:
    tab.do("slider.value=0;slider.dispatchEvent(new Event('input'))")
    before = shown(tab)
    assert len(before) <= 3 * N_READOUTS
    name = f"{SITES[1]}[2] @5"
    own = {(s, t) for s, t in graph.graph.edges if name in (s, t)}
    assert not own <= before
    click(tab, name)
    assert shown(tab) == before | own
    assert tab.do("[...document.querySelectorAll('#prompt .on')].map(e=>e.textContent)") == [" word5"]
    text = tab.do("panel.textContent")
    assert f"acted on by ({graph.graph.in_degree(name)})" in text
    assert f"acts on ({graph.graph.out_degree(name)})" in text
    click(tab, name)
    assert shown(tab) == before
    for measure in ("share", "size", "influence"):
        tab.do(f"$('measure').value='{measure}';$('measure').dispatchEvent(new Event('change'))")
        tab.do("slider.value=1000;slider.dispatchEvent(new Event('input'))")
        assert shown(tab) == set(graph.graph.edges)


@needs_chromium
def test_every_token_of_the_prompt_can_be_read(tab: Browser) -> None:
    words = [f"␣word{t}" for t in range(N_POSITIONS)]
    axis = "tokenLabels.filter(t=>t.g.getAttribute('visibility')!=='hidden').map(t=>t.word.textContent)"
    assert tab.do(axis) == words
    assert tab.do("[...document.querySelectorAll('#prompt span')].map(s=>s.textContent).join('')") == "".join(
        f" word{t}" for t in range(N_POSITIONS)
    )
    # No word is drawn over another one.
    boxes = tab.do("tokenLabels.map(t=>t.word.getBoundingClientRect().right)")
    assert all(a < b for a, b in itertools.pairwise(boxes))


@needs_chromium
def test_pins_groups_and_labels_are_kept_by_the_address(tab: Browser, graph: AttributionGraph, folder: Path) -> None:
    names = [f"{SITES[0]}[1] @3", f"{SITES[1]}[0] @5", f"{SITES[2]}[3] @7"]
    for name in names:
        click(tab, name, ctrlKey=True)
    assert "given label" in tab.do("$('pins').textContent")
    tab.do(
        "document.querySelectorAll('.tick')[0].click();document.querySelectorAll('.tick')[2].click();$('group').click()"
    )
    tab.do("(()=>{const n=document.querySelector('.group');n.value='my group';n.dispatchEvent(new Event('input'))})()")
    tab.do("$('only').click()")
    assert tab.do("[...document.querySelectorAll('.box title')].length") == 2
    assert "my group" in tab.do("subLayer.textContent")
    between = sum(
        d["weight"] for s, t, d in graph.graph.edges(data=True) if s in (names[0], names[2]) and t == names[1]
    )
    edges = tab.do("exported().edges.filter(e=>e.from==='my group')")
    assert sum(e["weight"] for e in edges) == pytest.approx(between, rel=1e-4)
    click(tab, names[1])
    tab.do("(()=>{const n=$('label');n.value='typed here';n.dispatchEvent(new Event('input'))})()")
    assert "typed here" in tab.do("subLayer.textContent")
    address = tab.do("location.href")
    tab.open("about:blank")
    tab.open(address)
    assert tab.do("$('only').checked")
    assert {"my group", "typed here"} <= set(tab.do("units().map(u=>u.name)"))
    assert tab.do("data.nodes[chosen].name") == names[1]
    kept = tab.do("exported()")
    assert kept["groups"] == [{"name": "my group", "members": [names[0], names[2]]}]
    tab.do("[...document.querySelectorAll('.line button')].find(b=>b.textContent==='ungroup').click()")
    assert tab.do("pinned.length") == 3
    assert tab.messages == []


@needs_chromium
def test_nodes_that_are_ablated_change_the_readouts_as_python_predicts(tab: Browser, graph: AttributionGraph) -> None:
    names = [f"{SITES[0]}[1] @3", f"{SITES[1]}[0] @5"]
    for name in names:
        click(tab, name)
        tab.key("x")
    fallen = removal.predicted_falls(graph.graph, set(names))
    got = tab.do("(()=>{const f=predicted(removed);return data.nodes.map((n,i)=>[n.name,f[i]])})()")
    for name, value in got:
        assert value == pytest.approx(fallen[name], rel=1e-3, abs=1e-3), name
    assert any(abs(fallen[f"readout {r}"]) > 0.01 for r in range(N_READOUTS))
    text = tab.do("$('removed').innerText")
    assert "This page holds no model, so it cannot measure" in text
    assert json.dumps(names).replace(" ", "") in re.sub(
        r"\s", "", tab.do("$('removed').querySelector('pre').textContent")
    )


@needs_chromium
def test_pictures_are_files_of_what_is_shown(tab: Browser, tmp_path: Path) -> None:
    import xml.etree.ElementTree as ET

    tab.downloads(tmp_path)
    tab.do("$('svgfile').click()")
    root = ET.fromstring(tab.downloaded(tmp_path / "graph.svg"))
    space = "{http://www.w3.org/2000/svg}"
    words = {e.text for e in root.iter(f"{space}text")}
    assert {"Random", "␣word3", "readouts", "␣t0"} <= words
    strokes = [
        e for e in root.iter(f"{space}path") if e.get("fill") == "none" and e.get("stroke", "").startswith("rgb")
    ]
    assert len(strokes) == len(shown(tab))
    assert not list(root.iter(f"{space}image")) + list(root.iter(f"{space}script"))
    tab.do("$('pngfile').click()")
    assert tab.downloaded(tmp_path / "graph.png").startswith(b"\x89PNG")
    # The picture has the colours of what is drawn.
    colours = tab.do(
        "(()=>{const c=pngCanvas(),p=c.getContext('2d').getImageData(0,0,c.width,c.height).data;let blue=0,red=0;"
        "for(let i=0;i<p.length;i+=4){if(p[i+2]-p[i]>60)blue++;if(p[i]-p[i+2]>60)red++}return [blue,red]})()"
    )
    assert min(colours) > 200
    assert tab.messages == []
    assert all(r.startswith(("file:", "about:", "blob:")) for r in tab.requests)


@needs_chromium
def test_hostile_texts_and_addresses_are_shown_and_run_nowhere(browser: Browser, folder: Path) -> None:
    browser.messages.clear()
    path = folder / "hostile.html"
    for fragment in ("", "#pin=0,1,99999,-1&groups=%5B%5B%22%3Cimg src=x%3E%22,0,1%5D,3,null%5D&node=1&only=1&off=0,2",
                     "#groups=%7B&pin=%3Cscript%3E&node=__proto__&off=1e9"):  # fmt: skip
        browser.open("about:blank")
        browser.open(path.as_uri() + fragment)
        assert browser.do("document.querySelectorAll('g.node').length") == 3
        assert browser.do("document.querySelectorAll('img').length") == 0
        assert browser.do("document.title") == "Graph"
    browser.open("about:blank")
    browser.open(path)
    browser.do("choose(1)")
    assert HOSTILE in browser.do("panel.textContent")
    assert browser.do("[...panel.querySelectorAll('.text span')].map(s=>s.textContent)") == ["whale ", HOSTILE, "plain"]
    browser.do("take(1);pin(1);pin(0);$('only').click();svgText();pngCanvas()")
    assert browser.messages == []
    broken = folder / "broken.html"
    broken.write_text(path.read_text().replace("</body>", "<script>nothing.here()</script></body>"))
    browser.open(broken)
    assert "Content Security Policy" in browser.messages[0]  # the console is really read
