"""What subcomponents do over a data set: `harvest`, in one streamed pass; and which fire together: `coactivation`."""

from spd_lens.statistics.coactivations import CoActivation, Partner, Window, coactivation
from spd_lens.statistics.directions import SiteDirections
from spd_lens.statistics.firing import harvest
from spd_lens.statistics.result import Harvest
from spd_lens.statistics.site_harvest import Example, Histogram, SiteHarvest
from spd_lens.statistics.token_counts import TokenCounts, TokenStatistic

__all__ = [
    "CoActivation",
    "Example",
    "Harvest",
    "Histogram",
    "Partner",
    "SiteDirections",
    "SiteHarvest",
    "TokenCounts",
    "TokenStatistic",
    "Window",
    "coactivation",
    "harvest",
]
