"""`specialise`: a smaller model of the subcomponents that a domain needs.

For every matrix of a block the kept subcomponents S replace the whole: `W' = V_S U_S`, stored as two narrow factors
where these are fewer numbers, and as the untouched W where they are not. What is not kept, the delta with it, is gone.
What is kept is chosen by what removing it costs on the domain (`Domain.effects`), per parameter.

Cost: a few passes over the domain's rows, one copy of the model's numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.inputs import checked_decomposition
from spd_lens.core.units import Ids, units_of
from spd_lens.specialists.allocation import Kept, effect_allocation, uniform_allocation
from spd_lens.specialists.costs import mean_loss
from spd_lens.specialists.distilling import distil
from spd_lens.specialists.domain import Domain, domain_of
from spd_lens.specialists.matrices import SmallMatrix, cheapest_form
from spd_lens.specialists.plain_transformer import PlainTransformer
from spd_lens.specialists.specialist import Specialist
from spd_lens.specialists.writing import plain_copy
from spd_lens.support.given import given_flag, given_number, given_one_of, given_whole

Allocation = Literal["measured", "effect", "uniform"]
Tokens = Literal["all", "domain"]
# Rows of the domain that choices are measured on.
_MEASURED_ON = 16
# Of the logits' scale: how far the plain model may be off.
_ROUNDINGS = 2_000


@dataclass(frozen=True, eq=False)
class Directions:
    """For each site `V [d_in, n]`, `U [n, d_out]`, and each direction's worth `[n]`, best first.

    - `numbers[site]`: the subcomponents that they are, where they are some.
    """

    V: Mapping[str, Tensor]
    U: Mapping[str, Tensor]
    worth: Mapping[str, Tensor]
    numbers: Mapping[str, Tensor]

    def kept(self, kept: Kept, whole: Mapping[str, Tensor]) -> dict[str, SmallMatrix]:
        """The matrices with the first `kept[site]` directions each."""
        return {
            site: SmallMatrix(whole[site])
            if k is None
            else cheapest_form(self.V[site][:, :k], self.U[site][:k], whole[site])
            for site, k in kept.items()
        }


def ordered(
    domain: Domain, factors: Mapping[str, tuple[Tensor, Tensor]], numbers: Mapping[str, Tensor] | None = None
) -> Directions:
    """Directions in the falling order of what they are worth on the domain."""
    V, U, worth, named = {}, {}, {}, {}
    for site, (v, u) in factors.items():
        effect = domain.effects(site, v, u)
        order = effect.argsort(descending=True, stable=True)
        V[site], U[site], worth[site] = v[:, order], u[order], effect[order]
        if numbers is not None:
            named[site] = numbers[site][order]
    return Directions(V, U, worth, named)


def specialise(
    decomposition: Decomposition,
    domain_batches: Any,
    budget: int | float,
    *,
    ids: Ids = None,
    refit: bool = False,
    allocation: Allocation = "measured",
    tokens: Tokens = "all",
    cut_below: float = 0.0,
    distil_steps: int = 0,
    seed: int = 0,
) -> Specialist:
    """A smaller plain model that keeps the subcomponents that a domain needs most; the decomposed model stays as it is.

    - `domain_batches`: tokens `[batch pos]` of the domain, or a list of such batches; a few dozen rows.
    - `budget`: the most parameters that the small model may have, or a share of the model's (a float below 1).
    - `ids`: the subcomponents that may be kept, as everywhere (`units_of`): a circuit's units, components; None: all.
    - `refit`: what the kept ones write is fitted anew, so that on the domain `x V_S B` is as near to `x W` as it can be
      for the clean inputs x. Without, the small model computes what the decomposed one does when it keeps S alone.
    - `allocation`: how many each matrix keeps: "effect", what pays most; "uniform", the same share of each; "measured",
      whichever of the two has the lower loss on the domain.
    - `tokens`: "domain" leaves out the embedding rows of tokens that the domain never uses.
    - `cut_below`: heads and neurons whose weights are below this share of the largest are left out; 0: those at zero.
    - `distil_steps`: steps of distillation from the model on the domain afterwards.

    Raises ValueError for an impossible budget (with the smallest possible one), unknown sites and ids, units of another
    decomposition, a decomposition that was removed, and models that are no plain causal transformer.
    """
    checked_decomposition(decomposition, "specialise")
    refit = given_flag("refit", refit)
    given_one_of("allocation", allocation, ("measured", "effect", "uniform"))
    given_one_of("tokens", tokens, ("all", "domain"))
    cut_below = given_number("cut_below", cut_below, least=0.0, most=1.0)
    steps = given_whole("distil_steps", distil_steps, least=0)
    domain = domain_of(decomposition, domain_batches, seed=seed)
    allowed = _allowed(decomposition, domain, ids)
    rows = None if tokens == "all" else domain.rows
    before = checked_plain(decomposition, domain)
    room = matrix_budget(decomposition, domain, before, budget, rows)
    factors = {s: (decomposition[s].V.detach()[:, c], decomposition[s].U.detach()[c]) for s, c in allowed.items()}
    directions = ordered(domain, factors, allowed)
    found = {}
    for kept in allocations(decomposition, directions, room, allocation):
        matrices = directions.kept(kept, whole_matrices(decomposition, domain))
        if refit:
            matrices = {site: refitted(m, decomposition[site].target_weight.detach(), domain.moments[site])
                        for site, m in matrices.items()}  # fmt: skip
        model = plain_copy(decomposition, matrices, tokens=rows, cut_below=cut_below)
        names = {s: None if k is None else tuple(sorted(directions.numbers[s][:k].tolist())) for s, k in kept.items()}
        found[mean_loss(model, domain.rows[:_MEASURED_ON])] = model, names
    model, names = found[min(found)]
    if steps:
        distil(model, decomposition.host.forward, domain.rows, steps=steps, seed=seed)
    return Specialist(model, before, decomposition, names, exact=not (refit or steps or cut_below or rows is not None))


def checked_plain(decomposition: Decomposition, domain: Domain) -> PlainTransformer:
    """The whole model as a plain transformer; ValueError if its logits on rows of the domain are not the model's."""
    plain, some = plain_copy(decomposition), domain.rows[:2]
    with torch.no_grad():
        expected, got = decomposition.clean_pass(some).output, plain(some)
    off = float((got.double() - expected.double()).abs().max())
    allowed = _ROUNDINGS * torch.finfo(expected.dtype).eps * float(expected.abs().max())
    if off > allowed:
        raise ValueError(
            f"written as a plain transformer this {type(decomposition.model).__name__} gives other logits (off by "
            f"{off:.3g}, rounding explains {allowed:.3g}): it has a part that a plain transformer does not have"
        )
    return plain


def matrix_budget(
    decomposition: Decomposition, domain: Domain, whole: PlainTransformer, budget: int | float, tokens: Tensor | None
) -> int:
    """How many of the budget's parameters are left for the matrices that shrink. ValueError if none are."""
    shrinks = sum(decomposition[site].target_weight.numel() for site in domain.sites)
    largest = sum(p.numel() for p in whole.parameters())
    start = whole if tokens is None else plain_copy(decomposition, tokens=tokens)
    fixed = sum(p.numel() for p in start.parameters()) - shrinks
    share = isinstance(budget, float)
    most = (
        int(given_number("budget", budget, above=0.0, most=1.0) * largest)
        if share
        else given_whole("budget", budget, least=1, of="parameters, or a share of the model's: a float below 1")
    )
    if not fixed < most < largest:
        asked = f"budget={budget}" + (f", {most:,} parameters" if share else "")
        smallest = "even without a single subcomponent" if most <= fixed else "as it is"
        size = fixed if most <= fixed else largest
        raise ValueError(
            f"{asked}: {smallest} the model has {size:,} parameters, whole it has {largest:,}; expected a budget "
            f"between {fixed + 1:,} ({(fixed + 1) / largest:.3f}) and {largest - 1:,}"
            + ("" if tokens is not None else "; tokens='domain' leaves embedding rows out")
        )
    return most - fixed


def whole_matrices(decomposition: Decomposition, domain: Domain) -> dict[str, Tensor]:
    """The sites' own matrices."""
    return {site: decomposition[site].target_weight.detach() for site in domain.sites}


def allocations(decomposition: Decomposition, directions: Directions, room: int, allocation: Allocation) -> list[Kept]:
    """One or two ways to share out the parameters."""
    shapes = {
        s: (decomposition[s].target_weight.shape[0], decomposition[s].target_weight.shape[1]) for s in directions.V
    }
    found = []
    if allocation != "uniform":
        found.append(effect_allocation(directions.worth, shapes, room))
    if allocation != "effect":
        found.append(uniform_allocation(shapes, room))
    return found


def refitted(matrix: SmallMatrix, W: Float[Tensor, "d_in d_out"], moments: Float[Tensor, "d_in d_in"]) -> SmallMatrix:
    """`A @ B` with the B that brings `x A B` nearest to `x W`, least squares over the domain's inputs."""
    if matrix.B is None or matrix.rank == 0:
        return matrix
    A = matrix.A.double()
    # Kept directions may depend on each other, and inputs may not reach all of them.
    inverse = torch.linalg.pinv(A.T @ moments @ A, rtol=1e-10, hermitian=True)
    return SmallMatrix(matrix.A, (inverse @ (A.T @ moments @ W.double())).to(W.dtype))


def _allowed(decomposition: Decomposition, domain: Domain, ids: Ids) -> dict[str, Tensor]:
    """Numbers of the subcomponents that may be kept, for every site that shrinks."""
    everywhere = decomposition.device
    if ids is None:
        return {s: torch.arange(decomposition[s].n_subcomponents, device=everywhere) for s in domain.sites}
    units = units_of(decomposition, ids)
    chosen = {s: sorted({c for unit in units for c in unit.ids_at(s)}) for s in domain.sites}
    return {site: torch.tensor(c, dtype=torch.long, device=everywhere) for site, c in chosen.items()}
