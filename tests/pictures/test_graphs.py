"""The graph on paper: every drawn edge is there, at the nodes' places, and text is text."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from spd_lens.graphs import AttributionGraph
from spd_lens.pictures import graph_figure
from tests.graphs.test_page import random_graph


@pytest.fixture(scope="module")
def graph() -> AttributionGraph:
    return random_graph()


def test_the_strongest_edges_are_drawn_and_their_sign_can_be_seen(graph: AttributionGraph) -> None:
    weights = sorted((d["weight"] for _, _, d in graph.graph.edges(data=True)), key=lambda w: -abs(w))[:20]
    lines = [line for line in graph_figure(graph, edges=20).axes[0].lines if np.size(line.get_xdata()) == 2]
    assert [line.get_linestyle() for line in lines] == ["-" if w > 0 else "--" for w in weights]
    widths = [line.get_linewidth() for line in lines]
    assert widths == sorted(widths, reverse=True)


def test_nodes_do_not_stand_on_each_other(graph: AttributionGraph) -> None:
    figure = graph_figure(graph, edges=10_000)
    points = [tuple(at) for dots in figure.axes[0].collections for at in dots.get_offsets().tolist()]  # pyright: ignore
    assert len(points) == len(set(points)) == len({n for edge in graph.graph.edges for n in edge})
    names = {data["site"] for _, data in graph.graph.nodes(data=True) if data["kind"] == "subcomponent"}
    assert names <= {label.get_text() for label in figure.axes[0].get_yticklabels()}


def test_dollars_are_no_mathematics_and_mistakes_are_named(graph: AttributionGraph) -> None:
    tokens = ("$x^$",) * len(graph.tokens)
    odd = AttributionGraph(graph.graph, graph.check, tokens, graph.settings)
    graph_figure(odd).canvas.draw()
    empty = graph.graph.__class__()
    with pytest.raises(ValueError, match="the graph has no edges"):
        graph_figure(AttributionGraph(empty, graph.check, graph.tokens, graph.settings))
    with pytest.raises(ValueError, match="edges=0"):
        graph_figure(graph, edges=0)
