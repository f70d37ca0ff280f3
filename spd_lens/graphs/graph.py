"""What `attribution_graph` and `dataset_graph` return: a graph, and how far its edges agree with real ablations.

A graph without its check is not made: every edge is a prediction (C1), and `check` says how a sample of them came out
when the sender was really taken away (C2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spd_lens.core.units import Unit
from spd_lens.graphs.check import AttributionCheck
from spd_lens.graphs.page import Context, edge_size, graph_page
from spd_lens.graphs.pruning import influences, prune
from spd_lens.graphs.viewer_json import GraphFile, read_graph, write_graph
from spd_lens.support.files import given_path, write_text
from spd_lens.support.pages import table_html
from spd_lens.support.tables import format_table

if TYPE_CHECKING:
    import networkx as nx


@dataclass(frozen=True, repr=False)
class AttributionGraph:
    """An attribution graph with its check.

    - `graph`: a `networkx.DiGraph` with plain strings and numbers as attributes. Edges have `weight` (signed), and in
      data-set graphs `absolute`. Nodes have `kind` ("subcomponent", "delta", "embedding", "readout"), `label`, `site`,
      `subcomponent`, `position`, `token`, `row` (0 embeddings, then sites in running order, last readouts),
      `activation`, `importance`, and as receivers `from_unshown`: the sum of attributions from subcomponents that are
      not in the graph.
    - `tokens`: the prompt as strings (empty for data-set graphs). `settings`: what the graph was made with.
    """

    graph: nx.DiGraph
    check: AttributionCheck
    tokens: tuple[str, ...]
    settings: dict[str, Any]

    def _table(self) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
        """Title, header and rows of the strongest edges."""
        strongest = sorted(self.graph.edges(data=True), key=lambda e: -edge_size(e[2]))[:15]
        rows = [(self._label(s), self._label(t), f"{d['weight']:+.4g}") for s, t, d in strongest]
        n_nodes, n_edges = self.graph.number_of_nodes(), self.graph.number_of_edges()
        left_out = self.settings.get("left_out", 0)
        title = f"attribution graph: {n_nodes} nodes, {n_edges} edges"
        title += f" ({left_out} important subcomponents left out by max_nodes)" if left_out else ""
        return title, ("from", "to", "attribution"), rows

    def __str__(self) -> str:
        title, header, rows = self._table()
        return f"{title}\n{self.check.summary()}\n" + format_table(header, rows)

    def __repr__(self) -> str:
        return f"AttributionGraph({self._table()[0].partition(': ')[2]}; {self.check.summary()})"

    def _repr_html_(self) -> str:
        return table_html(*self._table(), notes=[self.check.summary()])

    @property
    def units(self) -> list[Unit]:
        """The subcomponents of the graph, at their positions, for all that takes units."""
        found = []
        for _, data in self.graph.nodes(data=True):
            if data["kind"] == "subcomponent":
                where = None if data["position"] is None else (data["position"],)
                found.append(Unit(((data["site"], data["subcomponent"]),), where))
        return found

    def _label(self, name: str) -> str:
        node = self.graph.nodes[name]
        return node["label"] if node["position"] is None else f"{node['label']} @{node['position']}"

    def prune(self, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> AttributionGraph:
        """The part of the graph that has these shares of all influence on the readouts (see `spd_lens.graphs.pruning`).

        What a kept receiver had from dropped subcomponents is added to its `from_unshown`. The check stays that of the
        whole graph, which was sampled from edges that may have gone. Raises ValueError for a graph without readouts.
        """
        names, weights, readout_weights = self._matrix()
        kinds = [self.graph.nodes[name]["kind"] for name in names]
        pruned = prune(
            weights,
            readout_weights,
            always_kept=np.array([kind in ("readout", "embedding") for kind in kinds]),
            needs_input=np.array([kind == "subcomponent" for kind in kinds]),
            node_threshold=node_threshold,
            edge_threshold=edge_threshold,
        )
        kept = {name for name, keep in zip(names, pruned.nodes, strict=True) if keep}
        order = {name: i for i, name in enumerate(names)}
        graph = self.graph.__class__()
        graph.add_nodes_from((name, dict(data)) for name, data in self.graph.nodes(data=True) if name in kept)
        for s, t, data in self.graph.edges(data=True):
            if pruned.edges[order[t], order[s]]:
                graph.add_edge(s, t, **data)
            elif t in kept and self.graph.nodes[s]["kind"] == "subcomponent":
                graph.nodes[t]["from_unshown"] = (graph.nodes[t]["from_unshown"] or 0.0) + data["weight"]
        settings = {**self.settings, "node_threshold": node_threshold, "edge_threshold": edge_threshold}
        return AttributionGraph(graph, self.check, self.tokens, settings)

    def influence(self) -> dict[str, float]:
        """Every node's influence on the readouts (see `spd_lens.graphs.pruning`)."""
        names, weights, readout_weights = self._matrix()
        return dict(zip(names, influences(weights, readout_weights).tolist(), strict=True))

    def _matrix(self) -> tuple[list[str], np.ndarray, np.ndarray]:
        names = list(self.graph.nodes)
        order = {name: i for i, name in enumerate(names)}
        weights = np.zeros((len(names), len(names)))
        for s, t, data in self.graph.edges(data=True):
            weights[order[t], order[s]] = edge_size(data)
        readout_weights = np.array([self.graph.nodes[name].get("readout_weight") or 0.0 for name in names])
        if not readout_weights.any():
            raise ValueError(
                "this graph has no readout, so nothing has influence on one; give readouts (or a metric) when making it"
            )
        return names, weights, readout_weights

    # -- files ---------------------------------------------------------------------------------------------------------

    def to_json(self, path: str | Path, *, slug: str | None = None, groups: Sequence[Unit] = ()) -> Path:
        """Write the JSON that circuit-tracer's viewer and Neuronpedia read (see `spd_lens.graphs.viewer_json`).

        `groups` (components, for example) become supernodes there, under their names: each has the nodes of its members
        at its positions; those with fewer than two nodes here are left out.
        """
        path = Path(path)
        content = GraphFile(self.graph, self.tokens, self.settings, _check_dict(self.check))
        cumulative = {}
        if any(data["kind"] == "readout" for _, data in self.graph.nodes(data=True)):
            names, weights, readout_weights = self._matrix()
            nobody = np.zeros(len(names), dtype=bool)
            everything = prune(
                weights,
                readout_weights,
                always_kept=~nobody,
                needs_input=nobody,
                node_threshold=1.0,
                edge_threshold=1.0,
            )
            cumulative = dict(zip(names, everything.cumulative.tolist(), strict=True))
        supernodes = {unit.label: nodes for unit in groups if len(nodes := self._nodes_of(unit)) > 1}
        return write_graph(path, content, slug=slug or path.stem, cumulative=cumulative, supernodes=supernodes)

    def _nodes_of(self, unit: Unit) -> list[str]:
        """The nodes of a unit's members at its positions."""
        return [
            name
            for name, data in self.graph.nodes(data=True)
            if (data["site"], data["subcomponent"]) in unit.members
            and data["kind"] == "subcomponent"
            and (unit.positions is None or data["position"] in unit.positions)
        ]

    @classmethod
    def from_json(cls, path: str | Path) -> AttributionGraph:
        """Read what `to_json` wrote. Raises ValueError for anything else."""
        content = read_graph(path)
        try:
            check = AttributionCheck(
                edges=tuple((s, t) for s, t in content.check["edges"]),
                **{k: tuple(_read(v) for v in content.check[k]) for k in ("predicted", "measured", "total")},
                n_strongest=content.check["n_strongest"],
                frozen=content.check["frozen"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: the check in metadata.spd_lens is incomplete ({error!r})") from error
        return cls(content.graph, check, content.tokens, content.settings)

    def to_html(
        self,
        path: str | Path,
        *,
        title: str = "Attribution graph",
        contexts: Mapping[tuple[str, int], Sequence[Context]] | None = None,
    ) -> Path:
        """Write a page that needs nothing else: the graph by site and position, to pan, zoom and click.

        `contexts[site, c]` are texts in which subcomponent c is important (`spd_lens.graphs.Context`); they are
        shown when one of its nodes is clicked.
        """
        page = graph_page(self.graph, self.tokens, check=self.check.summary(), title=title, contexts=contexts or {})
        path = given_path(path)
        write_text(path, page)
        return path


def _read(value: float | None) -> float:
    """A number from JSON, which has null where there is none."""
    return float("nan") if value is None else float(value)


def _check_dict(check: AttributionCheck) -> dict[str, Any]:
    return {**vars(check), "edges": [list(edge) for edge in check.edges]}
