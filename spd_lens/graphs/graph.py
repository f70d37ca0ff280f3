"""What `attribution_graph` and `dataset_graph` return: a graph, and how far its edges agree with real ablations.

A graph without its check is not made: every edge is a prediction (C1), and `check` says how a sample of them came out
when the sender was really ablated (C2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.units import Unit
from spd_lens.graphs.check import AttributionCheck
from spd_lens.graphs.contexts import Context, Described, Key, described
from spd_lens.graphs.graph_reading import read_graph
from spd_lens.graphs.graph_settings import GraphSettings
from spd_lens.graphs.page import edge_size, graph_page
from spd_lens.graphs.pruning import cumulative_shares, edge_influences, influences, prune
from spd_lens.graphs.removal import Removal, removal
from spd_lens.graphs.viewer_features import checked_slug, features_scan, write_viewer
from spd_lens.graphs.viewer_json import GraphFile, graph_json, write_graph
from spd_lens.patching.arguments import Metric
from spd_lens.statistics.harvests import Harvest
from spd_lens.statistics.labels import Labels
from spd_lens.support.files import given_directory, given_path, write_text
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
      `activation`, `importance`, and as receivers `from_unshown`: the sum of attributions from subcomponents whose
      edges to it are not in the graph (None in data-set graphs, where it is not measured).
    - `tokens`: the prompt as strings (empty for data-set graphs). `settings`: what the graph was made with.
    """

    graph: nx.DiGraph
    check: AttributionCheck
    tokens: tuple[str, ...]
    settings: GraphSettings

    def _table(self) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
        """Title, header and rows of the strongest edges."""
        strongest = sorted(self.graph.edges(data=True), key=lambda e: -edge_size(e[2]))[:15]
        rows = [(self._label(s), self._label(t), f"{d['weight']:+.4g}") for s, t, d in strongest]
        n_nodes, n_edges = self.graph.number_of_nodes(), self.graph.number_of_edges()
        left_out = self.settings.left_out
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

        What a kept receiver had from subcomponents by edges that are dropped is added to its `from_unshown`, where that
        is known. The check stays that of the whole graph, which was sampled from edges that may have gone. Raises
        ValueError for a graph without readouts.
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
                before = graph.nodes[t]["from_unshown"]
                graph.nodes[t]["from_unshown"] = None if before is None else before + data["weight"]
        settings = self.settings.model_copy(update={"node_threshold": node_threshold, "edge_threshold": edge_threshold})
        return AttributionGraph(graph, self.check, self.tokens, settings)

    def influence(self) -> dict[str, float]:
        """Every node's influence on the readouts (see `spd_lens.graphs.pruning`)."""
        names, weights, readout_weights = self._matrix()
        return dict(zip(names, influences(weights, readout_weights).tolist(), strict=True))

    def removal(
        self,
        decomposition: Decomposition,
        tokens: Int[Tensor, "1 pos"],
        nodes: Sequence[str],
        *,
        metrics: Mapping[str, Metric] | None = None,
    ) -> Removal:
        """Ablate nodes at once: what the edges predict for every readout, and what the model does.

        `nodes` are names of nodes, which the page gives (`graph.graph.nodes` lists them); `metrics` are the functions
        of the logits that the readouts were made with, where they are no tokens. See `spd_lens.graphs.removal`.

        Raises ValueError for unknown nodes and readouts, another decomposition or prompt, and graphs of a data set.
        """
        return removal(self.graph, self.tokens, self.settings, decomposition, tokens, nodes, metrics)

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

    def to_json(
        self,
        path: str | Path,
        *,
        slug: str | None = None,
        groups: Sequence[Unit] = (),
        labels: Labels | str | Path | None = None,
    ) -> Path:
        """Write the JSON that circuit-tracer's viewer and Neuronpedia read (see `spd_lens.graphs.viewer_json`).

        `groups` (components, for example) become supernodes there, under their names: each has the nodes of its members
        at its positions; those with fewer than two nodes here are left out. `labels` are `{site: {id: text}}`, or a
        file of them.
        """
        path = given_path(path)
        about = described(self.graph, self.settings, None, labels)
        return write_graph(path, self._json(slug or path.stem, groups, about))

    def to_viewer(
        self,
        directory: str | Path,
        *,
        slug: str = "graph",
        harvest: Harvest | None = None,
        labels: Labels | str | Path | None = None,
        groups: Sequence[Unit] = (),
    ) -> Path:
        """Write a directory that circuit-tracer's own frontend serves; returns the graph's file, `DIRECTORY/SLUG.json`.

        With the `harvest` of the same decomposition its panel shows contexts, logits and activations of a subcomponent
        that is clicked. Graphs under other slugs that are there stay. To see it, with the package circuit-tracer:

            from circuit_tracer.frontend.local_server import serve
            server = serve("DIRECTORY", port=8032)  # http://localhost:8032

        Raises ValueError for slugs that are no names of files, and for the harvest or labels of another decomposition.
        """
        about = described(self.graph, self.settings, harvest, labels)
        whole = self._json(checked_slug(slug), groups, about, features_scan(slug))
        return write_viewer(given_directory(directory), whole, self.graph, harvest)

    def _json(self, slug: str, groups: Sequence[Unit], about: Described, scan: str | None = None) -> dict[str, Any]:
        labels = {}
        for name, data in self.graph.nodes(data=True):
            better = about.name((data["site"], data["subcomponent"])) if data["kind"] == "subcomponent" else ""
            if better:
                labels[name] = f"{data['label']}: {better}"
        return graph_json(
            GraphFile(self.graph, self.tokens, self.settings, _check_dict(self.check)),
            slug=slug,
            cumulative=self._cumulative(),
            supernodes={unit.label: nodes for unit in groups if len(nodes := self._nodes_of(unit)) > 1},
            labels=labels,
            scan=scan,
        )

    def _cumulative(self) -> dict[str, float]:
        """Every node's share of influence together with all that have more; empty without readouts."""
        if not any(data["kind"] == "readout" for _, data in self.graph.nodes(data=True)):
            return {}
        names, weights, readout_weights = self._matrix()
        return dict(zip(names, cumulative_shares(influences(weights, readout_weights)).tolist(), strict=True))

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
        harvest: Harvest | None = None,
        labels: Labels | str | Path | None = None,
        contexts: Mapping[Key, Sequence[Context]] | None = None,
    ) -> Path:
        """Write a page that needs nothing else: the graph by site and position, to pan, zoom, click, pin and group.

        With the `harvest` of the same decomposition, nodes have labels from its counts and show the texts in which they
        fire most. `labels` are `{site: {id: text}}`, or a file of them that pages exported; `contexts[site, c]` are
        texts of your own (`spd_lens.graphs.Context`) in place of those of the harvest.

        Raises ValueError for the harvest, labels or contexts of another decomposition.
        """
        path = given_path(path)
        write_text(path, self.page(title=title, harvest=harvest, labels=labels, contexts=contexts))
        return path

    def page(
        self,
        *,
        title: str = "Attribution graph",
        harvest: Harvest | None = None,
        labels: Labels | str | Path | None = None,
        contexts: Mapping[Key, Sequence[Context]] | None = None,
    ) -> str:
        """What `to_html` writes."""
        return graph_page(
            self.graph,
            self.tokens,
            check=self.check.summary(),
            title=title,
            about=described(self.graph, self.settings, harvest, labels, contexts),
            influence=self._edge_influence(),
            decomposition_sha256=self.settings.decomposition or "unknown",
        )

    def _edge_influence(self) -> dict[tuple[str, str], float] | None:
        """Every edge's influence on the readouts; None without readouts."""
        if not any(data["kind"] == "readout" for _, data in self.graph.nodes(data=True)):
            return None
        names, weights, readout_weights = self._matrix()
        scores = edge_influences(np.nan_to_num(weights), readout_weights)
        order = {name: i for i, name in enumerate(names)}
        return {(s, t): float(scores[order[t], order[s]]) for s, t in self.graph.edges}


def _read(value: float | None) -> float:
    """A number from JSON, which has null where there is none."""
    return float("nan") if value is None else float(value)


def _check_dict(check: AttributionCheck) -> dict[str, Any]:
    return {**vars(check), "edges": [list(edge) for edge in check.edges]}
