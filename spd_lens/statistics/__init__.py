"""What subcomponents do over a data set: `harvest`, in one streamed pass; saved, resumed, merged, and browsed.

`coactivation` is a sample of which fire together."""

from spd_lens.statistics.attention_pairs import Pair, QKInteractions, qk_interactions
from spd_lens.statistics.browser import Contents, inline_page
from spd_lens.statistics.coactivations import CoActivation, Partner, Window
from spd_lens.statistics.counting_together import coactivation
from spd_lens.statistics.directions import SiteDirections
from spd_lens.statistics.firing import harvest
from spd_lens.statistics.firing_together import cofiring
from spd_lens.statistics.harvest_sums import HarvestSums, positions_of
from spd_lens.statistics.harvests import Harvest
from spd_lens.statistics.labelling import Endpoint, Label, Provider, label_components, labels_for_pages
from spd_lens.statistics.labels import Labels, read_labels, template_label, write_labels
from spd_lens.statistics.saved import MadeFrom, made_from
from spd_lens.statistics.site_harvest import Example, Histogram, SiteHarvest
from spd_lens.statistics.sums import HarvestSettings
from spd_lens.statistics.token_counts import TokenCounts, TokenStatistic

__all__ = [
    "CoActivation",
    "Contents",
    "Endpoint",
    "Example",
    "Harvest",
    "HarvestSettings",
    "HarvestSums",
    "Histogram",
    "Label",
    "Labels",
    "MadeFrom",
    "Pair",
    "Partner",
    "Provider",
    "QKInteractions",
    "SiteDirections",
    "SiteHarvest",
    "TokenCounts",
    "TokenStatistic",
    "Window",
    "coactivation",
    "cofiring",
    "harvest",
    "inline_page",
    "label_components",
    "labels_for_pages",
    "made_from",
    "positions_of",
    "qk_interactions",
    "read_labels",
    "template_label",
    "write_labels",
]
