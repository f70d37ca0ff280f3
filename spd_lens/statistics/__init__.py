"""What subcomponents do over a data set: `harvest`."""

from spd_lens.statistics.firing import Example, Harvest, SiteHarvest, harvest

__all__ = ["Example", "Harvest", "SiteHarvest", "harvest"]
