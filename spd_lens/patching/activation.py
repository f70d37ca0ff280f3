"""Activation patching over subcomponents, exact and approximated by gradients.

The corrupted run is given, in turn, the clean run's activation of each subcomponent at each position; how much of
the metric comes back says where the difference between the prompts is carried. The shape is that of
`transformer_lens.patching`: decomposition, corrupted tokens, clean cache, metric.

Deliberately left out: patching the delta. What the subcomponents do not explain stays the corrupted run's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.units import Ids, Unit, units_of
from spd_lens.patching.arguments import Metric, Positions, checked_input, metric_values
from spd_lens.patching.effects import Effects
from spd_lens.patching.runner import Replacement, activations_of, effects_of
from spd_lens.support.names import near_names

# A cache of the clean run (`run_with_cache` on the decomposed model), or the clean tokens themselves.
Clean: TypeAlias = Any


def activation_patching(
    decomposition: Decomposition,
    corrupted_tokens: Tensor,
    clean: Clean,
    metric: Metric,
    ids: Ids = None,
    *,
    positions: Positions = "each",
    per_pass: int | None = None,
) -> Effects:
    """The metric of the corrupted run with each unit's clean activations patched in, `[unit position]`.

    In the patched pass `a'[pos, c]` is the clean run's `a[pos, c]` for one unit and position, so the site's output
    moves by `(a_clean - a_corrupted)[pos, c] U[c]`, and all that follows is computed live.

    `clean` is the clean tokens, of the shape of the corrupted ones, or a cache of the clean run that holds
    `hook_*_acts` of the sites (`_, cache = model.run_with_cache(clean_tokens)` on the decomposed model). With tokens
    the result also knows the clean metric, and `recovered` is 1 where a patch restores all of it. `ids`, `positions`,
    `metric` and cost are as in `ablation_effects`; `positions=None` patches all positions at once.

    Raises ValueError for prompts of different shapes, a cache without the activations, unknown sites, ids, positions.

    >>> from spd_lens import decompose
    >>> from spd_lens.tasks import agreement_task
    >>> from spd_lens.models import load_tiny_lm
    >>> model = load_tiny_lm()
    >>> task = agreement_task(model.tokenizer, 8, prepend_bos=True)
    >>> decomposition = decompose(model, {"blocks.1.mlp.W_out": 8})
    >>> metric = task.metric(decomposition).per_row
    >>> effects = activation_patching(decomposition, task.corrupted, task.clean, metric)
    >>> effects.recovered.shape == (8, task.clean.shape[1])
    True
    """
    corrupted_tokens = checked_input(decomposition, corrupted_tokens, "corrupted_tokens")
    units, values, clean_metric = prepared(decomposition, corrupted_tokens, clean, metric, ids)
    return effects_of(
        decomposition,
        corrupted_tokens,
        metric,
        units,
        Replacement(values),
        what="activation patching",
        positions=positions,
        per_pass=per_pass,
        clean_metric=clean_metric,
    )


def prepared(
    decomposition: Decomposition, corrupted_tokens: Tensor, clean: Clean, metric: Metric, ids: Ids
) -> tuple[tuple[Unit, ...], dict[str, Tensor], Tensor | None]:
    """The units, every site's clean activations, and the clean metric if it can be known."""
    clean = checked_clean(decomposition, clean)
    units = units_of(decomposition, ids)
    sites = list(dict.fromkeys(site for unit in units for site in unit.sites))
    values, clean_metric = clean_activations(decomposition, corrupted_tokens, clean, sites), None
    if isinstance(clean, Tensor):
        with torch.no_grad():
            clean_metric = metric_values(metric, decomposition.host.forward(clean), len(clean))
    return units, values, clean_metric


def checked_clean(decomposition: Decomposition, clean: Clean) -> Clean:
    """`clean` with its tokens checked, if it is tokens; a cache as it is."""
    is_tokens = isinstance(clean, (Tensor, np.ndarray, list, tuple, str))
    return checked_input(decomposition, clean, "clean tokens") if is_tokens else clean


def clean_activations(
    decomposition: Decomposition, corrupted_tokens: Tensor, clean: Clean, sites: Sequence[str]
) -> dict[str, Tensor]:
    """`a [batch pos C]` of the clean run at the named sites, from its tokens or its cache."""
    if isinstance(clean, Tensor):
        if clean.shape != corrupted_tokens.shape:
            raise ValueError(
                f"clean tokens have shape {tuple(clean.shape)}, corrupted ones {tuple(corrupted_tokens.shape)}; "
                "patching needs prompts of equal length, row by row"
            )
        return activations_of(decomposition, clean, sites)
    found = {}
    for site in sites:
        name = decomposition[site].site.point_names()[0]
        try:
            acts = clean[name]
        except (KeyError, TypeError, IndexError):
            keys = list(clean.keys()) if hasattr(clean, "keys") else None
            if keys is None:
                raise TypeError(
                    f"clean is a {type(clean).__name__}; expected clean tokens [batch pos], or a cache of the clean run"
                ) from None
            raise ValueError(
                f"the clean cache has no {name!r} (near: {near_names(name, keys)}); make it with run_with_cache on the "
                "decomposed model, with a names_filter that lets that name through, or give the clean tokens instead"
            ) from None
        if acts.shape[:2] != corrupted_tokens.shape[:2] and corrupted_tokens.ndim > 1:
            raise ValueError(
                f"{name} in the clean cache is {tuple(acts.shape)}, but the corrupted tokens are "
                f"{tuple(corrupted_tokens.shape)}; patching needs prompts of equal length, row by row, and a cache "
                "with its batch axis"
            )
        found[site] = acts.to(decomposition.device)
    return found
