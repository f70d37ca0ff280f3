"""What SPD is compared with: its predecessor APD, and fixed subcomponents that only have their gates trained."""

from spd_lens.baselines.apd import APD, APD_RESID_MLP_1, APD_TMS_5_2, APD_TMS_40_10, APDConfig, batch_top_k, train_apd
from spd_lens.baselines.apd_recovery import APDReport, apd_report, component_recovery, cut_off
from spd_lens.baselines.fixed import NO_LR, FixedKind, decompose_fixed, fixed_factors, train_gates

__all__ = [
    "APD",
    "APD_RESID_MLP_1",
    "APD_TMS_5_2",
    "APD_TMS_40_10",
    "NO_LR",
    "APDConfig",
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
