"""Path patching: the effect of one subcomponent on another along the direct path alone.

For a sender s and a receiver r, both runs on the *corrupted* tokens:

1. *Direct path.* The sender's activations are set to the clean run's (at its positions). Every other subcomponent is
   held at its corrupted value: the outputs of all other decomposed sites are, so nothing passes through them. What
   reaches the receiver is read there: `a_r` of this pass, minus `a_r` of the same pass without the sender's patch, is
   the *direct change* of the receiver. This is the intervention that an attribution edge predicts (C2).
2. *Onwards.* In another corrupted run the receiver's activation is set to its corrupted value plus the direct
   change, and everything after it is computed live. The metric then, minus its baseline, is the *path effect*.

What the direct path contains: the residual stream, biases, element-wise non-linearities between two decomposed
matrices of one MLP, attention from one position to another, and every matrix that is *not* decomposed (decompose it,
if paths through it should count as indirect). Frozen at the corrupted run by default, each by a switch: attention
patterns, normalisation scales, and the delta `x @ (W - V U)` of the held sites.

Exchange the two runs to ask the opposite question (everything at clean values, the sender corrupted).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.units import Ids, Unit, units_of
from spd_lens.patching.activation import Clean, checked_clean, clean_activations
from spd_lens.patching.arguments import Metric, checked_input, metric_values, unit_positions
from spd_lens.patching.effects import Effects
from spd_lens.patching.frozen import Frozen, HeldPass, SiteChange, frozen_given
from spd_lens.patching.hooks import add, store
from spd_lens.patching.runner import Replacement, Runner, effects_of
from spd_lens.support.pages import table_html
from spd_lens.support.progress import tqdm
from spd_lens.support.tables import format_table


@dataclass(frozen=True, repr=False)
class PathEffects:
    """What path patching measured for every pair of a sender and a receiver. `str(...)` is a table.

    - `direct_change` `[sender receiver batch pos]` (and a head axis where the receiver's input has one): how far the
      receiver's activation moved (step 1).
    - `values` `[sender receiver example]`: the metric with the receiver moved so (step 2); `baseline` `[example]`: of
      the corrupted run.
    - `total`: the effect of patching each sender with nothing held (C2), at the same positions.
    - `frozen`: what the direct path left out.
    """

    senders: tuple[Unit, ...]
    receivers: tuple[Unit, ...]
    direct_change: Float[Tensor, "sender receiver *batch"]
    values: Float[Tensor, "sender receiver example"]
    baseline: Float[Tensor, " example"]
    total: Effects
    frozen: Frozen

    @property
    def effects(self) -> Float[Tensor, "sender receiver"]:
        """`values - baseline`, mean over examples."""
        return (self.values - self.baseline).mean(-1)

    def _table(self) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
        """Title, header and rows of the strongest paths."""
        strongest = self.effects.flatten().abs().argsort(descending=True, stable=True)[:20].tolist()
        change, rows = self.direct_change.flatten(2).abs().amax(-1), []
        for i in strongest:
            s, r = divmod(i, len(self.receivers))
            total = float(self.total.effects[s, 0])
            row = (f"{self.effects[s, r]:+.4g}", f"{change[s, r]:.3g}", f"{total:+.4g}")
            rows.append((f"{self.senders[s]} -> {self.receivers[r]}", *row))
        header = ("path", "effect", "max |change of a|", "total effect of sender")
        return f"path patching ({self.frozen})", header, rows

    def __str__(self) -> str:
        title, header, rows = self._table()
        return title + "\n" + format_table(header, rows)

    def __repr__(self) -> str:
        n_senders, n_receivers, n_examples = self.values.shape
        return f"PathEffects({n_senders} senders, {n_receivers} receivers, {n_examples} examples; {self.frozen})"

    def _repr_html_(self) -> str:
        return table_html(*self._table())


def path_patching(
    decomposition: Decomposition,
    corrupted_tokens: Tensor,
    clean: Clean,
    metric: Metric,
    *,
    senders: Ids,
    receivers: Ids,
    sender_position: int | None = None,
    receiver_position: int | None = None,
    frozen: Frozen | None = None,
    per_pass: int | None = None,
) -> PathEffects:
    """The effect of every sender on the metric through every receiver, along the direct path (see the module).

    `clean` is the clean tokens or a cache of their run, as in `activation_patching`. `senders` and `receivers` are ids
    (see `units_of`); a sender may be a group at one site, a receiver is a single subcomponent. A position of None
    patches (reads) all positions at once, or those that a unit names itself. `frozen=Frozen(attention=False)` lets
    attention patterns follow the sender.

    Cost: three passes over the batch, and as batched copies of it two for every sender and one for every pair.

    Raises ValueError for a receiver that runs before its sender, groups over several sites, units with positions of
    their own beside `sender_position` or `receiver_position`, and all that `activation_patching` refuses.
    """
    frozen = frozen_given(frozen)
    corrupted_tokens = checked_input(decomposition, corrupted_tokens, "corrupted_tokens")
    clean = checked_clean(decomposition, clean)
    sending, receiving = units_of(decomposition, senders), units_of(decomposition, receivers)
    for unit in (*sending, *receiving):
        if len(unit.sites) > 1 or (unit in receiving and len(unit.members) > 1):
            raise ValueError(f"{unit}: a sender is at one site, and a receiver is a single subcomponent")
    sites = list(dict.fromkeys(site for unit in sending for site in unit.sites))
    values = clean_activations(decomposition, corrupted_tokens, clean, sites)
    where, read = (
        unit_positions(units, None if position is None else [position], corrupted_tokens)
        for units, position in ((sending, sender_position), (receiving, receiver_position))
    )
    with torch.no_grad():
        change = direct_changes(
            decomposition,
            corrupted_tokens,
            values,
            sending,
            receiving,
            position=None if where is None else where[0],
            frozen=frozen,
            per_pass=per_pass,
        )
        change = _where_read(change, receiving, read)
        measured, baseline = _onwards(decomposition, corrupted_tokens, metric, receiving, change, per_pass)
    total = effects_of(
        decomposition,
        corrupted_tokens,
        metric,
        sending,
        Replacement(values),
        what="total effect of senders",
        positions=where,
        per_pass=per_pass,
    )
    return PathEffects(sending, receiving, change, measured, baseline, total, frozen)


def _where_read(
    change: Float[Tensor, "sender receiver *batch"], receivers: Sequence[Unit], read: Sequence[int] | None
) -> Float[Tensor, "sender receiver *batch"]:
    """The change at the positions that each receiver names itself, or at those in `read`; 0 at the others."""
    kept = change.clone()
    for r, receiver in enumerate(receivers):
        at = read if receiver.positions is None else receiver.positions
        if at is not None:
            kept[:, r] = 0
            kept[:, r, :, list(at)] = change[:, r, :, list(at)]
    return kept


@torch.no_grad()
def direct_changes(
    decomposition: Decomposition,
    tokens: Tensor,
    values: Mapping[str, Tensor],
    senders: Sequence[Unit],
    receivers: Sequence[Unit],
    *,
    position: int | None = None,
    frozen: Frozen | None = None,
    per_pass: int | None = None,
) -> Float[Tensor, "sender receiver *batch"]:
    """How far each receiver's activation moves when a sender's becomes `values[site]`, all else held (step 1, C2).

    `values[site]` broadcasts to the site's activations `[batch pos C]`: clean activations to patch, zeros to ablate.
    All else is held at its value on `tokens`. Result `[sender receiver batch pos]`, at all positions whatever the
    receivers say.
    """
    frozen = frozen_given(frozen)
    held = HeldPass(decomposition, frozen, lambda: decomposition.host.forward(tokens))
    _check_order(held.order, senders, receivers)
    runner = Runner(decomposition, tokens, {site for unit in senders for site in unit.sites})
    # The same pass with nobody sending: rounding differences between held and plain passes cancel.
    base = _received(runner, held, [None], position, values, receivers)[0]
    size = runner.copies_per_pass(per_pass)
    changes = []
    with tqdm(total=len(senders), desc="direct paths", leave=False, delay=2) as progress:
        for group in _same_start(senders, runner, size):
            received = _received(runner, held, group, position, values, receivers)
            changes += [(senders.index(unit), moved - base) for unit, moved in zip(group, received, strict=True)]
            progress.update(len(group))
    return torch.stack([change for _, change in sorted(changes, key=lambda pair: pair[0])])


def _same_start(units: Sequence[Unit], runner: Runner, size: int) -> Iterator[list[Unit]]:
    """Units that can start at the same block, at most `size` together."""
    groups: dict[int | None, list[Unit]] = {}
    for unit in units:
        groups.setdefault(runner.first_block(unit.sites), []).append(unit)
    for group in groups.values():
        for k in range(0, len(group), size):
            yield group[k : k + size]


def _check_order(order: Sequence[str], senders: Sequence[Unit], receivers: Sequence[Unit]) -> None:
    rank = {site: i for i, site in enumerate(order)}
    for sender in senders:
        for receiver in receivers:
            if rank[receiver.sites[0]] <= rank[sender.sites[0]]:
                raise ValueError(
                    f"there is no path {sender} -> {receiver}: {receiver.sites[0]} does not run after {sender.sites[0]}"
                )


def _received(
    runner: Runner,
    held: HeldPass,
    group: Sequence[Unit | None],
    position: int | None,
    values: Mapping[str, Tensor],
    receivers: Sequence[Unit],
) -> Float[Tensor, "copy receiver *batch"]:
    """The receivers' activations in a held pass over a copy of the batch per sender (None: nobody sends)."""
    decomposition, empty, found = runner.decomposition, Unit(()), {}
    cells = [(unit or empty, position) for unit in group]
    own = list(dict.fromkeys(site for unit, _ in cells for site in unit.sites))
    changes = {s: SiteChange(runner.where(cells, s, decomposition[s].n_subcomponents)[0], values[s]) for s in own}
    reading = dict.fromkeys(receiver.sites[0] for receiver in receivers)
    hooks = [(held.acts[site], store(found, site)) for site in reading] + held.hooks(changes)
    # The unpatched pass computes edited normalisations the same way, so rounding cancels.
    with decomposition.host.quiet_edits():
        runner.run_hooked(len(group), hooks, runner.first_block(own))
    per_receiver = [found[r.sites[0]].unflatten(0, (len(group), -1))[..., r.members[0][1]] for r in receivers]
    return torch.stack(per_receiver, dim=1)


def _onwards(
    decomposition: Decomposition,
    tokens: Tensor,
    metric: Metric,
    receivers: Sequence[Unit],
    change: Float[Tensor, "sender receiver *batch"],
    per_pass: int | None,
) -> tuple[Float[Tensor, "sender receiver example"], Float[Tensor, " example"]]:
    """Step 2: the metric with each receiver moved by the change that each sender made."""
    runner = Runner(decomposition, tokens, {receiver.sites[0] for receiver in receivers})
    baseline = metric_values(metric, runner.output, len(tokens))
    size = runner.copies_per_pass(per_pass)
    rows: dict[tuple[int, int], Tensor] = {}
    pairs = [(s, r) for r in range(len(receivers)) for s in range(len(change))]
    with tqdm(total=len(pairs), desc="path patching", leave=False, delay=2) as progress:
        for r, receiver in enumerate(receivers):
            (site, c), n_senders = receiver.members[0], len(change)
            name, start = decomposition[site].site.point_names()[0], runner.first_block([site])
            for first in range(0, n_senders, size):
                senders = range(first, min(first + size, n_senders))
                moved = change[senders.start : senders.stop, r]
                output = runner.run_hooked(len(senders), [(name, add(moved.flatten(0, 1), at=c))], start)
                for s, logits in zip(senders, output, strict=True):
                    rows[s, r] = metric_values(metric, logits, len(tokens), may_be_nan=True)
                progress.update(len(senders))
    values = torch.stack([rows[s, r] for s in range(len(change)) for r in range(len(receivers))])
    return values.unflatten(0, (len(change), len(receivers))), baseline
