"""Which sites use masked weights at which positions (K5), drawn from a generator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from spd_lens.core.draws import integers, uniform
from spd_lens.core.masks import SiteMask

Routing = Literal["all", "layerwise", "subset"] | float


def sample_routing(
    shapes: Mapping[str, torch.Size], routing: Routing, *, generator: torch.Generator
) -> list[dict[str, Bool[Tensor, "*batch"] | None]]:
    """Which sites use masked weights where (K5): one dict per forward pass that the routing asks for.

    `shapes` gives every site's positions `[batch pos]` (its activations without the last axis). A value of None
    means routed everywhere; a site that is missing from a dict stays with the target in that pass.

    - `"all"`: one pass, every site routed everywhere.
    - `"layerwise"`: one pass per site, with only that site routed.
    - `"subset"`: one pass; at every position k ~ U{1..L}, then k sites at random (uniform-k).
    - a float p: one pass; every site at every position independently with probability p.

    Routing is drawn on the generator's device (a CPU generator needs no device synchronisation).
    """
    names = list(shapes)
    if isinstance(routing, float):
        if not 0 <= routing <= 1:
            raise ValueError(f"routing={routing}; a static probability lies between 0 and 1")
        return [{n: uniform(shapes[n], generator) < routing for n in names}]
    match routing:
        case "all":
            return [dict.fromkeys(names)]
        case "layerwise":
            return [{name: None} for name in names]
        case "subset":
            return [_uniform_k_subset(shapes, generator)]
    raise ValueError(f"routing={routing!r}; expected 'all', 'layerwise', 'subset' or a probability")


def _uniform_k_subset(
    shapes: Mapping[str, torch.Size], generator: torch.Generator
) -> dict[str, Bool[Tensor, "*batch"] | None]:
    names, sizes = list(shapes), set(shapes.values())
    # Sites with a head axis share the draw of their position.
    positions = min(sizes, key=len)
    if any(size[: len(positions)] != positions for size in sizes):
        raise ValueError(f"subset routing needs sites with the same positions, got shapes {sorted(map(tuple, sizes))}")
    n_sites = len(names)
    k = integers(1, n_sites + 1, positions, generator)
    order = uniform((n_sites, *positions), generator, rows=1).argsort(dim=0)
    rank = order.argsort(dim=0)
    chosen = rank < k
    return {
        name: chosen[i].reshape(*positions, *([1] * (len(shapes[name]) - len(positions)))).expand(shapes[name])
        for i, name in enumerate(names)
    }


def route(masks: Mapping[str, SiteMask], routed: Mapping[str, Bool[Tensor, "*batch"] | None]) -> dict[str, SiteMask]:
    """The masks of the sites named in `routed`, with their routing attached; the other sites are left out.

    Routing stays on the device where it was drawn: drawn on the CPU, the number of routed rows is known without
    waiting, and the unrouted ones are never computed.
    """
    return {name: SiteMask(masks[name].mask, masks[name].delta, where) for name, where in routed.items()}
