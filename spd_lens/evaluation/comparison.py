"""Do two decompositions of the same weights find the same subcomponents (E11)?

For every site and every alive subcomponent of one decomposition, the largest |cosine| with an alive subcomponent of the
other, averaged, and averaged over both directions: MMCS, of the columns of `V`, of the rows of `U`, and of the rank-one
matrices `V[:, c] U[c, :]` (whose cosine is the product of the other two, sign included). Each stands beside the same
number for random subcomponents of the same shapes in the place of the other decomposition: in few dimensions random
directions look similar, too. Matched pairs come from the Hungarian method on the rank-one cosines.

Cost: products of the V's and U's, and one clean pass per batch and decomposition to see what is alive.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.inputs import checked_decomposition
from spd_lens.core.units import ALIVE_ABOVE
from spd_lens.data.batches import Batch
from spd_lens.data.streams import first_batches
from spd_lens.evaluation.held import hold
from spd_lens.evaluation.site_report import ImportanceSums
from spd_lens.support.given import given_seed
from spd_lens.support.names import near_names
from spd_lens.support.tables import format_table

# Random controls are averaged over this many draws.
DRAWS = 4
# Rank-one cosine from which two subcomponents are counted as the same.
SAME_ABOVE = 0.9


@dataclass(frozen=True)
class MatchedPair:
    """Subcomponent `a` of one decomposition and `b` of the other, with the cosines of their rank-one matrices, of V and
    of U (the last two up to a common sign)."""

    a: int
    b: int
    cosine: float
    cosine_V: float
    cosine_U: float


@dataclass(frozen=True)
class SiteComparison:
    """One site: MMCS of `V`, `U` and the rank-one matrices, their values for random ones, and the matched pairs,
    closest first. `alive` counts those compared, of each decomposition."""

    alive: tuple[int, int]
    mmcs: dict[str, float]
    mmcs_random: dict[str, float]
    pairs: tuple[MatchedPair, ...]

    @property
    def same(self) -> float:
        """Share of the smaller set that has a match with a rank-one cosine above 0.9."""
        return sum(pair.cosine > SAME_ABOVE for pair in self.pairs) / max(1, len(self.pairs))


@dataclass(frozen=True)
class Comparison:
    """What `compare` found, by site; `str(comparison)` is the table."""

    sites: dict[str, SiteComparison]
    only_alive: bool

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def _table(self) -> tuple[list[str], list[list[str]]]:
        header = ["site", "compared", "MMCS V", "U", "rank-one", f"matched above {SAME_ABOVE:g}"]
        rows = []
        for name, site in self.sites.items():
            both = [f"{site.mmcs[k]:.3f} ({site.mmcs_random[k]:.3f})" for k in ("V", "U", "rank_one")]
            rows.append([name, f"{site.alive[0]} and {site.alive[1]}", *both, f"{site.same:.0%}"])
        return header, rows

    def _note(self) -> str:
        which = f"importance above {ALIVE_ABOVE:g} somewhere in the data" if self.only_alive else "all subcomponents"
        return f"compared: {which}; in brackets: random subcomponents of the same shapes"

    def __str__(self) -> str:
        header, rows = self._table()
        return f"{format_table(header, rows)}\n\n{self._note()}"

    def __repr__(self) -> str:
        parts = [f"{name}: {site.mmcs['rank_one']:.3f}" for name, site in self.sites.items()]
        return f"Comparison(MMCS of rank-one matrices {{{', '.join(parts)}}})"

    def _repr_html_(self) -> str:
        header, rows = self._table()
        head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p>{escape(self._note())}</p>"


@torch.no_grad()
def compare(
    a: Decomposition,
    b: Decomposition,
    batches: Any = None,
    *,
    max_batches: int = 8,
    seed: int = 0,
) -> Comparison:
    """MMCS and matched pairs of two decompositions of equal weights (two seeds, two runs).

    With `batches` only what is alive on them is compared: dead subcomponents are whatever they started as. Sites with
    tied weights count once. Raises ValueError for other sites or other weights.
    """
    for decomposition in (a, b):
        checked_decomposition(decomposition, "compare")
    seed = given_seed(seed)
    names = _common_sites(a, b)
    if batches is None:
        alive = [{name: torch.ones(d[name].n_subcomponents, dtype=torch.bool) for name in names} for d in (a, b)]
    else:
        chosen = list(first_batches(batches, a, max_batches, purpose="see what is alive on"))
        alive = [_alive_on(d, chosen) for d in (a, b)]
    generator = torch.Generator().manual_seed(seed)
    sites = {}
    for name in names:
        factors = []
        for decomposition, own in zip((a, b), alive, strict=True):
            kept = own[name].cpu()
            V, U = decomposition[name].V.detach(), decomposition[name].U.detach()
            factors.append((V.double().cpu()[:, kept].T, U.double().cpu()[kept], kept.nonzero().squeeze(1).tolist()))
        sites[name] = _compare_site(factors[0], factors[1], generator)
    return Comparison(sites, only_alive=batches is not None)


def _common_sites(a: Decomposition, b: Decomposition) -> list[str]:
    if set(a) != set(b):
        odd = sorted(set(a) ^ set(b))
        raise ValueError(
            f"the decompositions have different sites: {odd[:4]} in one alone; both have: "
            f"{near_names(odd[0], sorted(set(a) & set(b)))}"
        )
    for name in a:
        W, other = a[name].target_weight, b[name].target_weight
        if W.shape != other.shape or not torch.allclose(W.cpu().float(), other.cpu().float(), rtol=1e-4, atol=1e-6):
            raise ValueError(f"{name} has other weights in the two models; compare decompositions of the same target")
    return [name for name in a if a[name].tied_to is None]


def _alive_on(decomposition: Decomposition, batches: Iterable[Batch]) -> dict[str, Bool[Tensor, " _"]]:
    """As in `evaluate`: by the positions that count."""
    sums = {name: ImportanceSums(w.n_subcomponents, decomposition.device) for name, w in decomposition.items()}
    for batch in batches:
        held = hold(decomposition, batch, "mse")
        for name, g in held.importances.items():
            sums[name].add(g, held.counted)
    return {name: own.alive for name, own in sums.items()}


def _compare_site(
    a: tuple[Tensor, Tensor, list[int]], b: tuple[Tensor, Tensor, list[int]], generator: torch.Generator
) -> SiteComparison:
    """One site, from the rows of `V.T` and `U` that are compared, and their ids."""
    (Va, Ua, ids_a), (Vb, Ub, ids_b) = a, b
    if not ids_a or not ids_b:
        nothing = {"V": 0.0, "U": 0.0, "rank_one": 0.0}
        return SiteComparison((len(ids_a), len(ids_b)), nothing, nothing, ())
    cosines_V, cosines_U = _cosines(Va, Vb), _cosines(Ua, Ub)
    rank_one = cosines_V * cosines_U
    draws = []
    for _ in range(DRAWS):
        forth = _mmcs(_cosines(Va, _like(Vb, generator)), _cosines(Ua, _like(Ub, generator)), directions=(1,))
        back = _mmcs(_cosines(Vb, _like(Va, generator)), _cosines(Ub, _like(Ua, generator)), directions=(1,))
        draws.append({k: (forth[k] + back[k]) / 2 for k in forth})
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(rank_one.numpy(), maximize=True)
    pairs = [
        MatchedPair(ids_a[i], ids_b[j], float(rank_one[i, j]), float(cosines_V[i, j]), float(cosines_U[i, j]))
        for i, j in zip(rows.tolist(), columns.tolist(), strict=True)
    ]
    return SiteComparison(
        alive=(len(ids_a), len(ids_b)),
        mmcs=_mmcs(cosines_V, cosines_U),
        mmcs_random={k: sum(draw[k] for draw in draws) / DRAWS for k in draws[0]},
        pairs=tuple(sorted(pairs, key=lambda pair: -pair.cosine)),
    )


def _mmcs(cosines_V: Tensor, cosines_U: Tensor, directions: tuple[int, ...] = (0, 1)) -> dict[str, float]:
    """Mean of the largest cosine, over both directions. V and U alone are known up to sign, their product is not."""
    of = {"V": cosines_V.abs(), "U": cosines_U.abs(), "rank_one": cosines_V * cosines_U}
    return {k: sum(float(c.amax(dim).mean()) for dim in directions) / len(directions) for k, c in of.items()}


def _cosines(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    return torch.nn.functional.normalize(x, dim=1) @ torch.nn.functional.normalize(y, dim=1).T


def _like(x: Float[Tensor, "n d"], generator: torch.Generator) -> Float[Tensor, "n d"]:
    return torch.randn(x.shape, generator=generator, dtype=x.dtype)
