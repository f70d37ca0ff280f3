"""Graphs and circuits."""

from __future__ import annotations

import torch

from spd_lens import decompose
from spd_lens.circuits import (
    HeadAndMLPParts,
    HeadAndNeuronParts,
    SubcomponentParts,
    check_circuit,
    circuit_of,
    compare_parts,
    faithfulness_curve,
    find_circuit,
)
from spd_lens.graphs import attribution_graph, dataset_graph
from tests.house.mistakes.table import SITE, T, Table, last, task
from tests.small_models import tiny_transformer

TABLE = Table()
add = TABLE.add

for k, v in {
    "readouts": ["x y", [99], ["nope-word"], [], [1.5], lambda l: l],
    "position": [99, "x", 1.5, -99, None],
    "importance_above": ["x", -1, 2.0, float("nan")],
    "circuit": ["x", 3],
    "max_nodes": [0, -1, "x", 1.5],
    "frozen": ["x", True],
    "n_checked": ["x", -1],
    "generator": [3],
    "per_pass": [0, "x"],
}.items():
    for x in v:
        add(f"graph {k}={x!r}"[:60], lambda d, m, p, k=k, x=x: attribution_graph(d, T[:1], **{k: x}))
    if k in ("importance_above", "max_nodes", "frozen", "n_checked", "per_pass", "generator"):
        for x in v:
            add(f"dataset_graph {k}={x!r}"[:60], lambda d, m, p, k=k, x=x: dataset_graph(d, T, **{k: x}))
add("graph two rows", lambda d, m, p: attribution_graph(d, T))
G = lambda d: attribution_graph(d, T[:1], importance_above=None)
add("graph prune 2", lambda d, m, p: G(d).prune(node_threshold=2.0))
add("graph prune text", lambda d, m, p: G(d).prune(node_threshold="x"))
add("graph prune nan", lambda d, m, p: G(d).prune(node_threshold=float("nan")))
for k, v in {
    "objective": ["klx", None],
    "masks": [[], ["x"], 3],
    "by_position": ["x"],
    "start": ["x"],
    "minimality": [-1, "x"],
    "p": [0],
    "steps": [0, "x"],
    "lr": [0, "x"],
    "pgd": ["x", 3],
}.items():
    for x in v:
        add(f"circuit {k}={x!r}"[:60], lambda d, m, p, k=k, x=x: find_circuit(d, task(), **{k: x}))
add("circuit config dict", lambda d, m, p: find_circuit(d, task(), {"steps": 1}))
add("circuit typo", lambda d, m, p: find_circuit(d, task(), step=1))
add("circuit metric no task", lambda d, m, p: find_circuit(d, T, objective="metric", steps=1))
add("circuit position_mask", lambda d, m, p: find_circuit(d, T, position_mask=torch.ones(3, 3).bool(), steps=1))
add("circuit position_mask list", lambda d, m, p: find_circuit(d, T, position_mask=[1, 2], steps=1))
add("circuit mask none", lambda d, m, p: find_circuit(d, T, position_mask=T < 0, steps=1))
add("circuit metrics list", lambda d, m, p: find_circuit(d, T, metrics=[last], steps=1))
add("circuit metrics fn", lambda d, m, p: find_circuit(d, T, metrics=last, steps=1))
add("circuit_of typo", lambda d, m, p: circuit_of(d, {"x": [0]}))
add("circuit_of bare", lambda d, m, p: circuit_of(d, 3))
add("circuit_of n_positions", lambda d, m, p: circuit_of(d, None, n_positions="x"))
add("circuit_of n_positions 0", lambda d, m, p: circuit_of(d, None, n_positions=0))
ck = lambda d, **k: check_circuit(d, circuit_of(d, {SITE: [0]}), T, **k)
for k, v in {
    "budgets": [20, [0], "x", [1.5]],
    "step_size": [0, "x", float("nan")],
    "restarts": [0, "x", 1.5],
    "draws": [0, "x"],
    "holds_above": ["x", 2.0, -1],
    "seed": ["x", None],
    "objective": ["x"],
    "position_mask": ["x"],
}.items():
    for x in v:
        add(f"check_circuit {k}={x!r}"[:60], lambda d, m, p, k=k, x=x: ck(d, **{k: x}))
add("check_circuit ids", lambda d, m, p: check_circuit(d, {SITE: [0]}, T))
add("check_circuit None", lambda d, m, p: check_circuit(d, None, T))
add(
    "check_circuit other",
    lambda d, m, p: check_circuit(d, circuit_of(decompose(tiny_transformer(), {"blocks.0.mlp.W_in": 4}), None), T),
)
add(
    "check_circuit other C",
    lambda d, m, p: check_circuit(d, circuit_of(decompose(tiny_transformer(), {SITE: 5}), None), T),
)
add("units tokens", lambda d, m, p: SubcomponentParts(d, T))
add("units outside", lambda d, m, p: SubcomponentParts(d, task(), outside="x"))
add("units heads tokens", lambda d, m, p: HeadAndMLPParts(d, T))
add("units neurons tokens", lambda d, m, p: HeadAndNeuronParts(d, T))
add("curve of d", lambda d, m, p: faithfulness_curve(d))
add("curve scores", lambda d, m, p: faithfulness_curve(SubcomponentParts(d, task()), torch.ones(3)))
add(
    "curve scores nan", lambda d, m, p: faithfulness_curve(SubcomponentParts(d, task()), torch.full((5,), float("nan")))
)
add("curve sizes", lambda d, m, p: faithfulness_curve(SubcomponentParts(d, task()), sizes=[99]))
add("curve sizes number", lambda d, m, p: faithfulness_curve(SubcomponentParts(d, task()), sizes=3))
add("compare_parts level", lambda d, m, p: compare_parts(d, task(), level=2.0))
add("compare_parts level text", lambda d, m, p: compare_parts(d, task(), level="x"))
add("compare_parts tokens", lambda d, m, p: compare_parts(d, T))
