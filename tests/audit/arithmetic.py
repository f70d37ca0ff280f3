"""The credit model in plain arithmetic: what audits say is compared with this."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from spd_lens.core import Decomposition


def biases_of(decomposition: Decomposition) -> dict[str, Tensor]:
    """Biases by HookedTransformer's names; a bridge has other names, flat heads, and a buffer at the end."""
    named = dict(decomposition.model.named_parameters())
    own = {name.rsplit(".", 1)[-1]: p.detach() for name, p in named.items() if ".b_" in name and "gate" not in name}
    if own:
        return own
    ends = {"q": "b_Q", "k": "b_K", "v": "b_V", "o": "b_O", "fc_in": "b_in", "fc_out": "b_out"}
    tail = "._original_component.bias"
    found = {n.removesuffix(tail).rsplit(".", 1)[-1]: p.detach() for n, p in named.items() if n.endswith(tail)}
    found = {ends[name]: p.unflatten(0, (2, 8)) if name in "qkv" else p for name, p in found.items()}
    return {**found, "b_U": decomposition.model.unembed.b_U.detach()}  # pyright: ignore


def pass_by_hand(
    decomposition: Decomposition,
    tokens: Tensor,
    *,
    removed: Mapping[str, list[tuple[int, int]]] | None = None,
    replaced: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> tuple[float, dict[str, Tensor]]:
    """The margin of the one-block model and every subcomponent's activation `[pos C]`.

    `removed`: `(position, c)` taken out of each matrix. `replaced`: where `[pos C]`, and the activations put there.
    """
    W = {name: weight.target_weight.detach() for name, weight in decomposition.items()}
    b = biases_of(decomposition)
    activations: dict[str, Tensor] = {}

    def times(x: Tensor, name: str) -> Tensor:
        y = x @ W[name]
        V, U = decomposition[name].V, decomposition[name].U
        a = activations[name] = x @ V
        for position, c in (removed or {}).get(name, []):
            y[position] -= a[position, c] * U[c]
        if replaced is not None and name in replaced:
            where, values = replaced[name]
            for position, c in where.nonzero().tolist():
                y[position] += (values[position, c] - a[position, c]) * U[c]
        return y

    with torch.no_grad():
        token = torch.nn.functional.one_hot(tokens, len(W["embed.W_E"])).float()
        place = torch.eye(len(tokens), len(W["pos_embed.W_pos"]))
        x = times(token, "embed.W_E") + times(place, "pos_embed.W_pos")
        q, k, v = (times(x, f"blocks.0.attn.W_{s}").unflatten(-1, (2, 8)) + b[f"b_{s}"] for s in "QKV")
        scores = torch.einsum("qhe,khe->hqk", q, k) / 8**0.5
        causal = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
        pattern = scores.masked_fill(~causal, -torch.inf).softmax(-1)
        z = torch.einsum("hqk,khe->qhe", pattern, v).flatten(1)
        x = x + times(z, "blocks.0.attn.W_O") + b["b_O"]
        hidden = torch.relu(times(x, "blocks.0.mlp.W_in") + b["b_in"])
        x = x + times(hidden, "blocks.0.mlp.W_out") + b["b_out"]
        logits = (times(x, "unembed.W_U") + b["b_U"])[-1]
    return float(logits[1] - logits[0]), activations
