"""Nodes of an attribution graph: their names and attributes."""

from __future__ import annotations

from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.units import Unit
from spd_lens.graphs.direct_pass import origin_of
from spd_lens.support.given import given_number, given_whole

# Entries of the activations, outputs and logits of one pass over several copies: 128 MB in float32.
_ENTRIES_PER_PASS = 2**25
_MOST_COPIES = 32


def copies_per_pass(decomposition: Decomposition, tokens: Tensor, given: int | None, n_receivers: int) -> int:
    """How many receivers share a backward pass: what was given, or what memory allows."""
    if given is not None:
        given = given_whole("per_pass", given, least=1, of=" receiver per backward pass", or_none=True)
    per_position = sum(3 * weight.n_subcomponents + weight.U.shape[1] for weight in decomposition.values())
    host = decomposition.host
    per_position += host.vocabulary_size() or 0
    # What the rest of the model keeps for the backward pass: about twenty residual streams a block.
    per_position += 20 * host.n_layers() * host.d_model()
    fitting = max(1, _ENTRIES_PER_PASS // (per_position * tokens.numel()))
    return min(given or min(fitting, _MOST_COPIES), n_receivers)


def threshold_given(importance_above: Any) -> float | None:
    """What a user gave as `importance_above`; importance lies in [0, 1]."""
    return None if importance_above is None else given_number("importance_above", importance_above, least=0, most=1)


def above_rounding(weights: Float[Tensor, "receiver sender"], eps: float) -> Bool[Tensor, "receiver sender"]:
    """Which weights are more than rounding: above `16 eps` of the sum of what acts on the receiver.

    Raises ValueError for weights that are NaN or infinite, which would hide all others of their receiver.
    """
    broken = ~weights.isfinite()
    if bool(broken.any()):
        raise ValueError(
            f"{int(broken.sum())} of {weights.numel()} attributions are NaN or infinite: parameters or readouts are "
            "not finite, or a gradient is too large for the model's dtype (use float32)"
        )
    return weights.abs() > 16 * eps * weights.abs().sum(1, keepdim=True)


def node_attributes(sender: Unit, row: int, token: str | None) -> dict[str, Any]:
    """The attributes of the node of a sender, whose name is `str(sender)`; those that do not apply are None."""
    (kind, site), below = origin_of(sender), {"embed": "token embedding", "pos_embed": "position embedding"}
    label = sender.label
    if kind == "embedding":
        label = below.get(site, f"residual stream into {site.removesuffix(' input')}")
    number = sender.id if kind == "subcomponent" else -2 if site == "pos_embed" else -1
    return _attributes(kind, label, site, number, sender.position, row, token)


def readout_attributes(number: int, position: int | None, row: int, token: str | None) -> dict[str, Any]:
    """The attributes of the node of a readout; its label is still to be given."""
    return _attributes("readout", "", "", number, position, row, token)


def _attributes(
    kind: str, label: str, site: str, number: int, position: int | None, row: int, token: str | None
) -> dict[str, Any]:
    return {
        "kind": kind,
        "label": label,
        "site": site,
        "subcomponent": number if kind == "subcomponent" else -1,
        # Keeps public ids apart: the token of a readout, -1 for a delta, -2 for the position embedding.
        "number": number,
        "position": position,
        "token": token,
        "row": row,
        "activation": None,
        "importance": None,
        "probability": None,
        "readout_weight": None,
        "predicts": None,
        "from_unshown": None,
    }
