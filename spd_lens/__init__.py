"""Stochastic Parameter Decomposition as a TransformerLens plugin."""

from spd_lens.core import DecomposedWeight, Decomposition, decompose, decompose_layer
from spd_lens.data import Batch, TokenBatches, cache_residuals, load_tokens, pack_tokens
from spd_lens.evaluation import EvaluationReport, evaluate
from spd_lens.hosts import DeclaredSite
from spd_lens.objective import PGD
from spd_lens.statistics import harvest
from spd_lens.training import Reconstruction, TrainConfig, TrainResult, train

__all__ = [
    "PGD",
    "Batch",
    "DeclaredSite",
    "DecomposedWeight",
    "Decomposition",
    "EvaluationReport",
    "Reconstruction",
    "TokenBatches",
    "TrainConfig",
    "TrainResult",
    "cache_residuals",
    "decompose",
    "decompose_layer",
    "evaluate",
    "harvest",
    "load_tokens",
    "pack_tokens",
    "train",
]
