"""What SPD is compared with: its predecessor APD, fixed subcomponents that only have their gates trained, and other
ways to edit a model (`Rival`) or make it small (`small_model`)."""

from spd_lens.baselines.apd import APD
from spd_lens.baselines.apd_config import APD_RESID_MLP_1, APD_TMS_5_2, APD_TMS_40_10, APDConfig
from spd_lens.baselines.apd_learner import APDLearner
from spd_lens.baselines.apd_losses import batch_top_k
from spd_lens.baselines.apd_recovery import APDReport, apd_report, component_recovery, cut_off
from spd_lens.baselines.apd_training import train_apd
from spd_lens.baselines.edits_by_subcomponents import component_writes, components, edit_rival
from spd_lens.baselines.edits_by_training import fine_tuning, lora, task_vector
from spd_lens.baselines.edits_of_activations import difference_of_means, heads_and_neurons, leace
from spd_lens.baselines.edits_of_weights import rank_one
from spd_lens.baselines.fixed import NO_LR, FixedKind, decompose_fixed, fixed_factors, train_gates
from spd_lens.baselines.pruning import (
    SMALL_METHODS,
    SmallMethod,
    SmallModel,
    magnitude,
    small_model,
    truncated_svd,
    wanda,
)
from spd_lens.baselines.rival import Rival, cheapest, effect_at, strength_for

__all__ = [
    "APD",
    "APD_RESID_MLP_1",
    "APD_TMS_5_2",
    "APD_TMS_40_10",
    "NO_LR",
    "SMALL_METHODS",
    "APDConfig",
    "APDLearner",
    "APDReport",
    "FixedKind",
    "Rival",
    "SmallMethod",
    "SmallModel",
    "apd_report",
    "batch_top_k",
    "cheapest",
    "component_recovery",
    "component_writes",
    "components",
    "cut_off",
    "decompose_fixed",
    "difference_of_means",
    "edit_rival",
    "effect_at",
    "fine_tuning",
    "fixed_factors",
    "heads_and_neurons",
    "leace",
    "lora",
    "magnitude",
    "rank_one",
    "small_model",
    "strength_for",
    "task_vector",
    "train_apd",
    "train_gates",
    "truncated_svd",
    "wanda",
]
