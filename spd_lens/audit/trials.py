"""Many interventions on one input at once: every row of a batch is the same input under an intervention of its own.

A *cell* is one subcomponent at one position of one site; a set of cells is a boolean `[pos C]` per site. What can be
done with a set: remove it (mask 0), or replace it (its activations are those of another case). Both are ordinary
TransformerLens hooks on the points of the decomposed weights, so nothing here is special to audits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spd_lens.audit.decision import Decision
from spd_lens.core.decomposition import Decomposition
from spd_lens.core.squashings import importance_of

# Per site, `[pos C]`.
Cells: TypeAlias = dict[str, Bool[Tensor, "pos C"]]
Values: TypeAlias = dict[str, Float[Tensor, "pos C"]]
# Numbers of one batch of rows in flight; more rows go in several passes.
ROOM = 20_000_000


@dataclass(frozen=True)
class Recorded:
    """Clean passes over inputs `[n pos]`: activations and importances `[n pos C]` per site, and the logits."""

    activations: Mapping[str, Float[Tensor, "n pos C"]]
    importances: Mapping[str, Float[Tensor, "n pos C"]]
    logits: Float[Tensor, "n pos out"]

    def row(self, index: int) -> Values:
        """The activations of one input."""
        return {name: a[index] for name, a in self.activations.items()}


@torch.no_grad()
def record(decomposition: Decomposition, tokens: Int[Tensor, "n pos"]) -> Recorded:
    """Run the model as it is over `tokens`.

    Raises ValueError where activations have a head axis (`use_split_qkv_input`), which cells do not know.
    """
    clean = decomposition.clean_pass(tokens.to(decomposition.device))
    importances = {name: importance_of(p) for name, p in decomposition.pre_importances(clean.inputs).items()}
    activations = {name: decomposition[name].activations(x) for name, x in clean.inputs.items()}
    odd = [name for name, a in activations.items() if a.ndim != 3]
    if odd:
        raise ValueError(
            f"{odd[0]} has activations of shape {tuple(activations[odd[0]].shape)}; expected [batch pos C]"
        )
    return Recorded(activations, importances, clean.output)


@dataclass(frozen=True)
class Trial:
    """One intervention: cells to remove, and cells to replace with values. Empty: the model as it is."""

    removed: Cells | None = None
    replaced: Cells | None = None
    values: Values | None = None


class Trials:
    """Runs interventions on one input and says what margin the decision then has."""

    def __init__(self, decomposition: Decomposition, tokens: Int[Tensor, "1 pos"], decision: Decision) -> None:
        self.decomposition, self.decision = decomposition, decision
        self.tokens = tokens.to(decomposition.device)
        widest = max(weight.n_subcomponents for weight in decomposition.values())
        self._rows = max(1, ROOM // (tokens.shape[1] * widest * len(decomposition)))

    @torch.no_grad()
    def margins(self, trials: Sequence[Trial]) -> Float[Tensor, " n"]:
        """The margin under each intervention, in float64."""
        found = [self._margins(trials[start : start + self._rows]) for start in range(0, len(trials), self._rows)]
        return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)

    def _margins(self, trials: Sequence[Trial]) -> Tensor:
        hooks = []
        for name, weight in self.decomposition.items():
            points = weight.site.point_names()
            if any(t.removed is not None and bool(t.removed[name].any()) for t in trials):
                kept = torch.stack([_ones_without(weight.V, t.removed, name, self.tokens.shape[1]) for t in trials])
                hooks.append((points[2], partial(_times, factor=kept)))
            if any(t.replaced is not None and bool(t.replaced[name].any()) for t in trials):
                where = torch.stack(
                    [_or_none(t.replaced, name, kept_like(weight.V, self.tokens.shape[1])) for t in trials]
                )
                values = torch.stack([_values(t, name, where[0]) for t in trials])
                hooks.append((points[0], partial(_replace, where=where, values=values)))
        return self.run(len(trials), hooks).double().cpu()

    def run(self, rows: int, hooks: list[tuple[str, Callable[..., Any]]]) -> Float[Tensor, " n"]:
        """Margins of `rows` copies of the input under hooks; with gradients where these are on."""
        tokens = self.tokens.expand(rows, -1)
        with self.decomposition.model.hooks(fwd_hooks=hooks):
            return self.decision.margin(self.decomposition.host.forward(tokens))


def kept_like(V: Tensor, n_pos: int) -> Bool[Tensor, "pos C"]:
    """No cell at all."""
    return torch.zeros(n_pos, V.shape[1], dtype=torch.bool, device=V.device)


def _ones_without(V: Tensor, removed: Cells | None, name: str, n_pos: int) -> Tensor:
    ones = torch.ones(n_pos, V.shape[1], device=V.device)
    return ones if removed is None else ones.masked_fill(removed[name], 0.0)


def _or_none(cells: Cells | None, name: str, none: Tensor) -> Tensor:
    return none if cells is None else cells[name]


def _values(trial: Trial, name: str, like: Tensor) -> Tensor:
    return torch.zeros(like.shape, device=like.device) if trial.values is None else trial.values[name]


def _times(value: Tensor, hook: Any, *, factor: Tensor) -> Tensor:
    return value * factor.to(value.dtype)


def _replace(value: Tensor, hook: Any, *, where: Tensor, values: Tensor) -> Tensor:
    return torch.where(where, values.to(value.dtype), value)


# -- sets of cells ---------------------------------------------------------------------------------------------------


def union(sets: Sequence[Cells]) -> Cells:
    """The cells that are in any of the sets (at least one)."""
    return {name: torch.stack([cells[name] for cells in sets]).any(0) for name in sets[0]}


def without(cells: Cells, other: Cells) -> Cells:
    """The cells of the first set that are not in the second."""
    return {name: own & ~other[name] for name, own in cells.items()}


def both(cells: Cells, other: Cells) -> Cells:
    """The cells that are in both sets."""
    return {name: own & other[name] for name, own in cells.items()}


def count(cells: Cells) -> int:
    """Number of cells."""
    return sum(int(own.sum()) for own in cells.values())
