"""What subcomponents do over a data set: `harvest`, in one streamed pass; saved, resumed and merged."""

from spd_lens.statistics.directions import SiteDirections
from spd_lens.statistics.firing import harvest
from spd_lens.statistics.result import Harvest
from spd_lens.statistics.site_harvest import Example, Histogram, SiteHarvest
from spd_lens.statistics.token_counts import TokenCounts, TokenStatistic

__all__ = [
    "Example",
    "Harvest",
    "Histogram",
    "SiteDirections",
    "SiteHarvest",
    "TokenCounts",
    "TokenStatistic",
    "harvest",
]
