"""What an importance costs: the penalty `phi` that minimality (L2) and the frequency term (L3) sum over subcomponents.

A penalty is any function of importances, element by element. Two are here: a power (the paper's) and smooth L0 (S5).
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from spd_lens.core.subcomponents import at_least_float32

# Without it the gradient of g^p at g = 0 is infinite for p < 1.
EPSILON = 1e-12


@dataclass(frozen=True)
class Power:
    """`phi(g) = (g + 1e-12)^p`, the paper's penalty (Bushnaq, Braun and Sharkey 2025, arXiv 2506.20790, eq. 9).

    >>> import torch
    >>> Power(2.0)(torch.tensor([0.5, 1.0])).tolist()
    [0.25, 1.0]
    """

    p: float

    def __call__(self, g: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch C"]:
        shifted = at_least_float32(g) + EPSILON
        return shifted if self.p == 1 else shifted.pow(self.p)


@dataclass(frozen=True)
class SmoothL0:
    """`phi(g) = g^2 / (g^2 + gamma^2)` (S5): a count of what is on, flat at 0, half at gamma, of slope < 0.65 / gamma.

    >>> import torch
    >>> SmoothL0(0.5)(torch.tensor([0.0, 0.5, 1.0])).tolist()
    [0.0, 0.5, 0.800000011920929]
    """

    gamma: float

    def __call__(self, g: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch C"]:
        square = at_least_float32(g).square()
        return square / (square + self.gamma**2)


Penalty = Power | SmoothL0
