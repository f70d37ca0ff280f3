"""Toy models whose mechanisms are known (TMS, residual MLPs), their data and training, and who found the mechanisms."""

from spd_lens.models.tiny_lm import load_moby_dick, load_tiny_lm
from spd_lens.toys.features import ActiveRows, SparseFeatures, one_hot_inputs, resid_mlp_features, tms_features
from spd_lens.toys.recovery import MIN_MMCS, ML2R_RANGE, ONE_HOT_ALIVE, Recovery, alive, identity_match, ml2r, mmcs
from spd_lens.toys.reports import (
    ResidMLPReport,
    TMSReport,
    resid_mlp_contributions,
    resid_mlp_report,
    tms_report,
)
from spd_lens.toys.resid_mlp import ResidMLP
from spd_lens.toys.tms import TMS
from spd_lens.toys.train_target import (
    folded_output,
    tms_gradients,
    tms_target_report,
    train_many_tms,
    train_resid_mlp,
    train_tms,
)

__all__ = [
    "MIN_MMCS",
    "ML2R_RANGE",
    "ONE_HOT_ALIVE",
    "TMS",
    "ActiveRows",
    "Recovery",
    "ResidMLP",
    "ResidMLPReport",
    "SparseFeatures",
    "TMSReport",
    "alive",
    "folded_output",
    "identity_match",
    "load_moby_dick",
    "load_tiny_lm",
    "ml2r",
    "mmcs",
    "one_hot_inputs",
    "resid_mlp_contributions",
    "resid_mlp_features",
    "resid_mlp_report",
    "tms_features",
    "tms_gradients",
    "tms_report",
    "tms_target_report",
    "train_many_tms",
    "train_resid_mlp",
    "train_tms",
]
