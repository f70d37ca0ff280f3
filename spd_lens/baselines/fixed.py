"""Fixed subcomponents with trained gates: the decompositions a sceptic would ask for.

If any subcomponents that sum to W would do, gates trained on the usual losses should make sense of the singular vectors
of W, or of random subcomponents. They do not: neither has one per feature. The control are the rows of W, which are the
known solution of TMS: with them the same training of the gates meets all criteria, so what fails are the subcomponents.

`decompose_fixed` puts them in, `train_gates` trains gates alone. Both give an ordinary `Decomposition`, so every
report applies. Cost: that of `train_many`; the gradients of V and U are computed and come to nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spd_lens.core.decomposing import decompose
from spd_lens.core.decomposition import Decomposition
from spd_lens.core.gates import GateKind
from spd_lens.support.given import given_one_of, given_whole
from spd_lens.training.config import TrainConfig
from spd_lens.training.many import ManyResult, checked_members, train_many

FixedKind = Literal["svd", "random", "rows"]

# Far below the spacing of floating-point numbers around any entry of V and U, and not 0, which `TrainConfig` refuses.
NO_LR = 1e-30


def fixed_factors(
    W: Float[Tensor, "d_in d_out"], kind: FixedKind, n_subcomponents: int, seed: int = 0
) -> tuple[Float[Tensor, "d_in C"], Float[Tensor, "C d_out"]]:
    """`V, U` with `V @ U = W`, in float64.

    - `svd`: singular vectors, `V[:, c] = sqrt(s_c) left_c`, `U[c, :] = sqrt(s_c) right_c`, largest first.
    - `random`: the factor on the smaller side of W has random rows of unit length, the other solves `V U = W` with the
      smallest norm (`init="exact"` of `decompose`).
    - `rows`: `V[:, c]` is the c-th unit vector, `U[c, :]` the c-th row of W.

    Unused subcomponents are zero. Raises ValueError where C is below what the sum takes: `min(d_in, d_out)`, for rows
    `d_in`.
    """
    given_one_of("kind", kind, get_args(FixedKind))
    given_whole("n_subcomponents", n_subcomponents, least=1)
    W = W.detach().double().cpu()
    d_in, d_out = W.shape
    least = d_in if kind == "rows" else min(d_in, d_out)
    if n_subcomponents < least:
        raise ValueError(
            f"n_subcomponents={n_subcomponents}; subcomponents of kind {kind!r} sum to a {d_in} x {d_out} matrix from "
            f"{least} on"
        )
    match kind:
        case "svd":
            left, s, right = torch.linalg.svd(W, full_matrices=False)
            return _padded(left * s.sqrt(), n_subcomponents, 1), _padded(s.sqrt()[:, None] * right, n_subcomponents, 0)
        case "rows":
            return torch.eye(d_in, n_subcomponents, dtype=W.dtype), _padded(W, n_subcomponents, 0)
        case "random":
            generator = torch.Generator().manual_seed(seed)
            thin = torch.randn(n_subcomponents, least, generator=generator, dtype=W.dtype)
            thin = thin / thin.norm(dim=1, keepdim=True)
            return (thin.T, torch.linalg.pinv(thin.T) @ W) if d_in <= d_out else (W @ torch.linalg.pinv(thin), thin)
    raise AssertionError(kind)


def decompose_fixed(
    model: nn.Module,
    n_subcomponents: Mapping[str, int],
    kind: FixedKind,
    *,
    gate: GateKind = "scalar",
    gate_width: int | None = None,
    seed: int = 0,
) -> Decomposition:
    """`decompose(model, n_subcomponents)` with `fixed_factors` in the place of random ones.

    Sites with tied weights share them. The gates are initialised from `seed`. Raises ValueError as `fixed_factors`; the
    model then keeps the decomposition with random subcomponents.
    """
    given_one_of("kind", kind, get_args(FixedKind))
    decomposition = decompose(model, n_subcomponents, gate=gate, gate_width=gate_width, seed=seed)
    with torch.no_grad():
        for index, weight in enumerate(decomposition.values()):
            if weight.tied_to is None:
                V, U = fixed_factors(weight.target_weight, kind, weight.n_subcomponents, seed * 1_000_003 + index)
                weight.V.copy_(V)
                weight.U.copy_(U)
    return decomposition


def train_gates(
    decompositions: Sequence[Decomposition],
    batches: Sequence[Iterable[Any]],
    configs: TrainConfig | Sequence[TrainConfig],
    *,
    out_dir: str | Path | None = None,
) -> ManyResult:
    """`train_many` with V and U held fixed, bit for bit; gates learn at `gate_lr`, or at `lr` where that is None.

    Their learning rate is so small that adding a step to a number leaves the number as it is (a zero would become
    1e-30; V and U are written back at the end). Faithfulness has nothing to train and is left out, with its warm-up.
    """
    decompositions = checked_members(decompositions, batches, configs)
    members = [configs] * len(decompositions) if isinstance(configs, TrainConfig) else list(configs)
    members = [
        m.changed(
            lr=NO_LR, gate_lr=m.lr if m.gate_lr is None else m.gate_lr, faithfulness=0.0, faithfulness_warmup=0,
            clip_subcomponents=None,
        )
        for m in members
    ]  # fmt: skip
    factors = [(p, p.detach().clone()) for d in decompositions for p in d.subcomponent_parameters()]
    result = train_many(decompositions, batches, members, out_dir=out_dir)
    with torch.no_grad():
        for p, before in factors:
            p.copy_(before)
    return result


def _padded(matrix: Tensor, length: int, dim: int) -> Tensor:
    """Zeros behind `matrix` along `dim`."""
    missing = list(matrix.shape)
    missing[dim] = length - missing[dim]
    return torch.cat([matrix, matrix.new_zeros(missing)], dim=dim)
