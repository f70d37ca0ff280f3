"""How well estimates agree with what was measured, on a sample that was measured both ways."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Agreement:
    """How well estimated effects agree with exact ones, on cells that were measured both ways.

    `estimated`, `exact` `[cell]`, the first `n_strongest` of them those with the largest estimates, the others drawn at
    random from the rest.
    """

    estimated: Float[Tensor, " cell"]
    exact: Float[Tensor, " cell"]
    n_strongest: int

    @property
    def correlation(self) -> float:
        """Pearson correlation over all measured cells; NaN if either side is constant."""
        return pearson(self.estimated, self.exact)

    def __str__(self) -> str:
        n, k = len(self.exact), self.n_strongest
        text = f"correlation with exact patching {self.correlation:.3f} on {n} cells"
        if k > 2 and n - k > 2:
            strong, rest = pearson(self.estimated[:k], self.exact[:k]), pearson(self.estimated[k:], self.exact[k:])
            text += f" ({strong:.3f} on the {k} largest estimates, {rest:.3f} on {n - k} others at random)"
        return text


def sampled_cells(effects: Tensor, n: int, generator: torch.Generator | None) -> list[int]:
    """Flat numbers of `n` cells: the half with the largest |effect|, then others at random."""
    order = effects.flatten().abs().argsort(descending=True, stable=True)
    n = min(n, len(order))
    strongest, rest = order[: (n + 1) // 2], order[(n + 1) // 2 :]
    generator = generator or torch.Generator().manual_seed(0)
    drawn = rest[torch.randperm(len(rest), generator=generator, device=generator.device).cpu()[: n - len(strongest)]]
    return [*strongest.tolist(), *drawn.tolist()]


def pearson(x: Tensor, y: Tensor) -> float:
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    scale = float(x.norm() * y.norm())
    return float(x @ y) / scale if scale > 0 else float("nan")
