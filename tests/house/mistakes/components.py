"""Components: co-activations, groupings, names, files."""

from __future__ import annotations

import numpy as np
import torch

from spd_lens import Decomposition
from spd_lens.components import (
    Components,
    adjusted_rand,
    coeffects,
    description_length,
    ensemble,
    leiden,
    merge_subcomponents,
)
from spd_lens.core import Unit
from spd_lens.statistics import CoActivation, coactivation
from tests.house.mistakes.table import SITE, T, Table, another, file_in, removed, saved

TABLE = Table()
add = TABLE.add

FIRES = CoActivation.of({SITE: torch.rand(40, 4, generator=torch.Generator().manual_seed(0)) > 0.5})
NOTHING = CoActivation.of({SITE: torch.zeros(4, 4, dtype=torch.bool)})


def components(decomposition: Decomposition) -> Components:
    return Components.of(decomposition, [{SITE: [0, 1]}, {SITE: [2]}], names=["reader", "writer"])


for k, v in {
    "threshold": ["x", None, -1, 1.0, True],
    "window": [0, "column", 1.5, None],
    "max_events": [0, "x", 2.5, None],
    "max_batches": [0, "x"],
    "seed": ["x", -1, None, 1.5],
}.items():
    for x in v:
        add(f"coactivation {k}={x!r}", lambda d, m, p, k=k, x=x: coactivation(d, T, **{k: x}))
add("coactivation of the model", lambda d, m, p: coactivation(m, T))
add("coactivation removed", lambda d, m, p: coactivation(removed(), T))
add("coactivation of nothing", lambda d, m, p: CoActivation.of({}))
add("coactivation of a list", lambda d, m, p: CoActivation.of([torch.ones(3, 2).bool()]))
add("coactivation of lengths", lambda d, m, p: CoActivation.of({"a": torch.ones(3, 2).bool(), "b": torch.ones(2, 2)}))
add("coactivation of one axis", lambda d, m, p: CoActivation.of({"a": torch.ones(3).bool()}))
add("coactivation of importances", lambda d, m, p: CoActivation.of({"a": torch.rand(3, 2)}))
for x in (0, -3, "x", 1.5, None):
    add(f"between {x!r}", lambda d, m, p, x=x: FIRES.between(x))
for x in (0, 2.0, "x", None):
    add(f"between share {x!r}", lambda d, m, p, x=x: FIRES.between(1, x))
for x in (0, 2.0, "x", None, float("nan")):
    add(f"drawn {x!r}", lambda d, m, p, x=x: FIRES.drawn(x, np.random.default_rng(0)))
add("drawn by a seed", lambda d, m, p: FIRES.drawn(0.5, 3))
add("shuffled by a seed", lambda d, m, p: FIRES.shuffled(3))
add("partners of another site", lambda d, m, p: FIRES.partners("blocks.1.mlp.W_inn", 0))
add("partners of an id", lambda d, m, p: FIRES.partners(SITE, 4))
add("partners of a text", lambda d, m, p: FIRES.partners(SITE, "0"))
add("member outside", lambda d, m, p: FIRES.member(9))
add("sum of others", lambda d, m, p: FIRES + CoActivation.of({"W": torch.ones(2, 2).bool()}))
for k, v in {
    "alpha": ["x", None, -1, float("nan"), float("inf"), True],
    "pairs": ["some", None, 3],
    "sampled": [0, "x", 1.5, True],
    "temperature": ["x", None, -1, float("nan"), 1.0],
    "beyond": [-1, "x", 1.5],
    "seed": ["x", -1, None, 1.5],
}.items():
    for x in v:
        add(f"merge {k}={x!r}", lambda d, m, p, k=k, x=x: merge_subcomponents(FIRES, **{k: x}))
        if k not in ("temperature",):
            add(f"ensemble {k}={x!r}", lambda d, m, p, k=k, x=x: ensemble(FIRES, runs=2, **{k: x}))
add("merge a decomposition", lambda d, m, p: merge_subcomponents(d))
add("merge nothing", lambda d, m, p: merge_subcomponents(NOTHING))
add("merge None", lambda d, m, p: merge_subcomponents(None))
add("merge after too many", lambda d, m, p: merge_subcomponents(FIRES).groups_after(99))
add("merge after a text", lambda d, m, p: merge_subcomponents(FIRES).groups_after("x"))
for x in (1, 0, "x", 1.5, None, True):
    add(f"ensemble runs={x!r}", lambda d, m, p, x=x: ensemble(FIRES, runs=x))
for x in (0, 2.0, "x", None):
    add(f"ensemble share={x!r}", lambda d, m, p, x=x: ensemble(FIRES, runs=2, share=x))
add("ensemble of none", lambda d, m, p: ensemble([]))
add("ensemble of a decomposition", lambda d, m, p: ensemble(d))
add("ensemble of other sites", lambda d, m, p: ensemble([FIRES, CoActivation.of({"W": torch.ones(2, 2).bool()})]))
add("ensemble of nothing", lambda d, m, p: ensemble(NOTHING, runs=2))
for k, v in {"resolution": [0, 2.0, "x", None, float("nan")], "seed": ["x", -1, None]}.items():
    for x in v:
        add(f"leiden {k}={x!r}", lambda d, m, p, k=k, x=x: leiden(FIRES, **{k: x}))
add("leiden of a decomposition", lambda d, m, p: leiden(d))
add("leiden of nothing", lambda d, m, p: leiden(NOTHING))
for k, v in {
    "threshold": ["x", None, 0, -1, float("nan"), float("inf")],
    "readout": ["x", 3, lambda logits: logits],
    "max_batches": [0, "x"],
    "max_events": [0, "x", None],
    "seed": ["x", None, -1],
    "ids": [{"blocks.1.mlp.W_inn": [0]}, {SITE: [4]}, {SITE: ["0"]}, [{SITE: [0, 1]}], 3, Unit(((SITE, 0),), (1,))],
}.items():
    for x in v:
        add(f"coeffects {k}={x!r}"[:70], lambda d, m, p, k=k, x=x: coeffects(d, T, **{k: x}))
add("coeffects of the model", lambda d, m, p: coeffects(m, T))
add("coeffects removed", lambda d, m, p: coeffects(removed(), T))
add("adjusted_rand lengths", lambda d, m, p: adjusted_rand(np.array([0, 1]), np.array([0, 1, 1])))
add("adjusted_rand list", lambda d, m, p: adjusted_rand("ab", "cd"))
add("description_length lengths", lambda d, m, p: description_length([0.5, 0.2], [1], alpha=1.0))
add("description_length none", lambda d, m, p: description_length([], [], alpha=1.0))
add("description_length alpha", lambda d, m, p: description_length([0.5], [1], alpha="x"))

add("components of the model", lambda d, m, p: Components.of(m, [{SITE: [0]}]))
add("components removed", lambda d, m, p: Components.of(removed(), [{SITE: [0]}]))
for name, x in {
    "near site": [{"blocks.1.mlp.W_inn": [0]}], "id": [{SITE: [4]}], "id below": [{SITE: [-5]}], "text id": [{SITE: ["0"]}],
    "half id": [{SITE: [0.5]}], "no group": [], "empty group": [{}], "no id": [{SITE: []}], "number": 3, "None": None,
    "text": "reader", "texts": ["reader"], "one unit": [None], "co-activations": FIRES,
}.items():  # fmt: skip
    add(f"components of {name}", lambda d, m, p, x=x: Components.of(d, x))
for name, x in {
    "one": ["a"], "text": "ab", "twice": ["a", "a"], "numbers": [1, 2], "empty": ["a", ""], "blank": ["a", " "], "number": 3,
}.items():  # fmt: skip
    add(
        f"components names {name}",
        lambda d, m, p, x=x: Components.of(d, [{SITE: [0]}, {SITE: [1]}], names=x),
    )
add("components by near name", lambda d, m, p: components(d)["raeder"])
add("components of_subcomponent site", lambda d, m, p: components(d).of_subcomponent("blocks.1.mlp.W_on", 0))
add("components of_subcomponent id", lambda d, m, p: components(d).of_subcomponent(SITE, 3))
add("components rename near", lambda d, m, p: components(d).rename({"raeder": "x"}))
add("components rename twice", lambda d, m, p: components(d).rename({"reader": "writer"}))
add("components rename list", lambda d, m, p: components(d).rename(["x", "y"]))
add("components rename number", lambda d, m, p: components(d).rename({"reader": 3}))
add("components chosen near", lambda d, m, p: components(d).chosen(["raeder"]))
add("components chosen text", lambda d, m, p: components(d).chosen("reader"))
add("components chosen number", lambda d, m, p: components(d).chosen([7]))
add("components chosen none", lambda d, m, p: components(d).chosen(3))
add("components save None", lambda d, m, p: components(d).save(None))
add("components save number", lambda d, m, p: components(d).save(3))
add("components save below a file", lambda d, m, p: components(d).save(file_in(p) / "x.json"))
add("components save /proc", lambda d, m, p: components(d).save("/proc/nope/x.json"))
add("components save foreign", lambda d, m, p: ((p / "x.json").write_text("{}"), components(d).save(p / "x.json")))
add("components load None", lambda d, m, p: Components.load(None, d))
add("components load absent", lambda d, m, p: Components.load(p / "x.json", d))
add("components load empty folder", lambda d, m, p: Components.load(p, d))
add("components load text file", lambda d, m, p: Components.load(file_in(p), d))
add("components load saved", lambda d, m, p: Components.load(saved(d, p), d))
add("components load swapped", lambda d, m, p: Components.load(d, components(d).save(p)))
add("components load model", lambda d, m, p: Components.load(components(d).save(p), m))
add("components load other", lambda d, m, p: Components.load(components(d).save(p), another()))
add("components load removed", lambda d, m, p: Components.load(components(d).save(p), removed()))
add("components load revision", lambda d, m, p: Components.load(components(d).save(p), d, revision="main"))
add("groups of another", lambda d, m, p: Components.of(d, merge_subcomponents(coactivation(another(), T))))
add("components of another ablated", lambda d, m, p: another().ablate(components(d)))
add("components of another hub", lambda d, m, p: another().push_to_hub("me/x", components=components(d)))
add("hub components", lambda d, m, p: d.push_to_hub("me/x", components=[{SITE: [0]}]))
