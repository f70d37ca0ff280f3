"""Stochastic Parameter Decomposition as a TransformerLens plugin."""

from spd_lens.decompose import decompose, decompose_layer
from spd_lens.decomposition import Decomposition
from spd_lens.hosts import DeclaredSite
from spd_lens.subcomponents import DecomposedWeight

__all__ = ["DeclaredSite", "DecomposedWeight", "Decomposition", "decompose", "decompose_layer"]
