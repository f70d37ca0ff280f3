"""`Components`: groups of subcomponents with names, saved beside the decomposition that they belong to.

A component is a `Unit` with a name, so it goes wherever a subcomponent goes: masks, ablation, patching, circuits,
graphs. The file, `components.json`, holds the names, the members, how they were found, and a hash of every site's V and
U: it is refused for any other decomposition. Names may be changed in the file by hand; nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any, overload

from pydantic import Field

from spd_lens.components.merging import How
from spd_lens.core.decomposition import Decomposition
from spd_lens.core.fingerprint import difference, subcomponent_hashes
from spd_lens.core.hub import downloaded
from spd_lens.core.inputs import checked_decomposition
from spd_lens.core.units import Unit, units_of
from spd_lens.support.checked_json import CheckedContent, read_checked, write_checked
from spd_lens.support.files import given_path
from spd_lens.support.given import given_list, shown
from spd_lens.support.names import near_names
from spd_lens.support.pages import shortened, table_html, visible
from spd_lens.support.tables import format_table
from spd_lens.support.versions import library_versions

FORMAT, FORMAT_VERSION, FILE = "spd_lens components", 1, "components.json"
# People may rename components in the file; everything else there is under its checksum.
_BY_HAND = (("names", "given"),)
# A name with an ending is meant as a file.
_HUB_ID = re.compile(r"[\w-][\w.-]*/(?!.*\.json$)[\w-][\w.-]*")
_HEADER = ("component", "members", "sites", "rate", "stability", "subcomponents")
_SHOWN = 30


@dataclass(frozen=True)
class ComponentFigures:
    """What is known of one component: the share of events in which it is active, and how stable it is (see
    `ensemble`); None where it was not measured."""

    rate: float | None = None
    stability: float | None = None


class SavedComponent(CheckedContent):
    """One component in the file: `{site: ids}`, positions, and what is known of it."""

    members: dict[str, list[int]]
    positions: list[int] | None
    rate: float | None
    stability: float | None


class SavedNames(CheckedContent):
    """The names, in the order of the components."""

    given: list[str]


class SavedComponents(CheckedContent):
    """The fields of `components.json`."""

    names: SavedNames
    components: list[SavedComponent]
    subcomponents: dict[str, str]
    how: How
    versions: dict[str, str]
    note: str = Field(default="")


class Components(Sequence[Unit]):
    """Components of one decomposition: a sequence of named units, also by name: `components["identity"]`.

    Made by `Components.of(decomposition, merging)` or by `Components.load(path, decomposition)`. It never changes;
    `rename`, `chosen` and `only_groups` give others.
    """

    def __init__(
        self,
        units: Iterable[Unit],
        *,
        subcomponents: Mapping[str, str],
        found: Sequence[ComponentFigures] | None = None,
        how: How | None = None,
    ) -> None:
        self._units = tuple(
            replace(unit, found_in={site: subcomponents.get(site, "") for site in unit.sites}) for unit in units
        )
        self.found = tuple(found) if found is not None else (ComponentFigures(),) * len(self._units)
        self.subcomponents, self.how = dict(subcomponents), dict(how or {})
        _check_names([unit.name for unit in self._units])
        self._by_name = {str(unit.name): i for i, unit in enumerate(self._units)}
        self._by_member: dict[tuple[str, int], int] = {}
        for i, unit in enumerate(self._units):
            for member in unit.members:
                self._by_member.setdefault(member, i)

    @staticmethod
    def of(decomposition: Decomposition, groups: Any, *, names: Sequence[str] | None = None) -> Components:
        """Components of what `merge_subcomponents`, `ensemble` or `leiden` found, or of groups or units by hand.

        By hand: a list of units, or of groups `{site: ids}`. Without `names` they are called "component 0", ... in
        that order; units keep the names that they have. Raises ValueError for unknown sites and ids, for names that are
        empty or given twice, and for groups that were found in another decomposition, or before V and U changed.
        """
        checked_decomposition(decomposition, "Components.of")
        given = list(groups.groups) if hasattr(groups, "groups") else groups
        if given is None:
            raise TypeError("Components.of was given no groups; expected a Merging, or a list of {site: ids} or units")
        listed = isinstance(given, (list, tuple))
        if listed and given and isinstance(given[0], tuple):
            given = [Unit(tuple(group)) for group in given]
        if listed and not given:
            raise ValueError("there are no groups; a decomposition has components where something fires")
        units = units_of(decomposition, given)
        hashes = subcomponent_hashes(decomposition)
        _check_found_in(groups, units, hashes)
        if names is None:
            names = [unit.name or f"component {i}" for i, unit in enumerate(units)]
        elif len(names := given_list("names", names, "texts, one for each component")) != len(units):
            raise ValueError(f"{len(names)} names for {len(units)} components; give one for each")
        known = [ComponentFigures(*pair) for pair in groups.known()] if hasattr(groups, "known") else None
        return Components(
            [replace(unit, name=name) for unit, name in zip(units, names, strict=True)],
            subcomponents=hashes,
            found=known,
            how=groups.how() if hasattr(groups, "how") else {"method": "by hand"},
        )

    # -- a sequence ----------------------------------------------------------------------------------------------

    @overload
    def __getitem__(self, key: int | str) -> Unit: ...
    @overload
    def __getitem__(self, key: slice) -> Sequence[Unit]: ...
    def __getitem__(self, key: int | str | slice) -> Unit | Sequence[Unit]:
        if isinstance(key, str):
            if key not in self._by_name:
                raise KeyError(f"no component {key!r}; near: {near_names(key, self._by_name)}")
            return self._units[self._by_name[key]]
        if isinstance(key, int) and not -len(self) <= key < len(self):
            raise IndexError(f"no component number {key}; there are {len(self)}, counted from 0")
        return self._units[key]

    def __len__(self) -> int:
        return len(self._units)

    def __iter__(self) -> Iterator[Unit]:
        return iter(self._units)

    @property
    def names(self) -> list[str]:
        """The names, in order."""
        return list(self._by_name)

    def of_subcomponent(self, site: str, c: int) -> Unit:
        """The component that subcomponent `c` of `site` is in. Raises KeyError if it is in none."""
        if (site, c) not in self._by_member:
            known = sorted({name for name, _ in self._by_member})
            why = (
                f"no such site; near: {near_names(site, known)}"
                if site not in known
                else "it never fired; choose one that did"
            )
            raise KeyError(f"{site}[{c}] is in no component: {why}")
        return self._units[self._by_member[site, c]]

    # -- others --------------------------------------------------------------------------------------------------

    def rename(self, names: Mapping[str, str]) -> Components:
        """The same with other names: `{"component 3": "identity"}`. Raises KeyError for a name that is not there."""
        if not isinstance(names, Mapping):
            raise TypeError(f"names={shown(names)}; expected {{old name: new name}}")
        for old in names:
            self[old]
        units = [replace(unit, name=names.get(str(unit.name), unit.name)) for unit in self]
        return self._with(units, self.found)

    def chosen(self, names: Sequence[str | int]) -> Components:
        """Only these, in this order."""
        listed = given_list("names", names, "names or numbers of components")
        odd = [key for key in listed if not isinstance(key, str) and (
            isinstance(key, bool) or not isinstance(key, int) or not -len(self) <= key < len(self))]  # fmt: skip
        if odd:
            raise ValueError(f"no component {shown(odd[0])}; expected a name, or a number in 0..{len(self) - 1}")
        places = [self._by_name[str(self[key].name)] for key in listed]
        return self._with([self._units[i] for i in places], [self.found[i] for i in places])

    def only_groups(self) -> Components:
        """Only those of more than one subcomponent."""
        return self.chosen([i for i, unit in enumerate(self) if len(unit.members) > 1])

    def _with(self, units: Sequence[Unit], found: Sequence[ComponentFigures]) -> Components:
        return Components(units, subcomponents=self.subcomponents, found=found, how=self.how)

    # -- belonging, saving ---------------------------------------------------------------------------------------

    def check_belongs(self, decomposition: Decomposition) -> None:
        """Raise ValueError unless these are components of `decomposition`, as it is now."""
        checked_decomposition(decomposition, "Components")
        if (odd := difference(self.subcomponents, subcomponent_hashes(decomposition))) is not None:
            raise ValueError(
                f"these components belong to another decomposition (V and U of {odd}): load the one that they were "
                "found in, or find them again in this one"
            )

    def save(self, path: str | Path) -> Path:
        """Write to `path`, or to `components.json` in it if it is a directory; returns the path of the file.

        What was there before stays until the new file is whole. Raises ValueError for a file of another program,
        OSError where nothing can be written.
        """
        path = _file(path)
        if path.exists():
            _read(path)
        content = {
            "names": {"given": self.names},
            "note": "names.given may be changed by hand; all else is under the checksum",
            "components": [
                {
                    "members": {site: unit.ids_at(site) for site in unit.sites},
                    "positions": None if unit.positions is None else list(unit.positions),
                    "rate": found.rate,
                    "stability": found.stability,
                }
                for unit, found in zip(self, self.found, strict=True)
            ],
            "subcomponents": self.subcomponents,
            "how": self.how,
            "versions": library_versions(),
        }
        write_checked(path, content, format_name=FORMAT, version=FORMAT_VERSION, free=_BY_HAND)
        return path

    @staticmethod
    def load(path_or_hub_id: str | Path, decomposition: Decomposition, *, revision: str | None = None) -> Components:
        """Read what `save` wrote, for the decomposition that it was made from.

        A text "owner/name" that is no path here is a repository of the Hugging Face Hub, to which
        `decomposition.push_to_hub(components=...)` has put them; `revision` is a branch, tag or commit there.

        Raises ValueError for another decomposition, and for a damaged, altered, foreign, newer or missing file.
        """
        checked_decomposition(decomposition, "Components.load")
        path = _found(path_or_hub_id, revision)
        saved = _read(path)
        if len(saved.names.given) != len(saved.components):
            raise ValueError(f"{path}: {len(saved.names.given)} names for {len(saved.components)} components")
        units = [
            Unit(
                tuple((site, c) for site, ids in one.members.items() for c in ids),
                None if one.positions is None else tuple(one.positions),
                name,
            )
            for one, name in zip(saved.components, saved.names.given, strict=True)
        ]
        found = [ComponentFigures(one.rate, one.stability) for one in saved.components]
        try:
            components = Components(units, subcomponents=saved.subcomponents, found=found, how=saved.how)
            components.check_belongs(decomposition)
            units_of(decomposition, components)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return components

    # -- printed -------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        several = sum(1 for unit in self if len(unit.members) > 1)
        return f"Components({len(self):,}, {several:,} of several subcomponents)"

    def __str__(self) -> str:
        left = f"\n... {len(self) - _SHOWN} more" if len(self) > _SHOWN else ""
        return f"{self!r}\n{format_table(_HEADER, self._rows())}{left}"

    def _repr_html_(self) -> str:
        return table_html(escape(repr(self)), _HEADER, self._rows())

    def _rows(self) -> list[tuple[str, ...]]:
        def share(value: float | None) -> str:
            return "-" if value is None else f"{value:.1%}"

        rows = []
        for unit, found in zip(self._units[:_SHOWN], self.found, strict=False):
            members = replace(unit, name=None).label
            name = visible(shortened(str(unit.name), 40))
            sizes = (str(len(unit.members)), str(len(unit.sites)), share(found.rate), share(found.stability))
            rows.append((name, *sizes, shortened(members, 60)))
        return rows


def _check_found_in(groups: Any, units: Sequence[Unit], hashes: Mapping[str, str]) -> None:
    """Raise ValueError if what grouped these units looked at other subcomponents than those of `hashes`."""
    known = getattr(groups, "found_in", None) or {}
    for site in dict.fromkeys(site for unit in units for site in unit.sites):
        if known.get(site, hashes[site]) != hashes[site]:
            raise ValueError(
                f"these groups were found in another decomposition (V and U of {site} differ, so their ids mean other "
                "subcomponents): give the one that coactivation or coeffects looked at, or count in this one"
            )


def _check_names(names: Sequence[Any]) -> None:
    odd = [name for name in names if not isinstance(name, str) or not name.strip()]
    if odd:
        raise ValueError(f"a component is called {odd[0]!r}; expected a text")
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise ValueError(f"two components are called {twice[0]!r}; every name stands for one")


def _file(path: str | Path) -> Path:
    path = given_path(path)
    return path / FILE if path.is_dir() else path


def _found(path_or_hub_id: str | Path, revision: str | None) -> Path:
    """The file, here or from the Hub."""
    path = _file(path_or_hub_id)
    is_hub_id = isinstance(path_or_hub_id, str) and _HUB_ID.fullmatch(path_or_hub_id) is not None
    if path.exists() or not is_hub_id:
        if revision is not None:
            raise ValueError(
                f"revision={revision!r} is for the Hub, and {path} is a path here; leave it away, or give the name of "
                "a repository of the Hub, 'owner/name'"
            )
        return path
    directory, _ = downloaded(str(path_or_hub_id), revision, [FILE], "components")
    if not (directory / FILE).exists():
        raise ValueError(
            f"{path_or_hub_id!r} has no {FILE} on the Hugging Face Hub; decomposition.push_to_hub({path_or_hub_id!r}, "
            "components=components) puts it there. Use Components.of where there are none yet"
        )
    return directory / FILE


def _read(path: Path) -> SavedComponents:
    return read_checked(path, SavedComponents, format_name=FORMAT, version=FORMAT_VERSION, free=_BY_HAND)
