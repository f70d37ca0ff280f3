"""An attribution graph on paper: sites upwards, tokens across. `AttributionGraph.to_html` is the one to click."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from spd_lens.graphs.graph import AttributionGraph
from spd_lens.graphs.page import edge_size
from spd_lens.support.given import given_instance, given_whole
from spd_lens.support.pages import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = {"subcomponent": "o", "delta": "D", "embedding": "s", "readout": "^"}
# Told apart in grey, too: what lowers is dashed.
_RAISES, _LOWERS, _NODE = "#0072B2", "#D55E00", "0.2"


def graph_figure(graph: AttributionGraph, *, edges: int = 150) -> Figure:
    """The graph with its strongest `edges` and the nodes at their ends; `prune` it first to see what reaches readouts.

    Sites stand upwards in running order, positions across, wide where many nodes are; subcomponents carry their ids.
    Lines that raise the receiver are blue, those that lower it orange and dashed; the width is the attribution's size.

    Raises ValueError for a graph without edges.
    """
    given_instance("graph", graph, AttributionGraph, "attribution_graph(decomposition, tokens)")
    given_whole("edges", edges, least=1)
    import matplotlib.pyplot as plt

    drawn = sorted(graph.graph.edges(data=True), key=lambda e: -edge_size(e[2]))[:edges]
    if not drawn:
        raise ValueError("the graph has no edges; lower the thresholds it was pruned with, or give it more nodes")
    nodes = {name: graph.graph.nodes[name] for s, t, _ in drawn for name in (s, t)}
    rows = sorted({node["row"] for node in nodes.values()})
    places, middles, width = _places(nodes, rows, len(graph.tokens))
    figure, axis = plt.subplots(figsize=(2.4 + 0.3 * max(width, 14), 1.9 + 0.55 * len(rows)), layout="constrained")
    largest = edge_size(drawn[0][2])
    for s, t, data in drawn:
        (x0, y0), (x1, y1) = places[s], places[t]
        raises = data["weight"] > 0
        axis.plot(
            [x0, x1], [y0, y1], "-" if raises else "--", color=_RAISES if raises else _LOWERS,
            lw=0.3 + 2.2 * edge_size(data) / largest, alpha=0.6, zorder=1,
        )  # fmt: skip
    _draw_nodes(axis, nodes, places)
    words = {"embedding": "embeddings", "readout": "readouts"}
    named = {node["row"]: words.get(node["kind"], str(node["site"])) for node in nodes.values()}
    axis.set_yticks(range(len(rows)), [named[row] for row in rows], fontsize=7)
    axis.set_ylim(-0.4, len(rows) + 0.1)
    axis.set_xticks(middles, [_plain(token) for token in graph.tokens], fontsize=7, rotation=45, ha="right")
    axis.set_xlim(0, width)
    axis.set_xlabel("token", fontsize=8)
    for raises in (True, False):
        style, colour = ("-", _RAISES) if raises else ("--", _LOWERS)
        axis.plot([], [], style, color=colour, label="raises" if raises else "lowers")
    figure.legend(loc="outside lower center", ncols=6, fontsize=7, frameon=False)
    shown = f"{len(drawn)} of {graph.graph.number_of_edges():,} edges, the widest {largest:.3g}"
    axis.set_title(f"Attributions, in units of the receiver: {shown}", fontsize=9)
    return figure


def _places(
    nodes: Mapping[str, Mapping[str, Any]], rows: list[int], n_tokens: int
) -> tuple[dict[str, tuple[float, float]], list[float], int]:
    """Where nodes stand, those of one site and position beside each other; the middle of every position; the width."""
    together: dict[tuple[int, int], list[str]] = defaultdict(list)
    for name, node in nodes.items():
        together[node["position"] or 0, rows.index(node["row"])].append(name)
    widths = [1] * max(n_tokens, 1)
    for (position, _), group in together.items():
        widths[position] = max(widths[position], len(group))
    middles = [sum(widths[:i]) + w / 2 for i, w in enumerate(widths)]
    places = {
        name: (middles[position] + i - (len(group) - 1) / 2, float(row))
        for (position, row), group in together.items()
        for i, name in enumerate(group)
    }
    return places, middles[:n_tokens], sum(widths)


def _draw_nodes(axis: Axes, nodes: Mapping[str, Mapping[str, Any]], places: Mapping[str, tuple[float, float]]) -> None:
    for kind, marker in _MARKERS.items():
        own = [name for name, node in nodes.items() if node["kind"] == kind]
        if own:
            x, y = zip(*(places[name] for name in own), strict=True)
            axis.scatter(x, y, marker=marker, s=18, color=_NODE, zorder=2, label=kind)
    for name, node in nodes.items():
        texts = {"readout": node["label"].removeprefix("logit of "), "subcomponent": str(node["subcomponent"])}
        text = texts.get(node["kind"])
        if text is not None:
            axis.annotate(
                _plain(text), places[name], xytext=(0, 4), textcoords="offset points", fontsize=5, ha="center",
                rotation=60 if node["kind"] == "readout" else 0, va="bottom",
            )  # fmt: skip


def _plain(text: str) -> str:
    """Text as it stands: a dollar sign would begin mathematics."""
    return visible(text).replace("$", r"\$")
