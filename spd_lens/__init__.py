"""Stochastic Parameter Decomposition as a TransformerLens plugin."""

from spd_lens.decomposition import Decomposition, decompose, decompose_layer
from spd_lens.hosts import DeclaredSite
from spd_lens.subcomponents import DecomposedWeight

__all__ = ["DecomposedWeight", "DeclaredSite", "Decomposition", "decompose", "decompose_layer"]
