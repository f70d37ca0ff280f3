"""Masks from sources `s` in [0, 1] that somebody else has chosen (K3)."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor

from spd_lens.core.masks import Importances, SiteMask, mask_from_source


def masks_from_sources(
    importances: Importances, sources: Mapping[str, Float[Tensor, "*_batch _C_and_delta"]], *, delta: bool = True
) -> dict[str, SiteMask]:
    """K3: `m = g + (1 - g) s` with the first C channels of `s`, delta mask the last one (0 with `delta=False`).

    Sources may be smaller than the importances in batch and position (`[1 1 C+1]`): they are then shared.
    """
    return {
        name: SiteMask(
            mask_from_source(g, sources[name][..., :-1]),
            sources[name][..., -1].expand(g.shape[:-1]) if delta else g.new_zeros(g.shape[:-1]),
        )
        for name, g in importances.items()
    }
