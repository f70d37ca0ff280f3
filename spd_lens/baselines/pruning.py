"""Other ways to make a model small, at equal parameters: what specialists of subcomponents are compared with.

Low rank, with the same allocations and the same way to write factors: truncated SVD, SVD of what the domain's inputs
bring out (whitened), also weighted by what the loss's gradients say of the outputs (both sides), random subcomponents.
Entries set to zero: the smallest (magnitude), and the smallest of `|W_ij|` times the size of input i (Wanda, for every
output by itself). Those stay whole matrices: their parameters are counted without the entries that were set to zero,
and without the indices that storing them so would need, and they are no faster.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens.core import Decomposition
from spd_lens.specialists import (
    MEASURED_ON,
    SHARES,
    Directions,
    Domain,
    PlainTransformer,
    SmallMatrix,
    Write,
    best_model,
    candidates,
    ordered,
    plain_copy,
    whitened_factors,
    whole_matrices,
)
from spd_lens.support.given import given_instance, given_one_of, given_whole

SmallMethod = Literal[
    "subcomponents", "subcomponents, refitted", "subcomponents, whitened", "random subcomponents",
    "random subcomponents, whitened", "truncated SVD", "whitened SVD", "whitened SVD, both sides", "magnitude", "Wanda",
]  # fmt: skip
SMALL_METHODS: tuple[SmallMethod, ...] = get_args(SmallMethod)


@dataclass(frozen=True, eq=False)
class SmallModel:
    """A model that a method made.

    - `zeroed`: entries of its matrices that the method has set to zero.
    - `chosen_from`: the share of every matrix's subcomponents whose sum was written anew; None where nothing was.
    """

    method: str
    model: PlainTransformer
    zeroed: int = 0
    chosen_from: float | None = None

    @property
    def parameters(self) -> int:
        """Numbers that count: all but those that were set to zero; zeros that the model had elsewhere count."""
        return sum(p.numel() for p in self.model.parameters()) - self.zeroed


def small_model(
    decomposition: Decomposition,
    domain: Domain,
    room: int,
    method: SmallMethod,
    *,
    seed: int = 0,
    measured_on: int = MEASURED_ON,
) -> SmallModel:
    """The model by one method, with `room` parameters for the matrices that shrink (`matrix_budget` says how many).

    Methods of low rank share out the room in two ways, equally and by effect; the lower loss on the domain's first
    `measured_on` rows is taken. "subcomponents, whitened" also chooses how many subcomponents it looks at; its control
    draws as many at random.
    """
    given_one_of("method", method, SMALL_METHODS)
    given_instance("domain", domain, Domain, "domain_of(decomposition, tokens)")
    room = given_whole("room", room, least=1, of=" parameters")
    measured_on = given_whole("measured_on", measured_on, least=1, of=" rows")
    whole = whole_matrices(decomposition, domain)
    if method in ("magnitude", "Wanda"):
        share = room / sum(W.numel() for W in whole.values())
        score = magnitude if method == "magnitude" else wanda
        pruned = {site: score(W, domain.moments[site], share) for site, W in whole.items()}
        zeroed = sum(W.numel() - int(W.count_nonzero()) for W in pruned.values())
        return SmallModel(method, plain_copy(decomposition, {s: SmallMatrix(W) for s, W in pruned.items()}), zeroed)
    directions = _directions(decomposition, domain, whole, method, seed)
    write: Write = (
        "refitted" if method.endswith("refitted") else "whitened" if method.endswith("whitened") else "subcomponents"
    )
    shares = SHARES
    if method == "random subcomponents, whitened":  # as many as ours chooses
        ours = _directions(decomposition, domain, whole, "subcomponents", seed)
        offered = candidates(domain, ours, whole, room, write=write)
        taken = best_model(decomposition, domain, offered, measured_on=measured_on)[1]
        shares = tuple(share for share in SHARES if share == taken.share)
    offered = candidates(domain, directions, whole, room, write=write, shares=shares)
    model, taken = best_model(decomposition, domain, offered, measured_on=measured_on)
    return SmallModel(method, model, chosen_from=taken.share)


def _directions(
    decomposition: Decomposition, domain: Domain, whole: Mapping[str, Tensor], method: SmallMethod, seed: int
) -> Directions:
    if method == "truncated SVD":  # in the order of singular values, as it is known
        factors = {site: truncated_svd(W) for site, W in whole.items()}
        V, U = ({site: f[i] for site, f in factors.items()} for i in (0, 1))
        return Directions(V, U, _falling(domain, factors), {})
    if method.startswith("whitened SVD"):
        outputs = domain.gradient_moments if method.endswith("both sides") else {}
        return ordered(domain, {s: whitened_factors(W, domain.moments[s], outputs.get(s)) for s, W in whole.items()})
    factors = {s: (decomposition[s].V.detach(), decomposition[s].U.detach()) for s in domain.sites}
    if not method.startswith("random"):
        return ordered(domain, factors)
    generator = torch.Generator().manual_seed(seed)
    shuffled = {}
    for site, (V, U) in factors.items():
        order = torch.randperm(V.shape[1], generator=generator).to(V.device)
        shuffled[site] = V[:, order], U[order]
    # The numbers per matrix are those of our own choice; which they are is drawn.
    worth = ordered(domain, factors).worth
    return Directions({s: f[0] for s, f in shuffled.items()}, {s: f[1] for s, f in shuffled.items()}, worth, {})


def _falling(domain: Domain, factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """What directions are worth, with the order of the singular values kept: a running mean never rises."""
    found = {}
    for site, (V, U) in factors.items():
        effects = domain.effects(site, V, U)
        found[site] = effects.cummin(0).values
    return found


def truncated_svd(W: Float[Tensor, "d_in d_out"]) -> tuple[Tensor, Tensor]:
    """`W = A B`, with the directions in the order of W's singular values."""
    P, sizes, Q = torch.linalg.svd(W.double(), full_matrices=False)
    return (P * sizes).to(W.dtype), Q.to(W.dtype)


def magnitude(W: Float[Tensor, "d_in d_out"], moments: Tensor, share: float) -> Tensor:
    """W without all but its largest entries."""
    return _largest(W, W.abs().flatten()[None], share)


def wanda(W: Float[Tensor, "d_in d_out"], moments: Float[Tensor, "d_in d_in"], share: float) -> Tensor:
    """W without all but the entries of each column with the largest `|W_ij| sqrt(E x_i^2)`."""
    score = W.abs() * moments.diagonal().sqrt().to(W)[:, None]
    return _largest(W, score.T, share)


def _largest(W: Tensor, score: Float[Tensor, "group n"], share: float) -> Tensor:
    """W where the score is among the share of largest of its group, 0 elsewhere."""
    n = int(share * score.shape[1])
    kept = torch.zeros_like(score, dtype=torch.bool).scatter_(1, score.topk(n, dim=1).indices, True)
    mask = kept.view_as(W) if len(score) == 1 else kept.T
    return torch.where(mask, W, 0.0)
