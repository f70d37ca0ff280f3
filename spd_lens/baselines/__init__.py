"""What SPD is compared with: its predecessor APD, and fixed subcomponents that only have their gates trained."""

from spd_lens.baselines.apd import APD
from spd_lens.baselines.apd_config import APD_RESID_MLP_1, APD_TMS_5_2, APD_TMS_40_10, APDConfig
from spd_lens.baselines.apd_learner import APDLearner
from spd_lens.baselines.apd_losses import batch_top_k
from spd_lens.baselines.apd_recovery import APDReport, apd_report, component_recovery, cut_off
from spd_lens.baselines.apd_training import train_apd
from spd_lens.baselines.fixed import NO_LR, FixedKind, decompose_fixed, fixed_factors, train_gates

__all__ = [
    "APD",
    "APD_RESID_MLP_1",
    "APD_TMS_5_2",
    "APD_TMS_40_10",
    "NO_LR",
    "APDConfig",
    "APDLearner",
    "APDReport",
    "FixedKind",
    "apd_report",
    "batch_top_k",
    "component_recovery",
    "cut_off",
    "decompose_fixed",
    "fixed_factors",
    "train_apd",
    "train_gates",
]
