"""How pairs of subcomponents of `W_Q` and `W_K` act on each other in the attention scores.

A query at position i and a key at position j = i - offset give head h the score

    s = scale * <R(i) q, R(j) k>,   q = sum_c a_c U_Q[c, h] + b,   k likewise,

so a pair adds `a_c a_d` times its *strength*

    S[h, offset, c, d] = scale * <R(offset) U_Q[c, h], U_K[d, h]>

where R turns as the model's rotary embedding does (none: R = 1; then S is the same at every offset). Grouped heads
share their keys. Exact for the pair; left out are biases, deltas, what position biases (ALiBi) add, and soft caps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.inputs import checked_decomposition
from spd_lens.statistics.harvests import Harvest
from spd_lens.support.given import given_instance
from spd_lens.support.names import near_names


@dataclass(frozen=True)
class Pair:
    """One pair's strength at one head and offset."""

    head: int
    offset: int
    query: int
    key: int
    strength: float


@dataclass(frozen=True)
class QKInteractions:
    """Strengths `values [head offset query key]` of the subcomponents `queries` of `W_Q` and `keys` of `W_K`.

    `in_scores`: whether they are multiplied with both subcomponents' root mean square activations, so that they are
    in the units of attention scores; else they are per unit of both activations.
    """

    layer: int
    offsets: tuple[int, ...]
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    values: Float[Tensor, "head offset query key"]
    in_scores: bool

    def top(self, n: int = 10) -> list[Pair]:
        """The pairs of the largest absolute strength, at whatever head and offset."""
        flat = self.values.abs().flatten()
        found = []
        for index in flat.topk(min(n, len(flat))).indices.tolist():
            place = torch.unravel_index(torch.tensor(index), self.values.shape)
            h, o, q, k = (int(i) for i in place)
            found.append(Pair(h, self.offsets[o], self.queries[q], self.keys[k], float(self.values[h, o, q, k])))
        return found

    def __repr__(self) -> str:
        heads = len(self.values)
        return (
            f"QKInteractions(block {self.layer}, {heads} heads, offsets {', '.join(map(str, self.offsets))}, "
            f"{len(self.queries)} x {len(self.keys)} pairs)"
        )


@torch.no_grad()
def qk_interactions(
    decomposition: Decomposition,
    layer: int,
    *,
    offsets: Sequence[int] = (0, 1, 2, 4, 8),
    queries: Sequence[int] | None = None,
    keys: Sequence[int] | None = None,
    harvest: Harvest | None = None,
) -> QKInteractions:
    """The strength of every pair of subcomponents of `blocks.{layer}.attn.W_Q` and `W_K`, by head and offset.

    `offsets` are how far back a key is. `queries`, `keys`: ids; None takes all. With a `harvest` of this decomposition
    strengths are multiplied with the root mean square activations of both.

    Raises ValueError if `W_Q` or `W_K` of that block are not decomposed, for offsets below 0 or beyond the context, for
    the harvest of another decomposition, and for attention that normalises queries and keys.
    """
    checked_decomposition(decomposition, "qk_interactions")
    names = [f"blocks.{layer}.attn.W_{kind}" for kind in "QK"]
    for name in names:
        if name not in decomposition:
            raise ValueError(f"{name} is not decomposed; decomposed are {near_names(name, decomposition)}")
    context = decomposition.host.context_length() or 1 << 30
    for offset in offsets:
        if isinstance(offset, bool) or not isinstance(offset, Integral) or not 0 <= offset < context:
            raise ValueError(f"offset {offset!r}; expected a whole number in 0..{context - 1}: how far back the key is")
    if harvest is not None:
        given_instance("harvest", harvest, Harvest, "harvest(decomposition, batches)")
        harvest.check_of(decomposition)
    geometry = decomposition.host.attention_geometry(layer)
    chosen, written = [], []
    for name, ids in zip(names, (queries, keys), strict=True):
        weight = decomposition[name]
        picked = (
            list(range(weight.n_subcomponents))
            if ids is None
            else [_checked(c, weight.n_subcomponents, name) for c in ids]
        )
        U = weight.U.detach()[picked]
        if harvest is not None:
            U = U * harvest[name].activation_rms[picked].to(U).unsqueeze(1)
        chosen.append(tuple(picked))
        written.append(U.unflatten(1, (-1, geometry.d_head)))
    q, k = written
    # Every head's own columns; grouped heads share those of the keys.
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    values = [
        geometry.scale * torch.einsum("qhd,khd->hqk", geometry.rotated(q, int(offset)), geometry.rotated(k, 0))
        for offset in offsets
    ]
    return QKInteractions(
        layer=layer,
        offsets=tuple(map(int, offsets)),
        queries=chosen[0],
        keys=chosen[1],
        values=torch.stack(values, dim=1),
        in_scores=harvest is not None,
    )


def _checked(c: int, count: int, name: str) -> int:
    if isinstance(c, bool) or not isinstance(c, Integral) or not 0 <= c < count:
        raise ValueError(f"subcomponent {c!r} of {name}; expected a whole number in 0..{count - 1}")
    return int(c)
