"""What a model does with queries and keys between their matrices and the attention scores."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class AttentionGeometry:
    """Scores are `scale * <rotated(q, i), rotated(k, j)>` by heads of `d_head`; `turn` is what rotates, if anything."""

    d_head: int
    scale: float
    turn: Callable[[Tensor, int], Tensor] | None = None

    def rotated(self, x: Float[Tensor, "n head d_head"], position: int) -> Float[Tensor, "n head d_head"]:
        """Queries or keys as they are at `position`."""
        return x if self.turn is None else self.turn(x, position)


def refuse_normalised(layer: int) -> None:
    """ValueError: queries and keys pass a normalisation, so no pair of subcomponents adds to the scores by itself."""
    raise ValueError(
        f"the attention of block {layer} normalises queries and keys, so what a pair of subcomponents adds to the "
        "scores depends on all others; ablate them instead (spd_lens.patching.ablation_effects)"
    )


def hooked_geometry(model: Any, layer: int) -> AttentionGeometry:
    """Of a HookedTransformer."""
    attn, cfg = model.blocks[layer].attn, model.cfg
    if getattr(cfg, "use_qk_norm", False):
        refuse_normalised(layer)
    turn = partial(_turned_hooked, attn) if cfg.positional_embedding_type == "rotary" else None
    return AttentionGeometry(int(cfg.d_head), 1 / float(attn.attn_scale), turn)


def _turned_hooked(attn: Any, x: Tensor, position: int) -> Tensor:
    return attn.apply_rotary(x.unsqueeze(1), past_kv_pos_offset=position).squeeze(1)


def bridge_geometry(model: Any, layer: int) -> AttentionGeometry:
    """Of a TransformerBridge: the Hugging Face module's own scale, and its own function that turns."""
    attn: Any = model.blocks[layer].attn.original_component
    if any("norm" in name for name, _ in attn.named_children()):
        refuse_normalised(layer)
    d_head = getattr(attn, "head_dim", None) or getattr(attn, "head_size", None)
    scale = getattr(attn, "scaling", None)
    rotary = next(
        (m for name, m in model.original_model.named_modules() if name.rsplit(".", 1)[-1] == "rotary_emb"), None
    )
    turns = getattr(sys.modules[type(attn).__module__], "apply_rotary_pos_emb", None)
    known = (rotary is not None and turns is not None) or (rotary is None and "pos_embed" in model._modules)
    if d_head is None or scale is None or not known:
        raise ValueError(
            f"how a {type(attn).__name__} makes attention scores of queries and keys is not known here; strengths of "
            "pairs can be had for models with learned or rotary position embeddings"
        )
    rotary = getattr(rotary, "original_component", None) or rotary
    turn = None if rotary is None or turns is None else partial(_turned_bridge, rotary, turns)
    return AttentionGeometry(int(d_head), float(scale), turn)


def _turned_bridge(rotary: nn.Module, turns: Callable[..., Any], x: Tensor, position: int) -> Tensor:
    ids = torch.tensor([[position]], device=x.device)
    rows = x.unsqueeze(2)  # [n head 1 d_head]
    cos, sin = rotary(rows, ids)
    return turns(rows, rows, cos, sin)[0].squeeze(2)
