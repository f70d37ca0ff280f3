"""Patching, units and effects."""

from __future__ import annotations

from spd_lens import decompose
from spd_lens.core import Unit, unit_hooks
from spd_lens.graphs import dataset_graph
from spd_lens.patching import ablation_effects, activation_patching, attribution_patching, path_patching
from spd_lens.pictures import effects_heatmap
from tests.house.mistakes.table import SITE, T, Table, last
from tests.small_models import tiny_transformer, tokens

TABLE = Table()
add = TABLE.add

for k, v in {
    "ids": [3, "x", [1], {SITE: [9]}, {"x": [0]}, {}, [], {SITE: "0"}],
    "kind": ["zer", None],
    "test": ["necessary", None],
    "positions": ["x", [99], 1.5, [1.5], [], -99],
    "reference": ["x", T.float()],
    "per_pass": [0, -1, 1.5, "x"],
}.items():
    for x in v:
        add(f"ablation {k}={x!r}"[:60], lambda d, m, p, k=k, x=x: ablation_effects(d, T, last, **{k: x}))
mets = {
    "None": None,
    "text": "x",
    "returns wrong rows": lambda l: l[:1, -1, 0],
    "returns 2 axes": lambda l: l[:, -1],
    "returns nan": lambda l: l[:, -1, 0] * float("nan"),
    "returns None": lambda l: None,
    "wrong args": lambda a, b: a,
    "returns numpy": lambda l: l[:, -1, 0].detach().numpy(),
    "returns list": lambda l: l[:, -1, 0].tolist(),
}
for k, f in mets.items():
    add("ablation metric " + k, lambda d, m, p, f=f: ablation_effects(d, T, f))
    add("activation metric " + k, lambda d, m, p, f=f: activation_patching(d, T, tokens(2, seed=3), f))
    add("attribution metric " + k, lambda d, m, p, f=f: attribution_patching(d, T, tokens(2, seed=3), f))
    add(
        "path metric " + k,
        lambda d, m, p, f=f: path_patching(d, T, tokens(2, seed=3), f, senders={SITE: [0]}, receivers={SITE: [1]}),
    )
    if f is not None:
        add("dataset_graph metric " + k, lambda d, m, p, f=f: dataset_graph(d, T, metric=f))
for nm, fn in {"activation": activation_patching, "attribution": attribution_patching}.items():
    add(nm + " other length", lambda d, m, p, fn=fn: fn(d, T, tokens(2, length=5), last))
    add(nm + " other rows", lambda d, m, p, fn=fn: fn(d, T, tokens(3), last))
    add(nm + " clean None", lambda d, m, p, fn=fn: fn(d, T, None, last))
    add(nm + " clean dict", lambda d, m, p, fn=fn: fn(d, T, {}, last))
    add(nm + " clean cache of other", lambda d, m, p, fn=fn: fn(d, T, m.run_with_cache(tokens(2, length=5))[1], last))
    add(
        nm + " clean cache of target names",
        lambda d, m, p, fn=fn: fn(d, T, tiny_transformer().run_with_cache(T)[1], last),
    )
    add(nm + " positions text", lambda d, m, p, fn=fn: fn(d, T, tokens(2, seed=3), last, positions="every"))
    add(nm + " positions out", lambda d, m, p, fn=fn: fn(d, T, tokens(2, seed=3), last, positions=[12]))
    add(nm + " positions bool", lambda d, m, p, fn=fn: fn(d, T, tokens(2, seed=3), last, positions=True))
    add(nm + " per_pass 0", lambda d, m, p, fn=fn: fn(d, T, tokens(2, seed=3), last, per_pass=0))
    add(nm + " ids bare", lambda d, m, p, fn=fn: fn(d, T, tokens(2, seed=3), last, 3))
add("attribution n_checked text", lambda d, m, p: attribution_patching(d, T, tokens(2, seed=3), last, n_checked="x"))
add("attribution n_checked negative", lambda d, m, p: attribution_patching(d, T, tokens(2, seed=3), last, n_checked=-1))
add("attribution generator int", lambda d, m, p: attribution_patching(d, T, tokens(2, seed=3), last, generator=3))
pp = lambda d, **k: path_patching(
    d, T, tokens(2, seed=3), last, **{"senders": {SITE: [0]}, "receivers": {SITE: [1]}, **k}
)
for k, v in {
    "senders": [3, "x", {"x": [0]}, [], {SITE: [9]}],
    "receivers": [3, "x", [], {SITE: [9]}],
    "sender_position": [99, "x", 1.5, [1]],
    "receiver_position": [99, "x"],
    "frozen": ["all", 3, True],
    "per_pass": [0, "x"],
}.items():
    for x in v:
        add(f"paths {k}={x!r}"[:60], lambda d, m, p, k=k, x=x: pp(d, **{k: x}))
add(
    "paths backwards",
    lambda d, m, p: path_patching(
        decompose(tiny_transformer(), {"blocks.*.mlp.W_in": 4}),
        T,
        T,
        last,
        senders={SITE: [0]},
        receivers={"blocks.0.mlp.W_in": [0]},
    ),
)
E_ = lambda d: ablation_effects(d, T, last)
add("effects top text", lambda d, m, p: E_(d).top("x"))
add("effects top 0", lambda d, m, p: E_(d).top(0))
add("effects heatmap site", lambda d, m, p: effects_heatmap(E_(d), "x"))
add("effects heatmap swapped", lambda d, m, p: effects_heatmap(SITE, E_(d)))
add("Unit empty", lambda d, m, p: unit_hooks(d, Unit(()), keep=False))
add("Unit bare", lambda d, m, p: unit_hooks(d, Unit((SITE, 0)), keep=False))
add("Unit text", lambda d, m, p: unit_hooks(d, Unit("x"), keep=False))
add(
    "Unit position number",
    lambda d, m, p: m.run_with_hooks(T, fwd_hooks=unit_hooks(d, Unit(((SITE, 0),), 5), keep=False)),
)
add(
    "Unit position out",
    lambda d, m, p: m.run_with_hooks(T, fwd_hooks=unit_hooks(d, Unit(((SITE, 0),), (50,)), keep=False)),
)
add(
    "Unit position text",
    lambda d, m, p: m.run_with_hooks(T, fwd_hooks=unit_hooks(d, Unit(((SITE, 0),), ("a",)), keep=False)),
)
add("Unit id out", lambda d, m, p: d.ablate(Unit(((SITE, 9),))))
add("Unit at text", lambda d, m, p: d.ablate(Unit(((SITE, 0),)).at("x")))
add("Unit of foreign", lambda d, m, p: d.ablate(Unit((("x", 0),))))
add("Unit delta", lambda d, m, p: d.ablate(Unit(((SITE, -1),))))
add("units list of text", lambda d, m, p: d.ablate(["x"]))
add("units mixed", lambda d, m, p: d.ablate([Unit(((SITE, 0),)), 3]))
add("units repeated", lambda d, m, p: d.ablate([Unit(((SITE, 0),)), Unit(((SITE, 0),))]))
