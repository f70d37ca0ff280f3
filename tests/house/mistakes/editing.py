"""Edits: what is changed, what it is measured on, where it is written."""

from __future__ import annotations

from typing import Any

import torch

from spd_lens import Decomposition
from spd_lens.components import Components
from spd_lens.core import Unit
from spd_lens.editing import (
    Above,
    Edit,
    Habit,
    Rewrite,
    edit,
    find,
    generate,
    load_edit,
    measure,
    random_edits,
    relearning,
    report,
    save_baked,
    save_edit,
)
from tests.house.mistakes.table import SITE, T, Table, another, file_in, removed

TABLE = Table()
add = TABLE.add
U = Unit(((SITE, 1),))
OTHER = T.flip(1)  # text that is to stay as it is


def made(decomposition: Decomposition) -> Edit:
    return edit(decomposition, {SITE: {0: 0.0}})


def habit() -> Habit:
    return Habit("a habit", T[:, :6], T[:, 6:7], T[:, 6:])


def after_removal(decomposition: Decomposition) -> Edit:
    change = made(decomposition)
    decomposition.remove()
    return change


for name, x in {
    "near site": {"blocks.1.mlp.W_inn": {0: 0.0}}, "no site": {"W": [0]}, "id": {SITE: [4]}, "id below": {SITE: [-5]},
    "half id": {SITE: {0.5: 0.0}}, "text id": {SITE: {"0": 0.0}}, "twice": {SITE: {0: 0.0, (0, 1): 0.5}}, "none": {},
    "no id": {SITE: []}, "empty": {SITE: {}}, "number": {SITE: 0.5}, "rewrite": {SITE: Rewrite(writes=torch.ones(3))},
    "scale one": {SITE: {0: 1.0}}, "NaN": {SITE: {0: float("nan")}}, "infinite": {SITE: {0: float("inf")}},
    "text scale": {SITE: {0: "off"}}, "None scale": {SITE: {0: None}}, "flag": {SITE: {0: False}}, "a list": [SITE],
    "a text": SITE, "a number": 3, "nothing": None, "ids alone": [0, 1], "at positions": U.at(2),
    "no direction": {SITE: {0: Rewrite()}}, "short": {SITE: {0: Rewrite(writes=torch.ones(3))}},
    "whole": {SITE: {0: Rewrite(writes=torch.ones(32, dtype=torch.long))}}, "a list direction": lambda: {SITE: {0: Rewrite(writes=[1.0])}},
    "NaN direction": {SITE: {0: Rewrite(writes=torch.full((32,), float("nan")))}},
    "direction of several": {Unit(((SITE, 0), (SITE, 1))): Rewrite(writes=torch.ones(32))},
    "scale of a rewrite": lambda: {SITE: {0: Rewrite(writes=torch.ones(32), scale="x")}}, "two scales": {SITE: {0: torch.ones(2)}},
}.items():  # fmt: skip
    add(f"edit {name}", lambda d, m, p, x=x: edit(d, x() if callable(x) else x))
for name, x in {
    "text": "importance", "number": 0.5, "one": Above(1.0), "below": Above(-0.1), "NaN": Above(float("nan")),
    "text threshold": lambda: Above("x"), "other unit": Above(0.5, Unit((("blocks.0.mlp.W_in", 0),))), "ids": lambda: Above(0.5, {SITE: [0]}),
    "None threshold": lambda: Above(None),
}.items():  # fmt: skip
    add(f"edit when {name}", lambda d, m, p, x=x: edit(d, {SITE: [0]}, when=x() if callable(x) else x))
add("edit the model", lambda d, m, p: edit(m, {SITE: [0]}))
add("edit removed", lambda d, m, p: edit(removed(), {SITE: [0]}))
add("edit components of another", lambda d, m, p: edit(d, Components.of(another(), [{SITE: [0]}])))
add("edit unit of another", lambda d, m, p: edit(d, Unit((("blocks.0.mlp.W_in", 0),))))
conditional = lambda d: edit(d, {SITE: [0]}, when=Above(0.5))
add("condition without tokens", lambda d, m, p: conditional(d).applied().__enter__())
add("condition hooks", lambda d, m, p: conditional(d).hooks())
add("condition baked", lambda d, m, p: conditional(d).bake())
add("rewrite as hooks", lambda d, m, p: edit(d, {SITE: {0: Rewrite(writes=torch.ones(32))}}).hooks())
for x in (0, "x", None, float("nan"), float("inf"), True):
    add(f"scaled {x!r}", lambda d, m, p, x=x: made(d).scaled(x))
add("reads scaled", lambda d, m, p: edit(d, {SITE: {0: Rewrite(reads=torch.ones(16))}}).scaled(2))
add("removed applied", lambda d, m, p: after_removal(d).applied().__enter__())
add("removed hooks", lambda d, m, p: after_removal(d).hooks())
add("removed baked", lambda d, m, p: after_removal(d).bake())
add("removed logits", lambda d, m, p: after_removal(d).logits(T))
add("removed reported", lambda d, m, p: report(after_removal(d), habit(), OTHER))
add("removed saved", lambda d, m, p: save_edit(after_removal(d), p / "e.json"))
add("removed random", lambda d, m, p: random_edits(after_removal(d), T, 1))
add("factors of a site", lambda d, m, p: made(d).factors("blocks.1.mlp.W_inn"))
add("rank of a site", lambda d, m, p: made(d).rank("blocks.0.mlp.W_in"))
for name, x in {"text": "x", "above": T + 40, "floats": T.float(), "a row": T[0], "None": None}.items():
    add(f"logits of {name}", lambda d, m, p, x=x: made(d).logits(x))
    add(f"find prompts {name}", lambda d, m, p, x=x: find(d, Habit("h", x, T[:, :1]), OTHER))
    add(f"find controls {name}", lambda d, m, p, x=x: find(d, habit(), x))
    add(f"report unrelated {name}", lambda d, m, p, x=x: report(made(d), habit(), x))
    add(f"random edits on {name}", lambda d, m, p, x=x: random_edits(made(d), x, 1))
    add(f"habit answers {name}", lambda d, m, p, x=x: find(d, Habit("h", T[:, :6], x), OTHER))
    if name != "None":
        add(
            f"habit continuations {name}",
            lambda d, m, p, x=x: report(made(d), Habit("h", T[:, :6], T[:, :1], x), OTHER),
        )
add("habit no prompts", lambda d, m, p: Habit("h", T[:0], T[:0]))
add("habit no answer", lambda d, m, p: Habit("h", T, torch.full((2, 1), -1)))
add("habit other rows", lambda d, m, p: Habit("h", T, T[:1]))
add("habit rows outside", lambda d, m, p: habit()[[7]])
add("habit no rows", lambda d, m, p: habit()[5:])
in_text = lambda **k: Habit.in_text(**{"name": "h", "rows": T, "answers": [1], "context": 2} | k)
for name, k in {
    "absent": {"answers": [39]}, "no answers": {"answers": []}, "a text": {"answers": "the"}, "texts": {"answers": ["the"]},
    "half": {"answers": [1.5]}, "one number": {"answers": 3}, "text rows": {"rows": "a text"}, "a row": {"rows": T[0]},
    "long context": {"context": 99}, "no context": {"context": 0}, "below": {"context": -1}, "text context": {"context": "x"},
    "most": {"most": 0}, "text most": {"most": "x"}, "first": {"first": "<bos>"}, "generator": {"generator": 3},
}.items():  # fmt: skip
    add(f"in_text {name}", lambda d, m, p, k=k: in_text(**k))
for k, v in {
    "n_measured": [0, "x", 1.5, None, True], "n_checked": [-1, "x"], "per_pass": [0, "x"],
    "ids": [{"blocks.1.mlp.W_inn": [0]}, {SITE: [9]}, 3, "x"],
}.items():  # fmt: skip
    for x in v:
        add(f"find {k}={x!r}"[:60], lambda d, m, p, k=k, x=x: find(d, habit(), OTHER, **{k: x}))
add("find the model", lambda d, m, p: find(m, habit(), OTHER))
add("find controls are the prompts", lambda d, m, p: find(d, habit(), habit().prompts))
add("find controls are the text", lambda d, m, p: find(d, habit(), T))
add("report unrelated is the text", lambda d, m, p: report(made(d), habit(), T))
add("edit a list twice", lambda d, m, p: edit(d, [U, U]))
add("habit answer below -1", lambda d, m, p: Habit("h", T[:, :6], torch.full((2, 2), -5).fill_diagonal_(3)))
add("relearning the decomposed", lambda d, m, p: relearning(m, habit(), habit(), goal=0.5))
add("difference to the decomposed", lambda d, m, p: made(d).difference(m, T))
add("save over a text", lambda d, m, p: save_edit(made(d), file_in(p)))
add("find removed", lambda d, m, p: find(removed(), habit(), OTHER))
add("find tokens", lambda d, m, p: find(d, T, T))
add("find components of another", lambda d, m, p: find(d, habit(), OTHER, Components.of(another(), [{SITE: [0]}])))
found = lambda d: find(d, habit(), OTHER, n_checked=1)
for x in (0, 1, 1.5, "x", None, float("nan")):
    add(f"smallest {x!r}", lambda d, m, p, x=x: found(d).smallest(x))
for x in (0, "x", None):
    add(f"smallest at_most {x!r}", lambda d, m, p, x=x: found(d).smallest(0.1, at_most=x))
for k, v in {
    "n_random": [-1, "x", 1.5, 99], "n_generated": [-1, "x", 1.5], "seed": ["x", None], "relearn_on": ["x", T],
    "wordings": [{"a": T}, [habit()], "x"],
}.items():  # fmt: skip
    for x in v:
        add(f"report {k}={x!r}"[:60], lambda d, m, p, k=k, x=x: report(made(d), habit(), OTHER, **{k: x}))
add("report a decomposition", lambda d, m, p: report(d, habit(), OTHER))
add("report tokens", lambda d, m, p: report(made(d), T, T))
add("random edits of a decomposition", lambda d, m, p: random_edits(d, T, 1))
for x in (-1, "x", None, 1.5):
    add(f"random edits {x!r}", lambda d, m, p, x=x: random_edits(made(d), T, x))
forward: Any = lambda d: d.host.forward
for x in (-1, "x", None, 1.5):
    add(f"generate {x!r}", lambda d, m, p, x=x: generate(forward(d), T, x))
    add(f"measure n_generated {x!r}", lambda d, m, p, x=x: measure(forward(d), forward(d), habit(), T, n_generated=x))
add("generate a model", lambda d, m, p: generate("gpt2", T, 2))
add("generate a row", lambda d, m, p: generate(forward(d), T[0], 2))
add("measure tokens", lambda d, m, p: measure(forward(d), forward(d), T, T))
for k, v in {
    "goal": [0, "x", None, float("nan"), 2.0], "steps": [-1, "x", 1.5], "learning_rate": [0, "x", -1, float("nan")],
}.items():  # fmt: skip
    for x in v:
        add(
            f"relearning {k}={x!r}",
            lambda d, m, p, k=k, x=x: relearning(
                made(d).bake(), habit(), habit(), **{"goal": 0.5, "steps": 1} | {k: x}
            ),
        )
add("relearning tokens", lambda d, m, p: relearning(made(d).bake(), T, habit(), goal=0.5))
add("relearning an edit", lambda d, m, p: relearning(made(d), habit(), habit(), goal=0.5))

add("save_edit None", lambda d, m, p: save_edit(made(d), None))
add("save_edit number", lambda d, m, p: save_edit(made(d), 3))
add("save_edit a decomposition", lambda d, m, p: save_edit(d, p / "e.json"))
add("save_edit below a file", lambda d, m, p: save_edit(made(d), file_in(p) / "e.json"))
add("save_edit /proc", lambda d, m, p: save_edit(made(d), "/proc/nope/e.json"))
add("save_edit folder", lambda d, m, p: save_edit(made(d), p))
add("load_edit absent", lambda d, m, p: load_edit(d, p / "e.json"))
add("load_edit text", lambda d, m, p: load_edit(d, file_in(p)))
add("load_edit folder", lambda d, m, p: load_edit(d, p))
add("load_edit swapped", lambda d, m, p: load_edit(save_edit(made(d), p / "e.json"), d))
add("load_edit other", lambda d, m, p: load_edit(another(), save_edit(made(d), p / "e.json")))
add("load_edit removed", lambda d, m, p: load_edit(removed(), save_edit(made(d), p / "e.json")))
add("load_edit model", lambda d, m, p: load_edit(m, save_edit(made(d), p / "e.json")))
add("save_baked None", lambda d, m, p: save_baked(made(d).bake(), None))
add("save_baked an edit", lambda d, m, p: save_baked(made(d), p / "x"))
add("save_baked a decomposition", lambda d, m, p: save_baked(d, p / "x"))
add("save_baked a decomposed model", lambda d, m, p: save_baked(m, p / "x"))
add("save_baked a file", lambda d, m, p: save_baked(made(d).bake(), file_in(p)))
add("save_baked there", lambda d, m, p: save_baked(made(d).bake(), p))
add("save_baked /proc", lambda d, m, p: save_baked(made(d).bake(), "/proc/nope/x"))
add("save_baked tokenizer", lambda d, m, p: save_baked(made(d).bake(), p / "x", tokenizer="gpt2"))
add("difference of an edit", lambda d, m, p: made(d).difference(made(d), T))
