"""Attribution-based Parameter Decomposition of toys (APD; Braun et al. 2025, arXiv 2501.14926), SPD's predecessor.

The parameters `theta` are written as a sum of C components that each span *all* matrices,

    theta = sum_c P_c,    P_c at a matrix = sum_m V[c, m, :]^T U[c, m, :],    V [C m d_in], U [C m d_out]

(what the APD paper calls U is called V here, as in the rest of this package: the side of the input). How much c matters
for the outputs f on an input x is its attribution

    A_c(x) = sqrt((1 / d_out) sum_o (sum_theta df_o/dtheta * P_c)^2),

the root mean square over outputs of f's derivative in the direction P_c. The largest `k * batch` attributions of a
batch are active, `s_c(x) = 1`, the others 0. Trained are V and U, on

    faithfulness  |theta* - sum_c P_c|^2 / N                                       (N the number of entries of theta)
    minimality    D(f(x; theta*), f(x; sum_c s_c(x) P_c)), the mean squared difference; `beta` is its coefficient
    simplicity    sum_c s_c(x) sum_{matrices, m} (|V[c, m]|^2 |U[c, m]|^2)^(p/2) / N, mean over x; `alpha`
    hidden        as minimality, on the activations after the ReLU

The paper's appendix writes faithfulness and simplicity as sums; its coefficients belong to these means, which its main
text has for faithfulness and the authors' public code for both. As in the paper, biases are not decomposed but always
on, and a matrix that the target uses twice (TMS: encoder and decoder) is one matrix of one component.

Attributions are computed in closed form, for all outputs at once, where gradients would take a backward pass for each
output. Inputs without any active feature are left out: they have no attribution and no error (should k ask for more
pairs than the others have, all of those are active).

Cost per step: about 4 C forward passes on the other inputs, and 16 bytes for each of the `C m (d_in + d_out)` numbers
per matrix. Left out on purpose: TMS with +ID (where APD is published to fail), residual MLPs of
several blocks, and the paper's variant without top-k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens.baselines.apd_config import APDConfig
from spd_lens.baselines.apd_losses import ENTRIES_AT_ONCE, attributions
from spd_lens.baselines.apd_targets import Matrices, between_features, components_between_features, target_of
from spd_lens.support.shown import short_repr
from spd_lens.toys.resid_mlp import ResidMLP
from spd_lens.toys.tms import TMS


@dataclass(frozen=True)
class APD:
    """A trained APD: `V[name] [C m d_in]` and `U[name] [C m d_out]` of every matrix; `log` one dict per logged step."""

    model: TMS | ResidMLP
    config: APDConfig
    V: Matrices
    U: Matrices
    log: list[dict[str, Any]]

    __repr__ = short_repr

    def components(self, name: str) -> Float[Tensor, "C d_in d_out"]:
        """`P_c` at one matrix: `"W"`, `"W_in"` or `"W_out"`."""
        return self.V[name].mT @ self.U[name]

    @torch.no_grad()
    def attributions(
        self, x: Float[Tensor, "batch features"], *, entries_at_once: int = ENTRIES_AT_ONCE
    ) -> Float[Tensor, "batch C"]:
        """`A_c(x)`, at the parameters at which it was trained; of so many components together as this many entries."""
        target = target_of(self.model)
        P = components_between_features(self.V, self.U, target.constants)
        at = {name: p.sum(0) for name, p in P.items()}
        if self.config.attributions_from == "target":
            at = {name: between_features(name, W, target.constants) for name, W in target.matrices.items()}
        return attributions(target, at, P, target.constants, x, entries_at_once=entries_at_once)
