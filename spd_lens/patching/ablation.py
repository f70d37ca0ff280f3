"""Ablation: what a metric loses when subcomponents are ablated, or keeps when only they are left.

Removing subcomponent c by zero ablation is the same as running a model with `W - V_c U_c` in place of `W`: the
delta `W - V U` and everything else stay. `necessity` asks what breaks without a unit, `sufficiency` what is left
with nothing but the unit at its sites.

That a metric survives an ablation says nothing about text on which it was not measured; and a unit that survives as
sufficient under importances alone is not a circuit (E3).
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.units import Ids, units_of
from spd_lens.patching.arguments import Metric, Positions, checked_input
from spd_lens.patching.effects import Effects
from spd_lens.patching.runner import Replacement, activations_of, effects_of

AblationKind: TypeAlias = Literal["zero", "mean", "position_mean", "resample", "importance"]


Test: TypeAlias = Literal["necessity", "sufficiency"]


def ablation_effects(
    decomposition: Decomposition,
    tokens: Tensor,
    metric: Metric,
    ids: Ids = None,
    *,
    kind: AblationKind = "zero",
    test: Test = "necessity",
    positions: Positions = None,
    reference: Tensor | None = None,
    per_pass: int | None = None,
) -> Effects:
    """`metric(ablated) - metric(target)` for each unit of subcomponents, `[unit position]`.

    A unit's activations `a = x @ V [batch pos C]` are replaced, and the site's output moves by `(a' - a) @ U`:

    - `zero`: `a' = 0`. Exactly the model with `W - V_c U_c`, whatever the delta.
    - `mean`: `a'` is the mean of `a` over rows and positions of `reference` (None: of `tokens`). A BOS whose
      activations are a thousand times the others' dominates that mean.
    - `position_mean`: the mean over rows alone, at the same position; for prompts made from one template.
    - `resample`: `a'` is the activation at the same position of another prompt: the same row of `reference`, which has
      the shape of `tokens`; None: the row before it in `tokens` (needs at least two rows).
    - `importance`: `a' = g * a`, the mask that the gates predict. Little happens if they are right.

    `test="necessity"` replaces the unit; `"sufficiency"` replaces all other subcomponents of the unit's sites and sets
    their delta mask to 0, so that only the unit is left there; other sites stay the target's either way.

    `ids` says what the units are (see `units_of`): None takes every subcomponent on its own, `{site: [3, 17]}` these
    two, `{site: [[3, 17]]}` both together, `[{site: [3], other: [5]}]` a group over sites. `positions=None` replaces
    at all positions at once, `"each"` at every position separately, a list at each of these separately. `metric` gets
    the logits `[batch pos d_vocab]` of one ablation at a time and returns a scalar, or one number per row (then the
    result has standard errors and intervals).

    Cost: one clean pass (two for all kinds but `zero`) and `units * positions / per_pass` passes over
    `per_pass * batch` rows, from the first ablated block on (the first time, two passes more try whether that gives
    what whole passes give). `per_pass` is chosen for 128 MB of logits unless given.

    Raises ValueError for unknown sites, ids, kinds, positions and unfit references; TypeError for wrong types.

    >>> from spd_lens import decompose
    >>> from spd_lens.models import load_tiny_lm
    >>> model = load_tiny_lm()
    >>> decomposition = decompose(model, {"blocks.0.mlp.W_in": 8})
    >>> tokens = model.to_tokens("Call me Ishmael")
    >>> metric = lambda logits: logits[:, -1].log_softmax(-1).amax(-1)
    >>> effects = ablation_effects(decomposition, tokens, metric, {"blocks.0.mlp.W_in": None}, positions="each")
    >>> effects.grid("blocks.0.mlp.W_in").shape == (tokens.shape[1], 8)
    True
    >>> [len(effects.top(3)), effects.top(1)[0].site]
    [3, 'blocks.0.mlp.W_in']
    """
    if test not in ("necessity", "sufficiency"):
        raise ValueError(f"test={test!r}; expected 'necessity' (remove the unit) or 'sufficiency' (keep only the unit)")
    tokens = checked_input(decomposition, tokens)
    units = units_of(decomposition, ids)
    sites = list(dict.fromkeys(site for unit in units for site in unit.sites))
    values = _replacements(decomposition, tokens, sites, kind, reference)
    replacement = Replacement(values, multiply=kind == "importance", others=test == "sufficiency")
    return effects_of(
        decomposition,
        tokens,
        metric,
        units,
        replacement,
        what=f"{kind} ablation, {test}",
        positions=positions,
        per_pass=per_pass,
    )


def _replacements(
    decomposition: Decomposition, tokens: Tensor, sites: list[str], kind: str, reference: Tensor | None
) -> dict[str, Tensor]:
    """What the activations of every site are replaced by (multiplied with, for `importance`)."""
    if reference is not None and kind in ("zero", "importance"):
        raise ValueError(f"reference is given, but kind={kind!r} does not use one; use kind='mean' or 'resample'")
    if reference is not None:
        reference = checked_input(decomposition, reference, "reference")
    match kind:
        case "zero":
            return {site: torch.zeros((), device=decomposition.device) for site in sites}
        case "mean":
            a = activations_of(decomposition, tokens if reference is None else reference, sites)
            # Over all axes but C: a head axis, where there is one, has subcomponents of its own per head.
            return {site: value.mean(dim=tuple(range(min(2, value.ndim - 1)))) for site, value in a.items()}
        case "position_mean":
            if reference is not None and reference.shape[1:] != tokens.shape[1:]:
                raise ValueError(
                    f"reference has shape {tuple(reference.shape)}; kind='position_mean' needs prompts as long as the "
                    f"tokens, {tuple(tokens.shape)}"
                )
            a = activations_of(decomposition, tokens if reference is None else reference, sites)
            return {site: value.mean(dim=0) for site, value in a.items()}
        case "resample":
            if reference is None and len(tokens) < 2:
                raise ValueError(
                    "kind='resample' takes activations from another row of the tokens, and there is only one; give "
                    "reference, tokens of the same shape"
                )
            if reference is not None and reference.shape != tokens.shape:
                raise ValueError(
                    f"reference has shape {tuple(reference.shape)}; kind='resample' needs that of the tokens, "
                    f"{tuple(tokens.shape)}"
                )
            patched_from = tokens.roll(1, dims=0) if reference is None else reference
            return activations_of(decomposition, patched_from, sites)
        case "importance":
            g = decomposition.importance(tokens)
            return {site: g[site] for site in sites}
    raise ValueError(f"kind={kind!r}; expected 'zero', 'mean', 'position_mean', 'resample' or 'importance'")
