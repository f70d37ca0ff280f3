"""Pictures of importances, effects, attention, graphs and components, and the browser in notebooks."""

from spd_lens.pictures.attention import qk_figure
from spd_lens.pictures.components import coactivation_figure, dendrogram_figure, description_length_figure
from spd_lens.pictures.effects import effects_figure, effects_heatmap
from spd_lens.pictures.graph_views import GraphView, graph_view
from spd_lens.pictures.graphs import graph_figure
from spd_lens.pictures.importance import importance_figure, importance_page, save_importance, strongest
from spd_lens.pictures.inline import InlineBrowser, browse

__all__ = [
    "GraphView",
    "InlineBrowser",
    "browse",
    "coactivation_figure",
    "dendrogram_figure",
    "description_length_figure",
    "effects_figure",
    "effects_heatmap",
    "graph_figure",
    "graph_view",
    "importance_figure",
    "importance_page",
    "qk_figure",
    "save_importance",
    "strongest",
]
