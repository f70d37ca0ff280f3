"""Candidates for a reason: one for every place of the input, with the cells through which that place acts.

A place's cells are the subcomponents that are used there (importance above `ALIVE_ABOVE`) in this case or in one of the
control cases, except those whose activation is the same in all of them: what does not depend on the input is no reason.
At the decision's own position only what fewer than half of the cases use counts, for the rest there is the machinery
that every decision goes through.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from spd_lens.audit.trials import Cells, Recorded, Values, at_position, count
from spd_lens.core.units import ALIVE_ABOVE

# At the decision's own position: the largest share of control cases that may use a subcomponent of a reason.
SPECIAL_BELOW = 0.5
# Differences of activations below this share of their size are rounding.
SAME = 1e-5
# How many cells of most equal use a control is drawn from.
NEAREST = 20
# Per site, `[pos C]`: the share of cases that use a cell.
Rates: TypeAlias = dict[str, Tensor]


@dataclass(frozen=True)
class Candidate:
    """A place and its cells; `used` are those that this case itself uses, the ones that can be removed."""

    position: int
    cells: Cells
    used: Cells


def candidates(own: Recorded, controls: Recorded, decided_at: int, reasons_at: Sequence[int]) -> list[Candidate]:
    """One candidate for each of the positions `reasons_at` that has any cell."""
    used = {name: g[0] > ALIVE_ABOVE for name, g in own.importances.items()}
    anywhere, varies = {}, {}
    for name, g in controls.importances.items():
        anywhere[name] = used[name] | (g > ALIVE_ABOVE).any(0)
        a = torch.cat([own.activations[name], controls.activations[name]])
        varies[name] = a.amax(0) - a.amin(0) > SAME * a.abs().amax(0)
        share = (g > ALIVE_ABOVE).float().mean(0)
        anywhere[name][decided_at] &= share[decided_at] < SPECIAL_BELOW
    cells = {name: anywhere[name] & varies[name] for name in anywhere}
    found = []
    for position in reasons_at:
        here = at_position(cells, position)
        if count(here):
            found.append(Candidate(position, here, {name: here[name] & used[name] for name in here}))
    return found


def used_cells(candidate: Candidate, controls: Recorded, index: int) -> Cells:
    """The candidate's cells that this case or one control case uses."""
    used = {name: g[index] > ALIVE_ABOVE for name, g in controls.importances.items()}
    return {name: own & (candidate.used[name] | used[name]) for name, own in candidate.cells.items()}


def mean_values(controls: Recorded) -> Values:
    """The mean activation of every cell over the control cases."""
    return {name: a.mean(0) for name, a in controls.activations.items()}


def equal_use(
    position: int, cells_of: Sequence[Cells], rates: Rates, n: int, generator: torch.Generator
) -> list[Cells] | None:
    """`n` random sets; the i-th has as many cells as `cells_of[i % len]` has at `position`.

    Each is drawn beside one of these: another place of the same site, and as often used in the data (one of the
    `NEAREST` in `rates`, which are 0 where nothing can be drawn).

    None where some site has no such cell at another place.
    """
    drawn: list[Cells] = [{} for _ in range(n)]
    for name in cells_of[0]:
        wanted = torch.stack([cells[name][position] for cells in cells_of])
        ids = wanted.any(0).nonzero().squeeze(1)
        chosen = torch.zeros(n, rates[name].numel(), dtype=torch.bool, device=wanted.device)
        if len(ids):
            elsewhere = rates[name].clone()
            elsewhere[position] = 0.0
            places = elsewhere.flatten().nonzero().squeeze(1)
            if not len(places):
                return None
            distance = (elsewhere.flatten()[places][None] - rates[name][position][ids][:, None]).abs()
            near = places[distance.argsort(dim=1, stable=True)[:, :NEAREST]]
            picks = torch.randint(near.shape[1], (n, len(ids)), generator=generator).to(near.device)
            targets = near[torch.arange(len(ids), device=near.device), picks]
            here = wanted[:, ids][torch.arange(n) % len(cells_of)]
            rows = torch.arange(n, device=near.device)[:, None].expand_as(targets)
            chosen[rows[here], targets[here]] = True
        for own, row in zip(drawn, chosen, strict=True):
            own[name] = row.view(rates[name].shape)
    return drawn


def use_rates(of_cases: Recorded) -> Rates:
    """How often each cell is used in the data; 0 for those whose activation never differs."""
    rates = {}
    for name, g in of_cases.importances.items():
        a = of_cases.activations[name]
        varies = a.amax(0) - a.amin(0) > SAME * a.abs().amax(0)
        rates[name] = (g > ALIVE_ABOVE).double().mean(0) * varies
    return rates
