"""An attribution graph as one HTML file without any outside resource: by site and position, to pan, zoom and click."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spd_lens.support.pages import filled_page

if TYPE_CHECKING:
    import networkx as nx

# More would make the page slow; the strongest are kept, and the page says how many there are.
_MOST_EDGES = 20_000
_MOST_CONTEXTS = 8


@dataclass(frozen=True)
class Context:
    """A text in which a subcomponent is important: its tokens, and the importance (or None) at each of them."""

    tokens: Sequence[str]
    importances: Sequence[float] | None = None


def graph_page(
    graph: nx.DiGraph,
    tokens: Sequence[str],
    *,
    check: str,
    title: str,
    contexts: Mapping[tuple[str, int], Sequence[Context]],
) -> str:
    """The page; `check` is shown above the graph. Raises ValueError for contexts of nodes that are not in the graph."""
    names = {name: i for i, name in enumerate(graph.nodes)}
    known = {(data["site"], data["subcomponent"]) for _, data in graph.nodes(data=True)}
    unknown = [key for key in contexts if tuple(key) not in known]
    if unknown:
        raise ValueError(f"contexts has {unknown[0]!r}, which is no (site, subcomponent) of this graph")
    edges = sorted(graph.edges(data=True), key=lambda edge: -edge_size(edge[2]))
    data = {
        "tokens": list(tokens),
        "check": check,
        "rows": _row_names(graph),
        "nodes": [_node(name, attributes) for name, attributes in graph.nodes(data=True)],
        "edges": [
            # In data-set graphs the mean absolute attribution follows.
            [names[s], names[t], _rounded(d["weight"]), *([_rounded(d["absolute"])] if "absolute" in d else [])]
            for s, t, d in edges[:_MOST_EDGES]
        ],
        "allEdges": len(edges),
        "contexts": {_context_key(site, c): _texts(texts) for (site, c), texts in contexts.items()},
    }
    return filled_page("graph.html", title=title, data=data)


def edge_size(data: Mapping[str, Any]) -> float:
    """What edges are compared by: the mean absolute attribution where there is one, else the absolute weight."""
    return float(data.get("absolute", abs(data["weight"])))


def _row_names(graph: nx.DiGraph) -> list[str]:
    """What stands at each row, from the bottom; rows without nodes are empty strings."""
    found: dict[int, str] = {}
    for _, data in graph.nodes(data=True):
        found[data["row"]] = {"embedding": "embeddings", "readout": "readouts"}.get(data["kind"], str(data["site"]))
    return [found.get(row, "") for row in range(max(found, default=-1) + 1)]


def _node(name: str, data: Mapping[str, Any]) -> dict[str, Any]:
    numbers = {
        "activation": data["activation"],
        "importance": data["importance"],
        "firing rate": data.get("firing_rate"),
        "probability": data["probability"],
        "from subcomponents not shown": data["from_unshown"],
    }
    return {
        "name": name,
        "label": data["label"],
        "kind": data["kind"],
        "row": data["row"],
        "pos": data["position"],
        "token": data["token"],
        "importance": _rounded(data["importance"]),
        "context": _context_key(data["site"], data["subcomponent"]),
        "numbers": [[k, _rounded(v)] for k, v in numbers.items() if v is not None],
    }


def _context_key(site: str, subcomponent: int) -> str:
    return f"{site} {subcomponent}"


def _texts(contexts: Sequence[Context]) -> list[dict[str, Any]]:
    found = []
    for context in contexts[:_MOST_CONTEXTS]:
        values = None if context.importances is None else [_rounded(float(v)) for v in context.importances]
        if values is not None and len(values) != len(context.tokens):
            raise ValueError(f"a context has {len(context.tokens)} tokens and {len(values)} importances")
        found.append({"tokens": [str(token) for token in context.tokens], "values": values})
    return found


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")
