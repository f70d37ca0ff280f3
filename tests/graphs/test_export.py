"""Graphs as files: the public JSON and back, the page in a browser, and pictures; text from models stays text."""

from __future__ import annotations

import hashlib
import html
import json
import re
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch

from spd_lens import decompose
from spd_lens.core import Unit
from spd_lens.graphs import AttributionCheck, AttributionGraph, Context, GraphSettings, attribution_graph, dataset_graph
from spd_lens.patching import Effects
from spd_lens.support import filled_page, script_json
from tests.small_models import tiny_transformer, tokens

HOSTILE = "</script><img src=x onerror=\"document.title='broken'\">"
SITE, LATER = "blocks.0.mlp.W_out", "blocks.1.mlp.W_in"

# What Neuronpedia's graph-schema.json and circuit-tracer's models require of a file, in words of our own.
SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["metadata", "qParams", "nodes", "links"],
    "properties": {
        "metadata": {
            "type": "object",
            "required": ["slug", "scan", "prompt_tokens", "prompt", "transcoder_list"],
            "properties": {
                "slug": {"type": "string"},
                "scan": {"type": "string"},
                "prompt": {"type": "string"},
                "prompt_tokens": {"type": "array", "items": {"type": "string"}},
                "transcoder_list": {"type": "array", "items": {"type": "string"}},
                "schema_version": {"type": "integer"},
                "node_threshold": {"type": "number"},
                "info": {
                    "type": "object",
                    "properties": {
                        "generator": {
                            "type": "object",
                            "properties": {"name": {"type": "string"}, "version": {"type": "string"}},
                        }
                    },
                },
                "generation_settings": {"type": "object"},
            },
        },
        "qParams": {
            "type": "object",
            "required": ["pinnedIds", "supernodes", "linkType", "clickedId", "sg_pos"],
            "properties": {
                "pinnedIds": {"type": "array", "items": {"type": "string"}},
                "supernodes": {"type": "array", "items": {"type": "array"}},
                "linkType": {"type": "string"},
                "clickedId": {"type": "string"},
                "sg_pos": {"type": "string"},
            },
        },
        "nodes": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["node_id", "feature", "layer", "ctx_idx", "feature_type", "jsNodeId", "clerp"],
                "properties": {
                    "node_id": {"type": "string", "pattern": r"^(E|\d+)_-?\d+_\d+$"},
                    "feature": {"type": ["integer", "null"]},
                    "layer": {"type": "string", "pattern": r"^(E|\d+)$"},
                    "ctx_idx": {"type": "integer", "minimum": 0},
                    "feature_type": {
                        "enum": ["cross layer transcoder", "mlp reconstruction error", "embedding", "logit"]
                    },
                    "token_prob": {"type": "number", "minimum": 0, "maximum": 1},
                    "is_target_logit": {"type": "boolean"},
                    "run_idx": {"type": "integer"},
                    "reverse_ctx_idx": {"type": "integer"},
                    "jsNodeId": {"type": "string"},
                    "clerp": {"type": "string"},
                    "influence": {"type": ["number", "null"], "minimum": 0, "maximum": 1.000001},
                    "activation": {"type": ["number", "null"]},
                },
            },
        },
        "links": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["source", "target", "weight"],
                "properties": {
                    "source": {"type": "string"},
                    "target": {"type": "string"},
                    "weight": {"type": "number"},
                },
            },
        },
    },
}


@pytest.fixture(scope="module")
def graph() -> AttributionGraph:
    torch.manual_seed(0)
    sites = {"blocks.*.mlp.W_*": 4, "blocks.*.attn.W_[VO]": 3}
    decomposition = decompose(tiny_transformer(), sites, gate="shared", gate_width=8)
    return attribution_graph(
        decomposition, tokens(1, seed=1, length=6), readouts=[3, 7], importance_above=0.0, n_checked=8, max_nodes=60
    )


def test_groups_are_supernodes_of_their_nodes(graph: AttributionGraph, tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="comes with nbformat, of the extra `dev`")
    one, two, *_ = dict.fromkeys((unit.site, unit.id) for unit in graph.units)
    anywhere, here = Unit((one, two), name="pair"), Unit((one, two), (graph.units[0].position or 0,), "pair, once")
    absent = Unit((("blocks.0.mlp.W_in", 99), one), (77,), "absent")
    whole = json.loads(graph.to_json(tmp_path / "g.json", groups=[anywhere, here, absent]).read_text())
    jsonschema.validate(whole, SCHEMA)
    ids = {node["node_id"]: node for node in whole["nodes"]}
    labels = [label for label, *_ in whole["qParams"]["supernodes"]]
    assert labels[0] == "pair"
    assert "absent" not in labels
    for label, *members in whole["qParams"]["supernodes"]:
        wanted = [
            u for u in graph.units if u.members[0] in (one, two) and (label == "pair" or u.positions == here.positions)
        ]
        assert len(members) == len(set(members)) == len(wanted) > 1
        assert {ids[m]["ctx_idx"] for m in members} == {u.position for u in wanted}
    AttributionGraph.from_json(tmp_path / "g.json")


def hostile_graph() -> AttributionGraph:
    """Three nodes and two edges, every string a trap."""
    inner = nx.DiGraph()
    common = {
        "importance": 0.5,
        "probability": None,
        "readout_weight": None,
        "predicts": None,
        "from_unshown": 0.25,
        "activation": 1.5,
    }
    inner.add_node("e", **{**common, "kind": "embedding", "label": HOSTILE, "site": "embed", "subcomponent": -1,
                           "number": -1, "position": 0, "token": HOSTILE, "row": 0, "importance": None})  # fmt: skip
    inner.add_node("s", **{**common, "kind": "subcomponent", "label": f"{SITE} 3 {HOSTILE}", "site": SITE,
                           "subcomponent": 3, "number": 3, "position": 1, "token": "<!--<script>",
                           "row": 1})  # fmt: skip
    inner.add_node("t", **{**common, "kind": "readout", "label": "logit of '<b>'", "site": "", "subcomponent": -1,
                           "number": 9, "position": 1, "token": "a&amp;b", "row": 2, "importance": None,
                           "readout_weight": 1.0, "probability": 0.5, "predicts": "'<b>'"})  # fmt: skip
    inner.add_edge("e", "s", weight=2.0)
    inner.add_edge("s", "t", weight=-0.5)
    inner.add_edge("e", "t", weight=0.001)
    check = AttributionCheck(
        edges=(("e", "s"),), predicted=(2.0,), measured=(2.0,), total=(1.0,), n_strongest=1, frozen="everything <i>"
    )
    return AttributionGraph(inner, check, (HOSTILE, "<!--<script>"), GraphSettings(model=HOSTILE))


# -- JSON ----------------------------------------------------------------------------------------------------------


def test_the_file_is_what_the_public_viewers_read(graph: AttributionGraph, tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="comes with nbformat, of the extra `dev`")
    for made in (graph, graph.prune(), hostile_graph()):
        whole = json.loads(made.to_json(tmp_path / "graph.json").read_text())
        jsonschema.validate(whole, SCHEMA)
        ids = [node["node_id"] for node in whole["nodes"]]
        assert len(set(ids)) == len(ids) == made.graph.number_of_nodes()
        assert {link[end] for link in whole["links"] for end in ("source", "target")} <= set(ids)
        assert len(whole["links"]) == made.graph.number_of_edges()
        assert whole["metadata"]["slug"] == "graph"
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**whole, "nodes": [{**whole["nodes"][0], "layer": 3}]}, SCHEMA)


def test_public_fields_say_what_the_nodes_are(graph: AttributionGraph, tmp_path: Path) -> None:
    whole = json.loads(graph.to_json(tmp_path / "g.json", slug="mine").read_text())
    assert whole["metadata"]["slug"] == "mine"
    assert whole["metadata"]["prompt_tokens"] == list(graph.tokens)
    sites = graph.settings.sites
    found = {node["spd_lens"]["id"]: node for node in whole["nodes"]}
    name = next(n for n, d in graph.graph.nodes(data=True) if d["site"] == SITE and d["subcomponent"] > 0)
    data, node = graph.graph.nodes[name], found[name]
    layer = sites.index(SITE) + 1
    c, t = data["subcomponent"], data["position"]
    assert node["node_id"] == f"{layer}_{c}_{t}"
    assert (node["layer"], node["ctx_idx"], node["feature_type"]) == (str(layer), t, "cross layer transcoder")
    assert node["activation"] == data["activation"]
    # Cantor's pairing, by enumerating the diagonals.
    diagonal = [(x, d - x) for d in range(40) for x in range(d, -1, -1)]
    assert diagonal[node["feature"]] == (layer, c)
    logit = found["readout 3"]
    assert (logit["node_id"], logit["is_target_logit"]) == (f"{len(sites) + 1}_3_5", True)
    assert logit["token_prob"] == pytest.approx(graph.graph.nodes["readout 3"]["probability"])
    assert found["embed @2"]["layer"] == "E"
    # Dynamic pruning in a viewer keeps nodes up to a cumulative share: the most influential node has the smallest.
    influence = graph.influence()
    best = max(influence, key=lambda n: influence[n])
    assert found[best]["influence"] == min(n["influence"] for n in whole["nodes"])
    assert found[best]["influence"] == pytest.approx(influence[best] / sum(influence.values()))


def test_a_graph_comes_back_from_its_file(graph: AttributionGraph, tmp_path: Path) -> None:
    for made in (graph, graph.prune(0.5, 0.9), hostile_graph()):
        back = AttributionGraph.from_json(made.to_json(tmp_path / "sub" / "graph.json"))
        assert dict(back.graph.nodes(data=True)) == dict(made.graph.nodes(data=True))
        assert list(back.graph.edges(data=True)) == list(made.graph.edges(data=True))
        assert back.check == made.check
        assert back.tokens == made.tokens
        assert back.settings == made.settings
        assert str(back) == str(made)
        assert set(back.prune(0.4, 0.8).graph.edges) == set(made.prune(0.4, 0.8).graph.edges)
    assert not list((tmp_path / "sub").glob(".*"))  # no temporary file is left


def test_a_data_set_graph_has_the_same_file(tmp_path: Path) -> None:
    decomposition = decompose(tiny_transformer(), {"blocks.*.mlp.W_*": 4})
    made = dataset_graph(decomposition, [tokens(2, length=6)], importance_above=None, n_checked=4)
    back = AttributionGraph.from_json(made.to_json(tmp_path / "d.json"))
    assert list(back.graph.edges(data=True)) == list(made.graph.edges(data=True))
    assert all(d["absolute"] >= abs(d["weight"]) * (1 - 1e-9) for _, _, d in back.graph.edges(data=True))
    # The page has the mean absolute attribution beside the signed one, and sorts by it.
    page = made.to_html(tmp_path / "d.html").read_text()
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    sizes = [edge[3] for edge in json.loads(data.group(1))["edges"]]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == pytest.approx(max(d["absolute"] for _, _, d in made.graph.edges(data=True)), rel=1e-4)


def _with_fitting_checksum(whole: Any) -> Any:
    """Computed as the docs say: over the sorted values without itself and without what viewers write back."""
    own = whole.get("metadata", {}).get("spd_lens")
    if own:
        own.pop("checksum", None)
        kept = {k: v for k, v in whole.items() if k != "qParams"}
        text = json.dumps(kept, sort_keys=True, separators=(",", ":"))
        own["checksum"] = hashlib.sha256(text.encode()).hexdigest()
    return whole


def _with(whole: Any, *path: Any, value: Any) -> Any:
    part = whole
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    return whole


def test_a_graph_that_was_changed_by_hand_is_refused(graph: AttributionGraph, tmp_path: Path) -> None:
    path = graph.to_json(tmp_path / "graph.json")
    whole = json.loads(path.read_text())
    whole["links"][0]["spd_lens"]["weight"] += 1
    path.write_text(json.dumps(whole))
    with pytest.raises(ValueError, match="its checksum does not fit its contents"):
        AttributionGraph.from_json(path)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda w: _with(w, "nodes", 0, "spd_lens", "kind", value="other"), r"nodes\[0\].spd_lens is damaged: kind"),
        (lambda w: _with(w, "nodes", 1, "node_id", value=w["nodes"][0]["node_id"]), r"nodes\[1\] has no id of its own"),
        (lambda w: _with(w, "links", 0, "spd_lens", "weight", value="x"), r"links\[0\].spd_lens is damaged: weight"),
        (lambda w: _with(w, "metadata", "spd_lens", "tokens", value=[1]), "tokens is missing or no list"),
        (lambda w: _with(w, "metadata", "spd_lens", "format_version", value=1), "has format version 1"),
        (lambda w: _with(w, "metadata", "generation_settings", value=None), "metadata.generation_settings is damaged"),
        (
            lambda w: _with(w, "metadata", "generation_settings", "left_out", value="3"),
            "metadata.generation_settings is damaged: left_out",
        ),
        (lambda w: "{", "is damaged"),
        (lambda w: "[1]", "holds a list; expected an object"),
        (lambda w: {"metadata": {}}, "qParams is missing"),
        (lambda w: {**w, "links": 3}, "links is missing or no list"),
        (lambda w: {**w, "metadata": {}}, "was not written by spd_lens"),
        (lambda w: {**w, "metadata": {"spd_lens": {"format_version": 99}}}, "format version 99; .* Upgrade"),
        (lambda w: {**w, "nodes": [{"node_id": "1"}]}, r"nodes\[0\] has no 'spd_lens'"),
        (lambda w: {**w, "links": [{**w["links"][0], "source": "9_9_9"}]}, r"links\[0\] names the node '9_9_9'"),
        (
            lambda w: {
                **w,
                "metadata": {**w["metadata"], "spd_lens": {"format_version": 4, "tokens": [], "check": {"edges": []}}},
            },
            "the check in metadata.spd_lens is incomplete",
        ),
    ],
)
def test_files_that_are_no_graph_are_named(graph: AttributionGraph, tmp_path: Path, damage: Any, text: str) -> None:
    path = graph.to_json(tmp_path / "graph.json")
    broken = damage(json.loads(path.read_text()))
    path.write_text(broken if isinstance(broken, str) else json.dumps(_with_fitting_checksum(broken)))
    with pytest.raises(ValueError, match=text):
        AttributionGraph.from_json(path)
    with pytest.raises(ValueError, match="does not exist"):
        AttributionGraph.from_json(tmp_path / "none.json")


# -- the page ------------------------------------------------------------------------------------------------------


CONTEXTS = {(SITE, 3): [Context(["whale ", HOSTILE], [0.0, 0.9]), Context(["plain"])]}


def test_the_page_stands_alone_and_every_text_is_escaped(tmp_path: Path) -> None:
    page = hostile_graph().to_html(tmp_path / "g.html", title=f"T {HOSTILE}", contexts=CONTEXTS).read_text()
    assert html.unescape(page.split("<h1><bdi>")[1].split("</bdi>")[0]) == f"T {HOSTILE}"
    assert not re.search(r"""(src|href)\s*=\s*["'a-z]|https?://(?!www\.w3\.org/2000/svg)""", page.replace("src=x", ""))
    assert "<img" not in page
    assert page.count("<script") == page.count("</script") == 2
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    content = json.loads(data.group(1))
    assert content["tokens"] == [HOSTILE, "<!--<script>"]
    assert content["edges"] == [[0, 1, 2.0], [1, 2, -0.5], [0, 2, 0.001]]
    assert content["contexts"][f"{SITE} 3"][0] == {"tokens": ["whale ", HOSTILE], "values": [0.0, 0.9]}
    with pytest.raises(ValueError, match="which is no"):
        hostile_graph().to_html(tmp_path / "g.html", contexts={(SITE, 99): []})
    with pytest.raises(ValueError, match="1 tokens and 2 importances"):
        hostile_graph().to_html(tmp_path / "g.html", contexts={(SITE, 3): [Context(["a"], [0.1, 0.2])]})


def test_json_in_a_page_cannot_end_its_element() -> None:
    for text in (HOSTILE, "<!--<script>", "</SCRIPT >", "<![CDATA[", "\u2028"):
        written = script_json({"t": text})
        assert "<" not in written
        assert json.loads(written) == {"t": text}
    page = filled_page("graph.html", title="{{ data }}", data={"t": "{{ data }} {% raw %}"})
    assert "<h1><bdi>{{ data }}</bdi></h1>" in page
    assert '{"t": "{{ data }} {% raw %}"}' in page
    assert script_json([float("nan"), {"a": float("inf")}]) == '[null, {"a": null}]'


# -- heat maps -----------------------------------------------------------------------------------------------------


def effects(positions: tuple[int, ...] | None = (0, 2)) -> Effects:
    n = 1 if positions is None else len(positions)
    units = (Unit(((SITE, 1),)), Unit(((SITE, 4),)), Unit(((LATER, 0),)))
    values = torch.arange(3.0 * n).reshape(3, n, 1) - 1
    return Effects("zero ablation", units, positions, values, torch.tensor([0.5]), torch.tensor([2.5]))


def test_heat_maps_are_blue_and_red_around_zero_with_tokens_that_stay_apart() -> None:
    pytest.importorskip("plotly", reason="the extra `plots` is not installed")
    from spd_lens.pictures import effects_heatmap

    figure = effects_heatmap(effects(), SITE, ["the", "<b>", "the"])
    (heat,) = figure.data
    assert [list(row) for row in heat.z] == [[-1.5, -0.5], [0.5, 1.5]]
    assert (list(heat.x), list(heat.y)) == (["the_0", "the_2"], ["1", "4"])
    assert heat.zmid == 0
    assert heat.colorscale[0][1] == "rgb(103,0,31)"  # red below
    assert heat.colorscale[-1][1] == "rgb(5,48,97)"
    assert list(effects_heatmap(effects((1,)), SITE, ["a", "<b>\n"]).data[0].x) == ["&lt;b&gt;⏎_1"]
    assert list(effects_heatmap(effects(None), LATER).data[0].x) == ["all positions"]
    shares = effects_heatmap(effects(), SITE, recovered=True).data[0]
    assert [list(row) for row in shares.z] == [[-0.75, -0.25], [0.25, 0.75]]
    assert list(shares.x) == ["0", "2"]
    with pytest.raises(ValueError, match="2 tokens for positions up to 2"):
        effects_heatmap(effects(), SITE, ["a", "b"])
    with pytest.raises(ValueError, match="nothing was measured"):
        effects_heatmap(effects(), "other")


def test_the_drawn_heat_map_has_the_same_cells_and_words_as_the_one_for_notebooks() -> None:
    pytest.importorskip("matplotlib", reason="the extra `plots` is not installed")
    from spd_lens.pictures import effects_figure

    axis = effects_figure(effects(), SITE, ["the", "$x<b>", "the"]).axes[0]
    (image,) = axis.images
    assert image.get_array().tolist() == [[-1.5, -0.5], [0.5, 1.5]]
    assert image.get_clim() == (-1.5, 1.5)
    assert [t.get_text() for t in axis.get_xticklabels()] == ["the_0", "the_2"]
    assert [t.get_text() for t in axis.get_yticklabels()] == ["1", "4"]
    hostile = effects_figure(effects((1,)), SITE, ["a", "$x<b>"], recovered=True).axes[0]
    assert [t.get_text() for t in hostile.get_xticklabels()] == ["$x<b>_1"]
    assert not any(t.get_parse_math() for t in hostile.get_xticklabels())
    with pytest.raises(ValueError, match="nothing was measured"):
        effects_figure(effects(), "other")
