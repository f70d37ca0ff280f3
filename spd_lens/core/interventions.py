"""Interventions as lists of ordinary TransformerLens hooks, `[(hook_name, fn)]`.

Every hook multiplies the mask that it receives, so lists compose by addition in any order. Nothing here changes a
model: the lists act only where they are passed to `model.hooks(fwd_hooks=...)` or `run_with_hooks`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from numbers import Integral
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from spd_lens.core.decomposed_weight import DecomposedWeight
from spd_lens.core.inputs import can_be_read
from spd_lens.core.masks import SiteMask
from spd_lens.support.given import given_number, shown
from spd_lens.support.names import near_names

HookList = list[tuple[str, Any]]

# What a mask may be given as: numbers, booleans, a tensor or an array of any dtype.
Factor: TypeAlias = Shaped[Tensor, "..."] | np.ndarray | float


def ablation_hooks(weight: DecomposedWeight, ids: Iterable[Any] | Integral | int) -> HookList:
    """The named subcomponents' masks are 0; everything else, also the delta, stays."""
    factor = torch.ones(weight.n_subcomponents, device=weight.V.device)
    factor[checked_ids(weight, ids)] = 0
    return [_mask_hook(weight, factor)]


def keeping_hooks(weight: DecomposedWeight, ids: Iterable[Any] | Integral | int) -> HookList:
    """Only the named subcomponents stay: all other masks of this site and its delta mask are 0."""
    factor = torch.zeros(weight.n_subcomponents, device=weight.V.device)
    factor[checked_ids(weight, ids)] = 1
    return [_mask_hook(weight, factor), _delta_hook(weight, 0.0)]


def mask_hooks(weight: DecomposedWeight, mask: Factor) -> HookList:
    """The site's mask is multiplied by `mask`, `[C]` or `[batch pos C]`."""
    mask = _as_factor(mask, f"mask for {weight.site.name}")
    if mask.shape[-1:] != (weight.n_subcomponents,):
        raise ValueError(
            f"mask for {weight.site.name} has shape {tuple(mask.shape)}; its last axis must be "
            f"C = {weight.n_subcomponents}"
        )
    return [_mask_hook(weight, mask)]


def delta_hooks(weight: DecomposedWeight, delta: Factor) -> HookList:
    """The site's delta mask is multiplied by `delta`, a number or `[batch pos]`."""
    return [_delta_hook(weight, delta)]


def hooks_for_masks(
    weights: Mapping[str, DecomposedWeight], masks: Mapping[str, Factor], delta: Factor | Mapping[str, Factor]
) -> HookList:
    """`mask_hooks` for all named sites; `delta` is one number for them, or given per site."""
    if not isinstance(masks, Mapping):
        raise TypeError(f"masks={shown(masks)}; expected {{site: mask}}, each [C] or [batch pos C]")
    if not masks and not (isinstance(delta, Mapping) and delta):
        raise ValueError("no site is named; expected {site: mask}, or delta={site: delta}")
    deltas = delta if isinstance(delta, Mapping) else dict.fromkeys(masks, delta)
    for site in (*masks, *deltas):
        check_site(weights, site)
    hooks = [hook for name, mask in masks.items() for hook in mask_hooks(weights[name], mask)]
    return hooks + [hook for name, value in deltas.items() for hook in delta_hooks(weights[name], value)]


def _mask_hook(weight: DecomposedWeight, factor: Tensor) -> tuple[str, Any]:
    return weight.site.point_names()[2], partial(_multiply, factor=factor)


def _delta_hook(weight: DecomposedWeight, factor: Factor) -> tuple[str, Any]:
    what = f"delta for {weight.site.name}"
    if isinstance(factor, (Tensor, np.ndarray)):
        factor = _as_factor(factor, what)
    else:
        factor = weight.V.new_tensor(given_number(what, float(factor) if isinstance(factor, bool) else factor))
    # The point has a last axis of length 1, `[batch pos 1]`.
    return weight.site.point_names()[3], partial(_multiply, factor=factor.unsqueeze(-1) if factor.ndim else factor)


def _multiply(value: Tensor, hook: Any, *, factor: Tensor) -> Tensor:
    """Hook: `value * factor`; a factor given per position also fits values with a head axis after the positions."""
    factor = factor.to(value.device)
    if factor.ndim == 3 and value.ndim == 4:
        factor = factor.unsqueeze(-2)
    elif factor.ndim not in (0, 1, value.ndim) or not _broadcasts(factor, value):
        per_position = hook.name.endswith("_delta_mask")
        given = tuple(factor.shape[:-1] if per_position else factor.shape)
        raise ValueError(
            f"{hook.name} is {tuple(value.shape)} in this pass and was given a factor {given}; "
            f"expected {'one number or [batch pos]' if per_position else 'the same shape, or [C]'} of this pass"
        )
    return value * factor


def _broadcasts(factor: Tensor, value: Tensor) -> bool:
    try:
        return torch.broadcast_shapes(factor.shape, value.shape) == value.shape
    except RuntimeError:
        return False


def _as_factor(given: Any, what: str) -> Tensor:
    """A mask or delta mask as a tensor of real, finite numbers (looked at where nothing waits for it)."""
    try:
        factor = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{what} is {shown(given)}; expected numbers: a tensor, an array or a list") from None
    if factor.is_complex():
        raise TypeError(f"{what} is {factor.dtype}; expected real numbers")
    if factor.is_floating_point() and can_be_read(factor) and not bool(factor.isfinite().all()):
        raise ValueError(f"{what} holds NaN or infinite numbers; expected finite ones, usually in [0, 1]")
    return factor


def check_site(weights: Mapping[str, Any], site: Any) -> None:
    """Raise ValueError, with near names, unless `site` is decomposed."""
    if site not in weights:
        raise ValueError(f"no decomposed site {site!r}; near: {near_names(str(site), weights)}")


def checked_site_masks(weights: Mapping[str, DecomposedWeight], masks: Any) -> Mapping[str, SiteMask]:
    """`masks`, if it is `{site: SiteMask}` of these weights with a last axis of C."""
    if not isinstance(masks, Mapping):
        raise TypeError(f"masks={shown(masks)}; expected {{site: SiteMask(mask, delta)}}")
    for name, given in masks.items():
        check_site(weights, name)
        if not isinstance(given, SiteMask):
            raise TypeError(f"the mask of {name} is {shown(given)}; expected a SiteMask(mask [batch pos C], delta)")
        count = weights[name].n_subcomponents
        if given.mask is not None and given.mask.shape[-1] != count:
            raise ValueError(
                f"the mask of {name} has shape {tuple(given.mask.shape)}; expected a last axis of C = {count}"
            )
    return masks


def checked_ids(weight: DecomposedWeight, ids: Iterable[Any] | Integral | int) -> list[int]:
    """`ids` (or one id) as plain numbers; TypeError or ValueError if one is no subcomponent of `weight`."""
    count = weight.n_subcomponents
    if isinstance(ids, Integral) or (isinstance(ids, Tensor) and ids.ndim == 0):
        ids = [ids]  # pyright: ignore[reportAssignmentType]
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Iterable):
        raise TypeError(f"subcomponents {ids!r} of {weight.site.name}: expected integer ids in 0..{count - 1}")
    chosen = [c.item() if isinstance(c, Tensor) and c.ndim == 0 else c for c in ids]
    odd = [c for c in chosen if isinstance(c, bool) or not isinstance(c, Integral)]
    if odd:
        raise TypeError(f"subcomponents {odd[:5]} of {weight.site.name}: expected integer ids in 0..{count - 1}")
    chosen = [int(c) for c in chosen]
    wrong = [c for c in chosen if not 0 <= c < count]
    if wrong:
        raise ValueError(f"subcomponents {wrong[:5]} of {weight.site.name}: expected ids in 0..{count - 1}")
    return chosen
