"""An attribution graph as one HTML file without any outside resource: by site and position, to pan, zoom and click.

Edges are shown by their influence on the readouts (`spd_lens.graphs.pruning`), where there are readouts; the three
edges that act most on each readout are always shown, and a chosen node shows all of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from spd_lens.graphs.contexts import MOST_CONTEXTS, Context, Described
from spd_lens.support.pages import filled_page

if TYPE_CHECKING:
    import networkx as nx

# More would make the page slow; the strongest are kept, and the page says how many there are.
_MOST_EDGES = 20_000
_ALWAYS = 3

Edge: TypeAlias = tuple[str, str, dict[str, Any]]


def graph_page(
    graph: nx.DiGraph,
    tokens: Sequence[str],
    *,
    check: str,
    title: str,
    about: Described,
    influence: Mapping[tuple[str, str], float] | None,
    decomposition_sha256: str,
) -> str:
    """The page; `check` is shown above the graph. `influence` of edges on the readouts, None where there are none."""
    names = {name: i for i, name in enumerate(graph.nodes)}
    edges = _kept(graph, influence)
    data = {
        "tokens": list(tokens),
        "check": check,
        "of": decomposition_sha256,
        "rows": _row_names(graph),
        "nodes": [_node(name, attributes, about) for name, attributes in graph.nodes(data=True)],
        "edges": [
            # In data-set graphs the mean absolute attribution follows.
            [names[s], names[t], _rounded(d["weight"]), *([_rounded(d["absolute"])] if "absolute" in d else [])]
            for s, t, d in edges
        ],
        "influence": None if influence is None else [_rounded(influence[s, t]) for s, t, _ in edges],
        "allEdges": graph.number_of_edges(),
        "contexts": {_context_key(*key): _texts(texts) for key, texts in about.contexts.items()},
    }
    return filled_page("graph.html", title=title, data=data)


def edge_size(data: Mapping[str, Any]) -> float:
    """What edges are compared by: the mean absolute attribution where there is one, else the absolute weight."""
    return float(data.get("absolute", abs(data["weight"])))


def _kept(graph: nx.DiGraph, influence: Mapping[tuple[str, str], float] | None) -> list[Edge]:
    """The edges of the page, strongest first: those with most influence, and the largest of every readout."""
    edges = sorted(graph.edges(data=True), key=lambda edge: -edge_size(edge[2]))
    if influence is None:
        return edges[:_MOST_EDGES]
    readouts = [name for name, data in graph.nodes(data=True) if data["kind"] == "readout"]
    own = [edge for name in readouts for edge in [e for e in edges if e[1] == name][:_ALWAYS]]
    edges.sort(key=lambda edge: -influence[edge[0], edge[1]])
    kept = edges[:_MOST_EDGES]
    there = {(s, t) for s, t, _ in kept}
    return kept + [edge for edge in own if (edge[0], edge[1]) not in there]


def _row_names(graph: nx.DiGraph) -> list[str]:
    """What stands at each row, from the bottom; rows without nodes are empty strings."""
    found: dict[int, str] = {}
    for _, data in graph.nodes(data=True):
        found[data["row"]] = {"embedding": "embeddings", "readout": "readouts"}.get(data["kind"], str(data["site"]))
    return [found.get(row, "") for row in range(max(found, default=-1) + 1)]


def _node(name: str, data: Mapping[str, Any], about: Described) -> dict[str, Any]:
    numbers = {
        "activation a": data["activation"],
        "importance g": data["importance"],
        "firing rate": data.get("firing_rate"),
        "probability": data["probability"],
        "from subcomponents not shown": data["from_unshown"],
    }
    key = (data["site"], data["subcomponent"]) if data["kind"] == "subcomponent" else None
    return {
        "name": name,
        "label": data["label"],
        "given": "" if key is None else about.labels.get(key, ""),
        "auto": "" if key is None else about.auto.get(key, ""),
        "kind": data["kind"],
        "site": data["site"],
        "id": data["subcomponent"],
        "row": data["row"],
        "pos": data["position"],
        "token": data["token"],
        "predicts": data["predicts"],
        "act": _rounded(data["activation"]),
        "importance": _rounded(data["importance"]),
        "context": _context_key(data["site"], data["subcomponent"]),
        "numbers": [[k, _rounded(v)] for k, v in numbers.items() if v is not None],
    }


def _context_key(site: str, subcomponent: int) -> str:
    return f"{site} {subcomponent}"


def _texts(contexts: Sequence[Context]) -> list[dict[str, Any]]:
    found = []
    for context in contexts[:MOST_CONTEXTS]:
        values = None if context.importances is None else [_rounded(float(v)) for v in context.importances]
        if values is not None and len(values) != len(context.tokens):
            raise ValueError(f"a context has {len(context.tokens)} tokens and {len(values)} importances")
        found.append({"tokens": [str(token) for token in context.tokens], "values": values})
    return found


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")
