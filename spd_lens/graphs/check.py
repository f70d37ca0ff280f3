"""C2: ablate the senders of a sample of edges for real, and put what happened beside what the edges predict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.units import Unit
from spd_lens.graphs.measured_removals import Drop, Readouts, removals
from spd_lens.patching.agreement import Agreement, sampled
from spd_lens.patching.frozen import Frozen
from spd_lens.support.progress import tqdm
from spd_lens.support.shown import short_repr, text_html
from spd_lens.support.tables import format_table

# What an edge is about besides its sender: how to read its receiver off what fell.
Reading: TypeAlias = Callable[[Drop], float]


def measured(
    decomposition: Decomposition,
    tokens: Int[Tensor, "1 pos"],
    pairs: Sequence[tuple[Unit, Reading]],
    readouts: Readouts,
    frozen: Frozen,
    *,
    progress: tqdm | None = None,
) -> tuple[list[float], list[float]]:
    """For every pair how far its receiver fell: with all else held, and with nothing held.

    Cost: two passes for every distinct sender, batched.
    """
    senders = list(dict.fromkeys(sender for sender, _ in pairs))
    columns = []
    for held in (True, False):
        found: dict[int, float] = {}
        for drop in removals(decomposition, tokens, senders, readouts, frozen, held=held):
            found |= {i: read(drop) for i, (sender, read) in enumerate(pairs) if sender == drop.sender}
            if progress is not None:
                progress.update(1)
        columns.append([found[i] for i in range(len(pairs))])
    return columns[0], columns[1]


def prompt_check(
    decomposition: Decomposition,
    tokens: Int[Tensor, "1 pos"],
    edges: Sequence[tuple[str, str]],
    weights: Float[Tensor, " edge"],
    pairs: Sequence[tuple[Unit, Reading]],
    readouts: Readouts,
    frozen: Frozen,
    n_checked: int,
    generator: torch.Generator | None,
) -> AttributionCheck:
    """The check of a graph of one prompt; `pairs[i]` belongs to `edges[i]`, which has `weights[i]`."""
    chosen, n_strongest = sampled(weights, n_checked, generator)
    with tqdm(total=2 * len({pairs[i][0] for i in chosen}), desc="ablating", leave=False, delay=2) as progress:
        direct, total = measured(decomposition, tokens, [pairs[i] for i in chosen], readouts, frozen, progress=progress)
    return AttributionCheck(
        edges=tuple(edges[i] for i in chosen),
        predicted=tuple(float(weights[i]) for i in chosen),
        measured=tuple(direct),
        total=tuple(total),
        n_strongest=n_strongest,
        frozen=str(frozen),
    )


@dataclass(frozen=True, kw_only=True)
class AttributionCheck(Agreement):
    """Predicted and measured direct effects of a sample of edges (C2), and the total effects beside them.

    - `edges`: `(sender, receiver)`, the first `n_strongest` of them the strongest edges, the others drawn at random.
    - `predicted[i]`: the edge's weight. `measured[i]`: how much the receiver falls when the sender is removed and
      everything else is held at its clean value (all other subcomponents, and what is frozen).
    - `total[i]`: how much it falls when nothing is held. That is another question, and it is not expected to agree.
    - `frozen`: what C1 left out, in words.
    """

    edges: tuple[tuple[str, str], ...]
    total: tuple[float, ...]
    frozen: str

    __repr__ = short_repr
    _repr_html_ = text_html

    def summary(self) -> str:
        """One line: what was measured, and how it compares."""
        if not self.edges:
            return f"no edge to compare with ablations ({self.frozen})"
        return (
            f"{len(self.edges)} edges ablated, the rest held at clean values: correlation {self.correlation:.4f}, "
            f"slope {self.slope:.4f}, largest error {self.max_error:.2g} ({self.relative_error:.1%} of the largest "
            f"effect)"
            + (f"; {self.not_finite} of the ablations left no finite number" if self.not_finite else "")
            + f"; {self.frozen}"
        )

    def _error(self, i: int) -> float:
        error = abs(self.measured[i] - self.predicted[i])
        return error if np.isfinite(error) else float("inf")

    def __str__(self) -> str:
        worst = sorted(range(len(self.edges)), key=lambda i: -self._error(i))[:8]
        rows = [
            (
                " -> ".join(self.edges[i]),
                f"{self.predicted[i]:+.4g}",
                f"{self.measured[i]:+.4g}",
                f"{self.total[i]:+.4g}",
            )
            for i in worst
        ]
        header = ("edges with the largest errors", "predicted", "ablated, rest held", "total effect")
        return self.summary() + "\n" + format_table(header, rows)
