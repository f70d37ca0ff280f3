"""Specialists: the domain, the budget, what is kept, where it is written."""

from __future__ import annotations

from typing import Any

import torch

from spd_lens import Decomposition, decompose
from spd_lens.baselines import small_model
from spd_lens.components import Components
from spd_lens.core import Unit
from spd_lens.specialists import (
    Specialist,
    costs_of,
    distil,
    domain_of,
    mean_loss,
    plain_copy,
    specialise,
    whitened_factors,
)
from tests.house.mistakes.table import SITE, T, Table, another, file_in, removed
from tests.small_models import TiedAutoencoder

TABLE = Table()
add = TABLE.add
# W_in is 16 x 32 of some 7,000 numbers: not much can go.
BUDGET = 0.97


def small(decomposition: Decomposition) -> Specialist:
    return specialise(decomposition, T, BUDGET)


for name, x in {
    "zero": 0, "zero share": 0.0, "one": 1.0, "above": 1.5, "below": -0.5, "negative": -10, "too small": 0.01,
    "too large": 10**9, "text": "half", "None": None, "NaN": float("nan"), "flag": True, "list": [0.5],
}.items():  # fmt: skip
    add(f"budget {name}", lambda d, m, p, x=x: specialise(d, T, x))
for k, v in {
    "write": ["whiten", None, True, 3], "allocation": ["best", None, 3], "tokens": ["some", None, T],
    "cut_below": [-0.1, 1.5, "x", None, float("nan"), True], "distil_steps": [-1, "x", 1.5, None, True],
    "seed": ["x", None, 1.5],
    "ids": [{"blocks.1.mlp.W_inn": [0]}, {SITE: [4]}, {SITE: ["0"]}, 3, "x", Unit((("blocks.0.mlp.W_in", 0),)), []],
}.items():  # fmt: skip
    for x in v:
        add(f"specialise {k}={x!r}"[:60], lambda d, m, p, k=k, x=x: specialise(d, T, BUDGET, **{k: x}))
for name, x in {
    "a text": "speeches", "texts": ["a", "b"], "nothing": None, "a number": 3, "no batch": [], "no row": T[:0],
    "floats": T.float(), "a mask": T > 3, "above": T + 40, "below": T - 50, "a row": T[0], "three axes": T[None],
    "lengths": [T, T[:, :5]], "too long": torch.cat([T, T], 1), "padding": {"input_ids": T, "attention_mask": T > 3},
    "one token": T[:, :1],
}.items():  # fmt: skip
    add(f"specialise domain {name}", lambda d, m, p, x=x: specialise(d, x, BUDGET))
    if name not in ("one token",):
        add(f"domain_of {name}", lambda d, m, p, x=x: domain_of(d, x))
    if name not in ("texts", "no batch", "lengths", "padding", "one token"):
        add(f"losses of {name}", lambda d, m, p, x=x: small(d).losses(inside=x))
        add(f"costs of {name}", lambda d, m, p, x=x: small(d).costs(x))
add("specialise the model", lambda d, m, p: specialise(m, T, BUDGET))
add("specialise removed", lambda d, m, p: specialise(removed(), T, BUDGET))
add(
    "specialise components of another",
    lambda d, m, p: specialise(d, T, BUDGET, ids=Components.of(another(), [{SITE: [0]}])),
)
add("specialise no transformer", lambda d, m, p: specialise(decompose(TiedAutoencoder(), {"encoder.W": 4}), T, BUDGET))
add("specialise embeddings", lambda d, m, p: specialise(decompose(plain_model_of(d), {"embed.W_E": 4}), T, BUDGET))


def plain_model_of(decomposition: Decomposition) -> Any:
    model = decomposition.model
    decomposition.remove()
    return model


add("save None", lambda d, m, p: small(d).save(None))
add("save number", lambda d, m, p: small(d).save(3))
add("save a file", lambda d, m, p: small(d).save(file_in(p)))
add("save there", lambda d, m, p: small(d).save(p))
add("save /proc", lambda d, m, p: small(d).save("/proc/nope/x"))
add("save tokenizer", lambda d, m, p: small(d).save(p / "x", tokenizer="gpt2"))
for k, v in {
    "steps": [0, -1, "x", None, 1.5], "lr": [0, "x", -1, float("nan")], "batch": [0, "x", 1.5], "seed": ["x", None],
}.items():  # fmt: skip
    for x in v:
        add(
            f"distil {k}={x!r}",
            lambda d, m, p, k=k, x=x: distil(small(d).model, d.host.forward, T, **{"steps": 1} | {k: x}),
        )
add("distil a text", lambda d, m, p: distil(small(d).model, d.host.forward, "x", steps=1))
add("distil from a model's name", lambda d, m, p: distil(small(d).model, "gpt2", T, steps=1))
add("distil a specialist", lambda d, m, p: distil(small(d), d.host.forward, T, steps=1))
add("small_model near", lambda d, m, p: small_model(d, domain_of(d, T), 100, "whitened svd"))
add("small_model room", lambda d, m, p: small_model(d, domain_of(d, T), -3, "magnitude"))
add("small_model rows", lambda d, m, p: small_model(d, T, 100, "magnitude"))
add("plain_copy the model", lambda d, m, p: plain_copy(m))
add("plain_copy near site", lambda d, m, p: plain_copy(d, {"blocks.1.mlp.W_inn": torch.ones(16, 32)}))
add("mean_loss one token", lambda d, m, p: mean_loss(small(d).model, T[:, :1]))
add("costs_of a text", lambda d, m, p: costs_of(small(d).model, "x"))
add("whitened shapes", lambda d, m, p: whitened_factors(torch.ones(3, 2), torch.eye(4)))
