"""Ablate and patch subcomponents: what a behaviour loses without them, or regains with them."""

from spd_lens.patching.ablation import ablation_effects
from spd_lens.patching.activation import activation_patching
from spd_lens.patching.agreement import Agreement
from spd_lens.patching.attribution import AttributionPatching, attribution_patching
from spd_lens.patching.effects import Effect, Effects
from spd_lens.patching.frozen import Frozen
from spd_lens.patching.path import PathEffects, direct_changes, path_patching

__all__ = [
    "Agreement",
    "AttributionPatching",
    "Effect",
    "Effects",
    "Frozen",
    "PathEffects",
    "ablation_effects",
    "activation_patching",
    "attribution_patching",
    "direct_changes",
    "path_patching",
]
