"""`SiteInputs`: what the gates of a clean pass read."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor


class SiteInputs(dict[str, Tensor]):
    """The input `x` of every site by name, and the residual streams `[batch pos d_model]` that enter some blocks.

    `residuals` holds those blocks that a global gate with `reads="residuals"` reads; it is empty for all other gates.
    """

    def __init__(self, inputs: Mapping[str, Tensor], residuals: Mapping[int, Float[Tensor, "batch pos d"]]) -> None:
        super().__init__(inputs)
        self.residuals = dict(residuals)
