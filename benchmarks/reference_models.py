"""Models out of plain `nn.Linear`s for the reference, from the weights of the models that the library decomposes.

Each computes exactly what its original does; `replace_linears` then puts the decomposed matrices in. Their modules have
the names of the library's sites, except inside a Hugging Face model, which is used as it is.
"""

from __future__ import annotations

import math
from typing import Any

import einops
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ReferenceAttention(nn.Module):
    """Causal softmax attention out of four `nn.Linear`s, heads side by side."""

    def __init__(self, attn: Any, n_heads: int) -> None:
        super().__init__()
        flat = "head d_model d_head -> d_model (head d_head)"
        self.W_Q, self.W_K, self.W_V = (
            linear(einops.rearrange(W, flat), b.flatten())
            for W, b in ((attn.W_Q, attn.b_Q), (attn.W_K, attn.b_K), (attn.W_V, attn.b_V))
        )
        self.W_O = linear(einops.rearrange(attn.W_O, "head d_head d_model -> (head d_head) d_model"), attn.b_O)
        self.n_heads = n_heads

    def forward(self, x: Tensor) -> Tensor:
        split = "batch pos (head d_head) -> batch head pos d_head"
        q, k, v = (einops.rearrange(W(x), split, head=self.n_heads) for W in (self.W_Q, self.W_K, self.W_V))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        z = scores.masked_fill(future, -math.inf).softmax(-1) @ v
        return self.W_O(einops.rearrange(z, "batch head pos d_head -> batch pos (head d_head)"))


class ReferenceMLP(nn.Module):
    """`gelu(x @ W_in + b) @ W_out + b`."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.W_in, self.W_out = linear(mlp.W_in, mlp.b_in), linear(mlp.W_out, mlp.b_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.W_out(F.gelu(self.W_in(x)))


class ReferenceBlock(nn.Module):
    def __init__(self, block: Any, cfg: Any) -> None:
        super().__init__()
        self.ln1, self.ln2 = _norm(block, "ln1", cfg), _norm(block, "ln2", cfg)
        self.attn, self.mlp = ReferenceAttention(block.attn, cfg.n_heads), ReferenceMLP(block.mlp)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class ReferenceTransformer(nn.Module):
    """What a HookedTransformer of the same weights computes; its modules have the names of the library's sites."""

    W_E: Tensor
    W_pos: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        cfg = model.cfg
        if cfg.act_fn != "gelu" or cfg.positional_embedding_type != "standard" or cfg.gated_mlp or cfg.attn_only:
            raise ValueError("expected gelu, learned absolute positions and an MLP without gates")
        self.register_buffer("W_E", model.embed.W_E.detach().clone())
        self.register_buffer("W_pos", model.pos_embed.W_pos.detach().clone())
        self.blocks = nn.ModuleList(ReferenceBlock(block, cfg) for block in model.blocks)
        self.ln_final = _norm(model, "ln_final", cfg)
        self.unembed = linear(model.unembed.W_U, model.unembed.b_U)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.W_E[tokens] + self.W_pos[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.unembed(self.ln_final(x))


class ReferenceTMS(nn.Module):
    """`relu(x @ W [@ W_id] @ W.T + b)`."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.W_enc, self.W_dec = linear(model.W, None), linear(model.W.T, model.b)
        self.W_id = nn.Identity() if model.W_id is None else linear(model.W_id, None)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.W_dec(self.W_id(self.W_enc(x))))


class HuggingFaceLogits(nn.Module):
    """Tokens to logits with a Hugging Face model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, use_cache=False).logits


def linear(W: Tensor, b: Tensor | None) -> nn.Linear:
    """`x @ W + b` as an `nn.Linear`."""
    module = nn.Linear(*W.shape, bias=b is not None, device="meta")
    module.weight = nn.Parameter(W.detach().T.clone())
    if b is not None:
        module.bias = nn.Parameter(b.detach().clone())
    return module


def _norm(parent: Any, name: str, cfg: Any) -> nn.Module:
    if cfg.normalization_type is None:
        return nn.Identity()
    if cfg.normalization_type != "LN":
        raise ValueError(f"normalization_type={cfg.normalization_type!r}; expected 'LN' or None")
    own = getattr(parent, name)
    norm = nn.LayerNorm(cfg.d_model, eps=cfg.eps, device="meta")
    norm.weight, norm.bias = nn.Parameter(own.w.detach().clone()), nn.Parameter(own.b.detach().clone())
    return norm
