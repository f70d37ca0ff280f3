"""Nodes of a graph ablated at once: what its edges predict for the readouts, and what the model does.

Predicted, to first order: what is ablated falls whole, and a receiver t by the sum over its senders,

    fallen(t) = sum over s of share(s) weight(s -> t),    share(s) = 1 if s is ablated, else fallen(s) / a_s,

in the order of the graph. This is what the direct effects of its edges come to along all its paths; it leaves out what
the graph leaves out: subcomponents that are no nodes, what C1 freezes (attention patterns, normalisation scales,
deltas), and that the model is not linear. Measured: one pass with the nodes ablated and nothing held, so the
difference between the two is how far the graph is from saying what such a change does.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
from jaxtyping import Int
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.graphs.direct_pass import sender_of
from spd_lens.graphs.graph_settings import GraphSettings
from spd_lens.graphs.measured_removals import removed_together
from spd_lens.graphs.readouts import ReadoutsGiven, chosen_readouts
from spd_lens.patching.arguments import Metric, checked_input
from spd_lens.statistics.saved import tensors_sha256
from spd_lens.support.given import given_list
from spd_lens.support.names import near_names
from spd_lens.support.pages import table_html
from spd_lens.support.tables import format_table

_HEADER = ("readout", "clean", "predicted change", "measured change")


@dataclass(frozen=True, repr=False)
class Removal:
    """What ablating `nodes` does to every readout: `clean` values, and the `predicted` and `measured` changes.

    In units of the readout: for a token, its logit minus the mean logit.
    """

    nodes: tuple[str, ...]
    readouts: tuple[str, ...]
    clean: tuple[float, ...]
    predicted: tuple[float, ...]
    measured: tuple[float, ...]

    def _rows(self) -> list[tuple[str, ...]]:
        columns = zip(self.readouts, self.clean, self.predicted, self.measured, strict=True)
        return [(name, f"{c:.4g}", f"{p:+.4g}", f"{m:+.4g}") for name, c, p, m in columns]

    def __repr__(self) -> str:
        return f"Removal({len(self.nodes)} nodes, {len(self.readouts)} readouts)"

    def __str__(self) -> str:
        return f"{len(self.nodes)} nodes ablated\n" + format_table(_HEADER, self._rows())

    def _repr_html_(self) -> str:
        return table_html(f"{len(self.nodes)} nodes ablated", _HEADER, self._rows())


def predicted_falls(graph: nx.DiGraph, nodes: Collection[str]) -> dict[str, float]:
    """`fallen(t)` of every node when these are ablated (see the module)."""
    fallen = dict.fromkeys(graph, 0.0)
    for name in nx.topological_sort(graph):
        activation = graph.nodes[name]["activation"]
        share = 1.0 if name in nodes else fallen[name] / activation if activation else 0.0
        for _, receiver, data in graph.out_edges(name, data=True):
            fallen[receiver] += share * data["weight"]
    return fallen


def removal(
    graph: nx.DiGraph,
    strings: Sequence[str],
    settings: GraphSettings,
    decomposition: Decomposition,
    tokens: Int[Tensor, "1 pos"],
    nodes: Sequence[str],
    metrics: Mapping[str, Metric] | None = None,
) -> Removal:
    """See `AttributionGraph.removal`; `strings` are the tokens of the graph's prompt."""
    nodes = tuple(dict.fromkeys(given_list("nodes", nodes, "names of nodes of the graph")))
    for name in nodes:
        if name not in graph:
            raise ValueError(f"no node {name!r} in the graph; near: {near_names(str(name), graph)}")
    if not nodes or any(graph.nodes[name]["kind"] == "readout" for name in nodes):
        raise ValueError(f"nodes={list(nodes)!r}; expected at least one, and no readout, which are what is read off")
    if settings.readout_position is None:
        raise ValueError("this graph is of many prompts; nodes are ablated on one: make it with attribution_graph")
    tokens = _same_prompt(strings, settings.decomposition, decomposition, tokens)
    read = [(name, data) for name, data in graph.nodes(data=True) if data["kind"] == "readout"]
    given = _readouts_given([data for _, data in read], metrics or {})
    readouts = chosen_readouts(decomposition, tokens, given, settings.readout_position)
    senders = [
        sender_of((d["kind"], d["site"]), d["subcomponent"], d["position"])
        for d in (graph.nodes[name] for name in nodes)
    ]
    clean, after = removed_together(decomposition, tokens, senders, [readout.value for readout in readouts])
    fallen = predicted_falls(graph, set(nodes))
    return Removal(
        nodes=nodes,
        readouts=tuple(data["label"] for _, data in read),
        clean=tuple(clean),
        predicted=tuple(0.0 - fallen[name] for name, _ in read),
        measured=tuple(b - a for a, b in zip(clean, after, strict=True)),
    )


def _same_prompt(strings: Sequence[str], sha256: str | None, decomposition: Decomposition, tokens: Tensor) -> Tensor:
    if sha256 not in (None, tensors_sha256(decomposition)):
        raise ValueError("the graph is of another decomposition (its V, U or gates differ)")
    tokens = checked_input(decomposition, tokens).to(decomposition.device)
    found = decomposition.host.token_strings(tokens.flatten().tolist()) if not tokens.is_floating_point() else []
    if tokens.ndim != 2 or len(tokens) != 1 or found != list(strings):
        raise ValueError(f"tokens are {''.join(found)!r}, [1 pos] expected; the graph is of {''.join(strings)!r}")
    return tokens


def _readouts_given(nodes: Sequence[Mapping[str, Any]], metrics: Mapping[str, Metric]) -> ReadoutsGiven:
    if all(data["predicts"] is not None for data in nodes):
        return [data["number"] for data in nodes]
    missing = [data["label"] for data in nodes if data["label"] not in metrics]
    if missing:
        raise ValueError(
            f"the readout {missing[0]!r} is a function of the logits; give metrics={{{missing[0]!r}: function}}"
        )
    return {data["label"]: metrics[data["label"]] for data in nodes}
