"""`specialise`: a smaller model of the subcomponents that a domain needs.

For every matrix of a block the kept subcomponents S replace the whole: `W' = V_S U_S`, stored as two narrow factors
where these are fewer numbers, and as the untouched W where they are not. What is not kept, the delta with it, is gone.
What is kept is chosen by what removing it costs on the domain (`Domain.effects`), per parameter. With
`write="whitened"` more are kept than there is room for, and what they sum to is written with fewer directions.

Cost: a few passes over the domain's rows, one copy of the model's numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.inputs import checked_decomposition
from spd_lens.core.units import Ids, units_of
from spd_lens.specialists.candidate import Allocation, Candidate, Write, candidates
from spd_lens.specialists.costs import mean_loss
from spd_lens.specialists.directions import ordered
from spd_lens.specialists.distilling import distil
from spd_lens.specialists.domain import Domain, domain_of
from spd_lens.specialists.plain_transformer import PlainTransformer
from spd_lens.specialists.specialist import Specialist
from spd_lens.specialists.writing import plain_copy
from spd_lens.support.given import given_number, given_one_of, given_seed, given_whole

Tokens = Literal["all", "domain"]
# Rows of the domain that choices are measured on.
MEASURED_ON = 16
# Of the logits' scale: how far the plain model may be off, in the dtype's roundings, and in any dtype.
_ROUNDINGS, _AT_MOST = 2_000, 0.1


def specialise(
    decomposition: Decomposition,
    domain_batches: Any,
    budget: int | float,
    *,
    ids: Ids = None,
    write: Write = "subcomponents",
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
    - `write`: "subcomponents", the kept ones are the small model's factors: it computes what the decomposed one does
      that keeps S alone. "refitted": what they write is fitted anew, so that on the domain `x V_S B` is as near to
      `x W` as it can be. "whitened": S is larger than what fits, how large is measured, and `V_S U_S` is written with
      the best of the directions that it falls into on the domain (`whitened_factors`): the lowest loss, but no factor
      is a subcomponent.
    - `allocation`: how many each matrix keeps: "effect", what pays most; "uniform", the same share of each; "measured",
      whichever of the two has the lower loss on the domain.
    - `tokens`: "domain" leaves out the embedding rows of tokens that the domain never uses.
    - `cut_below`: heads and neurons whose weights are below this share of the largest are left out; 0: those at zero.
    - `distil_steps`: steps of distillation from the model on the domain afterwards.

    Raises ValueError for an impossible budget (with the smallest possible one), unknown sites and ids, units of another
    decomposition, a decomposition that was removed, and models that are no plain causal transformer.
    """
    checked_decomposition(decomposition, "specialise")
    given_one_of("write", write, get_args(Write))
    given_one_of("allocation", allocation, get_args(Allocation))
    given_one_of("tokens", tokens, get_args(Tokens))
    cut_below = given_number("cut_below", cut_below, least=0.0, most=1.0)
    steps, seed = given_whole("distil_steps", distil_steps, least=0), given_seed(seed)
    domain = domain_of(decomposition, domain_batches, seed=seed)
    allowed = _allowed(decomposition, domain, ids)
    rows = None if tokens == "all" else domain.rows
    before = checked_plain(decomposition, domain)
    room = matrix_budget(decomposition, domain, before, budget, rows)
    factors = {s: (decomposition[s].V.detach()[:, c], decomposition[s].U.detach()[c]) for s, c in allowed.items()}
    directions = ordered(domain, factors, allowed)
    offered = candidates(domain, directions, whole_matrices(decomposition, domain), room, allocation, write)
    model, taken = best_model(decomposition, domain, offered, tokens=rows, cut_below=cut_below)
    if steps:
        distil(model, decomposition.host.forward, domain.rows, steps=steps, seed=seed)
    names = {s: None if n is None else tuple(sorted(directions.numbers[s][:n].tolist()))
             for s, n in taken.chosen.items()}  # fmt: skip
    exact = write == "subcomponents" and not (steps or cut_below or rows is not None)
    return Specialist(
        model, before, decomposition, names, exact=exact, ranks={s: m.rank for s, m in taken.matrices.items()}
    )


def best_model(
    decomposition: Decomposition,
    domain: Domain,
    offered: Iterable[Candidate],
    *,
    tokens: Tensor | None = None,
    cut_below: float = 0.0,
    measured_on: int = MEASURED_ON,
) -> tuple[PlainTransformer, Candidate]:
    """The candidate with the lowest loss on the first `measured_on` rows of the domain, and its model.

    No more than two models are held at once.
    """
    best: tuple[PlainTransformer, Candidate] | None = None
    lowest = float("inf")
    for one in offered:
        model = plain_copy(decomposition, one.matrices, tokens=tokens, cut_below=cut_below)
        loss = mean_loss(model, domain.rows[:measured_on])
        if best is None or loss < lowest:
            best, lowest = (model, one), loss
    assert best is not None
    return best


def checked_plain(decomposition: Decomposition, domain: Domain) -> PlainTransformer:
    """The whole model as a plain transformer; ValueError if its logits on rows of the domain are not the model's."""
    plain, some = plain_copy(decomposition), domain.rows[:2]
    with torch.no_grad():
        expected, got = decomposition.clean_pass(some).output, plain(some)
    off = float((got.double() - expected.double()).abs().max())
    allowed = min(_ROUNDINGS * torch.finfo(expected.dtype).eps, _AT_MOST) * float(expected.double().abs().max())
    if not off <= allowed:
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
    # With the heads and neurons that are cut in the end: `shrinks` counts their numbers, too.
    start = plain_copy(decomposition, tokens=tokens, cut_below=None)
    fixed = sum(p.numel() for p in start.parameters()) - shrinks
    if getattr(budget, "ndim", None) == 0:  # numpy's numbers, and tensors without axes
        budget = budget.item()  # pyright: ignore[reportAttributeAccessIssue]
    share = isinstance(budget, float)
    if share and 1 < budget < float("inf"):
        raise ValueError(f"budget={budget}; expected a whole number of parameters ({int(budget)}), or a share below 1")
    most = (
        int(given_number("budget", budget, above=0.0, most=1.0) * largest)
        if share
        else given_whole("budget", budget, least=1, of=" (of parameters; a share of the model's is a float below 1)")
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


def _allowed(decomposition: Decomposition, domain: Domain, ids: Ids) -> dict[str, Tensor]:
    """Numbers of the subcomponents that may be kept, for every site that shrinks."""
    everywhere = decomposition.device
    if ids is None:
        return {s: torch.arange(decomposition[s].n_subcomponents, device=everywhere) for s in domain.sites}
    units = units_of(decomposition, ids)
    chosen = {s: sorted({c for unit in units for c in unit.ids_at(s)}) for s in domain.sites}
    if not any(chosen.values()):
        named = sorted({site for unit in units for site in unit.sites})
        raise ValueError(
            f"ids names subcomponents of {', '.join(named[:4])} alone; only the matrices of blocks are made smaller: "
            f"name some of {', '.join(domain.sites[:4])} ..."
        )
    return {site: torch.tensor(c, dtype=torch.long, device=everywhere) for site, c in chosen.items()}
