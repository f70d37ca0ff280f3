"""An attribution graph inside a notebook: its page, and nodes that a user ticks off, with the change that is measured.

The page alone (`AttributionGraph.to_html`) holds no model and can only predict. Here the kernel has it: every tick runs
the model without the nodes that are ticked, and puts the measured change of every readout beside the predicted one.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.inputs import checked_decomposition
from spd_lens.graphs.contexts import described
from spd_lens.graphs.graph import AttributionGraph
from spd_lens.graphs.removal import Removal
from spd_lens.patching.arguments import Metric
from spd_lens.pictures.inline import framed
from spd_lens.statistics.harvests import Harvest
from spd_lens.statistics.labels import Labels
from spd_lens.support.pages import shortened, visible
from spd_lens.support.shown import with_widget

_LONGEST = 100


class GraphView:
    """What `graph_view` gives: shown by a notebook; `run` is what a tick does."""

    def __init__(
        self,
        graph: AttributionGraph,
        decomposition: Decomposition | None,
        tokens: Tensor | None,
        metrics: Mapping[str, Metric] | None,
        page: str,
        choices: Sequence[tuple[str, str]],
        height: int,
    ) -> None:
        self.graph, self.decomposition, self.tokens, self.metrics = graph, decomposition, tokens, metrics
        self.page, self.choices, self.height = page, tuple(choices), height

    def __repr__(self) -> str:
        return f"GraphView({len(self.choices)} nodes to ablate, shown in notebooks)"

    def _repr_html_(self) -> str:
        return framed(self.page, self.height)

    def run(self, nodes: Sequence[str]) -> Removal:
        """The model without these nodes. Raises ValueError without a decomposition and tokens, and as `removal`."""
        if self.decomposition is None or self.tokens is None:
            raise ValueError(
                "this view was made without a model; graph_view(graph, decomposition, tokens) can measure what a "
                "removal does"
            )
        checked_decomposition(self.decomposition, "graph_view")
        return self.graph.removal(self.decomposition, self.tokens, nodes, metrics=self.metrics)

    def widget(self) -> Any:
        """The page above a list of nodes to tick, as an ipywidgets widget. Raises ImportError without ipywidgets."""
        try:
            import ipywidgets
        except ImportError as error:
            raise ImportError("ticking nodes off needs ipywidgets: pip install 'spd-lens[notebook]'") from error
        frame = ipywidgets.HTML(framed(self.page, self.height))
        if self.decomposition is None or self.tokens is None:
            return frame
        search = ipywidgets.Text(placeholder="show nodes with these letters", layout={"width": "40%"})
        none = ipywidgets.Button(description="put all back")
        ticks = {
            name: ipywidgets.Checkbox(False, description=text, indent=False, layout={"width": "auto"})
            for text, name in self.choices
        }
        nodes, result = ipywidgets.VBox(list(ticks.values()), layout={"max_height": "260px"}), ipywidgets.HTML()
        nodes.layout.overflow = "auto"

        def measure(_: Any = None) -> None:
            chosen = [name for name, tick in ticks.items() if tick.value]
            try:
                result.value = self.run(chosen)._repr_html_() if chosen else ""
            except ValueError as error:
                result.value = f"<pre>{html.escape(str(error))}</pre>"

        def filter_(change: Any) -> None:
            wanted = change["new"].lower()
            nodes.children = [t for t in ticks.values() if t.value or wanted in t.description.lower()]

        def clear(_: Any) -> None:
            for tick in ticks.values():
                tick.unobserve(measure, "value")
                tick.value = False
                tick.observe(measure, "value")
            measure()

        for tick in ticks.values():
            tick.observe(measure, "value")
        search.observe(filter_, "value")
        none.on_click(clear)
        return ipywidgets.VBox([frame, ipywidgets.HBox([search, none]), nodes, result])

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        """The widget where there is one, and the page alone for whoever has no kernel."""
        return with_widget(self._repr_html_(), repr(self), None if self.decomposition is None else self.widget)


def graph_view(
    graph: AttributionGraph,
    decomposition: Decomposition | None = None,
    tokens: Int[Tensor, "1 pos"] | None = None,
    *,
    harvest: Harvest | None = None,
    labels: Labels | str | Path | None = None,
    metrics: Mapping[str, Metric] | None = None,
    title: str = "Attribution graph",
    height: int = 720,
) -> GraphView:
    """An attribution graph inside a notebook, with its nodes to tick off: what that does is measured at once.

    `tokens` are the prompt that the graph is of. Nodes are listed by influence on the readouts. `harvest` and `labels`
    as in `AttributionGraph.to_html`, `metrics` as in `AttributionGraph.removal`. Cost of a tick: two forward passes.

    Raises ValueError for the harvest or labels of another decomposition.
    """
    page = graph.page(title=title, harvest=harvest, labels=labels)
    about = described(graph.graph, graph.settings, harvest, labels)
    choices = []
    if graph.settings.readout_position is not None:
        influence = graph.influence()
        for name in sorted(influence, key=lambda name: -influence[name]):
            data = graph.graph.nodes[name]
            if data["kind"] != "readout":
                words = about.name((data["site"], data["subcomponent"])) if data["kind"] == "subcomponent" else ""
                place = f"@{data['position']} {data['token']!r}"
                text = f"{data['label']} {place}" + (f": {words}" if words else "")
                choices.append((shortened(visible(text), _LONGEST), name))
    return GraphView(graph, decomposition, tokens, metrics, page, choices, height)
