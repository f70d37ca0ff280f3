"""Passes in which subcomponents' activations are replaced, many experiments per forward pass.

The engine under ablation and patching. One *cell* is one experiment: a unit, and a position or everywhere. `k`
copies of the batch run together, each with a replacement of its own, by hooks on `hook_*_acts`:

    a'[copy, row, pos, c] = r[row, pos, c]   where the cell replaces c, else a,

so at a site `y = y0 + (a' - a) @ U` (M2), and the delta stays as it is. Blocks before the first changed site are
not run again.

Cost: one clean pass, then `ceil(cells / k)` passes over `k * batch` rows from the first changed block on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.units import Unit
from spd_lens.patching.arguments import Metric, Positions, checked_input, metric_values, unit_positions
from spd_lens.patching.effects import Effects
from spd_lens.patching.hooks import put_per_copy
from spd_lens.support.given import given_whole
from spd_lens.support.names import near_names
from spd_lens.support.progress import tqdm

# Entries of the output of one pass over several copies of the batch: 128 MB in float32.
_ENTRIES_PER_PASS = 2**25


@dataclass(frozen=True)
class Replacement:
    """What activations become.

    - `values[site]`: `r`, broadcastable to the site's activations `[batch pos C]` (or with a head axis).
    - `multiply`: `a' = r * a` instead of `a' = r`.
    - `others`: the subcomponents of a cell's sites that the unit does *not* name are replaced, and the delta mask is
      0 there, so that only the unit is left at its sites (sufficiency).
    """

    values: Mapping[str, Tensor]
    multiply: bool = False
    others: bool = False


@torch.no_grad()
def effects_of(
    decomposition: Decomposition,
    tokens: Tensor,
    metric: Metric,
    units: Sequence[Unit],
    replacement: Replacement,
    *,
    what: str,
    positions: Positions,
    per_pass: int | None,
    clean_metric: Float[Tensor, " example"] | None = None,
) -> Effects:
    """Run every unit at every position as a cell of its own; see `Effects` for what comes back."""
    chosen = unit_positions(units, positions, tokens)
    cells = [(unit, where) for unit in units for where in ([None] if chosen is None else chosen)]
    runner = Runner(decomposition, tokens, {site for unit in units for site in unit.sites})
    baseline = metric_values(metric, runner.output, len(tokens))
    measured: list[Tensor | None] = [None] * len(cells)
    with tqdm(total=len(cells), desc=what, leave=False, delay=2) as progress:
        for numbers in _passes(cells, runner, per_pass):
            output = runner.run([cells[i] for i in numbers], replacement)
            for i, logits in zip(numbers, output, strict=True):
                measured[i] = metric_values(metric, logits, len(tokens), may_be_nan=True)
                if measured[i].shape != baseline.shape:  # pyright: ignore[reportOptionalMemberAccess]
                    raise ValueError(f"the metric returned {tuple(baseline.shape)} first, then another shape")
            progress.update(len(numbers))
    n_positions = 1 if chosen is None else len(chosen)
    values = torch.stack([m for m in measured if m is not None]).unflatten(0, (len(units), n_positions))
    where = None if chosen is None else tuple(chosen)
    return Effects(what, tuple(units), where, values, baseline, clean_metric)


def _passes(cells: Sequence[tuple[Unit, int | None]], runner: Runner, per_pass: int | None) -> list[list[int]]:
    """Cell numbers that run together: as many as memory allows, all from the same block on."""
    size = runner.copies_per_pass(per_pass)
    by_block: dict[int | None, list[int]] = {}
    for i, (unit, _) in enumerate(cells):
        by_block.setdefault(runner.first_block(unit.sites), []).append(i)
    return [group[k : k + size] for group in by_block.values() for k in range(0, len(group), size)]


class Runner:
    """Passes over copies of one batch that start at the first block that an experiment changes."""

    def __init__(self, decomposition: Decomposition, tokens: Tensor, sites: set[str]) -> None:
        tokens = checked_input(decomposition, tokens)
        self.decomposition, self.host, self.tokens = decomposition, decomposition.host, tokens
        starts = {decomposition.starts.first_block([site]) for site in sites} if self.host.can_start_at_blocks() else ()
        with torch.no_grad(), self.host.record_residuals(layer for layer in starts if layer) as residuals:
            self.output = self.host.forward(tokens)
        self.residuals = residuals
        widest = max((decomposition[site].n_subcomponents for site in sites), default=1)
        rows = tokens.shape[:2].numel() if tokens.ndim > 1 else tokens.shape[0]
        # The output usually needs most; with a small vocabulary it is the activations of a few sites at once.
        self.entries = max(self.output.numel(), 8 * widest * rows)

    def copies_per_pass(self, given: int | None) -> int:
        """How many copies of the batch run together: what was given, or what memory allows."""
        if given is not None:
            given = given_whole("per_pass", given, least=1, of=" experiment per forward pass", or_none=True)
        return given or max(1, _ENTRIES_PER_PASS // max(1, self.entries))

    def first_block(self, sites: Sequence[str]) -> int | None:
        """The block that a pass which changes these sites can start at; None: it has to start at the beginning."""
        layer = self.decomposition.starts.first_block(sites)
        if not layer or layer not in self.residuals:
            return None
        exact = self.decomposition.starts.is_exact(layer, self.residuals[layer], self.tokens)
        return layer if exact else None

    def run(self, cells: Sequence[tuple[Unit, int | None]], replacement: Replacement) -> Tensor:
        """The output of every cell, `[cell batch ...]`."""
        sites = list(dict.fromkeys(site for unit, _ in cells for site in unit.sites))
        hooks = []
        for name in sites:
            weight = self.decomposition[name]
            chosen, touched = self.where(cells, name, weight.n_subcomponents)
            acts_name, _, _, delta_name = weight.site.point_names()
            replaced = touched.unsqueeze(-1) & ~chosen if replacement.others else chosen
            by, times = replacement.values[name], replacement.multiply
            hooks.append((acts_name, put_per_copy(replaced, by, times=times)))
            if replacement.others:
                hooks.append((delta_name, put_per_copy(touched.unsqueeze(-1), torch.zeros(()))))
        return self.run_hooked(len(cells), hooks, self.first_block([s for u, _ in cells for s in u.sites]))

    def run_hooked(self, n_copies: int, hooks: Sequence[tuple[str, Any]], start_at: int | None) -> Tensor:
        """The output of `n_copies` copies of the batch under hooks, `[copy batch ...]`."""
        batch = self.tokens if start_at is None else self.residuals[start_at]
        rows = batch.repeat(n_copies, *[1] * (batch.ndim - 1))
        with torch.no_grad(), self.decomposition.model.hooks(fwd_hooks=list(hooks)) if hooks else nullcontext():
            output = self.host.forward(rows) if start_at is None else self.host.forward_from(start_at, rows)
        return output.unflatten(0, (n_copies, len(batch)))

    def where(
        self, cells: Sequence[tuple[Unit, int | None]], site: str, count: int
    ) -> tuple[Bool[Tensor, "cell pos C"], Bool[Tensor, "cell pos"]]:
        """Where each cell names subcomponents of `site`, and where it touches the site at all.

        The position axis has length 1 if no cell has a position.
        """
        by_position = any(where is not None or unit.positions is not None for unit, where in cells)
        length = self.tokens.shape[1] if by_position else 1
        chosen = torch.zeros(len(cells), length, count, dtype=torch.bool)
        touched = torch.zeros(len(cells), length, dtype=torch.bool)
        for k, (unit, where) in enumerate(cells):
            ids = unit.ids_at(site)
            for at in unit.positions or (where,):
                if ids:
                    chosen[k, slice(None) if at is None else at, ids] = True
                    touched[k, slice(None) if at is None else at] = True
        device = self.decomposition[site].V.device
        return chosen.to(device), touched.to(device)


def activations_of(decomposition: Decomposition, tokens: Tensor, sites: Sequence[str]) -> dict[str, Tensor]:
    """`a = x @ V` of the named sites in a clean pass over `tokens`."""
    inputs = decomposition.clean_pass(tokens).inputs
    missing = [site for site in sites if site not in inputs]
    if missing:
        raise ValueError(f"{missing[0]} was not reached in this pass; near: {near_names(missing[0], inputs)}")
    with torch.no_grad():
        return {site: decomposition[site].activations(inputs[site]) for site in sites}
