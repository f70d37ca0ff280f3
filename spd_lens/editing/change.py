"""What an edit changes: which subcomponents, by how much or into what.

One line of an edit is a `Change`: a unit, the number that its rank-one matrices are multiplied with, and, for a single
subcomponent, what it writes or reads from then on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.units import Unit, check_site, units_of
from spd_lens.support.given import given_instance, given_number
from spd_lens.support.shown import short_repr


@dataclass(frozen=True, eq=False)
class Rewrite:
    """A subcomponent in another direction: `V_c U_c` becomes `scale * reads^T writes`.

    - `writes [d_out]`: the new `U_c`; None: the old one.
    - `reads [d_in]`: the new `V_c`; None: the old one.
    """

    writes: Tensor | None = None
    reads: Tensor | None = None
    scale: float | int = 1.0

    __repr__ = short_repr


@dataclass(frozen=True)
class Above:
    """A condition: an edit acts at the positions where clean importance is above `threshold` (S4).

    - `of`: the unit whose importance is asked; any of its members counts. None: each changed unit's own.
    """

    threshold: float
    of: Unit | None = None

    def __str__(self) -> str:
        return f"where the importance of {'the unit itself' if self.of is None else self.of} is above {self.threshold}"


@dataclass(frozen=True, eq=False)
class Change:
    """One line of an edit."""

    unit: Unit
    scale: float
    writes: Tensor | None = None
    reads: Tensor | None = None

    __repr__ = short_repr

    @property
    def is_rewrite(self) -> bool:
        """Whether a direction changes, not only a size."""
        return self.writes is not None or self.reads is not None

    def __str__(self) -> str:
        what = [] if self.scale == 1 and self.is_rewrite else [f"x {self.scale:g}"]
        what += ["writes another direction"] * (self.writes is not None)
        what += ["reads another direction"] * (self.reads is not None)
        return f"{self.unit}: {', '.join(what)}"


# What the values of an edit may be.
New: TypeAlias = float | Rewrite

# What `edit` takes: {site: {id or ids: new}}, {site: [ids]} (new = 0), {unit: new}, a unit or units (new = 0).
Changes: TypeAlias = Mapping[Any, Any] | Unit | Sequence[Unit]


def changes_of(decomposition: Decomposition, given: Changes) -> tuple[Change, ...]:
    """Every line of an edit, checked.

    Raises ValueError for unknown sites and ids, for subcomponents that are named twice, units at positions, numbers
    that are not finite and directions of the wrong shape; TypeError for wrong types.
    """
    if isinstance(given, Unit):
        given = {given: 0.0}
    elif isinstance(given, Sequence) and not isinstance(given, (str, bytes)):
        if hasattr(given, "check_belongs"):  # components, of this decomposition only
            given.check_belongs(decomposition)  # pyright: ignore[reportAttributeAccessIssue]
        odd = [item for item in given if not isinstance(item, Unit)]
        if odd:
            raise TypeError(
                f"the edit's list holds a {type(odd[0]).__name__}; expected units, or {{site: {{ids: new}}}}"
            )
        units_of(decomposition, given)  # none twice
        given = dict.fromkeys(given, 0.0)
    if not isinstance(given, Mapping):
        raise TypeError(
            f"an edit is a {type(given).__name__}; expected {{site: {{ids: scale}}}}, {{unit: scale}} or units"
        )
    changes: list[Change] = []
    for key, value in given.items():
        if isinstance(key, Unit):
            changes.append(_change(decomposition, key, value))
            continue
        check_site(decomposition, key)
        for ids, new in _by_ids(decomposition, key, value):
            changes.append(_change(decomposition, {key: ids}, new))
    if not changes:
        raise ValueError("the edit names no subcomponent at all; give at least one, {site: {id: scale}}")
    _check_once(changes)
    return tuple(changes)


def check_condition(decomposition: Decomposition, when: Any) -> None:
    """Raise ValueError or TypeError unless `when` is a condition that can be asked of this decomposition."""
    if not isinstance(when, Above):
        raise TypeError(f"when is a {type(when).__name__}; expected Above(threshold), or None for everywhere")
    if not 0 <= given_number("the threshold of Above", when.threshold) < 1:
        raise ValueError(f"when=Above({when.threshold}): importance is in [0, 1]; expected a threshold in [0, 1)")
    if when.of is None:
        return
    given_instance("Above(of=...)", when.of, Unit, "Unit((('blocks.0.mlp.W_in', 3),))")
    units_of(decomposition, when.of)
    if when.of.positions is not None:
        raise ValueError(
            f"when=Above(of={when.of}) has positions, and a condition is asked at every position by itself: give "
            "unit.at(), the unit everywhere"
        )


def _by_ids(decomposition: Decomposition, site: str, value: Any) -> list[tuple[list[Any], Any]]:
    if isinstance(value, Mapping):
        return [(_ids(ids), new) for ids, new in value.items()]
    if isinstance(value, (Real, Rewrite)) and not isinstance(value, bool):
        raise TypeError(
            f"the edit of {site} is {value!r}, which names no subcomponent; expected {{ids: {value!r}}} there, or a "
            "list of ids that are ablated"
        )
    return [([unit.id], 0.0) for unit in units_of(decomposition, {site: value})]


def _ids(ids: Any) -> list[Any]:
    return list(ids) if isinstance(ids, (tuple, frozenset, range)) else [ids]


def _change(decomposition: Decomposition, group: Unit | Mapping[str, Any], new: Any) -> Change:
    (unit,) = units_of(decomposition, [group])
    if unit.positions is not None:
        raise ValueError(
            f"{unit} is at positions, and weights are the same at every position: give unit.at(), the unit everywhere, "
            "or ablate it at positions with decomposition.ablate"
        )
    rewrite = new if isinstance(new, Rewrite) else Rewrite()
    scale: Any = rewrite.scale if isinstance(new, Rewrite) else new
    if isinstance(scale, Tensor) and scale.numel() == 1:
        scale = scale.item()
    if isinstance(scale, bool) or not isinstance(scale, Real):
        raise TypeError(f"the edit of {unit} is {new!r}; expected a number (0 takes it away, 1 leaves it) or a Rewrite")
    scale = float(scale)
    if scale != scale or abs(scale) == float("inf"):
        raise ValueError(f"the edit of {unit} is {scale}; expected a finite number")
    if isinstance(new, Rewrite) and new.writes is None and new.reads is None:
        raise ValueError(f"the Rewrite of {unit} has neither writes nor reads; give the number {scale} instead")
    if isinstance(new, Rewrite) and len(unit.members) > 1:
        raise ValueError(f"{unit} has {len(unit.members)} subcomponents, and a Rewrite gives one a direction; name one")
    weight = decomposition[unit.site]
    writes = _direction(rewrite.writes, weight.U[unit.id], f"writes for {unit}", "d_out")
    reads = _direction(rewrite.reads, weight.V[:, unit.id], f"reads for {unit}", "d_in")
    return Change(unit, scale, writes, reads)


def _direction(given: Any, own: Tensor, what: str, axis: str) -> Tensor | None:
    if given is None:
        return None
    if not isinstance(given, Tensor) or not given.is_floating_point():
        raise TypeError(f"{what} is a {type(given).__name__}; expected a floating-point tensor [{axis}]")
    if given.shape != own.shape or not bool(given.isfinite().all()):
        raise ValueError(
            f"{what} is {tuple(given.shape)}; expected finite numbers of shape {tuple(own.shape)}, [{axis}]"
        )
    return given.detach().to(own).clone()


def _check_once(changes: Iterable[Change]) -> None:
    seen: dict[tuple[str, int], Change] = {}
    for change in changes:
        for member in change.unit.members:
            if member in seen:
                raise ValueError(
                    f"{member[0]}[{member[1]}] is named twice in the edit ({seen[member].unit} and {change.unit}); "
                    "name every subcomponent once"
                )
            seen[member] = change


def low_rank(decomposition: Decomposition, changes: Sequence[Change], site: str) -> tuple[Tensor, Tensor, list[int]]:
    """`A [d_in, r]`, `B [r, d_out]` in float64 with `W' = W + A @ B`, and the change that each of the r is of."""
    weight = decomposition[site]
    V, U = weight.V.detach().double(), weight.U.detach().double()
    left, right, owner = [], [], []
    for number, change in enumerate(changes):
        ids = change.unit.ids_at(site)
        if not ids:
            continue
        if not change.is_rewrite:
            left.append(V[:, ids])
            right.append((change.scale - 1) * U[ids])
        else:
            new_V = V[:, ids] if change.reads is None else change.reads.double()[:, None]
            new_U = U[ids] if change.writes is None else change.writes.double()[None]
            left += [V[:, ids], new_V]
            right += [-U[ids], change.scale * new_U]
        owner += [number] * (sum(part.shape[1] for part in left) - len(owner))
    return torch.cat(left, 1), torch.cat(right, 0), owner
