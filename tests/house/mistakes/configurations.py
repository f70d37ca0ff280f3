"""Configurations."""

from __future__ import annotations

from spd_lens import PGD, Reconstruction, TrainConfig
from spd_lens.objective import Merged, Persistent
from tests.house.mistakes.table import Table

TABLE = Table()
add = TABLE.add

C = {
    "steps": [0, -1, 2.5, "10", None, True, float("nan"), [1]],
    "lr": [0, -1, "1e-3x", None, float("nan"), float("inf"), True, [1e-3]],
    "gate_lr": [0, "a"],
    "schedule": ["cosin", None, 3],
    "lr_warmup": [-1, 0.5],
    "lr_end": [-0.1, 1.5],
    "clip_subcomponents": [0, -1, "a"],
    "precision": ["fp16", "float32", None, 16],
    "accumulate": [0, 1.5, None, "4", True],
    "recompute": ["gate", True, None],
    "offload": ["yes", 2, None],
    "faithfulness": [-1, float("nan")],
    "minimality": [-1, float("nan"), "x"],
    "minimality_factors": [[], "x", {"blocks.*": "x"}, {3: 1.0}, {"blocks.*": -1}],
    "penalty": ["l1"],
    "p_start": [0],
    "gamma_until": [2.0, -0.5, 0.0, True, "0.5", float("nan")],
    "frequency_reference": [0],
    "reconstructions": [
        (),
        [],
        "stochastic",
        None,
        (3,),
        {"a": 1},
        Reconstruction(),
        [Reconstruction(), Reconstruction()],
    ],
    "hidden": [1.0, -1],
    "hidden_points": ["blocks.0", [3]],
    "delta": ["yes", 1, None],
    "squash": ["leeky"],
    "divergence": ["l2", None],
    "extra_terms": [(3,), "x"],
    "seed": [None, "x", 1.5],
    "log_every": [0, None],
    "checkpoint_every": [0, -5, 2.5],
    "keep_checkpoints": [0],
}
for f, vs in C.items():
    for v in vs:
        add(f"TrainConfig {f}={v!r}"[:60], lambda d, m, p, f=f, v=v: TrainConfig(**{f: v}))
for f, v in {
    "masks": ["stocastic", None, 3, PGD, Persistent, ["pgd"]],
    "routing": ["subst", 1.5, -0.1, True, None, 2],
    "coefficient": [-1, "x", float("nan")],
    "draws": [0, 1.5, "x"],
}.items():
    for x in v:
        add(
            f"Reconstruction {f}={x!r}"[:60],
            lambda d, m, p, f=f, x=x: TrainConfig(reconstructions=[Reconstruction(**{f: x})]),
        )
for k, v in {"steps": [-1, 1.5, "x"], "step_size": [0, -1, "x", float("nan")], "scope": ["bach", None]}.items():
    for x in v:
        add(f"PGD {k}={x!r}", lambda d, m, p, k=k, x=x: PGD(**{k: x}))
for k, v in {
    "warm_steps": [-1, 1.5],
    "lr": [0, "x"],
    "betas": [(0.5,), (1.0, 0.9), "x", (0.5, "x")],
    "lr_warmup": [-1, 2.0],
    "scope": ["x"],
    "start": [-1, "x"],
    "first_steps": [-1],
}.items():
    for x in v:
        add(f"Persistent {k}={x!r}", lambda d, m, p, k=k, x=x: Persistent(**{k: x}))
for k, v in {"share": [-0.1, 1.5, "x"], "persistent": [3, None]}.items():
    for x in v:
        add(f"Merged {k}={x!r}", lambda d, m, p, k=k, x=x: Merged(**{k: x}))
