"""Decomposing a model, and a decomposition as a mapping."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from spd_lens import TokenBatches, TrainConfig, cache_residuals, decompose, decompose_layer, evaluate, harvest, train
from spd_lens.circuits import circuit_of, find_circuit
from spd_lens.core import Unit
from spd_lens.evaluation import compare, worst_case
from spd_lens.graphs import attribution_graph, dataset_graph
from spd_lens.patching import ablation_effects, activation_patching, attribution_patching, path_patching
from spd_lens.training import train_many
from tests.house.mistakes.table import SITE, T, Table, last, nan_model, plain_model, removed, task

TABLE = Table()
add = TABLE.add

for nm, a in {
    "model None": None,
    "model a path": Path("x"),
    "model a plain module": plain_model(),
    "model a state dict": {},
    "model a class": nn.Linear,
}.items():
    add(f"decompose {nm}", lambda d, m, p, a=a: decompose(a, {SITE: 4}))
    add(f"decompose_layer {nm}", lambda d, m, p, a=a: decompose_layer(a, 0))
add("decompose a Decomposition", lambda d, m, p: decompose(d, {SITE: 4}))
add("layer negative", lambda d, m, p: decompose_layer(m, -1))
add("layer list", lambda d, m, p: decompose_layer(m, [0]))
add("layer None", lambda d, m, p: decompose_layer(m, None))
add("layer bool", lambda d, m, p: decompose_layer(m, True))
add("layer tensor", lambda d, m, p: decompose_layer(m, torch.tensor([0, 1])))
add("C text", lambda d, m, p: decompose_layer(m, 0, "4"))
add("C negative", lambda d, m, p: decompose_layer(m, 0, -4))
add("C bool", lambda d, m, p: decompose_layer(m, 0, True))
add("C nan", lambda d, m, p: decompose_layer(m, 0, float("nan")))
add("C dict for layer", lambda d, m, p: decompose_layer(m, 0, {"mlp.W_in": 4}))
add("C huge", lambda d, m, p: decompose_layer(m, 0, 10**15))
add("C a list in a dict", lambda d, m, p: decompose(m, {"blocks.0.mlp.W_in": [4]}))
add("sites None inside", lambda d, m, p: decompose_layer(m, 0, 4, sites=[None]))
add("sites a number", lambda d, m, p: decompose_layer(m, 0, 4, sites=3))
add("sites empty", lambda d, m, p: decompose_layer(m, 0, 4, sites=[]))
add("sites twice", lambda d, m, p: decompose_layer(m, 0, 4, sites=["mlp.W_in", "mlp.W_in"]))
add("sites dict", lambda d, m, p: decompose_layer(m, 0, 4, sites={"mlp.W_in": 4}))
add("gate mistyped", lambda d, m, p: decompose_layer(m, 0, 4, gate="scaler"))
add("gate None", lambda d, m, p: decompose_layer(m, 0, 4, gate=None))
add("gate a number", lambda d, m, p: decompose_layer(m, 0, 4, gate=3))
add("gate returns linear", lambda d, m, p: decompose_layer(m, 0, 4, gate=lambda **k: nn.Linear(3, 3)))
add("gate with wrong args", lambda d, m, p: decompose_layer(m, 0, 4, gate=lambda a: nn.Linear(3, 3)))
add("gate_width text", lambda d, m, p: decompose_layer(m, 0, 4, gate_width="8"))
add("gate_width zero", lambda d, m, p: decompose_layer(m, 0, 4, gate_width=0))
add("gate_width negative", lambda d, m, p: decompose_layer(m, 0, 4, gate_width=-1))
add("gate_width fraction", lambda d, m, p: decompose_layer(m, 0, 4, gate_width=1.5))
add("gate_options for scalar", lambda d, m, p: decompose(m, {"blocks.0.mlp.W_in": 4}, gate_options={"n_heads": 2}))
add(
    "gate_options mistyped",
    lambda d, m, p: decompose(m, {"blocks.0.mlp.W_in": 4}, gate="global", gate_options={"n_head": 2}),
)
add(
    "gate_options list", lambda d, m, p: decompose(m, {"blocks.0.mlp.W_in": 4}, gate="global", gate_options=["n_heads"])
)
add(
    "gate_options heads do not divide",
    lambda d, m, p: decompose(m, {"blocks.0.mlp.W_in": 4}, gate="global", gate_width=6, gate_options={"n_heads": 4}),
)
add(
    "gate_options zero blocks",
    lambda d, m, p: decompose(m, {"blocks.0.mlp.W_in": 4}, gate="global", gate_options={"n_blocks": 0}),
)
add(
    "gate_options text",
    lambda d, m, p: decompose(m, {"blocks.0.mlp.W_in": 4}, gate="global", gate_options={"causal": "yes"}),
)
add("init mistyped", lambda d, m, p: decompose_layer(m, 0, 4, init="svdd"))
add("init None", lambda d, m, p: decompose_layer(m, 0, 4, init=None))
add("init number", lambda d, m, p: decompose_layer(m, 0, 4, init=0))
add("init returns one", lambda d, m, p: decompose_layer(m, 0, 4, init=lambda W, C, g: W))
add("init returns None", lambda d, m, p: decompose_layer(m, 0, 4, init=lambda W, C, g: None))
add("init returns numpy", lambda d, m, p: decompose_layer(m, 0, 4, init=lambda W, C, g: (W.numpy(), W.numpy())))
add(
    "init returns nan",
    lambda d, m, p: decompose_layer(
        m, 0, 4, init=lambda W, C, g: (torch.full((W.shape[0], C), float("nan")), torch.ones(C, W.shape[1]))
    ),
)
add("init wrong args", lambda d, m, p: decompose_layer(m, 0, 4, init=lambda W: W))
add("seed None", lambda d, m, p: decompose_layer(m, 0, 4, seed=None))
add("seed fraction", lambda d, m, p: decompose_layer(m, 0, 4, seed=0.5))
add("seed huge", lambda d, m, p: decompose_layer(m, 0, 4, seed=2**70))
add("seed generator", lambda d, m, p: decompose_layer(m, 0, 4, seed=torch.Generator()))
add("nan weights", lambda d, m, p: decompose_layer(nan_model(), 0, 4))
add("pattern matches nothing", lambda d, m, p: decompose(m, {"blocks.9.mlp.*": 4}))
add("pattern is regex", lambda d, m, p: decompose(m, {r"blocks\.0\.mlp\..*": 4}))
add("pattern list of pairs", lambda d, m, p: decompose(m, [(SITE, 4)]))
add("pattern hook name", lambda d, m, p: decompose(m, {"blocks.0.mlp.hook_pre": 4}))
add("pattern HF name", lambda d, m, p: decompose(m, {"transformer.h.0.mlp.c_fc": 4}))
add("pattern W_E lookups typo", lambda d, m, p: decompose(m, {"W_e": 4}))
add("d[unknown]", lambda d, m, p: d["blocks.1.mlp.W_on"])
add("d[int]", lambda d, m, p: d[0])
add("d[None]", lambda d, m, p: d[None])
add("subcomponent out", lambda d, m, p: d[SITE].subcomponent(4))
add("subcomponent text", lambda d, m, p: d[SITE].subcomponent("1"))
add("subcomponent float", lambda d, m, p: d[SITE].subcomponent(1.0))
add("subcomponent list", lambda d, m, p: d[SITE].subcomponent([1]))
R = {
    "ablate": lambda d: d.ablate({SITE: [0]}),
    "keep": lambda d: d.keep({SITE: [0]}),
    "keep unit": lambda d: d.keep(Unit(((SITE, 0),))),
    "mask": lambda d: d.mask({SITE: torch.ones(4)}),
    "importance": lambda d: d.importance(T),
    "summary": lambda d: d.summary(),
    "tensors": lambda d: d.tensors(),
    "parameters": lambda d: d.subcomponent_parameters(),
    "gate_parameters": lambda d: d.gate_parameters(),
    "clean_pass": lambda d: d.clean_pass(T),
    "masked_forward": lambda d: d.masked_forward(T, {}),
    "save": lambda d: d.save_pretrained("x"),
    "train": lambda d: train(d, T, steps=1),
    "evaluate": lambda d: evaluate(d, T),
    "harvest": lambda d: harvest(d, T),
    "cache": lambda d: cache_residuals(d, TokenBatches(T, 2)),
    "graph": lambda d: attribution_graph(d, T[:1]),
    "dataset graph": lambda d: dataset_graph(d, T),
    "ablation": lambda d: ablation_effects(d, T, last),
    "patching": lambda d: activation_patching(d, T, T, last),
    "attribution": lambda d: attribution_patching(d, T, T, last),
    "paths": lambda d: path_patching(d, T, T, last, senders=None, receivers=None),
    "find_circuit": lambda d: find_circuit(d, task()),
    "circuit_of": lambda d: circuit_of(d, None),
    "train_many": lambda d: train_many([d], [T], TrainConfig(steps=1)),
    "device": lambda d: d.device,
    "to": lambda d: d.to("cpu"),
    "load_tensors": lambda d: d.load_tensors({}),
    "compare": lambda d: compare(d, d),
    "worst_case": lambda d: worst_case(d, T),
    "push": lambda d: d.push_to_hub("a/b"),
    "gates": lambda d: d.gates,
    "pre_importances": lambda d: d.pre_importances({}),
    "deepcopy": lambda d: __import__("copy").deepcopy(d).importance(T),
}
for k, f in R.items():
    add("removed: " + k, lambda d, m, p, f=f: f(removed()))
