"""`FactoredWeight`: one site's matrix as `V @ U`, without any pass: parameters, products, moves between devices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from spd_lens.core.gates import Gate, matmul_or_lookup
from spd_lens.core.masked_change import through_U
from spd_lens.core.pass_state import PassState
from spd_lens.core.points import ReadPoint
from spd_lens.core.subcomponents import Subcomponents
from spd_lens.hosts.site import Site
from spd_lens.support.given import shown

if TYPE_CHECKING:
    from transformer_lens import FactoredMatrix


@dataclass(eq=False)
class Swapped:
    """What a `DecomposedWeight` knows besides its parameters.

    - `points`: the site's own HookPoints by suffix. `tied_to`: the weight whose factors it uses the other way round.
    - `state`: what running passes have left, shared by the sites of one decomposition.
    - `decomposition`: the `Decomposition`, once it is made.
    """

    site: Site
    points: dict[str, HookPoint]
    tied_to: FactoredWeight | None
    state: PassState
    decomposition: Any = None


class FactoredWeight(ReadPoint):
    """`V [d_in, C]` and `U [C, d_out]` of one site, the target's matrix and bias beside them, and its gate."""

    swapped: Swapped
    gate: Gate | None
    subcomponents: Subcomponents

    @property
    def site(self) -> Site:
        """Where in the model it stands."""
        return self.swapped.site

    @property
    def points(self) -> dict[str, HookPoint]:
        """The site's own HookPoints, by suffix."""
        return self.swapped.points

    @property
    def tied_to(self) -> FactoredWeight | None:
        """The weight whose factors this one uses the other way round, or None."""
        return self.swapped.tied_to

    @property
    def V(self) -> Float[Tensor, "d_in C"]:
        """Input directions, one column per subcomponent."""
        return self.subcomponents.V if self.tied_to is None else self.tied_to.U.T

    @property
    def U(self) -> Float[Tensor, "C d_out"]:
        """Output directions, one row per subcomponent."""
        return self.subcomponents.U if self.tied_to is None else self.tied_to.V.T

    @property
    def weight(self) -> Float[Tensor, "d_in d_out"]:
        """`V @ U`: the sum of all subcomponents."""
        return self.V @ self.U

    @property
    def target_weight(self) -> Float[Tensor, "d_in d_out"]:
        """The target's matrix `W`, as the host holds it now."""
        return self.site.matrix.read()

    @property
    def bias(self) -> Tensor | None:
        """The target's bias at this place, in the host's own shape; biases are never decomposed (M3)."""
        return self.site.read_bias()

    @property
    def n_subcomponents(self) -> int:
        """`C`."""
        return self.V.shape[1]

    @property
    def rank_bound(self) -> int:
        """`min(d_in, d_out)`, the largest rank that the target's matrix can have."""
        return min(self.V.shape[0], self.U.shape[1])

    def subcomponent(self, c: int) -> FactoredMatrix:
        """The rank-one matrix `V[:, c] U[c, :]` as TransformerLens's `FactoredMatrix [d_in, d_out]`."""
        from transformer_lens import FactoredMatrix

        if isinstance(c, bool) or not isinstance(c, Integral):
            raise TypeError(f"subcomponent {shown(c)} of {self.site.name}: expected one id, a whole number")
        if not 0 <= c < self.n_subcomponents:
            raise ValueError(f"subcomponent {c} of {self.site.name}: expected 0..{self.n_subcomponents - 1}")
        return FactoredMatrix(self.V[:, c : c + 1], self.U[c : c + 1, :])

    def activations(self, x: Tensor) -> Float[Tensor, "*batch C"]:
        """`a = x @ V` (a row look-up at embedding sites, M4)."""
        return self.whole(self._activations, x)

    def whole(self, use: Callable[..., Tensor], *tensors: Any) -> Tensor:
        """`use(*tensors)`, which may read V and U: they are whole meanwhile, also where processes share them out."""
        return (self.tied_to or self).subcomponents(use, *tensors)

    def _activations(self, x: Tensor) -> Tensor:
        return matmul_or_lookup(x, self.V)

    def through_U(self, coefficients: Float[Tensor, "*batch C"], y0: Tensor, U: Tensor | None = None) -> Tensor:
        """`coefficients @ U` in the shape of `y0`, which may have a head axis and repeat grouped heads.

        `U [C d_out]` is the site's own unless given.
        """
        return through_U(coefficients, self.U if U is None else U, y0)

    def _apply(self, fn: Any, recurse: bool = True) -> FactoredWeight:
        """Moves with the model; V, U and the gate stay in float32 (or wider) when the model becomes half precision."""

        def keeping_precision(t: Tensor) -> Tensor:
            moved = fn(t)
            narrower = moved.is_floating_point() and moved.dtype.itemsize < t.dtype.itemsize
            return t.to(moved.device) if narrower and moved.dtype.itemsize < 4 else moved

        return super()._apply(keeping_precision, recurse)
