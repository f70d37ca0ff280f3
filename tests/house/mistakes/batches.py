"""Batches, tokens and texts."""

from __future__ import annotations

import torch

from spd_lens import Batch, TokenBatches, cache_residuals, decompose, load_tokens, pack_tokens
from spd_lens.models import load_tiny_lm_tokenizer
from tests.house.mistakes.table import T, Table, other, short
from tests.small_models import tiny_transformer

TABLE = Table()
add = TABLE.add

add("TokenBatches size 0", lambda d, m, p: TokenBatches(T, 0))
add("TokenBatches size big", lambda d, m, p: TokenBatches(T, 5))
add("TokenBatches size 1.0", lambda d, m, p: TokenBatches(T, 1.0))
add("TokenBatches size None", lambda d, m, p: TokenBatches(T, None))
add("TokenBatches seed text", lambda d, m, p: TokenBatches(T, 1, seed="x"))
add("TokenBatches exclude text", lambda d, m, p: TokenBatches(T, 1, exclude="0"))
add("TokenBatches exclude None", lambda d, m, p: TokenBatches(T, 1, exclude=None))
add("TokenBatches exclude all", lambda d, m, p: short(d, TokenBatches(T, 1, exclude=range(40))))
add("TokenBatches exclude floats", lambda d, m, p: TokenBatches(T, 1, exclude=[0.5]))
add("TokenBatches of TokenBatches", lambda d, m, p: TokenBatches(TokenBatches(T, 1), 1))
add("TokenBatches of Batch", lambda d, m, p: TokenBatches(Batch(T), 1))
add("Batch None", lambda d, m, p: Batch(None))
add("Batch text", lambda d, m, p: Batch("x"))
add("Batch tokens other", lambda d, m, p: Batch(torch.zeros(2, 12, 16), 1, tokens=T[:1]))
add("Batch start_at text", lambda d, m, p: short(d, Batch(torch.zeros(2, 12, 16), "1")))
add("Batch start_at without residual", lambda d, m, p: short(d, Batch(T, 1)))
add("Batch start_at out", lambda d, m, p: short(d, Batch(torch.zeros(2, 12, 16), 7)))
add(
    "Batch start_at after site",
    lambda d, m, p: short(decompose(tiny_transformer(), {"blocks.0.mlp.W_in": 4}), Batch(torch.zeros(2, 12, 16), 1)),
)
add("Batch residual wrong width", lambda d, m, p: short(d, Batch(torch.zeros(2, 12, 15), 1)))
add("Batch mask text", lambda d, m, p: Batch(T, position_mask="x"))
add("Batch mask all false", lambda d, m, p: short(d, Batch(T, position_mask=T < 0)))
add("Batch mask nan", lambda d, m, p: Batch(T, position_mask=torch.full((2, 12), float("nan"))))
add("Batch mask ids", lambda d, m, p: Batch(T, position_mask=[0, 1, 2]))
add("batches with (T, ids)", lambda d, m, p: short(d, [(T, torch.arange(12))]))
add("batches (T,T,T)", lambda d, m, p: short(d, [(T, T, T)]))
add("left padded tuple", lambda d, m, p: short(d, [(T, torch.cat([torch.zeros(2, 3), torch.ones(2, 9)], 1).bool())]))
add("cache tensor", lambda d, m, p: cache_residuals(d, T))
add("cache model", lambda d, m, p: cache_residuals(m, TokenBatches(T, 1)))
add("cache swapped", lambda d, m, p: cache_residuals(TokenBatches(T, 1), d))
add("cache out of range", lambda d, m, p: cache_residuals(d, TokenBatches(T + 40, 1)))
add(
    "cache with hook",
    lambda d, m, p: (
        m.add_hook("blocks.0.hook_mlp_out", lambda v, hook: v * 0),
        cache_residuals(d, TokenBatches(T, 1)),
    ),
)
add("cache of another", lambda d, m, p: short(other(), cache_residuals(d, TokenBatches(T, 1))))
add(
    "cache of later",
    lambda d, m, p: short(
        decompose(tiny_transformer(), {"blocks.0.mlp.W_in": 4}), cache_residuals(d, TokenBatches(T, 1))
    ),
)
tk = load_tiny_lm_tokenizer()
add("pack None", lambda d, m, p: pack_tokens(None, tk, 8))
add("pack numbers", lambda d, m, p: pack_tokens([1, 2], tk, 8))
add("pack None inside", lambda d, m, p: pack_tokens(["a", None], tk, 8))
add("pack bytes", lambda d, m, p: pack_tokens([b"a"], tk, 8))
add("pack lists", lambda d, m, p: pack_tokens([["a", "b"]], tk, 8))
add("pack dicts", lambda d, m, p: pack_tokens([{"text": "a"}], tk, 8))
add("pack dict", lambda d, m, p: pack_tokens({"text": ["a"]}, tk, 8))
add("pack empty", lambda d, m, p: pack_tokens([], tk, 8))
add("pack empty texts", lambda d, m, p: pack_tokens(["", ""], tk, 8))
add("pack short", lambda d, m, p: pack_tokens(["a"], tk, 1000))
add("pack context 0", lambda d, m, p: pack_tokens(["a" * 50], tk, 0))
add("pack context 1", lambda d, m, p: pack_tokens(["a" * 50], tk, 1))
add("pack context text", lambda d, m, p: pack_tokens(["a" * 50], tk, "8"))
add("pack context float", lambda d, m, p: pack_tokens(["a" * 50], tk, 8.0))
add("pack max_rows 0", lambda d, m, p: pack_tokens(["a" * 50], tk, 8, max_rows=0))
add("pack max_rows text", lambda d, m, p: pack_tokens(["a" * 50], tk, 8, max_rows="x"))
add("pack tokenizer name", lambda d, m, p: pack_tokens(["a" * 50], "gpt2", 8))
add("pack tokenizer None", lambda d, m, p: pack_tokens(["a" * 50], None, 8))
add("pack tokenizer model", lambda d, m, p: pack_tokens(["a" * 50], m, 8))
add("pack swapped", lambda d, m, p: pack_tokens(tk, ["a" * 50], 8))
add("pack tokens", lambda d, m, p: pack_tokens(T, tk, 8))
add("load None", lambda d, m, p: load_tokens(None, tk, 8))
add("load dict", lambda d, m, p: load_tokens({"train": [{"text": "a"}]}, tk, 8))
add("load column", lambda d, m, p: load_tokens([{"txt": "a"}], tk, 8))
add("load empty", lambda d, m, p: load_tokens([], tk, 8))
add("load null rows", lambda d, m, p: load_tokens([{"text": "a" * 99}, {"text": None}], tk, 8))
add("load numbers", lambda d, m, p: load_tokens([{"text": 3}], tk, 8))
add("load ints", lambda d, m, p: load_tokens([1, 2], tk, 8))
add("load missing later", lambda d, m, p: load_tokens([{"text": "a" * 99}, {"x": "b"}], tk, 8))
add("load column None", lambda d, m, p: load_tokens([{"text": "a" * 99}], tk, 8, column=None))
add("load path file", lambda d, m, p: load_tokens("./no/such/dir", tk, 8))
