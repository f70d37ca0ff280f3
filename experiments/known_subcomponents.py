"""Subcomponents that sum to the target's matrices, made by hand: starts for training, and answers to compare with.

`singular_subcomponents`: singular vectors. `rotated_subcomponents`: a random orthonormal basis of the smaller side, so
a start that knows nothing of the matrix and is exact and well conditioned. `fourier_subcomponents`: the modular
addition model in the directions of its frequencies, or in directions that mix them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from spd_lens import Decomposition
from spd_lens.models import P, all_sums, fourier_reading

Subcomponents = dict[str, tuple[Tensor, Tensor]]
# Which directions stand for the key frequencies: each frequency's own (cos and sin, or singular directions); others
# of the same planes; others of all planes together. `rows`: as `aligned`, but one subcomponent per number in `W_E`.
FourierKind = Literal["aligned", "in planes", "across planes", "rows"]
# The neurons read four directions per frequency: those of both numbers, which the heads bring in different mixtures.
READ_PER_FREQUENCY = 4


@torch.no_grad()
def put_subcomponents(decomposition: Decomposition, subcomponents: Subcomponents) -> None:
    """Copy `V` and `U` in, scaled so that both have the same norm in every subcomponent; what is left of C becomes
    0."""
    for name, (V, U) in subcomponents.items():
        weight, (own_V, own_U) = decomposition[name], (decomposition[name].V, decomposition[name].U)
        if V.shape[1] > weight.n_subcomponents:
            raise ValueError(f"{name} has {weight.n_subcomponents} subcomponents; expected at least {V.shape[1]}")
        sizes = (U.norm(dim=1) / V.norm(dim=0).clamp_min(1e-12)).sqrt().clamp_min(1e-6)
        own_V.zero_()
        own_U.zero_()
        own_V[:, : V.shape[1]] = V * sizes
        own_U[: V.shape[1]] = U / sizes[:, None]


def singular_subcomponents(weights: Mapping[str, Tensor]) -> Subcomponents:
    """Singular vectors, largest first."""
    subcomponents = {}
    for name, W in weights.items():
        left, s, right = torch.linalg.svd(W.detach().double(), full_matrices=False)
        subcomponents[name] = (left * s, right)
    return subcomponents


def rotated_subcomponents(weights: Mapping[str, Tensor], seed: int = 0) -> Subcomponents:
    """`V = Q, U = Q^T W` with a random orthogonal Q where `d_in <= d_out`, else `V = W Q^T, U = Q`."""
    subcomponents = {}
    for index, (name, W) in enumerate(weights.items()):
        W, Q = W.detach().double(), _rotation(min(W.shape), seed * 1_000_003 + index)
        subcomponents[name] = (Q, Q.T @ W) if W.shape[0] <= W.shape[1] else (W @ Q.T, Q)
    return subcomponents


@torch.no_grad()
def fourier_subcomponents(model: Any, kind: FourierKind, seed: int = 0) -> Subcomponents:
    """Subcomponents of `W_E`, `W_in` and `W_out` of the modular addition model whose first ones hold its key
    frequencies.

    - `W_E`, two directions per frequency: `V` is the Fourier basis over the numbers (and the "=" by itself),
      `U = V^T W_E`.
    - `W_in`, four per frequency: the residual at "=" is fitted by a constant and, for every key frequency, all
      products `f(a) g(b)` of `1, cos, sin`; the four largest singular directions of a frequency's coefficients, the
      constant's and an orthonormal complement are a basis, rows of B: `V = B^-1, U = B W_in`.
    - `W_out`, two per frequency: what the unembedding reads `cos(w c)`, `sin(w c)` from, and an orthonormal
      complement, are the columns of G: `V = W_out G, U = G^-1`.

    With `kind` these directions are rotated (see `FourierKind`); the sum stays the matrix in every case.
    """
    keys = fourier_reading(model).key_frequencies
    rest = [k for k in range(1, (P - 1) // 2 + 1) if k not in keys]
    numbers = torch.cat([_waves([*keys, *rest]), torch.ones(P, 1).double()], dim=1)
    basis = torch.block_diag(numbers / numbers.norm(dim=0), torch.ones(1, 1).double())
    read = _directions_read(model, keys)
    written = model.W_U.double() @ _waves(keys)
    written = torch.cat([written, _complement(written.T).T], dim=1)
    for index, (rows, size) in enumerate(((basis.T, 2), (read, READ_PER_FREQUENCY), (written.T, 2))):
        n_key = size * len(keys)
        rows[:n_key] = _turn(kind, len(keys), size, seed + index) @ rows[:n_key]
    if kind == "rows":
        basis = torch.eye(P + 1).double()
    return {
        "embed.W_E": (basis, basis.T @ model.W_E.double()),
        "blocks.0.mlp.W_in": (torch.linalg.inv(read), read @ model.W_in[0].double()),
        "blocks.0.mlp.W_out": (model.W_out[0].double() @ written, torch.linalg.inv(written)),
    }


def _directions_read(model: Any, keys: Sequence[int]) -> Tensor:
    """The basis of the residual at "=", as rows: frequency after frequency, the constant, the complement."""
    sums = all_sums()
    _, cache = model.run_with_cache(sums, names_filter="blocks.0.hook_resid_mid")
    residual = cache["blocks.0.hook_resid_mid"][:, -1].double()
    one = torch.ones(P, 1).double()
    products = []
    for k in keys:
        of_number = torch.cat([one, _waves([k])], dim=1)
        pairs = of_number[sums[:, 0], :, None] * of_number[sums[:, 1], None, :]
        products.append(pairs.flatten(1)[:, 1:])
    known = torch.cat([*products, torch.ones(len(sums), 1).double()], dim=1)
    fitted = torch.linalg.lstsq(known / known.norm(dim=0), residual).solution
    rows = []
    for own in fitted[:-1].chunk(len(keys)):
        _, s, right = torch.linalg.svd(own, full_matrices=False)
        rows.append((s[:, None] * right)[:READ_PER_FREQUENCY])
    read = torch.cat([*rows, fitted[-1:]])
    return torch.cat([read, _complement(read)])


def _turn(kind: FourierKind, n_frequencies: int, size: int, seed: int) -> Tensor:
    match kind:
        case "aligned" | "rows":
            return torch.eye(size * n_frequencies).double()
        case "in planes":
            return torch.block_diag(*(_rotation(size, 10 * seed + i) for i in range(n_frequencies)))
        case "across planes":
            return _rotation(size * n_frequencies, seed)
    raise ValueError(f"kind={kind!r}; expected 'aligned', 'in planes', 'across planes' or 'rows'")


def _waves(frequencies: Sequence[int]) -> Tensor:
    """`cos(2 pi k n / P), sin(2 pi k n / P)` as columns, frequency after frequency."""
    n = torch.arange(P).double()
    return torch.stack([f(2 * math.pi * k * n / P) for k in frequencies for f in (torch.cos, torch.sin)], dim=1)


def _complement(rows: Tensor) -> Tensor:
    """Orthonormal rows that span what `rows` do not."""
    return torch.linalg.svd(rows, full_matrices=True).Vh[len(rows) :]


def _rotation(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
