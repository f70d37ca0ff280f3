"""The gate over all sites, written the usual way for `benchmarks/reference.py`: a small transformer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import einops
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ReferenceGlobalGate(nn.Module):
    """Pre-activations `[batch pos C]` of every site; reads the library's parameters to start from, and shares no code.

    Causal and two-sided gates look across positions through biases that the offset alone decides.
    """

    def __init__(self, gate: Any) -> None:
        super().__init__()
        self.sizes = dict(gate.sizes)
        self.n_heads, self.causal = gate.blocks[0].n_heads, gate.blocks[0].causal
        self.n_blocks = len(gate.blocks)
        self.names = {name.replace(".", "|"): name for name, _ in gate.named_parameters()}
        for name, value in gate.named_parameters():
            self.register_parameter(name.replace(".", "|"), nn.Parameter(value.detach().clone()))

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        stream = torch.cat([_normed(inputs[name]) for name in self.sizes], dim=-1) @ self._of("w_embed")
        for i in range(self.n_blocks):
            stream = self._block(stream, f"blocks.{i}.")
        pre = _normed(stream) @ self._of("w_out") + self._of("b_out")
        found, first = {}, 0
        for name, size in self.sizes.items():
            found[name] = pre[..., first : first + size]
            first += size
        return found

    def _of(self, name: str) -> Tensor:
        return getattr(self, name.replace(".", "|"))

    def _block(self, stream: Tensor, block: str) -> Tensor:
        q, k, v = (_normed(stream) @ self._of(block + "w_qkv")).split(stream.shape[-1], dim=-1)
        q, k, v = (einops.rearrange(x, "b p (h d) -> b h p d", h=self.n_heads) for x in (q, k, v))
        scores = einops.einsum(q, k, "b h p d, b h s d -> b h p s") / q.shape[-1] ** 0.5 + self._biases(block, q)
        attended = einops.einsum(scores.softmax(-1), v, "b h p s, b h s d -> b h p d")
        stream = stream + einops.rearrange(attended, "b h p d -> b p (h d)") @ self._of(block + "w_attended")
        hidden = F.gelu(_normed(stream) @ self._of(block + "w_in") + self._of(block + "b_in"))
        return stream + hidden @ self._of(block + "w_mlp")

    def _biases(self, block: str, like: Tensor) -> Tensor:
        """`[head pos pos]`: by how far the other position lies behind or ahead."""
        back = self._of(block + "offset_bias")
        ahead = torch.full_like(back, -torch.inf) if self.causal else self._of(block + "ahead_bias")
        last, position = back.shape[1] - 1, torch.arange(like.shape[-2])
        # From `last` ahead over here to `last` back.
        by_offset = torch.cat([ahead.flip(1)[:, :-1], back], dim=1)
        return by_offset[:, (position[:, None] - position[None, :]).clamp(-last, last) + last]

    def gradients(self) -> dict[str, Tensor]:
        """What a backward pass left, by the library's names."""
        found = {f"global_gate.{name}": getattr(self, own).grad for own, name in self.names.items()}
        return {name: gradient for name, gradient in found.items() if gradient is not None}


def _normed(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()
