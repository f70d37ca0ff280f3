"""Stochastic Parameter Decomposition as a TransformerLens plugin."""

from spd_lens.adversary import PGD
from spd_lens.config import Reconstruction, TrainConfig
from spd_lens.data import Batch, TokenBatches, cache_residuals, load_tokens, pack_tokens
from spd_lens.decompose import decompose, decompose_layer
from spd_lens.decomposition import Decomposition
from spd_lens.evaluate import EvaluationReport, evaluate
from spd_lens.harvest import harvest
from spd_lens.hosts import DeclaredSite
from spd_lens.subcomponents import DecomposedWeight
from spd_lens.training import TrainResult, train

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
