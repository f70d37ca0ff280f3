"""What a decomposition is compared with its known mechanisms by: functions of plain tensors.

Importance is read on one-hot inputs (0.75, the paper's), `G [features C]`: row i is the importance of every
subcomponent when only feature i is on. Reports on whole models are in `spd_lens/toys/reports.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from spd_lens.support.shown import short_repr

# Success: mean cosine at least this, mean ratio of lengths within these.
MIN_MMCS = 0.99
ML2R_RANGE = (0.95, 1.05)
# Importance on some one-hot input above which a subcomponent counts as alive; how far from 0 or 1 is still 0 or 1.
ONE_HOT_ALIVE = 0.1
TOLERANCE = 0.1

# -- directions and lengths ------------------------------------------------------------------------------------------


def cosines(
    V: Float[Tensor, "features C"], U: Float[Tensor, "C d_out"], W: Float[Tensor, "features d_out"]
) -> Float[Tensor, "features C"]:
    """`cos(V[j, c] U[c, :], W[j, :])`: the sign of `V[j, c]` times the cosine of `U[c, :]`; 0 where either is zero."""
    unit = torch.nn.functional.normalize
    return V.sign() * (unit(W, dim=1) @ unit(U, dim=1).T)


def closest_subcomponents(
    V: Float[Tensor, "features C"],
    U: Float[Tensor, "C d_out"],
    W: Float[Tensor, "features d_out"],
    among: Bool[Tensor, " C"] | None = None,
) -> Int[Tensor, " features"]:
    """`argmax_c cos(V[j, c] U[c, :], W[j, :])` for every feature j, over the subcomponents in `among` (None: all)."""
    cos = cosines(V, U, W)
    return (cos if among is None else cos.masked_fill(~among, -torch.inf)).argmax(dim=1)


def mmcs(
    V: Float[Tensor, "features C"],
    U: Float[Tensor, "C d_out"],
    W: Float[Tensor, "features d_out"],
    among: Bool[Tensor, " C"] | None = None,
) -> float:
    """`mean_j max_c cos(V[j, c] U[c, :], W[j, :])`, over the subcomponents in `among`; 0 if there are none.

    Lengths do not enter: over all c, a dead subcomponent that happens to point the right way is enough.
    """
    if among is not None and not bool(among.any()):
        return 0.0
    best = closest_subcomponents(V, U, W, among)
    return float(cosines(V, U, W).gather(1, best[:, None]).mean().detach())


def ml2r(
    V: Float[Tensor, "features C"],
    U: Float[Tensor, "C d_out"],
    W: Float[Tensor, "features d_out"],
    among: Bool[Tensor, " C"] | None = None,
) -> float:
    """`mean_j |V[j, c] U[c, :]| / |W[j, :]|` at the c of `mmcs`; 0 if `among` is empty. Below 1: shrunk."""
    if among is not None and not bool(among.any()):
        return 0.0
    best = closest_subcomponents(V, U, W, among)
    lengths = V.gather(1, best[:, None]).abs().squeeze(1) * U.norm(dim=1)[best]
    return float((lengths / W.norm(dim=1)).mean().detach())


# -- importance on one-hot inputs ------------------------------------------------------------------------------------


def alive(importances: Float[Tensor, "features C"]) -> Bool[Tensor, " C"]:
    """Subcomponents whose importance is above 0.1 on some one-hot input."""
    return (importances > ONE_HOT_ALIVE).any(dim=0)


def has_one_each(importances: Float[Tensor, "features C"]) -> bool:
    """Whether every feature has exactly one subcomponent above 0.1, and no two features have the same one."""
    on = importances > ONE_HOT_ALIVE
    return bool((on.sum(dim=1) == 1).all()) and int(on.any(dim=0).sum()) == len(importances)


def identity_match(importances: Float[Tensor, "features C"]) -> tuple[Int[Tensor, " features"], int]:
    """The subcomponent of every feature, and the number of errors: entries off by more than 0.1 from a 0/1 matrix
    that has one 1 per feature, in columns of their own.

    Of all such matchings this is one with the fewest errors, found by the Hungarian method on
    `cost[j, c] = [G[j, c] < 0.9] - [G[j, c] > 0.1]`, what matching j with c adds to the count. Where that count is 0
    it is the matching with the largest sum. With `C < features` the missing columns count as columns of zeros, and
    their features get numbers from C on.
    """
    G = importances.detach().cpu().double()
    missing = max(0, G.shape[0] - G.shape[1])
    G = torch.cat([G, G.new_zeros(len(G), missing)], dim=1)
    off_if_zero, off_if_one = G > TOLERANCE, G < 1 - TOLERANCE
    # Among equally many errors the larger sum decides, so that the matching is the one a reader would draw.
    cost = (off_if_one.int() - off_if_zero.int()) - G / (2 * len(G) + 1)
    rows, columns = linear_sum_assignment(cost.numpy())
    matched = torch.as_tensor(columns)
    extra = off_if_one[rows, matched].sum() - off_if_zero[rows, matched].sum()
    return matched, int(off_if_zero.sum() + extra)


def identity_error(importances: Float[Tensor, "features C"]) -> int:
    """The smallest number of entries off by more than 0.1 from "one subcomponent per feature" (`identity_match`)."""
    return identity_match(importances)[1]


def dense_error(importances: Float[Tensor, "features C"], expected: int) -> int:
    """How far `G` is from `expected` subcomponents that work together, with no basis of their own.

    Of the `expected` columns with the largest sums, those without any entry of 0.9 or more, plus the entries above
    0.1 in all other columns. A column need not be on everywhere: its direction may be orthogonal to some feature's.
    """
    order = importances.sum(dim=0).argsort(descending=True)
    block, rest = importances[:, order[:expected]], importances[:, order[expected:]]
    absent = expected - int((block >= 1 - TOLERANCE).any(dim=0).sum())
    return absent + int((rest > TOLERANCE).sum())


def always_on(importances: Float[Tensor, "features C"]) -> Bool[Tensor, " C"]:
    """Subcomponents whose importance is above 0.1 on every one-hot input."""
    return (importances > ONE_HOT_ALIVE).all(dim=0)


# -- neuron contributions --------------------------------------------------------------------------------------------


def target_contributions(
    W_in: Float[Tensor, "features neurons"], W_out: Float[Tensor, "neurons features"]
) -> Float[Tensor, "features neurons"]:
    """`W_in[i, n] W_out[n, i]`: what neuron n passes from feature i back to feature i, before its non-linearity.

    Both matrices are in feature space: `W_E @ W_in` and `W_out @ W_U` of a residual MLP.
    """
    return W_in * W_out.T


@dataclass(frozen=True)
class FeatureSite:
    """A site that should have one subcomponent per feature.

    `n_alive`: number of alive subcomponents; `one_each`: `has_one_each`; `identity_error`: see `identity_match`.
    """

    n_features: int
    n_alive: int
    one_each: bool
    identity_error: int

    @staticmethod
    def of(importances: Float[Tensor, "features C"]) -> FeatureSite:
        """Read off `G [features C]`."""
        return FeatureSite(
            len(importances), int(alive(importances).sum()), has_one_each(importances), identity_error(importances)
        )

    def problems(self, site: str) -> list[str]:
        """What is wrong, in words."""
        found = []
        if self.n_alive != self.n_features:
            found.append(f"{site}: {self.n_alive} subcomponents alive for {self.n_features} features")
        elif not self.one_each:
            found.append(f"{site}: some feature has not exactly one subcomponent of its own")
        if self.identity_error:
            found.append(f"{site}: {self.identity_error} importances differ from one subcomponent per feature")
        return found


@dataclass(frozen=True)
class DenseSite:
    """A site that should have `expected` subcomponents (its rank) working together.

    `n_always_on`: see `always_on`; `error`: `dense_error`.
    """

    expected: int
    n_alive: int
    n_always_on: int
    error: int

    @staticmethod
    def of(importances: Float[Tensor, "features C"], expected: int) -> DenseSite:
        """Read off `G [features C]`."""
        counts = int(alive(importances).sum()), int(always_on(importances).sum())
        return DenseSite(expected, *counts, dense_error(importances, expected))

    def problems(self, site: str) -> list[str]:
        """What is wrong, in words."""
        if self.n_alive == self.expected:
            return []
        return [f"{site}: {self.n_alive} subcomponents alive where the rank is {self.expected}"]


@dataclass(frozen=True)
class Recovery:
    """Directions and lengths: `mmcs` and `ml2r` over the alive subcomponents, and over all of them."""

    mmcs: float
    ml2r: float
    mmcs_all: float
    ml2r_all: float

    __repr__ = short_repr

    @staticmethod
    def of(
        V: Float[Tensor, "features C"],
        U: Float[Tensor, "C d_out"],
        W: Float[Tensor, "features d_out"],
        importances: Float[Tensor, "features C"],
    ) -> Recovery:
        """Compare subcomponents with `W`; alive is read off `G [features C]`."""
        among = alive(importances)
        return Recovery(mmcs(V, U, W, among), ml2r(V, U, W, among), mmcs(V, U, W), ml2r(V, U, W))

    def problems(self, site: str) -> list[str]:
        """What is wrong, in words."""
        found = []
        if self.mmcs < MIN_MMCS:
            found.append(f"{site}: MMCS {self.mmcs:.3f} is below {MIN_MMCS}")
        low, high = ML2R_RANGE
        if not low <= self.ml2r <= high:
            found.append(f"{site}: ML2R {self.ml2r:.3f} is not within {low} to {high}")
        return found
