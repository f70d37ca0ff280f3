"""What is minimised, and who attacks: losses, divergences, reconstruction, adversaries."""

from spd_lens.objective.adversary import PGD, PersistentSources, Scope, Sources, ascend, random_sources
from spd_lens.objective.divergences import Divergence, divergence, divergence_per_position, log_probs
from spd_lens.objective.losses import (
    EPSILON,
    faithfulness_loss,
    frequency_loss,
    hidden_reconstruction_loss,
    minimality_loss,
)
from spd_lens.objective.mask_sources import masks_from_sources
from spd_lens.objective.reconstruction import reconstruction_loss, reconstruction_passes

__all__ = [
    "EPSILON",
    "PGD",
    "Divergence",
    "PersistentSources",
    "Scope",
    "Sources",
    "ascend",
    "divergence",
    "divergence_per_position",
    "faithfulness_loss",
    "frequency_loss",
    "hidden_reconstruction_loss",
    "log_probs",
    "masks_from_sources",
    "minimality_loss",
    "random_sources",
    "reconstruction_loss",
    "reconstruction_passes",
]
