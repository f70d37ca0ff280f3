"""C2: passes in which one origin of attributions is really ablated, and what falls by it.

Shares with `spd_lens.graphs.direct_pass` what the origins are, and the held pass with path patching
(`spd_lens.patching.frozen`); no gradient is taken here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.interventions import HookList
from spd_lens.core.units import DELTA, Unit
from spd_lens.graphs.direct_pass import Start, delta_outputs, origin_of, start_of
from spd_lens.patching.frozen import Frozen, HeldPass, SiteChange, change_hooks
from spd_lens.patching.hooks import store, zero


@dataclass(frozen=True)
class Drop:
    """How much the activations `[pos C]` of every site, and every readout, fell when a sender was ablated."""

    sender: Unit
    activations: dict[str, Tensor]
    readouts: list[float]


Readouts: TypeAlias = Sequence[Callable[[Tensor], Tensor]]


def removals(
    decomposition: Decomposition,
    tokens: Int[Tensor, "1 pos"],
    senders: Sequence[Unit],
    readouts: Readouts,
    frozen: Frozen,
    *,
    held: bool,
    per_pass: int = 16,
) -> Iterator[Drop]:
    """For one prompt `[1 pos]`, the change `clean - without` for each sender (at one position) that is ablated.

    - `held=True` (C2): all other subcomponents and what is frozen keep their clean values.
    - `held=False`: the total effect; everything follows, also what C1 freezes.

    A subcomponent is removed by `a_c = 0` at the position, a delta by its vector, an embedding by the zero vector.
    """
    start = start_of(decomposition, tokens)
    clean = None
    if held:
        deltas = delta_outputs(decomposition, tokens)
        clean = HeldPass(decomposition, frozen, lambda: start.run(decomposition, start.rows(1)), deltas)
    # Nobody removed: rounding differences between held and plain passes cancel.
    base_acts, base_readouts = _removal_pass(decomposition, start, clean, readouts, [()], tokens.shape[1])
    for first in range(0, len(senders), per_pass):
        group = senders[first : first + per_pass]
        acts, values = _removal_pass(decomposition, start, clean, readouts, [(s,) for s in group], tokens.shape[1])
        for k, sender in enumerate(group):
            fell = {site: (base_acts[site][0] - a[k]).cpu() for site, a in acts.items()}
            yield Drop(sender, fell, (base_readouts[0] - values[k]).tolist())


def removed_together(
    decomposition: Decomposition, tokens: Int[Tensor, "1 pos"], senders: Sequence[Unit], readouts: Readouts
) -> tuple[list[float], list[float]]:
    """Every readout of the clean pass, and with all these senders ablated at once and nothing held.

    Cost: one pass over two copies of the prompt.
    """
    start = start_of(decomposition, tokens)
    _, values = _removal_pass(decomposition, start, None, readouts, [(), tuple(senders)], tokens.shape[1])
    return values[0].tolist(), values[1].tolist()


@torch.no_grad()
def _removal_pass(
    decomposition: Decomposition,
    start: Start,
    clean: HeldPass | None,
    readouts: Readouts,
    senders: Sequence[Sequence[Unit]],
    length: int,
) -> tuple[dict[str, Tensor], Tensor]:
    """`{site: a [copy pos C]}` and readouts `[copy readout]`, with the senders of each copy removed in it."""
    n, acts, changes = len(senders), {}, _changes(decomposition, senders, length)
    hooks: HookList = [(w.site.point_names()[0], store(acts, site)) for site, w in decomposition.items()]
    hooks += change_hooks(decomposition, changes) if clean is None else clean.hooks(changes)
    rows = start.rows(n)
    for k, sender in _numbered(senders):
        if origin_of(sender)[0] != "embedding":
            continue
        if sender.site == start.name:
            rows[k, sender.position] = 0
        else:
            hooks.append((start.points[sender.site], zero([(k, sender.position)])))
    with decomposition.host.quiet_edits(), decomposition.model.hooks(fwd_hooks=hooks):
        output = start.run(decomposition, rows)
    values = [[readout(output[k : k + 1]).sum() for readout in readouts] for k in range(n)]
    return acts, torch.tensor(values, dtype=torch.float64).reshape(n, len(readouts))


def _numbered(senders: Sequence[Sequence[Unit]]) -> Iterator[tuple[int, Unit]]:
    return ((k, sender) for k, group in enumerate(senders) for sender in group)


def _changes(decomposition: Decomposition, senders: Sequence[Sequence[Unit]], length: int) -> dict[str, SiteChange]:
    """What the copies change at every site: activations and deltas that become 0."""
    changes: dict[str, SiteChange] = {}
    for k, sender in _numbered(senders):
        if origin_of(sender)[0] == "embedding":
            continue
        weight = decomposition[sender.site]
        if sender.site not in changes:
            where = torch.zeros(len(senders), length, weight.n_subcomponents, dtype=torch.bool, device=weight.V.device)
            changes[sender.site] = SiteChange(where, torch.zeros((), device=weight.V.device), where.any(-1))
        change = changes[sender.site]
        if sender.id == DELTA:
            assert change.no_delta is not None
            change.no_delta[k, sender.position] = True
        else:
            change.where[k, sender.position, sender.id] = True
    return changes
