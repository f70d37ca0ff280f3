"""Units: "these subcomponents", the one vocabulary of masks, ablation, patching, circuits, graphs and edits.

A *unit* is one subcomponent, or a group of them (over any sites) that is changed together, everywhere or at some
positions. Its label is `str(unit)`: `"blocks.0.mlp.W_in[3, 17] @5"`, or the name that it was given.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from spd_lens.core.decomposed_weight import DecomposedWeight
from spd_lens.core.interventions import (
    HookList,
    ablation_hooks,
    check_site,
    checked_ids,
    delta_hooks,
    keeping_hooks,
)
from spd_lens.support.files import tensor_hash
from spd_lens.support.given import given_whole, shown

# Importance above which a subcomponent counts as active.
ALIVE_ABOVE = 0.01

# Numbers of members that are no subcomponents: a site's delta `W - V U`, and a whole embedding or residual stream.
# Attributions come from these too; they cannot be ablated or patched as subcomponents.
DELTA = -1
WHOLE = -2


@dataclass(frozen=True)
class Unit:
    """Subcomponents that are changed together; usually one.

    - `members`: `(site, id)` pairs.
    - `positions`: where in the sequence; None: everywhere.
    - `name`: what people call it. Units of equal members and positions are equal, whatever their names.
    - `found_in`: of a component, the `subcomponent_hash` of its sites. Another decomposition refuses it, as its ids
      mean other subcomponents there.

    >>> str(Unit((("blocks.0.mlp.W_in", 3),), (5,)))
    'blocks.0.mlp.W_in[3] @5'
    """

    members: tuple[tuple[str, int], ...]
    positions: tuple[int, ...] | None = None
    name: str | None = field(default=None, compare=False)
    found_in: Mapping[str, str] | None = field(default=None, compare=False, repr=False)

    @property
    def site(self) -> str:
        """The (first) member's site."""
        return self.members[0][0]

    @property
    def id(self) -> int:
        """The (first) member's id."""
        return self.members[0][1]

    @property
    def position(self) -> int | None:
        """The (first) position; None: everywhere."""
        return None if self.positions is None else self.positions[0]

    def ids_at(self, site: str) -> list[int]:
        """Ids of this unit's subcomponents at `site`."""
        return [c for name, c in self.members if name == site]

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that this unit has subcomponents at, each once."""
        return tuple(dict.fromkeys(name for name, _ in self.members))

    def at(self, *positions: int) -> Unit:
        """The same subcomponents at these positions; `unit.at()` is everywhere."""
        return replace(self, positions=positions or None)

    @property
    def label(self) -> str:
        """The name, or the members, without positions."""
        return self.name or " + ".join(_site_label(site, self.ids_at(site)) for site in self.sites)

    def __str__(self) -> str:
        where = "" if self.positions is None else f" @{', '.join(map(str, self.positions))}"
        return self.label + where


def _site_label(site: str, ids: Sequence[int]) -> str:
    return site if WHOLE in ids else f"{site}[{', '.join('delta' if c == DELTA else str(c) for c in ids)}]"


def subcomponent_hash(weight: DecomposedWeight) -> str:
    """One hash of a site's V and U, gates left out."""
    return hashlib.sha256(f"{tensor_hash(weight.V)} {tensor_hash(weight.U)}".encode()).hexdigest()


# What the public functions accept as `ids`; see `units_of`.
Ids: TypeAlias = Mapping[str, Any] | Unit | Sequence[Unit | Mapping[str, Any]] | None


def units_of(decomposition: Mapping[str, DecomposedWeight], ids: Ids) -> tuple[Unit, ...]:
    """The units that `ids` names.

    - None: every subcomponent of every site, one by one.
    - `{site: [3, 17]}`: these, one by one; `{site: 3}`: this one; `{site: None}`: all of that site, one by one.
    - `{site: [[3, 4], [17]]}`: groups at one site.
    - `[{site: [3, 4], other: [0]}, ...]`: groups over sites.
    - a `Unit`, or a list of units (a circuit's `units`, for example), also mixed with groups.
    - `Components`, or some of them: they must be those of this decomposition.

    Raises ValueError for unknown sites (near names), ids outside 0..C-1, empty and repeated units; TypeError for ids
    that are not integers. Components cost a hash of their sites' V and U.
    """
    if ids is None:
        ids = dict.fromkeys(decomposition)
    if (check_belongs := getattr(ids, "check_belongs", None)) is not None:
        check_belongs(decomposition)
    units: list[Unit] = []
    if isinstance(ids, Mapping):
        for site, chosen in ids.items():
            check_site(decomposition, site)
            count = decomposition[site].n_subcomponents
            for item in range(count) if chosen is None else _listed(site, chosen):
                single = not isinstance(item, Iterable) or (isinstance(item, Tensor) and item.ndim == 0)
                units.append(Unit(_members(decomposition, {site: [item] if single else item})))
    elif isinstance(ids, (str, int, Tensor)) or not isinstance(ids, (Unit, Iterable)):
        raise TypeError(f"ids is {ids!r}; expected {{site: ids}}, a Unit, or a list of units or groups {{site: ids}}")
    else:
        units = [_unit(decomposition, group) for group in ([ids] if isinstance(ids, Unit) else ids)]
    if check_belongs is None:
        _check_found_here(decomposition, units)
    if not units:
        raise ValueError("ids names no subcomponent at all; give at least one, or None for all of them")
    seen: set[Any] = set()
    for unit in units:
        key = (frozenset(unit.members), unit.positions)
        if key in seen:
            raise ValueError(f"{unit} is named twice; name every unit once")
        seen.add(key)
    return tuple(units)


def _check_found_here(decomposition: Mapping[str, DecomposedWeight], units: Sequence[Unit]) -> None:
    """Raise ValueError for a component whose subcomponents are not those of this decomposition."""
    hashes: dict[str, str] = {}
    for unit in units:
        for site, found in (unit.found_in or {}).items():
            if site not in hashes:
                hashes[site] = subcomponent_hash(decomposition[site])
            if hashes[site] != found:
                raise ValueError(
                    f"{unit} is a component of another decomposition (V and U of {site} differ, so its ids mean other "
                    "subcomponents): load the one that it was found in, or find components again in this one"
                )


def _unit(decomposition: Mapping[str, DecomposedWeight], group: Any) -> Unit:
    if isinstance(group, Unit):
        _check_unit(group)
        members = _members(decomposition, {site: group.ids_at(site) for site in group.sites})
        return replace(group, members=members)
    if isinstance(group, Mapping):
        return Unit(_members(decomposition, group))
    raise TypeError(
        f"ids holds a {type(group).__name__}; expected {{site: ids}}, or a list of units or of groups "
        "{site: ids, other site: ids}"
    )


def _check_unit(unit: Unit) -> None:
    pairs = unit.members if isinstance(unit.members, (tuple, list)) else ()
    if not pairs or not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs):
        raise TypeError(
            f"a unit has members={shown(unit.members)}; expected (site, id) pairs, as in "
            "Unit((('blocks.0.mlp.W_in', 3),))"
        )
    if unit.positions is not None:
        if not isinstance(unit.positions, tuple) or not unit.positions:
            raise TypeError(f"a unit has positions={shown(unit.positions)}; expected a tuple of positions, or None")
        for position in unit.positions:
            given_whole("a unit's position", position)


def _listed(site: str, chosen: Any) -> list[Any]:
    if isinstance(chosen, (str, Mapping)):
        raise TypeError(
            f"ids[{site!r}] is {chosen!r}; expected integers (one unit each), a list of lists (groups), or None for all"
        )
    if not isinstance(chosen, Iterable) or (isinstance(chosen, Tensor) and chosen.ndim == 0):
        return [chosen]
    return list(chosen)


def _members(decomposition: Mapping[str, DecomposedWeight], group: Mapping[str, Any]) -> tuple[tuple[str, int], ...]:
    members = []
    for site, chosen in group.items():
        check_site(decomposition, site)
        checked = checked_ids(decomposition[site], chosen)
        if len(set(checked)) != len(checked):
            raise ValueError(f"a group names subcomponents of {site} twice: {sorted(checked)}")
        members += [(site, c) for c in sorted(checked)]
    if not members:
        raise ValueError("a group of ids is empty; a unit needs at least one subcomponent")
    return tuple(members)


# -- masks -----------------------------------------------------------------------------------------------------------


def hooks_of(decomposition: Mapping[str, DecomposedWeight], chosen: Any, *, keep: bool) -> HookList:
    """Hooks that remove (`keep`: keep alone) what is named: `{site: ids}`, a unit, or a list of units."""
    if chosen is None:
        raise TypeError("subcomponents is None; expected {site: ids}, a Unit, or a list of units")
    if not isinstance(chosen, Mapping):
        return unit_hooks(decomposition, chosen, keep=keep)
    if not chosen:
        raise ValueError("no site is named; expected {site: ids}, for example {'blocks.0.mlp.W_in': [3, 17]}")
    for site in chosen:
        check_site(decomposition, site)
    hooks = keeping_hooks if keep else ablation_hooks
    return [hook for site, ids in chosen.items() for hook in hooks(decomposition[site], ids)]


def unit_hooks(decomposition: Mapping[str, DecomposedWeight], units: Unit | Sequence[Unit], *, keep: bool) -> HookList:
    """Hooks whose masks are 0 for the units (`keep`: for everything but them at their sites, the deltas included)."""
    checked = units_of(decomposition, units)
    hooks: HookList = []
    for site in dict.fromkeys(site for unit in checked for site in unit.sites):
        cells = [(unit.positions, unit.ids_at(site)) for unit in checked if site in unit.sites]
        weight = decomposition[site]
        hooks.append((weight.site.point_names()[2], partial(_mask_cells, cells=cells, keep=keep)))
        hooks += delta_hooks(weight, 0.0) if keep else []
    return hooks


def _mask_cells(mask: Tensor, hook: Any, *, cells: Sequence[tuple[Any, list[int]]], keep: bool) -> Tensor:
    """Hook: the mask `[batch pos .. C]` times 0 (1 with `keep`) at the cells, times the other elsewhere."""
    factor = torch.zeros_like(mask) if keep else torch.ones_like(mask)
    for positions, ids in cells:
        if positions is None:
            factor[..., ids] = float(keep)
            continue
        if mask.ndim < 3 or max(positions) >= mask.shape[1] or min(positions) < -mask.shape[1]:
            raise ValueError(
                f"a unit at positions {list(positions)}, but {hook.name} is {tuple(mask.shape)} in this pass; expected "
                "[batch pos C] with these positions (generation with a key-value cache sees one position at a time)"
            )
        for position in positions:
            factor[:, position, ..., ids] = float(keep)
    return mask * factor
