"""Nodes of an attribution graph: their names and attributes."""

from __future__ import annotations

from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from spd_lens.core.decomposition import Decomposition

# Entries of the activations, outputs and logits of one pass over several copies: 128 MB in float32.
_ENTRIES_PER_PASS = 2**25
_MOST_COPIES = 32


def copies_per_pass(decomposition: Decomposition, tokens: Tensor, given: int | None, n_receivers: int) -> int:
    """How many receivers share a backward pass: what was given, or what memory allows."""
    if given is not None and (isinstance(given, bool) or given < 1):
        raise ValueError(f"per_pass={given}; expected at least 1 receiver per backward pass, or None")
    per_position = sum(3 * weight.n_subcomponents + weight.U.shape[1] for weight in decomposition.values())
    cfg = getattr(decomposition.model, "cfg", None)
    per_position += int(getattr(cfg, "d_vocab", 0) or 0)
    # What the rest of the model keeps for the backward pass: about twenty residual streams a block.
    per_position += 20 * decomposition.host.n_layers() * int(getattr(cfg, "d_model", 0) or 0)
    fitting = max(1, _ENTRIES_PER_PASS // (per_position * tokens.numel()))
    return min(given or min(fitting, _MOST_COPIES), n_receivers)


def above_rounding(weights: Float[Tensor, "receiver sender"], eps: float) -> Bool[Tensor, "receiver sender"]:
    """Which weights are more than rounding: above `16 eps` of the sum of what acts on the receiver."""
    return weights.abs() > 16 * eps * weights.abs().sum(1, keepdim=True)


def node_name(kind: str, site: str, subcomponent: int, position: int | None) -> str:
    """The key of a node: `"blocks.0.mlp.W_in[3] @5"`, `"blocks.0.mlp.W_in delta @5"`, `"embed @5"`."""
    what = {"subcomponent": f"{site}[{subcomponent}]", "delta": f"{site} delta"}.get(kind, site)
    return what if position is None else f"{what} @{position}"


def node_attributes(
    kind: str, site: str, subcomponent: int, position: int | None, row: int, token: str | None
) -> dict[str, Any]:
    """The attributes that every node has; those that do not apply are None."""
    labels = {"subcomponent": f"{site} {subcomponent}", "delta": f"delta of {site}"}
    below = {"embed": "token embedding", "pos_embed": "position embedding"}
    label = labels.get(kind, below.get(site, f"residual stream into {site.removesuffix(' input')}"))
    return {
        "kind": kind,
        "label": label,
        "site": site,
        "subcomponent": subcomponent if kind == "subcomponent" else -1,
        # Keeps public ids apart: the token of a target, -1 for a delta, -2 for the position embedding.
        "number": {"subcomponent": subcomponent, "target": subcomponent}.get(kind, -2 if site == "pos_embed" else -1),
        "position": position,
        "token": token,
        "row": row,
        "activation": None,
        "importance": None,
        "probability": None,
        "target_weight": None,
        "from_unshown": None,
    }
