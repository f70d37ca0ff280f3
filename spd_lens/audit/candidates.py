"""Candidates for a reason: the places of the input, or components, each with the cells through which it acts.

A place's cells are the subcomponents that are used there (importance above `ALIVE_ABOVE`) in this case or in one of the
control cases, except those whose activation is the same in all of them: what does not depend on the input is no reason.
At the decision's own position only what fewer than half of the cases use counts, for the rest there is the machinery
that every decision goes through. A component's cells are those of its members, at all its positions, by the same rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from spd_lens.audit.trials import Cells, Recorded, Values, both, count
from spd_lens.core.decomposition import Decomposition
from spd_lens.core.units import ALIVE_ABOVE, Unit, units_of
from spd_lens.support.pages import visible

# At the decision's own position: the largest share of control cases that may use a subcomponent of a reason.
SPECIAL_BELOW = 0.5
# Differences of activations below this share of their size are rounding.
SAME = 1e-5
# How many cells of most equal use a control is drawn from.
NEAREST = 20
# Longer names are no names.
MAX_NAME = 200
# Per site, `[pos C]`: the share of cases that use a cell.
Rates: TypeAlias = dict[str, Tensor]
# What tells candidates of one audit apart: a place's position, a component's name.
Key: TypeAlias = int | str


@dataclass(frozen=True)
class Candidate:
    """A place (`position`) or a component (its name), and its cells.

    - `used`: those that this case itself uses, the ones that can be removed.
    - `own`: all that belongs to it, used or not; no control is drawn from there.
    """

    position: int | None
    component: str | None
    cells: Cells
    used: Cells
    own: Cells

    @property
    def key(self) -> Key:
        """The component's name, or the position."""
        return key_of(self.component, self.position)


def key_of(component: str | None, position: int | None) -> Key:
    """The key of a candidate, a judgement or a reason."""
    if component is not None:
        return component
    assert position is not None
    return position


def named_units(decomposition: Decomposition, components: Any, n_pos: int) -> tuple[Unit, ...]:
    """The components that may be reasons, as units with names and with positions `0..n_pos - 1`; None: none.

    Raises as `units_of`; and ValueError for two of one name, names of more than `MAX_NAME` characters, and positions
    that the input does not have.
    """
    if components is None:
        return ()
    units = units_of(decomposition, components)
    names = [unit.label for unit in units]
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise ValueError(f"two components are called {twice[0][:80]!r}; a reason is told by its name")
    long = [name for name in names if len(name) > MAX_NAME or not name.strip()]
    if long:
        raise ValueError(
            f"a component's name has {len(long[0])} characters: {long[0][:80]!r}; expected 1 to {MAX_NAME} "
            "(Components.rename, Unit(..., name=...))"
        )
    for unit in units:
        odd = [p for p in unit.positions or () if not -n_pos <= p < n_pos]
        if odd:
            raise ValueError(
                f"{visible(str(unit))} is at position {odd[0]}; the input has positions {-n_pos}..{n_pos - 1}"
            )
    placed = (None if unit.positions is None else tuple(sorted({p % n_pos for p in unit.positions})) for unit in units)
    return tuple(Unit(unit.members, at, name) for unit, at, name in zip(units, placed, names, strict=True))


def candidates(
    own: Recorded, controls: Recorded, decided_at: int, reasons_at: Sequence[int], units: Sequence[Unit] = ()
) -> list[Candidate]:
    """One candidate for each of the units, or without any for each of the positions `reasons_at`, that has a cell."""
    used = {name: g[0] > ALIVE_ABOVE for name, g in own.importances.items()}
    anywhere, varies = {}, {}
    for name, g in controls.importances.items():
        anywhere[name] = used[name] | (g > ALIVE_ABOVE).any(0)
        a = torch.cat([own.activations[name], controls.activations[name]])
        varies[name] = a.amax(0) - a.amin(0) > SAME * a.abs().amax(0)
        share = (g > ALIVE_ABOVE).float().mean(0)
        anywhere[name][decided_at] &= share[decided_at] < SPECIAL_BELOW
    cells = {name: anywhere[name] & varies[name] for name in anywhere}
    asked = [(None, unit.name, _of_unit(cells, unit)) for unit in units]
    if not asked:
        asked = [(position, None, _of_place(cells, position)) for position in reasons_at]
    found = []
    for position, component, belongs in asked:
        here = both(cells, belongs)
        if count(here):
            found.append(Candidate(position, component, here, both(here, used), belongs))
    return found


def _of_place(like: Cells, position: int) -> Cells:
    found = {name: torch.zeros_like(cells) for name, cells in like.items()}
    for cells in found.values():
        cells[position] = True
    return found


def _of_unit(like: Cells, unit: Unit) -> Cells:
    found = {name: torch.zeros_like(cells) for name, cells in like.items()}
    for site in unit.sites:
        rows = torch.zeros(len(like[site]), dtype=torch.bool, device=like[site].device)
        rows[slice(None) if unit.positions is None else list(unit.positions)] = True
        found[site][:, unit.ids_at(site)] = rows[:, None]
    return found


def used_cells(candidate: Candidate, controls: Recorded, index: int) -> Cells:
    """The candidate's cells that this case or one control case uses."""
    used = {name: g[index] > ALIVE_ABOVE for name, g in controls.importances.items()}
    return {name: own & (candidate.used[name] | used[name]) for name, own in candidate.cells.items()}


def mean_values(controls: Recorded) -> Values:
    """The mean activation of every cell over the control cases."""
    return {name: a.mean(0) for name, a in controls.activations.items()}


def equal_use(
    barred: Cells, cells_of: Sequence[Cells], rates: Rates, n: int, generator: torch.Generator
) -> list[Cells] | None:
    """`n` random sets; the i-th has as many cells at every site as `cells_of[i % len]`, none of them `barred`.

    Each is drawn beside one of these: another cell of the same site, as often used in the data (one of the `NEAREST` in
    `rates` that the set does not have yet; cells of rate 0 cannot be drawn).

    None where some site has too few such cells.
    """
    drawn: list[Cells] = [{} for _ in range(n)]
    for name, rate in rates.items():
        wanted = torch.stack([cells[name].flatten() for cells in cells_of])[torch.arange(n) % len(cells_of)]
        flat = rate.flatten()
        places = (flat * ~barred[name].flatten()).nonzero().squeeze(1)
        if len(places) < int(wanted.sum(1).max()):
            return None
        taken = torch.zeros(n, len(places), dtype=torch.bool, device=rate.device)
        # A little more for every next place: of equally near ones the first, on every machine.
        order = torch.arange(len(places), device=rate.device) * (1e-3 / max(1, len(places)))
        for cell in wanted.any(0).nonzero().squeeze(1).tolist():
            asking = wanted[:, cell].nonzero().squeeze(1)
            distance = ((flat[places] - flat[cell]).abs() + order).expand(n, -1).masked_fill(taken, torch.inf)
            near = distance.topk(min(NEAREST, len(places)), largest=False)
            free = near.values.isfinite().sum(1)
            picks = (torch.rand(n, generator=generator).to(rate.device) * free).long().clamp_max(NEAREST - 1)
            chosen = near.indices.gather(1, picks[:, None]).squeeze(1)
            taken[asking, chosen[asking]] = True
        found = torch.zeros(n, flat.numel(), dtype=torch.bool, device=rate.device)
        found[:, places] = taken
        for own, row in zip(drawn, found, strict=True):
            own[name] = row.view(rate.shape)
    return drawn


def barred(candidates: Sequence[Candidate]) -> Cells:
    """All that belongs to any of these (at least one)."""
    found = {name: cells.clone() for name, cells in candidates[0].own.items()}
    for candidate in candidates[1:]:
        for name, cells in candidate.own.items():
            found[name] |= cells
    return found


def use_rates(of_cases: Recorded) -> Rates:
    """How often each cell is used in the data; 0 for those whose activation never differs."""
    rates = {}
    for name, g in of_cases.importances.items():
        a = of_cases.activations[name]
        varies = a.amax(0) - a.amin(0) > SAME * a.abs().amax(0)
        rates[name] = (g > ALIVE_ABOVE).double().mean(0) * varies
    return rates
