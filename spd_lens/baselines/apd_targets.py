"""What APD needs of a toy: its matrices, and a pure function of them that gives what has to be reproduced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from spd_lens.toys.features import SparseFeatures, resid_mlp_features, tms_features
from spd_lens.toys.resid_mlp import ResidMLP
from spd_lens.toys.tms import TMS

# Tensors by the name of their matrix.
Matrices = dict[str, Tensor]


@dataclass(frozen=True)
class Target:
    """A toy as APD sees it.

    `forward(matrices, constants, x)` is a pure function that gives what a sparse pass has to reproduce, by the name of
    the loss: the outputs as `"minimality"`, and activations after a ReLU as `"hidden"`. `derivatives(matrices, P,
    constants, x)` are those of the outputs in the directions `P [C d_in d_out]`, `sum_theta df_o/dtheta * P_c`, as
    `[C batch d_out]`. `matrices` are the decomposed ones. A constant `"read NAME"` or `"write NAME"` is a fixed matrix
    before or behind NAME; both functions take the product of the three, so a wide residual stream costs nothing per
    input.
    """

    matrices: Matrices
    constants: Matrices
    forward: Callable[[Matrices, Matrices, Tensor], dict[str, Tensor]]
    derivatives: Callable[[Matrices, Matrices, Matrices, Tensor], Tensor]
    features: Callable[..., SparseFeatures]
    n_features: int


def target_of(model: TMS | ResidMLP) -> Target:
    """The decomposed matrices of a toy, detached; ValueError for +ID and for a residual MLP of several blocks."""
    if isinstance(model, TMS):
        if model.has_identity:
            raise ValueError("this TMS has a matrix in the middle (+ID); APD is implemented for TMS without it")
        return Target({"W": model.W.detach()}, {"b": model.b.detach()}, _tms_forward, _tms_derivatives, tms_features,
                      model.n_features)  # fmt: skip
    if model.cfg.n_layers != 1:
        raise ValueError(f"this residual MLP has {model.cfg.n_layers} blocks; APD is implemented for one")
    mlp, W_E = model.mlps()[0], model.W_E.detach()
    matrices = {"W_in": mlp.W_in.detach(), "W_out": mlp.W_out.detach()}
    constants = {"read W_in": W_E, "write W_out": W_E.T, "skip": W_E @ W_E.T}
    forward, derivatives = _resid_mlp_forward, _resid_mlp_derivatives
    return Target(matrices, constants, forward, derivatives, resid_mlp_features, model.cfg.n_features)


def _tms_forward(matrices: Matrices, constants: Matrices, x: Tensor) -> dict[str, Tensor]:
    return {"minimality": torch.relu(x @ matrices["W"] @ matrices["W"].mT + constants["b"])}


def _tms_derivatives(matrices: Matrices, P: Matrices, constants: Matrices, x: Tensor) -> Tensor:
    """`[f > 0] * x (P_c W^T + W P_c^T)`: W is used twice."""
    W, half = matrices["W"], P["W"] @ matrices["W"].mT
    return (x @ (half + half.mT)) * (x @ W @ W.mT + constants["b"] > 0)


def _resid_mlp_forward(matrices: Matrices, constants: Matrices, x: Tensor) -> dict[str, Tensor]:
    h = torch.relu(x @ matrices["W_in"])
    return {"minimality": x @ constants["skip"] + h @ matrices["W_out"], "hidden": h}


def _resid_mlp_derivatives(matrices: Matrices, P: Matrices, constants: Matrices, x: Tensor) -> Tensor:
    """`([h > 0] * (x P_c[W_in])) W_out + h P_c[W_out]`."""
    pre = x @ matrices["W_in"]
    return ((x @ P["W_in"]) * (pre > 0)) @ matrices["W_out"] + torch.relu(pre) @ P["W_out"]


def between_features(name: str, matrix: Tensor, constants: Matrices) -> Tensor:
    """`read @ matrix @ write`, what `forward` takes."""
    if f"read {name}" in constants:
        matrix = constants[f"read {name}"] @ matrix
    return matrix @ constants[f"write {name}"] if f"write {name}" in constants else matrix


def components_between_features(V: Matrices, U: Matrices, constants: Matrices) -> Matrices:
    """`P [C d_in d_out]` of every matrix as `forward` takes it; the products of thin factors come first."""
    P = {}
    for name, v in V.items():
        u = U[name]
        v = v @ constants[f"read {name}"].mT if f"read {name}" in constants else v
        u = u @ constants[f"write {name}"] if f"write {name}" in constants else u
        P[name] = v.mT @ u
    return P
