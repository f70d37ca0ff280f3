"""Reconstruction losses (L4 to L6): any mask source times any routing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spd_lens.core.masks import Importances, MaskKind, SiteMask, sample_masks
from spd_lens.core.routing import Routing, route, sample_routing
from spd_lens.objective.divergences import Divergence, divergence
from spd_lens.objective.mask_sources import MaskSource, masks_from_sources

MaskedForward = Callable[[Mapping[str, SiteMask]], Tensor]


def reconstruction_loss(
    forward: MaskedForward,
    clean_output: Float[Tensor, "*output_batch d_out"],
    importances: Importances,
    *,
    masks: MaskKind | Mapping[str, Tensor] | MaskSource = "stochastic",
    routing: Routing | list[dict[str, Tensor | None]] = "all",
    kind: Divergence = "kl",
    delta: bool = True,
    draws: int = 1,
    position_mask: Bool[Tensor, "*output_batch"] | None = None,
    clean_is_log_probs: bool = False,
    generator: torch.Generator,
    routing_generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    """L4 to L6: mean over draws, and over the passes that the routing asks for, of `D(clean, forward(masks))`.

    - `forward` maps masks per site to the model's output; sites that are not named stay with the target.
    - `masks` is a kind for `sample_masks`, adversarial sources `{site: [... C+1]}` (K3), or a `MaskSource`.
    - `routing` is a kind for `sample_routing`, or passes drawn before, so that an adversary and the loss share
      them. `"layerwise"` is L6.
    - `clean_output` comes from a frozen forward of the target, never from "all masks 1".

    Fresh masks are drawn for every pass. Cost: `draws` times the number of passes, each a forward of the model.
    """
    passes = reconstruction_passes(
        forward,
        clean_output,
        importances,
        masks=masks,
        routing=routing,
        kind=kind,
        delta=delta,
        draws=draws,
        position_mask=position_mask,
        clean_is_log_probs=clean_is_log_probs,
        generator=generator,
        routing_generator=routing_generator,
    )
    return torch.stack(list(passes)).sum()


def reconstruction_passes(
    forward: MaskedForward,
    clean_output: Float[Tensor, "*output_batch d_out"],
    importances: Importances,
    *,
    masks: MaskKind | Mapping[str, Tensor] | MaskSource,
    routing: Routing | list[dict[str, Tensor | None]],
    kind: Divergence,
    delta: bool,
    draws: int,
    position_mask: Bool[Tensor, "*output_batch"] | None,
    clean_is_log_probs: bool,
    generator: torch.Generator,
    routing_generator: torch.Generator | None,
) -> Iterator[Float[Tensor, ""]]:
    """The summands of `reconstruction_loss`, one for every pass, each computed when it is asked for.

    Differentiating each before asking for the next keeps one graph instead of all.
    """
    if draws < 1:
        raise ValueError(f"draws={draws}; expected at least 1")
    if not importances:
        raise ValueError("reconstruction_loss was given no site")
    shapes = {name: g.shape[:-1] for name, g in importances.items()}
    for _ in range(draws):
        passes = (
            routing
            if isinstance(routing, list)
            else sample_routing(shapes, routing, generator=routing_generator or generator)
        )
        for routed in passes:
            chosen = {name: importances[name] for name in routed}
            if isinstance(masks, MaskSource):
                drawn, routed = masks.masks(chosen, delta=delta, generator=generator), masks.routed(routed)
            elif isinstance(masks, str):
                drawn = sample_masks(chosen, kind=masks, delta=delta, generator=generator)
            else:
                drawn = masks_from_sources(chosen, masks, delta=delta)
            distance = divergence(
                clean_output,
                forward(route(drawn, routed)),
                kind=kind,
                position_mask=position_mask,
                clean_is_log_probs=clean_is_log_probs,
            )
            yield distance / (draws * len(passes))
