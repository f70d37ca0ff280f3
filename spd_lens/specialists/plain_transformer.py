"""A small causal transformer in plain PyTorch. It needs this file, torch and safetensors, nothing else.

    from model import load

    model = load("folder")              # config.json and model.safetensors
    logits = model(tokens)              # [batch pos] -> [batch pos d_vocab]
    tokens = model.generate(tokens, 20)

Every block may have its own number of heads and neurons, and every matrix may be a product of two narrow ones. There is
no key-value cache: `generate` runs the whole text for each token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


class Constant(nn.Module):
    """The same vector whatever comes in, zeros without a bias: what is left of a matrix that nothing is kept of."""

    def __init__(self, d_out: int, bias: bool) -> None:
        super().__init__()
        self.d_out = d_out
        self.bias = nn.Parameter(torch.zeros(d_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return x.new_zeros(*x.shape[:-1], self.d_out)
        # Not `expand`: without gradients torch cannot tell whose view that is, and its FLOP counter stops there.
        return x.new_zeros(*x.shape[:-1], 1) + self.bias


def matrix(d_in: int, d_out: int, rank: int | None, bias: bool) -> nn.Module:
    """`x @ W + b`; with a rank `x @ A @ B + b`; with rank 0 `b` alone, or zeros."""
    if rank is None:
        return nn.Linear(d_in, d_out, bias=bias)
    if rank == 0:
        return Constant(d_out, bias)
    return nn.Sequential(nn.Linear(d_in, rank, bias=False), nn.Linear(rank, d_out, bias=bias))


def norm(kind: str, d_model: int, eps: float) -> nn.Module:
    """ "layer", "rms" or "none"."""
    if kind == "none":
        return nn.Identity()
    return nn.LayerNorm(d_model, eps) if kind == "layer" else nn.RMSNorm(d_model, eps)


class Attention(nn.Module):
    """Causal attention of the heads that are left; `kv_of_head[h]` says whose keys and values head h reads."""

    q: nn.Module
    k: nn.Module
    v: nn.Module
    o: nn.Module

    def __init__(self, config: Mapping[str, Any], block: Mapping[str, Any]) -> None:
        super().__init__()
        self.d_head, self.scale, self.base = config["d_head"], config["attention_scale"], config["rotary_base"]
        self.kv_of_head: list[int] = block["kv_of_head"]
        for name in ("q", "k", "v", "o"):
            if name in block["matrices"]:
                self.add_module(name, matrix(*block["matrices"][name]))

    def forward(self, x: Tensor) -> Tensor:
        if not self.kv_of_head:
            return self.o(x)
        q, k, v = (self._heads(part(x)) for part in (self.q, self.k, self.v))
        if self.base is not None:
            q, k = rotated(q, self.base), rotated(k, self.base)
        if self.kv_of_head != list(range(len(self.kv_of_head))):
            k, v = k[:, self.kv_of_head], v[:, self.kv_of_head]
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1 / self.scale)
        return self.o(z.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.d_head)).transpose(1, 2)


def rotated(x: Tensor, base: float) -> Tensor:
    """Rotary positions: the two halves of `x [batch head pos d_head]` are turned against each other."""
    half = x.shape[-1] // 2
    frequencies = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class MLP(nn.Module):
    """`out(act(in(x)))`, or with a gate `out(act(gate(x)) * in(x))`; where no neuron is left, a constant."""

    gate: nn.Module
    out: nn.Module

    def __init__(self, config: Mapping[str, Any], block: Mapping[str, Any]) -> None:
        super().__init__()
        self.act, self.gated = ACTIVATIONS[config["activation"]], config["gated"]
        for name in ("gate", "in", "out"):
            if name in block["matrices"]:
                self.add_module(name, matrix(*block["matrices"][name]))

    def forward(self, x: Tensor) -> Tensor:
        if "in" not in self._modules:
            return self.out(x)
        pre = self.get_submodule("in")(x)
        return self.out(self.act(self.gate(x)) * pre if self.gated else self.act(pre))


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream."""

    def __init__(self, config: Mapping[str, Any], block: Mapping[str, Any]) -> None:
        super().__init__()
        self.ln1 = norm(config["norm"], config["d_model"], config["eps"])
        self.attn = Attention(config, block)
        if "out" in block["matrices"]:
            self.ln2 = norm(config["norm"], config["d_model"], config["eps"])
            self.mlp = MLP(config, block)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x)) if "mlp" in self._modules else x


class PlainTransformer(nn.Module):
    """The model that `config` describes; see the module's docstring."""

    row_of_token: Tensor

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = dict(config)
        d_model, rows = config["d_model"], config["embedding_rows"]
        self.embed = nn.Embedding(rows, d_model)
        if config["positions"] == "learned":
            self.positions = nn.Embedding(config["n_ctx"], d_model)
        self.blocks = nn.ModuleList([Block(config, block) for block in config["blocks"]])
        self.ln_final = norm(config["norm"], d_model, config["eps"])
        self.kept: int | None = config["kept_tokens"]
        if self.kept is not None:
            # Tokens without a row of their own share the last one, and get no probability.
            self.register_buffer("token_of_row", torch.zeros(self.kept, dtype=torch.long))
            self.register_buffer("row_of_token", torch.zeros(config["d_vocab"], dtype=torch.long))
        self.unembed = nn.Linear(d_model, self.kept or config["d_vocab"], bias=config["unembed_bias"])
        if config["tied"]:
            self.unembed.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.shape[1] > self.config["n_ctx"]:
            raise ValueError(f"{tokens.shape[1]} tokens; this model takes at most {self.config['n_ctx']}")
        x = self.embed(tokens if self.kept is None else self.row_of_token[tokens])
        if self.config["positions"] == "learned":
            x = x + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.unembed(self.ln_final(x))
        if self.kept is None:
            return logits
        everything = logits.new_full((*logits.shape[:-1], self.config["d_vocab"]), -torch.inf)
        return everything.index_copy(-1, self.token_of_row, logits)

    @torch.no_grad()
    def generate(
        self, tokens: Tensor, n_new: int, *, temperature: float = 0.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """`tokens` with `n_new` more behind each row; temperature 0 takes the likeliest."""
        if n_new < 0 or not temperature >= 0:
            raise ValueError(f"n_new={n_new}, temperature={temperature}; expected numbers that are not below 0")
        for _ in range(n_new):
            logits = self(tokens[:, -self.config["n_ctx"] :])[:, -1]
            if temperature > 0:
                new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            else:
                new = logits.argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, new], 1)
        return tokens


def load(directory: str | Path, device: str | torch.device = "cpu") -> PlainTransformer:
    """The model in a folder with `config.json` and `model.safetensors`, in eval mode."""
    from safetensors.torch import load_file

    config = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    weights = load_file(Path(directory) / "model.safetensors")
    if config["tied"]:
        weights["unembed.weight"] = weights["embed.weight"]
    model = PlainTransformer(config).to(getattr(torch, config["dtype"]))
    model.load_state_dict(weights, strict=True)
    return model.to(device).eval()
