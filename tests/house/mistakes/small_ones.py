"""Shipped models, toys and baselines."""

from __future__ import annotations

import torch

from spd_lens import TrainConfig, decompose, evaluate, train
from spd_lens.baselines import decompose_fixed, fixed_factors, train_gates
from spd_lens.core import make_gate, sample_masks, sample_routing
from spd_lens.graphs import attribution_graph
from spd_lens.models import load_moby_dick, load_tiny_lm, open_model
from spd_lens.toys import (
    TMS,
    ActiveRows,
    ResidMLP,
    SparseFeatures,
    resid_mlp_report,
    tms_report,
    train_resid_mlp,
    train_tms,
)
from tests.house.mistakes.table import SITE, T, Table, file_in
from tests.small_models import tiny_transformer

TABLE = Table()
add = TABLE.add

add("open None", lambda d, m, p: open_model(None))
add("open empty", lambda d, m, p: open_model(""))
add("open folder empty", lambda d, m, p: open_model(p))
add("open file", lambda d, m, p: open_model(file_in(p)))
add("open dtype text", lambda d, m, p: open_model("./x", dtype="bf16x"))
add("open host", lambda d, m, p: open_model("./x", host="hookd"))
add("tiny host", lambda d, m, p: load_tiny_lm(host="x"))
add("tiny dtype", lambda d, m, p: load_tiny_lm(dtype="float99"))
add("tiny dtype int", lambda d, m, p: load_tiny_lm(dtype=torch.int64))
add("tiny device", lambda d, m, p: load_tiny_lm(device="cdua"))
add("tiny device num", lambda d, m, p: load_tiny_lm(device=3.5))
add("moby", lambda d, m, p: load_moby_dick("test"))
add("TMS 0", lambda d, m, p: TMS(0, 2))
add("TMS text", lambda d, m, p: TMS("5", 2))
add("ResidMLP 0", lambda d, m, p: ResidMLP(0))
add("Sparse probability", lambda d, m, p: SparseFeatures(5, 4, probability=2.0))
add("Sparse probability text", lambda d, m, p: SparseFeatures(5, 4, probability="x"))
add("Sparse batch", lambda d, m, p: SparseFeatures(5, 0, probability=0.5))
add("Active probability", lambda d, m, p: ActiveRows(5, 4, probability=-0.1))
add("tms_report of lm", lambda d, m, p: tms_report(d))
add("resid report of lm", lambda d, m, p: resid_mlp_report(d))
add("train_tms none", lambda d, m, p: train_tms(m))
add("train_resid none", lambda d, m, p: train_resid_mlp(m))
add("TMS evaluate tokens", lambda d, m, p: evaluate(decompose(TMS(5, 2), {"*": 4}), T, quick=True))
add("TMS wrong width", lambda d, m, p: decompose(TMS(5, 2), {"*": 4}).importance(torch.rand(3, 7)))
add("TMS importance of text", lambda d, m, p: decompose(TMS(5, 2), {"*": 4}).importance("x"))
add(
    "TMS nan",
    lambda d, m, p: train(
        decompose(TMS(5, 2), {"*": 4}), torch.full((3, 5), float("nan")), steps=1, out_dir=p / "r", divergence="mse"
    ),
)
add("TMS graph", lambda d, m, p: attribution_graph(decompose(TMS(5, 2), {"*": 4}), torch.rand(1, 5)))
add("fixed kind", lambda d, m, p: decompose_fixed(tiny_transformer(), {SITE: 4}, "svdd"))
add("fixed list", lambda d, m, p: decompose_fixed(tiny_transformer(), [SITE], "svd"))
add("fixed_factors C", lambda d, m, p: fixed_factors(torch.rand(3, 4), "svd", 0))
add("train_gates lm", lambda d, m, p: train_gates(d, T, TrainConfig(steps=1)))
add("make_gate kind", lambda d, m, p: make_gate("x", d_in=3, n_subcomponents=2, width=3, generator=torch.Generator()))
add("sample_masks kind", lambda d, m, p: sample_masks({SITE: torch.rand(2, 4)}, kind="x", generator=torch.Generator()))
add("sample_routing", lambda d, m, p: sample_routing({SITE: torch.Size([2])}, "x", generator=torch.Generator()))
