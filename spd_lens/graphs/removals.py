"""C2: passes in which one source of attributions is really taken away, and what falls by it.

Shares with `spd_lens.graphs.direct_pass` what the sources are and what is frozen; no gradient is taken here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.graphs.direct_pass import Place, Source, Start, delta_outputs, in_output_shape, start_of
from spd_lens.patching.frozen import Frozen, output_names


@dataclass(frozen=True)
class Drop:
    """How much the activations `[pos C]` of every site, and every target, fell when a source was taken away."""

    place: Place
    activations: dict[str, Tensor]
    targets: list[float]


Targets: TypeAlias = Sequence[Callable[[Tensor], Tensor]]


def removals(
    decomposition: Decomposition,
    tokens: Int[Tensor, "1 pos"],
    places: Sequence[Place],
    targets: Targets,
    frozen: Frozen,
    *,
    held: bool,
    per_pass: int = 16,
) -> Iterator[Drop]:
    """For one prompt `[1 pos]`, the change `clean - without` for each source that is taken away.

    - `held=True` (C2): all other subcomponents and what is frozen keep their clean values.
    - `held=False`: the total effect; everything follows, also what C1 freezes.

    A subcomponent is removed by `a_c = 0` at the position, a delta by its vector, an embedding by the zero vector.
    """
    clean = _clean_values(decomposition, tokens, frozen)
    arguments = (decomposition, clean, targets, frozen, held)
    # Nobody removed: rounding differences between held and plain passes cancel.
    base_acts, base_targets = _removal_pass(*arguments, [None])
    for first in range(0, len(places), per_pass):
        group = places[first : first + per_pass]
        acts, values = _removal_pass(*arguments, group)
        for k, place in enumerate(group):
            fell = {site: (base_acts[site][0] - a[k]).cpu() for site, a in acts.items()}
            yield Drop(place, fell, (base_targets[0] - values[k]).tolist())


@dataclass(frozen=True)
class _Clean:
    start: Start
    points: dict[str, Tensor]
    outputs: dict[str, str]
    deltas: dict[str, Tensor]
    frozen_names: list[str]


@torch.no_grad()
def _clean_values(decomposition: Decomposition, tokens: Tensor, frozen: Frozen) -> _Clean:
    start, outputs = start_of(decomposition, tokens), output_names(decomposition)
    names = decomposition.host.frozen_points(attention=frozen.attention, norms=frozen.norms)
    acts = [weight.site.point_names()[0] for weight in decomposition.values()]
    points: dict[str, Tensor] = {}
    hooks = [(name, partial(_store, found=points, name=name)) for name in (*outputs.values(), *acts, *names)]
    with decomposition.model.hooks(fwd_hooks=hooks):
        start.run(decomposition, start.rows(1))
    return _Clean(start, points, outputs, delta_outputs(decomposition, tokens), [n for n in names if n in points])


def _store(value: Tensor, hook: Any, *, found: dict[str, Tensor], name: str) -> None:
    found[name] = value.detach().clone()


@torch.no_grad()
def _removal_pass(
    decomposition: Decomposition,
    clean: _Clean,
    targets: Targets,
    frozen: Frozen,
    held: bool,
    places: Sequence[Place | None],
) -> tuple[dict[str, Tensor], Tensor]:
    """`{site: a [copy pos C]}` and target values `[copy target]`, with one place removed per copy."""
    n, acts, hooks = len(places), {}, []
    by_source: dict[Source, list[tuple[int, Place]]] = {}
    for k, place in enumerate(places):
        if place is not None:
            by_source.setdefault(place.source, []).append((k, place))
    for site, weight in decomposition.items():
        name, output = weight.site.point_names()[0], clean.outputs[site]
        own = by_source.get(("subcomponent", site), [])
        delta = by_source.get(("delta", site), [])
        hooks.append((name, partial(_store, found=acts, name=site)))
        if held and frozen.delta:
            removed = _removed_vectors(clean, site, name, weight.U, own, delta, n)
            hooks.append((output, partial(_hold, to=clean.points[output], removed=removed)))
            continue
        if held:
            hooks.append((name, partial(_hold, to=clean.points[name], removed=None)))
        if own:
            hooks.append((name, partial(_zero, cells=[(k, p.position, p.subcomponent) for k, p in own])))
        if delta:
            cells = [(k, p.position) for k, p in delta]
            hooks.append((weight.site.point_names()[3], partial(_zero, cells=cells)))
    for what, name in clean.start.points.items():
        cells = [(k, p.position) for k, p in by_source.get(("embedding", what), [])]
        if cells:
            hooks.append((name, partial(_zero, cells=cells)))
    if held:
        hooks += [(name, partial(_hold, to=clean.points[name], removed=None)) for name in clean.frozen_names]
    with decomposition.host.quiet_edits(), decomposition.model.hooks(fwd_hooks=hooks):
        rows = clean.start.rows(n)
        for k, place in by_source.get(("embedding", clean.start.name), []):
            rows[k, place.position] = 0
        output = clean.start.run(decomposition, rows)
    values = [[target(output[k : k + 1]).sum() for target in targets] for k in range(n)]
    return acts, torch.tensor(values, dtype=torch.float64).reshape(n, len(targets))


def _removed_vectors(
    clean: _Clean,
    site: str,
    acts_name: str,
    U: Tensor,
    own: Sequence[tuple[int, Place]],
    delta: Sequence[tuple[int, Place]],
    n: int,
) -> Tensor | None:
    """What is subtracted from the site's output, flat `[copy pos d_out]`."""
    if not own and not delta:
        return None
    a, unexplained = clean.points[acts_name], clean.deltas[site]
    removed = torch.zeros(n, *unexplained.shape[1:], dtype=torch.promote_types(U.dtype, unexplained.dtype)).to(U.device)
    for k, place in own:
        removed[k, place.position] = a[0, place.position, place.subcomponent] * U[place.subcomponent]
    for k, place in delta:
        removed[k, place.position] = unexplained[0, place.position]
    return removed


def _hold(value: Tensor, hook: Any, *, to: Tensor, removed: Tensor | None) -> Tensor:
    """Hook: the clean value, minus what is removed."""
    held = to.repeat(len(value) // len(to), *[1] * (to.ndim - 1))
    return held if removed is None else held - in_output_shape(removed, held).to(held.dtype)


def _zero(value: Tensor, hook: Any, *, cells: Sequence[tuple[int, ...]]) -> Tensor:
    """Hook: 0 at each `(copy, position, ...)`."""
    value = value.clone()
    for cell in cells:
        value[cell] = 0
    return value
