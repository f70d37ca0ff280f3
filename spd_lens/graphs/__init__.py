"""Attribution graphs: which subcomponents act on which, with the measured agreement of every graph."""

from spd_lens.graphs.check import AttributionCheck
from spd_lens.graphs.contexts import Context
from spd_lens.graphs.graph import AttributionGraph
from spd_lens.graphs.graph_settings import GraphSettings
from spd_lens.graphs.of_dataset import dataset_graph
from spd_lens.graphs.of_prompt import attribution_graph
from spd_lens.graphs.pruning import influences, prune
from spd_lens.graphs.readouts import Readout
from spd_lens.graphs.removal import Removal

__all__ = [
    "AttributionCheck",
    "AttributionGraph",
    "Context",
    "GraphSettings",
    "Readout",
    "Removal",
    "attribution_graph",
    "dataset_graph",
    "influences",
    "prune",
]
