"""What is minimised, and who attacks: losses, penalties, divergences, reconstruction, mask sources, adversaries."""

from spd_lens.objective.adversary import PGD, Persistent, PersistentSources, Scope, Sources, ascend, random_sources
from spd_lens.objective.divergences import Divergence, divergence, divergence_per_position, log_probs
from spd_lens.objective.losses import (
    faithfulness_loss,
    frequency_loss,
    hidden_reconstruction_loss,
    minimality_loss,
    relative_faithfulness_loss,
)
from spd_lens.objective.mask_sources import (
    AdversarialMasks,
    Climb,
    MaskSource,
    Merged,
    MergedMasks,
    PersistentMasks,
    SampledMasks,
    mask_source,
    masks_from_sources,
)
from spd_lens.objective.penalties import EPSILON, Power, SmoothL0
from spd_lens.objective.reconstruction import reconstruction_loss, reconstruction_passes

__all__ = [
    "EPSILON",
    "PGD",
    "AdversarialMasks",
    "Climb",
    "Divergence",
    "MaskSource",
    "Merged",
    "MergedMasks",
    "Persistent",
    "PersistentMasks",
    "PersistentSources",
    "Power",
    "SampledMasks",
    "Scope",
    "SmoothL0",
    "Sources",
    "ascend",
    "divergence",
    "divergence_per_position",
    "faithfulness_loss",
    "frequency_loss",
    "hidden_reconstruction_loss",
    "log_probs",
    "mask_source",
    "masks_from_sources",
    "minimality_loss",
    "random_sources",
    "reconstruction_loss",
    "reconstruction_passes",
    "relative_faithfulness_loss",
]
