"""What subcomponents do over a data set: `harvest`."""

from spd_lens.statistics.firing import Example, SiteHarvest, harvest

__all__ = ["Example", "SiteHarvest", "harvest"]
