"""What the residual MLP experiments need besides those of TMS: targets, their basis, and where training starts.

The residual stream has 1000 directions, of which 100 to 136 are ever used. `in_used_directions` writes a target in
an orthonormal basis of these. Its function, hidden activations and all masked passes stay what they are, a step of
one block takes 13 ms instead of 30, and nothing in a report changes. What is lost is the part of `W_in` that no input
ever meets; no data could decompose it. Adam does depend on the basis: which minimum it finds may differ.

One coefficient of minimality does not fit both kinds of matrices: a subcomponent of `W_in` carries a whole feature,
one of `W_out` about a fiftieth of it. `Experiment.stages` therefore train them apart first, and then together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens import Decomposition
from spd_lens.core import ScalarGate
from spd_lens.toys import ONE_HOT_ALIVE, ResidMLP, SparseFeatures, one_hot_inputs, train_resid_mlp

D_RESID = 1000
# Inputs to choose starting subcomponents from, for each subcomponent; singular values that are left out of a start,
# relative to the largest; length of the spare subcomponents of `W_out` beside that of the others.
CANDIDATES_PER_PIECE, RTOL, SPARE = 10, 0.05, 0.02
FAR_AHEAD = 2**40
# Recruiting: batches that are looked at, and the cosine of inputs above which they are alike.
RECRUITING_BATCHES, ALIKE = 10, 0.5


# -- targets ---------------------------------------------------------------------------------------------------------


def train_resid_mlps(
    n_features: int, n_layers: int, d_mlp: int, seeds: Sequence[int], *, steps: int, d_resid: int = D_RESID
) -> list[ResidMLP]:
    """One trained target per seed, in the directions it uses."""
    targets = []
    for seed in seeds:
        model = ResidMLP(n_features, d_resid, n_layers, d_mlp, seed=seed)
        train_resid_mlp(model, steps=steps, seed=seed)
        targets.append(in_used_directions(model, seed=seed))
    return targets


def n_used_directions(n_features: int, n_layers: int, d_mlp: int) -> int:
    """Directions of the residual stream that something reads: of the embedding, and of all `W_out` but the last."""
    return n_features + (n_layers - 1) * d_mlp


@torch.no_grad()
def in_used_directions(model: ResidMLP, *, seed: int = 0) -> ResidMLP:
    """The same network with as many residual directions as are used, in a random orthonormal basis of them.

    With `Q [d_resid k]` such a basis: `W_E Q`, `Q^T W_in`, `W_out Q`. Every residual stream `r` becomes `r Q`, and
    `r W_in` stays. Raises ValueError if the model has fewer directions than it could use.
    """
    size, earlier = model.cfg, [mlp.W_out for mlp in model.mlps()[:-1]]
    used = torch.cat([model.W_E, *earlier]).double()
    if len(used) > size.d_resid:
        raise ValueError(f"d_resid={size.d_resid}; expected at least {len(used)}, the directions that can be used")
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(len(used), len(used), generator=generator, dtype=torch.float64)
    Q = torch.linalg.qr(used.T)[0] @ torch.linalg.qr(mixing)[0]
    small = ResidMLP(size.n_features, len(used), size.n_layers, size.d_mlp)
    small.W_E.copy_(model.W_E.double() @ Q)
    for ours, theirs in zip(small.mlps(), model.mlps(), strict=True):
        ours.W_in.copy_(Q.T @ theirs.W_in.double())
        ours.W_out.copy_(theirs.W_out.double() @ Q)
    return small


@torch.no_grad()
def resid_mlp_problems(model: ResidMLP) -> tuple[str, ...]:
    """Why a trained target is rejected; empty if it is not.

    What it adds to feature i on a one-hot input, `y_i - x_i`, must be more than half of the largest among the
    features: a network that spends each neuron on one feature leaves the others at 0.
    """
    x = one_hot_inputs(model.cfg.n_features)
    added = (model(x) - x).diagonal()
    given_up = (added <= 0.5 * added.max()).nonzero().flatten().tolist()
    return (f"features {given_up} were not learned: under half of the largest response",) if given_up else ()


# -- where training starts -------------------------------------------------------------------------------------------


@torch.no_grad()
def start(decomposition: Decomposition, data: SparseFeatures, seed: int) -> None:
    """Set V and U of every site of an untrained decomposition: `W_in` from inputs, `W_out` from a basis."""
    generator = torch.Generator().manual_seed(seed)
    wanted = CANDIDATES_PER_PIECE * max(weight.V.shape[1] for weight in decomposition.values())
    # Batches that training does not come to.
    x = torch.cat([data.batch(FAR_AHEAD + i) for i in range(-(-wanted // data.batch_size))])
    inputs = decomposition.clean_pass(x).inputs
    for name, weight in decomposition.items():
        C = weight.V.shape[1]
        if name.endswith("W_in"):
            V, U = from_inputs(inputs[name][: CANDIDATES_PER_PIECE * C], weight.target_weight, C)
        else:
            V, U = from_basis(weight.target_weight, C, generator)
        weight.V.copy_(V)
        weight.U.copy_(U)


def from_inputs(
    x: Float[Tensor, "rows d_in"], W: Float[Tensor, "d_in d_out"], C: int
) -> tuple[Float[Tensor, "d_in C"], Float[Tensor, "C d_out"]]:
    """`V[:, c]` along one input each, the inputs as unlike each other as possible; `V U = W` by least squares.

    Inputs are taken farthest first: the next one has the smallest largest `|cos|` with those before. Of sparse data
    these are inputs with other features, and sooner or later the features one by one. Inputs of zeros are left out.
    """
    x = x[x.any(dim=1)]
    if len(x) < C:
        raise ValueError(f"{len(x)} inputs that are not zero; expected at least C={C}")
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    chosen, nearest = [0], (unit @ unit[0]).abs()
    while len(chosen) < C:
        chosen.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, (unit @ unit[chosen[-1]]).abs())
    V = unit[chosen].T
    U = torch.linalg.pinv(V, rtol=RTOL) @ W.double()
    lengths = U.norm(dim=1).clamp_min(RTOL * U.norm(dim=1).max())
    return (V * lengths).to(W), (U / lengths[:, None]).to(W)


@torch.no_grad()
def recruit(decomposition: Decomposition, data: SparseFeatures, seed: int) -> None:
    """Start the subcomponents of `W_in`s that nothing uses again, where inputs are served worst; between stages.

    Two features that share a subcomponent are a local minimum: no other is on for them, so that none learns. With
    importances as masks and without the delta the site's output has the error `e = x W - ((x V) * g) U`. Unused
    subcomponents get `V = x / |x|` and `U = e / |x|` of the inputs with the longest errors, no two with `|cos|` over
    `ALIKE`, and gates as before the first step. Those that are not needed (the feature may rightly be off there: the
    ReLU hides it) go out again.
    """
    x = torch.cat([data.batch(2 * FAR_AHEAD + i) for i in range(RECRUITING_BATCHES)])
    inputs, importances = decomposition.clean_pass(x).inputs, decomposition.importance(x)
    for number, (name, weight) in enumerate(decomposition.items()):
        if not name.endswith("W_in"):
            continue
        on = inputs[name].any(dim=1)
        rows, g, gate = inputs[name][on], importances[name][on], weight.gate
        assert isinstance(gate, ScalarGate)
        error = rows @ weight.target_weight - ((rows @ weight.V) * g) @ weight.U
        unused = (g <= ONE_HOT_ALIVE).all(dim=0).nonzero().flatten()
        unit = torch.nn.functional.normalize(rows, dim=1)
        taken: list[int] = []
        for row in error.norm(dim=1).argsort(descending=True).tolist():
            if len(taken) == len(unused):
                break
            if not taken or float((unit[taken] @ unit[row]).abs().max()) <= ALIKE:
                taken.append(row)
        chosen = unused[: len(taken)]
        weight.V[:, chosen] = unit[taken].T
        weight.U[chosen] = error[taken] / rows[taken].norm(dim=1, keepdim=True)
        C, width = gate.w_in.shape
        fresh = ScalarGate(C, width, torch.Generator().manual_seed(seed + number))
        for own, first in zip(gate.parameters(), fresh.parameters(), strict=True):
            own[chosen] = first[chosen].to(own)


def from_basis(
    W: Float[Tensor, "d_in d_out"], C: int, generator: torch.Generator
) -> tuple[Float[Tensor, "d_in C"], Float[Tensor, "C d_out"]]:
    """As many subcomponents as the rank of W can be, along a random orthonormal basis of its smaller side, that sum to
    W; the others random and short, free to grow."""
    d_in, d_out = W.shape
    rank = min(d_in, d_out)
    if rank > C:
        raise ValueError(f"C={C}; expected at least {rank}, the smaller side of the matrix")
    Q = torch.linalg.qr(torch.randn(rank, rank, generator=generator))[0].to(W)
    V = torch.nn.functional.normalize(torch.randn(d_in, C, generator=generator), dim=0).to(W)
    U = torch.nn.functional.normalize(torch.randn(C, d_out, generator=generator), dim=1).to(W)
    U = SPARE * W.norm() / rank**0.5 * U
    if d_in <= d_out:
        V[:, :rank], U[:rank] = Q, Q.T @ W
    else:
        V[:, :rank], U[:rank] = W @ Q, Q.T
    return V, U
