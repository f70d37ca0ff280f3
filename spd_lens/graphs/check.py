"""C2: ablate the senders of a sample of edges for real, and put what happened beside what the edges predict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from spd_lens.core.decomposition import Decomposition
from spd_lens.graphs.direct_pass import Place
from spd_lens.graphs.removals import Drop, Targets, removals
from spd_lens.patching.frozen import Frozen
from spd_lens.support.tables import format_table

if TYPE_CHECKING:
    pass

# What an edge is about: the place of its sender, and how to read its receiver off what fell.
Reading: TypeAlias = Callable[[Drop], float]


def sampled(strengths: Float[Tensor, " edge"], n: int, generator: torch.Generator | None) -> tuple[list[int], int]:
    """Numbers of `n` edges, and how many of them come first for being strongest: half; the rest is drawn at random.

    From seed 0 if no generator is given. Raises ValueError for n < 1: a graph is not shown without its check.
    """
    if isinstance(n, bool) or n < 1:
        raise ValueError(
            f"n_checked={n}; expected at least 1: a graph carries its measured agreement with ablations (C2)"
        )
    order = strengths.abs().argsort(descending=True, stable=True)
    n = min(n, len(order))
    strongest, rest = order[: (n + 1) // 2], order[(n + 1) // 2 :]
    generator = generator or torch.Generator().manual_seed(0)
    drawn = rest[torch.randperm(len(rest), generator=generator, device=generator.device).cpu()[: n - len(strongest)]]
    return [*strongest.tolist(), *drawn.tolist()], len(strongest)


def measured(
    decomposition: Decomposition,
    tokens: Int[Tensor, "1 pos"],
    pairs: Sequence[tuple[Place, Reading]],
    targets: Targets,
    frozen: Frozen,
    *,
    progress: tqdm | None = None,
) -> tuple[list[float], list[float]]:
    """For every pair how far its receiver fell: with all else held, and with nothing held.

    Cost: two passes for every distinct sender, batched.
    """
    places = list(dict.fromkeys(place for place, _ in pairs))
    columns = []
    for held in (True, False):
        found: dict[int, float] = {}
        for drop in removals(decomposition, tokens, places, targets, frozen, held=held):
            found |= {i: read(drop) for i, (place, read) in enumerate(pairs) if place == drop.place}
            if progress is not None:
                progress.update(1)
        columns.append([found[i] for i in range(len(pairs))])
    return columns[0], columns[1]


def prompt_check(
    decomposition: Decomposition,
    tokens: Int[Tensor, "1 pos"],
    edges: Sequence[tuple[str, str]],
    weights: Float[Tensor, " edge"],
    pairs: Sequence[tuple[Place, Reading]],
    targets: Targets,
    frozen: Frozen,
    n_checked: int,
    generator: torch.Generator | None,
) -> AttributionCheck:
    """The check of a graph of one prompt; `pairs[i]` belongs to `edges[i]`, which has `weights[i]`."""
    chosen, n_strongest = sampled(weights, n_checked, generator)
    with tqdm(total=2 * len({pairs[i][0] for i in chosen}), desc="ablating", leave=False, delay=2) as progress:
        direct, total = measured(decomposition, tokens, [pairs[i] for i in chosen], targets, frozen, progress=progress)
    return AttributionCheck(
        edges=tuple(edges[i] for i in chosen),
        predicted=tuple(float(weights[i]) for i in chosen),
        measured=tuple(direct),
        total=tuple(total),
        n_strongest=n_strongest,
        frozen=str(frozen),
    )


@dataclass(frozen=True)
class AttributionCheck:
    """Predicted and measured direct effects of a sample of edges (C2), and the total effects beside them.

    - `edges`: `(sender, receiver)`, the first `n_strongest` of them the strongest edges, the others drawn at random.
    - `predicted[i]`: the edge's weight. `measured[i]`: how much the receiver falls when the sender is removed and
      everything else is held at its clean value (all other subcomponents, and what is frozen).
    - `total[i]`: how much it falls when nothing is held. That is another question, and it is not expected to agree.
    - `frozen`: what C1 left out, in words.
    """

    edges: tuple[tuple[str, str], ...]
    predicted: tuple[float, ...]
    measured: tuple[float, ...]
    total: tuple[float, ...]
    n_strongest: int
    frozen: str

    @property
    def not_finite(self) -> int:
        """How many ablations left no finite number; the figures below are of the others.

        It happens where a large part is removed while normalisation is frozen and much between is not decomposed.
        """
        return int((~np.isfinite(self.measured)).sum()) if self.measured else 0

    def _finite(self) -> tuple[np.ndarray, np.ndarray]:
        p, m = np.array(self.predicted, dtype=float), np.array(self.measured, dtype=float)
        finite = np.isfinite(m)
        return p[finite], m[finite]

    @property
    def correlation(self) -> float:
        """Pearson correlation of predicted and measured; NaN with fewer than two edges or a constant side."""
        return _pearson(*self._finite())

    @property
    def slope(self) -> float:
        """`sum(measured * predicted) / sum(predicted^2)`: 1 where predictions have the right size."""
        p, m = self._finite()
        return float(p @ m / (p @ p)) if p.any() else float("nan")

    @property
    def max_error(self) -> float:
        """The largest `|measured - predicted|`, in units of the receiver's activation."""
        p, m = self._finite()
        return float(np.abs(m - p).max()) if len(p) else float("nan")

    @property
    def relative_error(self) -> float:
        """`max_error` divided by the largest `|measured|`."""
        largest = float(np.abs(self._finite()[1]).max(initial=0.0))
        return self.max_error / largest if largest else float("nan")

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


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    if len(a) < 2:
        return float("nan")
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / scale if scale > 0 else float("nan")
