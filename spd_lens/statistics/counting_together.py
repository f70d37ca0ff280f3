"""`coactivation`: one streamed pass over data that counts which subcomponents fire together.

Cost: one clean pass and the gates per batch. What comes out is a `CoActivation`, whose file says what it holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.fingerprint import subcomponent_hashes
from spd_lens.core.inputs import checked_decomposition
from spd_lens.core.squashings import importance_of
from spd_lens.core.units import ALIVE_ABOVE
from spd_lens.data.streams import first_batches
from spd_lens.statistics.coactivations import CoActivation, Window, positive
from spd_lens.statistics.event_sample import Collector
from spd_lens.support.progress import tqdm


def coactivation(
    decomposition: Decomposition,
    batches: Any,
    *,
    max_batches: int | None = 64,
    threshold: float = ALIVE_ABOVE,
    window: Window = 1,
    max_events: int = 1 << 16,
    seed: int = 0,
) -> CoActivation:
    """Which subcomponents have an importance above `threshold` together, over all sites.

    With `window=1` an event is a position. With `window=w` it is a position with the w - 1 before it, in the same row:
    a subcomponent fires in it if it fires at any of them, so that what works at a token and what works at the next are
    seen together. `window="row"`: one event per row. Positions that a batch's mask leaves out neither fire nor count.

    Raises TypeError or ValueError for data that cannot be run, numbers out of range, importances that are NaN, and
    where nothing fires at all.
    """
    checked_decomposition(decomposition, "coactivation")
    _check_threshold(threshold)
    _check_window(window)
    if isinstance(seed, bool) or not isinstance(seed, Integral) or seed < 0:
        raise ValueError(f"seed={seed!r}; expected a whole number, zero or more")
    sizes = {name: weight.n_subcomponents for name, weight in decomposition.items()}
    most = positive("max_events", max_events)
    collector = Collector(sum(sizes.values()), most, np.random.default_rng(int(seed)))
    stream = first_batches(batches, decomposition, max_batches, purpose="count co-activations in")
    with torch.no_grad():
        for batch in tqdm(stream, desc="coactivation", leave=False):
            batch = batch.to(decomposition.device)
            clean = decomposition.clean_pass(batch.inputs, start_at=batch.start_at, attention_mask=batch.attention_mask)
            pre = decomposition.pre_importances(clean.inputs)
            check_numbers(pre)
            n_axes = batch.inputs.ndim if batch.inputs.is_floating_point() else batch.inputs.ndim + 1
            fires = torch.cat([_fires(pre[name], threshold, n_axes) for name in sizes], dim=-1)
            collector.add(_events(fires, batch.position_mask, window).cpu().numpy())
    hashes = subcomponent_hashes(decomposition)
    found = CoActivation(
        sizes, **collector.found(), max_events=most, threshold=float(threshold), window=window, found_in=hashes
    )
    if not found.fired.any():
        raise ValueError(
            f"nothing fires: no importance is above {threshold:g} in any of {found.n_seen:,} events; is the "
            "decomposition trained? (a smaller threshold may find more)"
        )
    return found


def check_numbers(pre: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming the site, for importances that are NaN: these would count as off."""
    wrong = [name for name, values in pre.items() if bool(values.isnan().any())]
    if wrong:
        raise ValueError(
            f"importances of {wrong[0]} are NaN on these data, as the model, V or the gates hold NaN; load an earlier "
            "state of them"
        )


def _fires(pre: Tensor, threshold: float, n_axes: int) -> Bool[Tensor, "*batch C"]:
    fires = importance_of(pre) > threshold
    return fires.any(-2) if fires.ndim > n_axes else fires  # a head axis: any head speaks for the position


def _events(fires: Tensor, position_mask: Tensor | None, window: Window) -> Bool[Tensor, "events C"]:
    if position_mask is not None:
        fires = fires & position_mask.unsqueeze(-1)
    if fires.ndim < 3:
        if window != 1:
            raise ValueError(f"window={window!r}, but this model's inputs have no positions; leave window=1")
        return fires if position_mask is None else fires[position_mask]
    if window == "row":
        rows = fires.any(1)
        return rows if position_mask is None else rows[position_mask.any(1)]
    seen = fires.clone()
    for back in range(1, min(window, fires.shape[1])):
        seen[:, back:] |= fires[:, :-back]
    return seen.flatten(0, 1) if position_mask is None else seen[position_mask]


def _check_threshold(threshold: Any) -> None:
    """Raise TypeError or ValueError unless `threshold` is a number in 0..1, 1 left out."""
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
        raise TypeError(f"threshold={threshold!r}; expected a number")
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold={threshold!r}; expected an importance: at least 0, below 1")


def _check_window(window: Any) -> None:
    if window != "row" and (isinstance(window, bool) or not isinstance(window, Integral) or window < 1):
        raise ValueError(f"window={window!r}; expected a number of positions, at least 1, or 'row'")
