"""Units: "these subcomponents", the one vocabulary of masks, ablation, patching, circuits, graphs and edits.

A *unit* is one subcomponent, or a group of them (over any sites) that is changed together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from spd_lens.core.decomposed_weight import DecomposedWeight
from spd_lens.core.interventions import checked_ids

# Importance above which a subcomponent counts as active.
ALIVE_ABOVE = 0.01

# What the public functions accept as `ids`; see `units_of`.
Ids: TypeAlias = Mapping[str, Iterable[Any] | None] | Sequence[Mapping[str, Iterable[int]]] | None


@dataclass(frozen=True)
class Unit:
    """Subcomponents that are changed together, as `(site, id)` pairs; usually one."""

    members: tuple[tuple[str, int], ...]

    def ids_at(self, site: str) -> list[int]:
        """Ids of this unit's subcomponents at `site`."""
        return [c for name, c in self.members if name == site]

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that this unit has subcomponents at, each once."""
        return tuple(dict.fromkeys(name for name, _ in self.members))

    def __str__(self) -> str:
        return " + ".join(f"{site}[{', '.join(map(str, self.ids_at(site)))}]" for site in self.sites)


def units_of(decomposition: Mapping[str, DecomposedWeight], ids: Ids) -> tuple[Unit, ...]:
    """The units that `ids` names.

    - None: every subcomponent of every site, one by one.
    - `{site: [3, 17]}`: these, one by one; `{site: None}`: all of that site, one by one.
    - `{site: [[3, 4], [17]]}`: groups at one site.
    - `[{site: [3, 4], other: [0]}, ...]`: groups over sites.

    Raises ValueError for unknown sites (near names), ids outside 0..C-1, empty and repeated units; TypeError for ids
    that are not integers.
    """
    if ids is None:
        ids = dict.fromkeys(decomposition)
    groups: list[list[tuple[str, int]]] = []
    if isinstance(ids, Mapping):
        for site, chosen in ids.items():
            check_site(decomposition, site)
            count = decomposition[site].n_subcomponents
            for item in range(count) if chosen is None else _listed(site, chosen):
                single = not isinstance(item, Iterable) or (isinstance(item, Tensor) and item.ndim == 0)
                group: Any = [item] if single else item
                groups.append(_members(decomposition, {site: group}))
    else:
        for group in ids:
            if not isinstance(group, Mapping):
                raise TypeError(
                    f"ids holds a {type(group).__name__}; expected {{site: ids}}, or a list of such groups "
                    "{site: ids, other site: ids}"
                )
            groups.append(_members(decomposition, group))
    if not groups:
        raise ValueError("ids names no subcomponent at all; give at least one, or None for all of them")
    units = [Unit(tuple(group)) for group in groups]
    seen: set[frozenset[tuple[str, int]]] = set()
    for unit in units:
        if frozenset(unit.members) in seen:
            raise ValueError(f"{unit} is named twice; name every unit once")
        seen.add(frozenset(unit.members))
    return tuple(units)


def _listed(site: str, chosen: Any) -> list[Any]:
    if isinstance(chosen, (str, Mapping)) or not isinstance(chosen, Iterable):
        raise TypeError(
            f"ids[{site!r}] is {chosen!r}; expected a list of integers (one unit each), a list of lists (groups), or "
            "None for all"
        )
    return list(chosen)


def _members(
    decomposition: Mapping[str, DecomposedWeight], group: Mapping[str, Iterable[int]]
) -> list[tuple[str, int]]:
    members = []
    for site, chosen in group.items():
        check_site(decomposition, site)
        checked = checked_ids(decomposition[site], chosen)
        if len(set(checked)) != len(checked):
            raise ValueError(f"a group names subcomponents of {site} twice: {sorted(checked)}")
        members += [(site, c) for c in sorted(checked)]
    if not members:
        raise ValueError("a group of ids is empty; a unit needs at least one subcomponent")
    return members


def check_site(decomposition: Mapping[str, DecomposedWeight], site: Any) -> None:
    if site not in decomposition:
        from spd_lens.support.names import near_names

        raise ValueError(f"no decomposed site {site!r}; near: {near_names(str(site), decomposition)}")
