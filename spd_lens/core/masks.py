"""Masks and routing as pure functions of importances and a generator (K1, K2, K5, K6).

Every mask has the form `m = g + (1 - g) r` with a source `r` in [0, 1]: random for training, chosen by an
adversary (`spd_lens.objective`) in the worst case, 0 for "importance itself". The delta mask has no importance and
is the source itself. The same generator state gives the same masks on every device: numbers are drawn on the
generator's device and moved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spd_lens.core.draws import uniform
from spd_lens.support.shown import short_repr


@dataclass(frozen=True)
class SiteMask:
    """Masks of one site for one forward pass.

    - `mask` `[... C]` and `delta` `[...]` are multiplied in as in M1; None stands for ones. Axes that all positions
      share may be 1 or left out.
    - `routed` `[...]`: where False, the site stays with the target whatever the masks say (K5); None: everywhere
      routed. On the CPU, whatever the device of the rest, it tells without waiting how many rows are routed, and
      only these are computed; elsewhere, and at sites with a head axis, the others are computed and selected away.
    """

    mask: Float[Tensor, "*#batch C"] | None = None
    delta: Float[Tensor, "*#batch"] | None = None
    routed: Bool[Tensor, "*#batch"] | None = None

    __repr__ = short_repr


MaskKind = Literal["stochastic", "bernoulli", "importance", "rounded", "random", "none", "off"]


Generators = torch.Generator | Sequence[torch.Generator]


Importances = Mapping[str, Float[Tensor, "*batch C"]]

# Importance at and above which a rounded mask keeps a subcomponent.
ROUND_AT = 0.5


def mask_from_source(
    importance: Float[Tensor, "*batch C"], source: Float[Tensor, "*#batch C"]
) -> Float[Tensor, "*batch C"]:
    """`m = g + (1 - g) r` (K1): a subcomponent of importance 1 stays on, one of importance 0 is the source's.

    >>> mask_from_source(torch.tensor([1.0, 0.0, 0.5]), torch.tensor([0.2, 0.2, 0.2])).tolist()
    [1.0, 0.20000000298023224, 0.6000000238418579]
    """
    return _Mask.apply(importance, source)  # pyright: ignore[reportReturnType]


class _Mask(torch.autograd.Function):
    """K1, keeping nothing for the backward pass but its two arguments, which are kept anyway."""

    generate_vmap_rule = True

    @staticmethod
    def forward(importance: Tensor, source: Tensor) -> Tensor:
        return torch.addcmul(importance, 1 - importance, source)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        importance, source = ctx.saved_tensors
        (grad,) = grads
        by_importance, by_source = ctx.needs_input_grad
        return (
            torch.addcmul(grad, grad, source, value=-1) if by_importance else None,
            (grad * (1 - importance)).sum_to_size(source.shape) if by_source else None,
        )


def _uniform(like: Tensor, shape: torch.Size, generator: Generators) -> Tensor:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if not isinstance(generator, torch.Generator):
        members = torch.empty(shape, dtype=dtype, device=generator[0].device)
        for own, room in zip(generator, members, strict=True):
            torch.rand(shape[1:], generator=own, device=own.device, dtype=dtype, out=room)
        return members.to(like.device)
    return uniform(shape, generator, dtype=dtype).to(like.device)


def _sources(kind: MaskKind, importance: Tensor, delta: bool, generator: Generators) -> tuple[Tensor, Tensor]:
    """Source of the mask and the delta mask, `([... C], [...])`; the latter is 0, and not drawn, without `delta`."""
    positions = importance.shape[:-1]
    source = _uniform(importance, importance.shape, generator)
    delta_mask = _uniform(importance, positions, generator) if delta else importance.new_zeros(positions)
    if kind == "bernoulli":
        source = (source >= 0.5).to(source.dtype)
        delta_mask = (delta_mask >= 0.5).to(delta_mask.dtype)
    return source, delta_mask


def sample_masks(
    importances: Importances,
    *,
    kind: MaskKind = "stochastic",
    delta: bool = True,
    generator: Generators,
) -> dict[str, SiteMask]:
    """One draw of masks for every site, from importances `g [... C]`.

    - `stochastic`: `m = g + (1 - g) r`, `r ~ U(0, 1)`; delta mask `U(0, 1)` per position (K1, K2).
    - `bernoulli`: the same with `r` 0 or 1 with probability one half each.
    - `random`: `m ~ U(0, 1)` whatever the importance; delta mask `U(0, 1)`.
    - `importance`: `m = g`, delta 0. `rounded`: `m = [g >= 0.5]`, delta 0. For monitoring only (E3).
    - `none`: `m = 1`, delta 0: the sum of all subcomponents alone (E2). `off`: `m = 0`, delta 0.

    Draws are fresh and independent for every site and position. With `delta=False` the random kinds use a delta
    mask of 0: what the subcomponents do not explain is then missing from the pass, as in the paper.
    Gradients flow through `g` (reparametrised). With a list of generators, the leading axis of the importances is
    that of independent members, each of which draws from its own.
    """
    masks = {}
    for name, g in importances.items():
        zero = g.new_zeros(g.shape[:-1])
        match kind:
            case "stochastic" | "bernoulli":
                source, delta_mask = _sources(kind, g, delta, generator)
                masks[name] = SiteMask(mask_from_source(g, source), delta_mask)
            case "random":
                source, delta_mask = _sources(kind, g, delta, generator)
                masks[name] = SiteMask(source, delta_mask)
            case "importance":
                masks[name] = SiteMask(g, zero)
            case "rounded":
                masks[name] = SiteMask((g >= ROUND_AT).to(g.dtype), zero)
            case "none":
                masks[name] = SiteMask(None, zero)
            case "off":
                masks[name] = SiteMask(torch.zeros_like(g), zero)
            case _:
                raise ValueError(
                    f"mask kind {kind!r}; expected stochastic, bernoulli, random, importance, rounded, none or off"
                )
    return masks
