"""Nodes ablated at once: predicted along all paths, measured by hooks of this test, and ticked in a notebook."""

from __future__ import annotations

import html
import itertools
from typing import Any

import networkx as nx
import pytest
import torch

from spd_lens import Decomposition, decompose
from spd_lens.graphs import AttributionGraph, attribution_graph, dataset_graph, removal
from spd_lens.pictures import graph_view
from tests.conftest import needs_hooked
from tests.graphs.test_page import N_READOUTS, SITES, random_graph
from tests.small_models import tiny_transformer, tokens

PROMPT = tokens(1, seed=1, length=6)


@pytest.fixture(scope="module")
def decomposition() -> Decomposition:
    torch.manual_seed(0)
    return decompose(
        tiny_transformer(), {"blocks.*.mlp.W_*": 4, "blocks.*.attn.W_[VO]": 3}, gate="shared", gate_width=8
    )


@pytest.fixture(scope="module")
def graph(decomposition: Decomposition) -> AttributionGraph:
    return attribution_graph(decomposition, PROMPT, readouts=[3, 7], importance_above=None, n_checked=4, max_nodes=60)


def test_a_prediction_is_the_sum_over_all_paths() -> None:
    inner, lengths = random_graph(3).graph, set()
    gone = [f"{SITES[0]}[{c}] @{t}" for c in range(2) for t in range(6)] + [f"{SITES[1]}[0] @{t}" for t in range(6)]
    fallen = removal.predicted_falls(inner, gone)
    for r in range(N_READOUTS):
        total = 0.0
        for first in gone:
            for path in nx.all_simple_paths(inner, first, f"readout {r}"):
                if set(path[1:]) & set(gone):
                    continue  # what is ablated passes nothing on
                lengths.add(len(path))
                value = 1.0
                for k, (s, t) in enumerate(itertools.pairwise(path)):
                    value *= inner.edges[s, t]["weight"] / (inner.nodes[s]["activation"] if k else 1.0)
                total += value
        assert fallen[f"readout {r}"] == pytest.approx(total, abs=1e-9)
    assert lengths == {2, 3, 4}


def test_a_measured_change_is_that_of_a_model_with_the_activations_set_to_zero(
    decomposition: Decomposition, graph: AttributionGraph
) -> None:
    model = decomposition.model
    names = [str(unit) for unit in (graph.units[0], graph.units[7], graph.units[20])]
    got = graph.removal(decomposition, PROMPT, names)

    def hooks() -> list[Any]:
        found = []
        for unit in (graph.units[0], graph.units[7], graph.units[20]):
            layer, kind = unit.site.split(".")[1], unit.site.rpartition(".")[2]

            def zero(acts: torch.Tensor, hook: Any, unit: Any = unit) -> torch.Tensor:
                acts = acts.clone()
                acts[:, unit.position, unit.id] = 0
                return acts

            found.append((f"blocks.{layer}.hook_{kind}_acts", zero))
        return found

    with torch.no_grad():
        clean, after = model(PROMPT), model.run_with_hooks(PROMPT, fwd_hooks=hooks())
    for k, token in enumerate((3, 7)):
        values = [logits[0, -1, token] - logits[0, -1].mean() for logits in (clean, after)]
        assert got.clean[k] == pytest.approx(float(values[0]), abs=1e-5)
        assert got.measured[k] == pytest.approx(float(values[1] - values[0]), abs=1e-5)
        assert abs(got.measured[k]) > 1e-4
    assert got.nodes == tuple(names)
    assert "measured change" in str(got)


@needs_hooked
def test_where_the_rest_is_linear_and_shown_the_prediction_is_what_happens() -> None:
    model = tiny_transformer()
    model.ln_final = torch.nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    decomposition = decompose(model, {"blocks.1.mlp.W_out": 6}, gate="shared", gate_width=8)
    metric = {"sum": lambda logits: logits[0, -1, :5].sum()}
    made = attribution_graph(decomposition, PROMPT, readouts=metric, importance_above=None, n_checked=1)
    last = [str(unit) for unit in made.units if unit.position == PROMPT.shape[1] - 1]
    got = made.removal(decomposition, PROMPT, last[:2], metrics=metric)
    # Nothing but the unembedding lies between.
    assert got.predicted[0] == pytest.approx(-sum(made.graph.edges[n, "readout -1"]["weight"] for n in last[:2]))
    assert got.measured[0] == pytest.approx(got.predicted[0], rel=1e-4)
    with pytest.raises(ValueError, match=r"'sum' is a function of the logits; give metrics=\{'sum': function\}"):
        made.removal(decomposition, PROMPT, last[:1])


def test_deltas_and_embeddings_can_be_ablated(decomposition: Decomposition, graph: AttributionGraph) -> None:
    kinds = {data["kind"]: name for name, data in graph.graph.nodes(data=True) if graph.graph.out_degree(name)}
    for kind in ("delta", "embedding"):
        got = graph.removal(decomposition, PROMPT, [kinds[kind]])
        assert max(map(abs, got.measured)) > 0


def test_mistakes_are_named(decomposition: Decomposition, graph: AttributionGraph) -> None:
    name = str(graph.units[0])
    with pytest.raises(ValueError, match=r"no node 'blocks\.0\.mlp\.W_in' in the graph; near: 'blocks"):
        graph.removal(decomposition, PROMPT, ["blocks.0.mlp.W_in"])
    with pytest.raises(ValueError, match="expected at least one, and no readout"):
        graph.removal(decomposition, PROMPT, ["readout 3"])
    with pytest.raises(ValueError, match="expected at least one"):
        graph.removal(decomposition, PROMPT, [])
    with pytest.raises(TypeError, match="nodes"):
        graph.removal(decomposition, PROMPT, name)
    with pytest.raises(ValueError, match="the graph is of"):
        graph.removal(decomposition, tokens(1, seed=2, length=6), [name])
    other = decompose(tiny_transformer(), {"blocks.*.mlp.W_*": 4}, gate="shared", gate_width=8)
    with pytest.raises(ValueError, match="the graph is of another decomposition"):
        graph.removal(other, PROMPT, [name])
    whole = dataset_graph(decomposition, [tokens(2, length=6)], importance_above=None, n_checked=1)
    with pytest.raises(ValueError, match="this graph is of many prompts"):
        whole.removal(decomposition, PROMPT, [str(whole.units[0])])
    with pytest.raises(ValueError, match="made without a model"):
        graph_view(graph).run([name])


# -- in a notebook -----------------------------------------------------------------------------------------------------


def test_a_tick_measures_and_putting_back_takes_the_table_away(
    decomposition: Decomposition, graph: AttributionGraph
) -> None:
    pytest.importorskip("ipywidgets", reason="the extra `notebook` is not installed")
    view = graph_view(graph, decomposition, PROMPT)
    frame, bar, nodes, result = view.widget().children
    assert "blocks.0" in html.unescape(frame.value)
    influence = graph.influence()
    names = [name for _, name in view.choices]
    assert names == sorted(names, key=lambda name: -influence[name])
    assert set(names) == {n for n, d in graph.graph.nodes(data=True) if d["kind"] != "readout"}
    nodes.children[0].value = True
    nodes.children[2].value = True
    expected = graph.removal(decomposition, PROMPT, [names[0], names[2]])
    assert result.value == expected._repr_html_()
    assert f"{expected.measured[0]:+.4g}" in result.value
    bar.children[0].value = "delta"
    assert len(nodes.children) == 2 + sum("delta" in text for text, _ in view.choices) - sum(
        "delta" in view.choices[k][0] for k in (0, 2)
    )
    bar.children[1].click()
    assert result.value == ""
    bundle = view._repr_mimebundle_()
    assert {"text/html", "application/vnd.jupyter.widget-view+json"} <= set(bundle)
    assert set(graph_view(graph)._repr_mimebundle_()) == {"text/html", "text/plain"}


CELLS = """
import torch
from spd_lens import decompose
from spd_lens.graphs import attribution_graph
from spd_lens.pictures import graph_view
from tests.small_models import tiny_transformer, tokens
torch.manual_seed(0)
decomposition = decompose(tiny_transformer(), {"blocks.*.mlp.W_*": 4}, gate="shared", gate_width=8)
prompt = tokens(1, seed=1, length=6)
graph = attribution_graph(decomposition, prompt, readouts=[3], importance_above=None, n_checked=1, max_nodes=20)
shown = graph_view(graph, decomposition, prompt).widget()
shown
---
tick = shown.children[2].children[0]
print(tick.comm.comm_id)
---
print(tick.value, shown.children[3].value)
"""


@pytest.mark.slow
def test_a_tick_of_a_frontend_reaches_the_model_in_a_real_kernel() -> None:
    nbformat = pytest.importorskip("nbformat", reason="the extra `dev` is not installed")
    pytest.importorskip("ipywidgets", reason="the extra `notebook` is not installed")
    from nbclient import NotebookClient

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in CELLS.split("---")])
    client = NotebookClient(notebook, timeout=300, kernel_name="python3")
    with client.setup_kernel():
        for k in range(2):
            client.execute_cell(notebook.cells[k], k)
        comm = notebook.cells[1].outputs[0]["text"].strip()
        # What a browser sends when somebody ticks a box.
        content = {"comm_id": comm, "data": {"method": "update", "state": {"value": True}, "buffer_paths": []}}
        client.kc.shell_channel.send(client.kc.session.msg("comm_msg", content))
        client.execute_cell(notebook.cells[2], 2)
    assert "application/vnd.jupyter.widget-view+json" in notebook.cells[0].outputs[-1]["data"]
    printed = notebook.cells[2].outputs[0]["text"]
    assert printed.startswith("True")
    assert "measured change" in printed
