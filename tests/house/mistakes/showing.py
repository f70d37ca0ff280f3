"""Pictures and tasks."""

from __future__ import annotations

import torch

from spd_lens.circuits import find_circuit
from spd_lens.models import load_tiny_lm_tokenizer
from spd_lens.pictures import importance_figure, importance_page, save_importance
from spd_lens.tasks import (
    agreement_task,
    docstring_task,
    greater_than_task,
    indirect_object_task,
    induction_task,
    pair_task,
)
from tests.house.mistakes.table import SITE, T, Table, file_in

TABLE = Table()
add = TABLE.add
tk = load_tiny_lm_tokenizer()

imp = lambda d: d.importance(T)
add("picture importance batch", lambda d, m, p: importance_figure(imp(d)))
add("picture tensor", lambda d, m, p: importance_figure(imp(d)[SITE][0]))
add("picture decomposition", lambda d, m, p: importance_figure(d))
add("picture None", lambda d, m, p: importance_figure(None))
add("picture empty", lambda d, m, p: importance_figure({}))
one = lambda d: {k: v[0] for k, v in imp(d).items()}
add("picture tokens count", lambda d, m, p: importance_figure(one(d), ["a"]))
add("picture tokens text", lambda d, m, p: importance_figure(one(d), "a" * 12))
add("picture tokens ids", lambda d, m, p: importance_figure(one(d), T[0]))
add("picture rows 0", lambda d, m, p: importance_figure(one(d), rows_per_site=0))
add("picture rows text", lambda d, m, p: importance_figure(one(d), rows_per_site="x"))
add("picture nan", lambda d, m, p: importance_figure({SITE: torch.full((12, 4), float("nan"))}))
add("page batch", lambda d, m, p: importance_page(imp(d)))
add("page tokens", lambda d, m, p: importance_page(one(d), ["a"]))
add("page nan", lambda d, m, p: importance_page({SITE: torch.full((12, 4), float("nan"))}))
add("page title number", lambda d, m, p: importance_page(one(d), title=3))
add("page title None", lambda d, m, p: importance_page(one(d), title=None))
add("page rows", lambda d, m, p: importance_page(one(d), rows_per_site=-1))
add("save_importance file", lambda d, m, p: save_importance(one(d), None, file_in(p), title="x"))
add("save_importance None", lambda d, m, p: save_importance(one(d), None, None, title="x"))
for nm, f in {
    "greater": greater_than_task,
    "io": indirect_object_task,
    "doc": docstring_task,
    "agree": agreement_task,
}.items():
    add(nm + " no tokenizer", lambda d, m, p, f=f: f(None))
    add(nm + " name", lambda d, m, p, f=f: f("gpt2"))
    add(nm + " n 0", lambda d, m, p, f=f: f(tk, 0))
    add(nm + " n text", lambda d, m, p, f=f: f(tk, "x"))
    add(nm + " n float", lambda d, m, p, f=f: f(tk, 2.5))
    add(nm + " seed text", lambda d, m, p, f=f: f(tk, 2, seed="x"))
add("greater century text", lambda d, m, p: greater_than_task(tk, 2, century="x"))
add("greater nouns text", lambda d, m, p: greater_than_task(tk, 2, nouns="war"))
add("greater nouns empty", lambda d, m, p: greater_than_task(tk, 2, nouns=[]))
add("io names text", lambda d, m, p: indirect_object_task(tk, 2, names="Mary"))
add("io names one", lambda d, m, p: indirect_object_task(tk, 2, names=["Mary"]))
add("induction text", lambda d, m, p: induction_task("x"))
add("induction 0", lambda d, m, p: induction_task(0))
add("induction 1", lambda d, m, p: induction_task(1, 4))
add("induction length", lambda d, m, p: induction_task(40, 4, length=1))
add("induction length text", lambda d, m, p: induction_task(40, 4, length="x"))
add("induction too long", lambda d, m, p: find_circuit(d, induction_task(40, 4, length=30), steps=1))
add("induction tokenizer", lambda d, m, p: induction_task(None))
add("induction bos", lambda d, m, p: induction_task(40, 4, bos="x"))
add("induction out of range", lambda d, m, p: find_circuit(d, induction_task(400, 4, length=6), steps=1))
add("pair texts", lambda d, m, p: pair_task(tk, "a", "b", "c", "d"))
add("pair lengths", lambda d, m, p: pair_task(tk, ["a b"], ["a b c"], [" x"], [" y"]))
add("pair counts", lambda d, m, p: pair_task(tk, ["a"], ["b", "c"], [" x"], [" y"]))
add("pair empty", lambda d, m, p: pair_task(tk, [], [], [], []))
add("pair answers None", lambda d, m, p: pair_task(tk, ["a"], ["b"], None, [" y"]))
add("pair two-token answer", lambda d, m, p: pair_task(tk, ["a"], ["b"], ["antidisestablishment"], [" y"]))
