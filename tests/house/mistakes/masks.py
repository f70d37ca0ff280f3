"""Masks, ablations and passes."""

from __future__ import annotations

import torch

from spd_lens import Decomposition
from spd_lens.core import SiteMask
from tests.house.mistakes.table import SITE, T, Table
from tests.small_models import tiny_transformer

TABLE = Table()
add = TABLE.add

for meth in ("ablate", "keep"):
    g = lambda d, a, meth=meth: getattr(d, meth)(a)
    add(meth + " bare id", lambda d, m, p, g=g: g(d, 3))
    add(meth + " text", lambda d, m, p, g=g: g(d, SITE))
    add(meth + " list of ids", lambda d, m, p, g=g: g(d, [1, 2]))
    add(meth + " None", lambda d, m, p, g=g: g(d, None))
    add(meth + " empty list", lambda d, m, p, g=g: g(d, []))
    add(meth + " id out", lambda d, m, p, g=g: g(d, {SITE: [4]}))
    add(meth + " id negative", lambda d, m, p, g=g: g(d, {SITE: [-1]}))
    add(meth + " id text", lambda d, m, p, g=g: g(d, {SITE: "3"}))
    add(meth + " id float", lambda d, m, p, g=g: g(d, {SITE: [1.0]}))
    add(meth + " id None", lambda d, m, p, g=g: g(d, {SITE: None}))
    add(meth + " bool mask as ids", lambda d, m, p, g=g: g(d, {SITE: torch.tensor([True, False, True, False])}))
    add(meth + " site typo", lambda d, m, p, g=g: g(d, {"blocks.1.mlp.W_out": [0]}))
    add(meth + " hook name", lambda d, m, p, g=g: g(d, {"blocks.1.hook_W_in_mask": [0]}))
    add(meth + " tuple", lambda d, m, p, g=g: g(d, (SITE, 3)))
    add(meth + " float tensor", lambda d, m, p, g=g: g(d, {SITE: torch.ones(4)}))
    add(meth + " empty dict", lambda d, m, p, g=g: g(d, {}))
    add(meth + " nested", lambda d, m, p, g=g: g(d, {SITE: [[0, 1], [2]]}))
run = lambda m, h: m.run_with_hooks(T, fwd_hooks=h)
add("mask wrong C", lambda d, m, p: run(m, d.mask({SITE: torch.ones(5)})))
add("mask scalar", lambda d, m, p: run(m, d.mask({SITE: 0.5})))
add("mask tensor not dict", lambda d, m, p: run(m, d.mask(torch.ones(4))))
add("mask list of text", lambda d, m, p: run(m, d.mask({SITE: ["a"] * 4})))
add("mask text", lambda d, m, p: run(m, d.mask({SITE: "ones"})))
add("mask None", lambda d, m, p: run(m, d.mask({SITE: None})))
add("mask site typo", lambda d, m, p: run(m, d.mask({"blocks.1.mlp.W_inn": torch.ones(4)})))
add("mask nan", lambda d, m, p: run(m, d.mask({SITE: torch.full((4,), float("nan"))})))
add("mask [batch C]", lambda d, m, p: run(m, d.mask({SITE: torch.ones(2, 4)})))
add("mask [batch pos C] of other pos", lambda d, m, p: run(m, d.mask({SITE: torch.ones(2, 5, 4)})))
add("mask complex", lambda d, m, p: run(m, d.mask({SITE: torch.ones(4, dtype=torch.complex64)})))
add("delta text", lambda d, m, p: run(m, d.mask({SITE: torch.ones(4)}, "0")))
add("delta None", lambda d, m, p: run(m, d.mask({SITE: torch.ones(4)}, None)))
add("delta nan", lambda d, m, p: run(m, d.mask({SITE: torch.ones(4)}, float("nan"))))
add("delta tensor of wrong shape", lambda d, m, p: run(m, d.mask({}, {SITE: torch.ones(3, 3)})))
add("delta [batch pos 1]", lambda d, m, p: run(m, d.mask({}, {SITE: torch.ones(2, 12, 1)})))
add("delta site typo", lambda d, m, p: run(m, d.mask({}, {"blocks.1.mlp.W_inn": 0.0})))
add("hook returns list", lambda d, m, p: run(m, [("blocks.1.hook_W_in_mask", lambda v, hook: [1])]))
add("hook returns wrong", lambda d, m, p: run(m, [("blocks.1.hook_W_in_acts", lambda v, hook: v[..., :2])]))
add("hook returns delta [b p]", lambda d, m, p: run(m, [("blocks.1.hook_W_in_delta_mask", lambda v, hook: v[..., 0])]))
add("masked_forward typo", lambda d, m, p: d.masked_forward(T, {"blocks.1.mlp.W_inn": SiteMask(torch.ones(4))}))
add("masked_forward tensor", lambda d, m, p: d.masked_forward(T, {SITE: torch.ones(4)}))
add("masked_forward wrong C", lambda d, m, p: d.masked_forward(T, {SITE: SiteMask(torch.ones(5))}))
add("masked_forward list", lambda d, m, p: d.masked_forward(T, [SiteMask(torch.ones(4))]))
add("masked_forward text", lambda d, m, p: d.masked_forward("text", {SITE: SiteMask(torch.ones(4))}))
add("masked_forward row", lambda d, m, p: d.masked_forward(T[0], {SITE: SiteMask(torch.ones(4))}))
add("masked_forward out of range", lambda d, m, p: d.masked_forward(T + 40, {SITE: SiteMask(torch.ones(4))}))
add("masked_forward floats", lambda d, m, p: d.masked_forward(T.float(), {SITE: SiteMask(torch.ones(4))}))
add(
    "masked_forward start_at out",
    lambda d, m, p: d.masked_forward(torch.zeros(2, 12, 16), {SITE: SiteMask(torch.ones(4))}, start_at=7),
)
add(
    "masked_forward start_at behind",
    lambda d, m, p: d.masked_forward(torch.zeros(2, 12, 16), {SITE: SiteMask(torch.ones(4))}, start_at=1.5),
)
add("clean_pass text", lambda d, m, p: d.clean_pass("text"))
add("clean_pass row", lambda d, m, p: d.clean_pass(T[0]))
add("clean_pass out of range", lambda d, m, p: d.clean_pass(T + 40))
add("clean_pass floats", lambda d, m, p: d.clean_pass(T.float()))
add("clean_pass start_at out", lambda d, m, p: d.clean_pass(torch.zeros(2, 12, 16), start_at=2))
add("clean_pass start_at with tokens", lambda d, m, p: d.clean_pass(T, start_at=1))
add("clean_pass hidden typo", lambda d, m, p: d.clean_pass(T, hidden_points=["blocks.0.hook_resid_pst"]))
add("clean_pass hidden text", lambda d, m, p: d.clean_pass(T, hidden_points="blocks.0.hook_resid_post"))
add("clean_pass attention mask text", lambda d, m, p: d.clean_pass(T, attention_mask="1"))
add("masked_hidden typo", lambda d, m, p: d.masked_hidden(T, {SITE: SiteMask(torch.ones(4))}, ["nope"]))
add("pre_importances tokens", lambda d, m, p: d.pre_importances(T))
add("load_tensors none", lambda d, m, p: d.load_tensors({}))
add(
    "load_tensors nan",
    lambda d, m, p: d.load_tensors({k: torch.full_like(v, float("nan")) for k, v in d.tensors().items()}),
)
add("load_tensors numpy", lambda d, m, p: d.load_tensors({k: v.detach().numpy() for k, v in d.tensors().items()}))
add("load_tensors list", lambda d, m, p: d.load_tensors(list(d.tensors().values())))
add("of a plain model", lambda d, m, p: Decomposition.of(tiny_transformer()))
add("of a decomposition", lambda d, m, p: Decomposition.of(d))
add("of None", lambda d, m, p: Decomposition.of(None))
add("remove twice", lambda d, m, p: (d.remove(), d.remove()))
