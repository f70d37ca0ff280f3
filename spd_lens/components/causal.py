"""Causal evidence for grouping: which outputs each subcomponent moves when it is ablated: `coeffects`.

Two subcomponents that fire together may have nothing to do with each other, and two that make one mechanism may fire
at different rates: one reads whenever a feature is there, the other writes only where it passes a threshold. What
ablation does tells both apart. Here an *event* is one output number at one position, and a subcomponent "fires" in it
where removing it (all else and the delta kept) changes that number by more than `threshold`. Links of a chain have the
same events whatever their gates do; independent mechanisms write to other outputs and share none.

The result is a `CoActivation`, for `merge_subcomponents`, `ensemble` and `leiden` alike. Cost: one masked pass per
subcomponent and batch, from the block of its site on. Left out: what only shows when two are removed together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.fingerprint import subcomponent_hashes
from spd_lens.core.inputs import checked_decomposition
from spd_lens.core.masks import SiteMask
from spd_lens.core.squashings import importance_of
from spd_lens.core.units import ALIVE_ABOVE, Ids, units_of
from spd_lens.data.batches import Batch
from spd_lens.data.streams import first_batches
from spd_lens.statistics.coactivations import CoActivation
from spd_lens.support.given import given_function, given_number, given_whole
from spd_lens.support.progress import tqdm

# The model's output, and that of the clean pass: numbers `[... n]` of which each is an event.
OutputNumbers: TypeAlias = Callable[[Tensor, Tensor], Tensor]
# Of a language model the log-probabilities of so many tokens at every position: the likeliest of the clean pass.
TOP_TOKENS = 8


def top_log_probabilities(output: Tensor, clean: Tensor) -> Tensor:
    """The log-probabilities of the tokens that were likeliest in the clean pass, `[batch pos 8]`."""
    return output.log_softmax(-1).gather(-1, clean.topk(min(TOP_TOKENS, clean.shape[-1]), dim=-1).indices)


def coeffects(
    decomposition: Decomposition,
    batches: Any,
    ids: Ids = None,
    *,
    threshold: float = 0.1,
    readout: OutputNumbers | None = None,
    max_batches: int | None = 4,
    max_events: int = 1 << 16,
    seed: int = 0,
) -> CoActivation:
    """Which subcomponents move the same outputs when they are ablated, over all sites.

    `ids`: the subcomponents to ablate; None: those with an importance above 0.01 somewhere in the first batches.
    `readout(output, clean_output)` says which numbers count; None: all outputs of a model without a vocabulary, the
    log-probabilities of the 8 likeliest tokens (nats) of one that has one. `threshold` is in these units. Positions
    that a batch's mask leaves out do not count.

    Raises TypeError or ValueError for data that cannot be run, units of several subcomponents, and where nothing that
    is removed moves any output by more than `threshold`.
    """
    checked_decomposition(decomposition, "coeffects")
    threshold = given_number("threshold", threshold, above=0.0)
    seed = given_whole("seed", seed, least=0)
    if readout is not None:
        given_function("readout", readout, "readout(output, clean_output)", 2)
    read = readout or (top_log_probabilities if decomposition.host.vocabulary_size() is not None else _all_outputs)
    stream = [
        batch.to(decomposition.device)
        for batch in first_batches(batches, decomposition, max_batches, purpose="ablate subcomponents on")
    ]
    chosen = _chosen(decomposition, stream, ids)
    sites = {name: weight.n_subcomponents for name, weight in decomposition.items()}
    parts = []
    for b, batch in enumerate(stream):
        fires = _moved(decomposition, batch, chosen, threshold, read)
        offsets = np.cumsum([0, *sites.values()])
        by_site = {name: fires[:, o : o + n] for (name, n), o in zip(sites.items(), offsets[:-1], strict=True)}
        generator = np.random.default_rng([seed, b])
        parts.append(CoActivation.of(by_site, max_events=max_events, threshold=threshold, generator=generator))
    found = parts[0]
    for part in parts[1:]:
        found = found + part
    if not found.fired.any():
        raise ValueError(
            f"no ablation moves any output by more than threshold={threshold:g}: give a smaller one, or other data"
        )
    return replace(found, found_in=subcomponent_hashes(decomposition))


def _all_outputs(output: Tensor, clean: Tensor) -> Tensor:
    return output


def _chosen(decomposition: Decomposition, stream: list[Batch], ids: Ids) -> dict[str, list[int]]:
    if ids is not None:
        units = units_of(decomposition, ids)
        wide = [unit for unit in units if len(unit.members) > 1 or unit.positions is not None]
        if wide:
            raise ValueError(f"{wide[0]}: expected single subcomponents at all positions; these are to be grouped")
        chosen: dict[str, list[int]] = {}
        for unit in units:
            chosen.setdefault(unit.site, []).append(unit.id)
        return chosen
    alive: dict[str, Tensor] = {}
    with torch.no_grad():
        for batch in stream:
            clean = decomposition.clean_pass(batch.inputs, start_at=batch.start_at, attention_mask=batch.attention_mask)
            for name, pre in decomposition.pre_importances(clean.inputs).items():
                fires = (importance_of(pre) > ALIVE_ABOVE).flatten(0, -2).any(0)
                alive[name] = fires | alive[name] if name in alive else fires
    return {name: fires.nonzero().flatten().tolist() for name, fires in alive.items() if bool(fires.any())}


def _moved(
    decomposition: Decomposition, batch: Batch, chosen: dict[str, list[int]], threshold: float, read: OutputNumbers
) -> np.ndarray:
    """`[events all_C]`: whether removing each subcomponent moves each output number by more than `threshold`."""
    with torch.no_grad():
        clean = decomposition.clean_pass(batch.inputs, start_at=batch.start_at, attention_mask=batch.attention_mask)
        before = read(clean.output, clean.output)
        if bool(before.isnan().any()):
            raise ValueError("the model's outputs are NaN on these data, so that no ablation can be seen to move them")
        offset, columns = 0, {}
        for name, weight in tqdm(decomposition.items(), desc="ablating", leave=False):
            for c in chosen.get(name, []):
                mask = torch.ones(weight.n_subcomponents, device=weight.V.device)
                mask[c] = 0
                output = decomposition.masked_forward(
                    batch.inputs,
                    {name: SiteMask(mask=mask)},
                    start_at=batch.start_at,
                    residuals=clean.residuals,
                    attention_mask=batch.attention_mask,
                )
                values = read(output, clean.output)
                if bool(values.isnan().any()):
                    raise ValueError(f"without {name}[{c}] the outputs are NaN: V, U or the model hold NaN")
                moved = (values - before).abs() > threshold
                columns[offset + c] = _counted(moved, batch).cpu().numpy()
            offset += weight.n_subcomponents
    fires = np.zeros((_counted(before, batch).numel(), offset), bool)
    for number, moved in columns.items():
        fires[:, number] = moved
    return fires


def _counted(values: Tensor, batch: Batch) -> Tensor:
    return (values if batch.position_mask is None else values[batch.position_mask]).reshape(-1)
