"""`SiteDirections`: what the weights alone say of one site's subcomponents, without any data.

- size: `|V_c| |U_c|`, the norm of the rank-one matrix.
- similar: the cosine of two rank-one matrices, `cos(V_c, V_d) cos(U_c, U_d)`; 1 for equal directions, also when both
  are turned around.
- logits: what `U_c` writes to the logits on the direct path, at an activation of 1 and with the final normalisation
  taken as a scale of 1: what it raises and lowers most. Only where there is such a path: matrices that write into the
  residual stream, values through the output matrix of their heads, and the unembedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.support.shown import short_repr

N_SIMILAR, N_LOGITS = 8, 10
_NAMES = ("size", "similar_ids", "similar", "raised_ids", "raised", "lowered_ids", "lowered")

# Entries of one block of cosines or logits: 64 MB in float32.
_ENTRIES = 2**24


@dataclass(frozen=True)
class SiteDirections:
    """By subcomponent; see the module. Logits are None where the site has no direct path to them."""

    size: Tensor
    similar_ids: Tensor
    similar: Tensor
    raised_ids: Tensor | None = None
    raised: Tensor | None = None
    lowered_ids: Tensor | None = None
    lowered: Tensor | None = None

    __repr__ = short_repr

    def tensors(self) -> dict[str, Tensor]:
        """Everything that it holds, by name."""
        return {name: value for name in _NAMES if (value := getattr(self, name)) is not None}

    @classmethod
    def of(cls, saved: Mapping[str, Tensor]) -> SiteDirections:
        """What `tensors` gave."""
        return cls(**{name: saved[name] for name in _NAMES if name in saved})


@torch.no_grad()
def site_directions(decomposition: Decomposition, name: str) -> SiteDirections:
    """The directions of every subcomponent of one site. Cost: `C^2 (d_in + d_out)` and `C d_out d_vocab`."""
    weight = decomposition[name]
    V, U = weight.V.detach().T.float(), weight.U.detach().float()
    size = V.norm(dim=1) * U.norm(dim=1)
    V, U = (torch.nn.functional.normalize(x, dim=1) for x in (V, U))
    C = len(U)
    n_similar = min(N_SIMILAR, C - 1)
    similar, similar_ids = [], []
    for rows in torch.arange(C, device=U.device).split(max(1, _ENTRIES // C)):
        cosines = (V[rows] @ V.T) * (U[rows] @ U.T)
        # Not oneself, and nothing that does not exist.
        cosines[torch.arange(len(rows)), rows] = -2
        best = cosines.topk(n_similar, dim=1)
        similar.append(best.values.cpu())
        similar_ids.append(best.indices.int().cpu())
    found = {"size": size.cpu(), "similar": torch.cat(similar), "similar_ids": torch.cat(similar_ids)}
    return SiteDirections(**found, **_logits(decomposition, name))


def _logits(decomposition: Decomposition, name: str) -> dict[str, Tensor]:
    U = decomposition[name].U.detach()
    found: dict[str, list[Tensor]] = {key: [] for key in _NAMES[3:]}
    d_vocab = decomposition.host.vocabulary_size() or 1
    for rows in U.split(max(1, _ENTRIES // d_vocab)):
        logits = decomposition.host.direct_logits(name, rows)
        if logits is None:
            return {}
        n = min(N_LOGITS, logits.shape[1])
        for key, sign in (("raised", 1), ("lowered", -1)):
            best = (sign * logits).topk(n, dim=1)
            found[key].append(sign * best.values.float().cpu())
            found[f"{key}_ids"].append(best.indices.int().cpu())
    return {key: torch.cat(values) for key, values in found.items()}
