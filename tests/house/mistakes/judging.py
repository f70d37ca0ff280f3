"""Evaluating, comparing and harvesting."""

from __future__ import annotations

import torch

from spd_lens import decompose, evaluate, harvest
from spd_lens.evaluation import compare, pareto, worst_case
from tests.house.mistakes.table import SITE, T, Table, other
from tests.small_models import tiny_transformer

TABLE = Table()
add = TABLE.add

for k, v in {
    "max_batches": [-1, "8", 1.5, True],
    "adversary_steps": [20, "20", [-1], [1.5], None, ["x"]],
    "adversary_step_size": [0, -1, "x", float("nan")],
    "starts": [0, -1, 1.5, "x"],
    "span": [0, -1, 1.5, "x"],
    "token_counts": ["x", torch.ones(3), torch.full((40,), -1.0), torch.full((40,), float("nan")), torch.zeros(40)],
    "kind": ["klx", None],
    "seed": ["x", 1.5, None],
    "deletion": ["yes", None],
    "quick": ["yes", None],
    "deletion_sample": ["x", 3],
}.items():
    for x in v:
        add(f"evaluate {k}={x!r}"[:60], lambda d, m, p, k=k, x=x: evaluate(d, T, **{k: x}))
add("evaluate swapped", lambda d, m, p: evaluate(T, d))
add("evaluate model", lambda d, m, p: evaluate(m, T))
add("evaluate nan", lambda d, m, p: (d[SITE].V.data.fill_(float("nan")), evaluate(d, T, quick=True)))
add("compare other", lambda d, m, p: compare(d, m))
add("compare other sites", lambda d, m, p: compare(d, decompose(tiny_transformer(), {"blocks.0.mlp.W_in": 4})))
add("compare other model", lambda d, m, p: compare(d, decompose(tiny_transformer(seed=3), {SITE: 4}), T))
add("compare text", lambda d, m, p: compare(d, other(seed=0), "x"))
add("compare seed text", lambda d, m, p: compare(d, other(seed=0), T, seed="x"))
add("pareto none", lambda d, m, p: pareto([]))
add("pareto text", lambda d, m, p: pareto("x"))
add("pareto numbers", lambda d, m, p: pareto([1, 2]))
add("pareto dict", lambda d, m, p: pareto({"a": 3}))
add("pareto None", lambda d, m, p: pareto(None))
for k, v in {
    "steps": [20, [], "x", [1.5]],
    "step_size": [0, "x"],
    "starts": [0, "x"],
    "kind": ["x"],
    "seed": ["x"],
    "importances": ["x", {}, {SITE: T}],
}.items():
    for x in v:
        add(f"worst_case {k}={x!r}"[:60], lambda d, m, p, k=k, x=x: worst_case(d, T, **{k: x}))
for k, v in {
    "max_batches": ["x", -1],
    "top_k": [0, -1, 1.5, "x"],
    "before": [-1, 1.5, "x"],
    "after": [-1, "x", 1.5],
    "threshold": [-1, "x", float("nan"), 2.0, None],
}.items():
    for x in v:
        add(f"harvest {k}={x!r}", lambda d, m, p, k=k, x=x: harvest(d, T, **{k: x}))
H = lambda d: harvest(d, T)
add("harvest site typo", lambda d, m, p: H(d)["blocks.1.mlp.W_inn"])
