"""Graphs in other people's viewers: the expressions that read a file, and circuit-tracer's own page in a browser."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from urllib.parse import urlencode

import numpy as np
import pytest
import torch

from spd_lens import Decomposition, decompose, harvest
from spd_lens.core import Unit
from spd_lens.graphs import AttributionGraph, GraphSettings, attribution_graph, dataset_graph, viewer_features
from spd_lens.models import load_tiny_lm
from spd_lens.statistics import Harvest, Histogram
from tests.chromium import Browser, chromium, needs_chromium
from tests.graphs.test_export import hostile_graph
from tests.support.foreign_viewer import frontend, served

SITES = {"blocks.1.mlp.W_*": 24, "blocks.1.attn.W_V": 12}
PROMPT = 'The "white" whale'


@pytest.fixture(scope="module")
def decomposition() -> Decomposition:
    torch.manual_seed(0)
    return decompose(load_tiny_lm(), SITES, gate="shared", gate_width=16)


@pytest.fixture(scope="module")
def graph(decomposition: Decomposition) -> AttributionGraph:
    tokens = decomposition.model.to_tokens(PROMPT)
    return attribution_graph(decomposition, tokens, importance_above=0.0, n_checked=4, max_nodes=40)


@pytest.fixture(scope="module")
def found(decomposition: Decomposition) -> Harvest:
    tokens = decomposition.model.to_tokens("The whale turned upon the boat, and the captain stood in the bow.")
    return harvest(decomposition, tokens, threshold=0.3)


def viewers_probability(label: str) -> float:
    """What both viewers do with the label of a logit node, `+d.clerp.split('(p=')[1].split(')')[0]`."""
    return float(label.split("(p=")[1].split(")")[0])


def viewers_token(label: str) -> str:
    """What both viewers take for the token of a logit node, `d.clerp.split('"')[1]`."""
    return label.split('"')[1]


# -- without a browser -------------------------------------------------------------------------------------------------


def test_viewers_read_probability_and_token_from_the_labels(graph: AttributionGraph, tmp_path: Path) -> None:
    whole = json.loads(graph.to_json(tmp_path / "g.json").read_text())
    logits = [node for node in whole["nodes"] if node["feature_type"] == "logit"]
    assert len(logits) > 2
    for node in logits:
        data = graph.graph.nodes[node["spd_lens"]["id"]]
        assert viewers_probability(node["clerp"]) == pytest.approx(data["probability"], rel=0.06, abs=0.0005)
        assert viewers_token(node["clerp"]) == data["predicts"].replace("\n", "⏎").replace('"', "”")
    assert whole["metadata"]["node_threshold"] == 1.0
    assert max(node["influence"] for node in whole["nodes"]) <= 1.0


@pytest.mark.parametrize(("token", "shown"), [('a"b', "a”b"), ("(p=7)", "(p =7)"), ("<b>", "‹b>"), (")", ")")])
def test_a_token_cannot_pass_for_the_rest_of_a_label(token: str, shown: str, tmp_path: Path) -> None:
    made = hostile_graph()
    made.graph.nodes["t"].update(predicts=token, probability=0.25)
    whole = json.loads(made.to_json(tmp_path / "g.json").read_text())
    (logit,) = (node["clerp"] for node in whole["nodes"] if node["feature_type"] == "logit")
    assert (viewers_probability(logit), viewers_token(logit)) == (0.25, shown)


def test_a_function_of_the_logits_has_a_label_that_viewers_read_too(
    decomposition: Decomposition, tmp_path: Path
) -> None:
    tokens = decomposition.model.to_tokens(PROMPT)
    metric = {"a - b": lambda logits: logits[0, -1, 5] - logits[0, -1, 7]}
    made = attribution_graph(decomposition, tokens, readouts=metric, importance_above=0.0, n_checked=1, max_nodes=5)
    whole = json.loads(made.to_json(tmp_path / "g.json").read_text())
    (logit,) = (node for node in whole["nodes"] if node["feature_type"] == "logit")
    assert (viewers_probability(logit["clerp"]), viewers_token(logit["clerp"])) == (0.0, "a - b")


def test_pins_and_groups_that_a_viewer_saved_leave_the_graph_readable(graph: AttributionGraph, tmp_path: Path) -> None:
    path = graph.to_viewer(tmp_path, slug="mine")
    whole = json.loads(path.read_text())
    whole["qParams"] = {**whole["qParams"], "pinnedIds": "E_-1_0", "supernodes": "[]"}  # as its save button writes it
    path.write_text(json.dumps(whole, indent=2))
    assert set(AttributionGraph.from_json(path).graph.edges) == set(graph.graph.edges)
    whole["nodes"][0]["clerp"] = "other"
    path.write_text(json.dumps(whole, indent=2))
    with pytest.raises(ValueError, match="its checksum does not fit"):
        AttributionGraph.from_json(path)


def test_a_directory_has_every_graph_and_every_feature(graph: AttributionGraph, found: Harvest, tmp_path: Path) -> None:
    for slug in ("one", "two", "one"):
        path = graph.to_viewer(tmp_path, slug=slug, harvest=found)
    listed = json.loads((tmp_path / "graph-metadata.json").read_text())["graphs"]
    assert [g["slug"] for g in listed] == ["two", "one"]
    assert all("spd_lens" not in g and g["node_threshold"] == 1.0 for g in listed)
    whole = json.loads(path.read_text())
    assert whole["metadata"]["scan"] == "./data/features/one"
    numbers = {n["feature"] for n in whole["nodes"] if n["feature_type"] == "cross layer transcoder"}
    assert {int(p.stem) for p in (tmp_path / "features" / "one").glob("*.json")} == numbers
    unit = graph.units[0]
    row = graph.graph.nodes[str(unit)]["row"]
    # Cantor's pairing by counting along the diagonals.
    number = [(x, d - x) for d in range(60) for x in range(d, -1, -1)].index((row, unit.id))
    feature = json.loads((tmp_path / "features" / "one" / f"{number}.json").read_text())
    example = found[unit.site].examples(unit.id, "top")[0]
    shown = feature["examples_quantiles"][0]["examples"][0]
    assert shown["tokens"] == [found.token_string(t) for t in example.tokens]
    pairs = zip(example.importances, example.activations, strict=True)
    assert shown["tokens_acts_list"] == [a if g > 0.3 else 0.0 for g, a in pairs]
    assert shown["tokens_acts_list"][shown["train_token_ind"]] == example.activation
    assert feature["activation_frequency"] == pytest.approx(float(found[unit.site].firing_rate[unit.id]))
    assert np.sign(feature["act_max"]) == np.sign(float(found[unit.site].signed_activation[unit.id]))
    assert any(unit.label in n["clerp"] and ": on " in n["clerp"] for n in whole["nodes"])


def test_percentiles_and_bars_spread_a_bin_evenly() -> None:
    histogram = Histogram((-4.0, -2.0, 0.0, 1.0, 2.0, 4.0), (0, 0, 10, 0, 30))
    values = viewer_features.quantile_values(histogram)
    assert len(values) == 100
    assert values[4] == pytest.approx(0.2)  # 2 of the 10 in [0, 1]
    assert values[39] == pytest.approx(2.4 + 0.0 + (0.4 * 40 - 10) / 30 * 2 - 0.4)
    assert values[99] == 4.0
    counted = viewer_features.bars(histogram, 4.0)
    assert sum(counted) == pytest.approx(40)
    assert sum(counted[:10]) == pytest.approx(10)
    assert counted[10:20] == pytest.approx([0.0] * 10)
    assert sum(viewer_features.bars(histogram, -4.0)) == 0
    assert viewer_features.quantile_values(Histogram((0.0, 1.0), (0,))) == []


def test_other_harvests_slugs_and_directories_are_refused(
    graph: AttributionGraph, decomposition: Decomposition, tmp_path: Path, without_type_checks: None
) -> None:
    other = decompose(load_tiny_lm(), SITES, gate="shared", gate_width=16, seed=1)
    with pytest.raises(ValueError, match="the harvest is of another decomposition than the graph"):
        graph.to_viewer(tmp_path, harvest=harvest(other, torch.arange(1, 9)[None]))
    for slug in ("../up", "", "a b", ".hidden"):
        with pytest.raises(ValueError, match="slug="):
            graph.to_viewer(tmp_path, slug=slug)
    with pytest.raises(TypeError, match="harvest"):
        graph.to_viewer(tmp_path, harvest={})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"labels name the site 'blocks.1.mlp.W_inn'; near: .*W_in"):
        graph.to_viewer(tmp_path, labels={"blocks.1.mlp.W_inn": {0: "x"}})
    with pytest.raises(ValueError, match=r"name subcomponent '0'; expected ids, which are whole numbers"):
        graph.to_viewer(tmp_path, labels={"blocks.1.mlp.W_in": {"0": "x"}})  # pyright: ignore[reportArgumentType]
    own = harvest(decomposition, torch.arange(1, 9)[None])
    with pytest.raises(ValueError, match=r"name subcomponent 99999; expected ids in 0\.\."):
        graph.to_viewer(tmp_path, labels={"blocks.1.mlp.W_in": {99_999: "x"}}, harvest=own)
    (tmp_path / "graph-metadata.json").write_text('{"graphs": 3}')
    with pytest.raises(ValueError, match="is no list of graphs"):
        graph.to_viewer(tmp_path)


# -- the viewers' own code ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def viewer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = frontend(tmp_path_factory.mktemp("viewer"))
    if made is None:
        pytest.skip("no package registry in reach (PyPI for circuit-tracer, npm for what its page loads)")
    return made


def module_at(path: Path) -> ModuleType:
    """A file of the package by itself, without the package (which imports a whole model library)."""
    spec = importlib.util.spec_from_file_location(f"foreign_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_circuit_tracers_own_models_take_the_files(
    viewer: Path, graph: AttributionGraph, found: Harvest, tmp_path: Path
) -> None:
    graphs, features = module_at(viewer / "graph_models.py"), module_at(viewer / "feature_models.py")
    for k, made in enumerate((graph, graph.prune(), hostile_graph())):
        path = made.to_viewer(tmp_path, slug=f"g{k}", harvest=found if k < 2 else None)
        read = graphs.Model.model_validate_json(path.read_text())
        assert len(read.nodes) == made.graph.number_of_nodes()
        files = list((tmp_path / "features" / f"g{k}").glob("*.json"))
        assert files or k == 1  # of the pruned graph only deltas are left
        for file in files:
            features.Model.model_validate_json(file.read_text())


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        browser.resize(1500, 1000)
        yield browser


def opened(tab: Browser, address: str, slug: str, **state: str) -> None:
    tab.messages.clear()
    tab.requests.clear()
    tab.open("about:blank")
    tab.open(f"{address}/index.html?{urlencode({'slug': slug, **state})}")


def click(tab: Browser, label: str) -> None:
    """As a hand does it: on the mark of the node that has this label."""
    tab.do(
        "(()=>{const n=[...document.querySelectorAll('text.node')].find(n=>n.__data__.clerp.includes("
        f"{json.dumps(label)}));const r=n.getBoundingClientRect();n.dispatchEvent(new MouseEvent('click',"
        "{bubbles:true,clientX:r.x+r.width/2,clientY:r.y+r.height/2}))})()"
    )


@pytest.mark.slow
@needs_chromium
def test_circuit_tracers_page_shows_every_node_and_what_a_click_asks_for(
    viewer: Path, tab: Browser, graph: AttributionGraph, found: Harvest, tmp_path: Path
) -> None:
    member = graph.units[0]
    twice = [u for u in graph.units if u.members == member.members] + graph.units[1:3]
    group = Unit(tuple(dict.fromkeys(m for u in twice for m in u.members)), name="my group")
    path = graph.to_viewer(tmp_path, slug="all", harvest=found, groups=[group])
    graph.prune(0.6, 0.9).to_viewer(tmp_path, slug="part", harvest=found)
    with served(viewer / "assets", tmp_path) as address:
        # This version of the page takes groups from its address alone, and forgets those of the file.
        groups = json.dumps(json.loads(path.read_text())["qParams"]["supernodes"])
        opened(tab, address, "all", supernodes=groups)
        tab.wait(f"document.querySelectorAll('text.node').length==={graph.graph.number_of_nodes()}")
        assert "my group" in tab.do("document.querySelector('.subgraph').textContent")
        click(tab, f"{member.label}: on ")
        token = found.token_string(found[member.site].examples(member.id)[0].tokens[-1]).strip()
        tab.wait(f"document.querySelector('.feature-detail').textContent.includes({json.dumps(token)})")
        assert "strongest" in tab.do("document.querySelector('.feature-detail').textContent")
        assert "Freq:" in tab.do("document.querySelector('.feature-detail').textContent")
        n_in, n_out = graph.graph.in_degree(str(member)), graph.graph.out_degree(str(member))
        assert tab.do("document.querySelectorAll('.features.input .feature-row').length") == n_in
        assert tab.do("document.querySelectorAll('.features.output .feature-row').length") == n_out
        # The slider prunes by the influence that the file gives.
        tab.do("(()=>{const s=document.querySelector('.slider-container input');s.value='.5';"
               "s.dispatchEvent(new Event('input'))})()")  # fmt: skip
        saved = json.loads(path.read_text())
        always, pinned = ("embedding", "logit"), saved["qParams"]["pinnedIds"]
        stays = [d["feature_type"] in always or d["node_id"] in pinned for d in saved["nodes"]]
        kept = [d for d, stay in zip(saved["nodes"], stays, strict=True) if stay or d["influence"] <= 0.5]
        assert 0 < len(kept) < graph.graph.number_of_nodes()
        tab.wait(f"document.querySelectorAll('text.node').length==={len(kept)}")
        opened(tab, address, "part")
        tab.wait(f"document.querySelectorAll('text.node').length==={graph.prune(0.6, 0.9).graph.number_of_nodes()}")
        assert not [m for m in tab.messages if "Uncaught" in m or "TypeError" in m]
        assert all(r.startswith((address, "data:", "about:")) for r in tab.requests)
        # The page is empty where the label lacks what it reads: this is what the test would see.
        path = graph.to_viewer(tmp_path, slug="without")
        path.write_text(path.read_text().replace("(p=", "(q="))
        opened(tab, address, "without")
        tab.do("new Promise(r=>setTimeout(r,1500))")
        assert tab.do("document.querySelectorAll('text.node').length") == 0


@pytest.mark.slow
@needs_chromium
def test_graphs_without_positions_and_of_one_token_are_not_empty_there(
    viewer: Path, tab: Browser, tmp_path: Path, decomposition: Decomposition
) -> None:
    tokens = decomposition.model.to_tokens(PROMPT)
    whole = dataset_graph(
        decomposition, [tokens], importance_above=None, n_checked=1, metric=lambda logits: logits[:, -1, 5]
    )
    one = attribution_graph(decomposition, tokens[:, :1], readouts=[5], importance_above=0.0, n_checked=1)
    for slug, made in (("dataset", whole), ("one", one)):
        made.to_viewer(tmp_path, slug=slug)
        with served(viewer / "assets", tmp_path) as address:
            opened(tab, address, slug)
            tab.wait(f"document.querySelectorAll('text.node').length==={made.graph.number_of_nodes()}")
            assert not [m for m in tab.messages if "Uncaught" in m or "TypeError" in m]


@pytest.mark.slow
@needs_chromium
def test_hostile_texts_run_nowhere_in_circuit_tracers_page(viewer: Path, tab: Browser, tmp_path: Path) -> None:
    made = hostile_graph()
    trap = "<img src=x onerror=\"document.body.dataset.broken='1'\">"
    for _, data in made.graph.nodes(data=True):
        data.update(label=trap, token=trap, **({"predicts": trap} if data["kind"] == "readout" else {}))
    made = AttributionGraph(made.graph, made.check, (trap, trap), GraphSettings(model=trap))
    made.to_viewer(tmp_path, slug="hostile", groups=[Unit(made.units[0].members, name=trap)])
    with served(viewer / "assets", tmp_path) as address:
        opened(tab, address, "hostile")
        tab.wait("document.querySelectorAll('text.node').length===3")
        for k in range(3):
            # The page's tooltip puts labels into it as HTML.
            tab.do(
                f"(()=>{{const n=document.querySelectorAll('text.node')[{k}],r=n.getBoundingClientRect();"
                "for(const kind of ['mousemove','click'])n.dispatchEvent(new MouseEvent(kind,{bubbles:true,"
                "clientX:r.x+r.width/2,clientY:r.y+r.height/2}))})()"
            )
            assert "onerror" in tab.do("document.querySelector('.tooltip').textContent")
        tab.do("new Promise(r=>setTimeout(r,300))")
        assert tab.do("document.body.dataset.broken===undefined")
        assert tab.do("document.querySelectorAll('img').length") == 0
