"""Pictures of a decomposed toy model, in the manner of the paper. Of the first run, good or bad: none is chosen.

`importance.png`: importance on one-hot inputs, columns in the order of the features that they match (of a residual
MLP's `W_out`, which has no features: the most used first).
`vectors.png` (two hidden dimensions): rows of the target's W, of the sum of all subcomponents, and of every alive
subcomponent. `contributions.png` (residual MLPs): what every neuron passes from each feature back to it, in the target
and in that feature's subcomponent of `W_in`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spd_lens import Decomposition
from spd_lens.toys import alive, identity_match, one_hot_inputs, resid_mlp_contributions

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Columns of the importance picture: as many as features, and this many times more of the others, the largest first.
SHOWN_WIDTH = 2


def save_figures(directory: Path, decomposition: Decomposition) -> list[Path]:
    """Write the pictures of a decomposed TMS or residual MLP; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    paths = [save_importances(directory / "importance.png", decomposition)]
    if "W_enc" not in decomposition:
        paths.append(save_contributions(directory / "contributions.png", decomposition))
    elif decomposition["W_enc"].target_weight.shape[1] == 2:
        paths.append(save_vectors(directory / "vectors.png", decomposition))
    return paths


@torch.no_grad()
def save_importances(path: Path, decomposition: Decomposition) -> Path:
    """A heat map per site: features down, subcomponents across; of more than three sites two in a row, a block each."""
    import matplotlib.pyplot as plt

    n_features = _n_features(decomposition)
    importances = decomposition.importance(one_hot_inputs(n_features))
    small = n_features <= 10
    columns = len(importances) if len(importances) <= 3 else 2
    rows = -(-len(importances) // columns)
    size = (2.6 * columns + 1.2, 2.2 * rows) if small else (4.6 * columns + 1.2, 3.6 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    image = None
    for axis, (name, G) in zip(axes.ravel(), importances.items(), strict=True):
        dense = name.endswith("W_out")
        order = (by_use(G) if dense else columns_in_order(G))[: SHOWN_WIDTH * n_features]
        image = axis.imshow(G[:, order].numpy(), cmap="magma_r", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
        axis.set_title(f"{name}: {int(alive(G).sum())} of {G.shape[1]} alive", fontsize=9)
        axis.set_xlabel(f"subcomponent (first {len(order)})" if len(order) < G.shape[1] else "subcomponent", fontsize=8)
        axis.set_ylabel("feature that is on", fontsize=8)
        axis.set_xticks(range(0, len(order), 1 if small else 10 if len(order) <= 100 else 25))
        axis.set_yticks(range(0, n_features, 1 if small else 10))
        axis.tick_params(labelsize=7)
    assert image is not None
    figure.colorbar(image, ax=axes.ravel().tolist(), label="importance", shrink=0.9)
    return _save(figure, path)


def _n_features(decomposition: Decomposition) -> int:
    if "W_enc" in decomposition:
        return len(decomposition["W_enc"].target_weight)
    return len(decomposition.model.W_E)


def by_use(importances: Float[Tensor, "features C"]) -> Int[Tensor, " C"]:
    """The columns with the largest sums first."""
    return importances.sum(dim=0).argsort(descending=True, stable=True)


def columns_in_order(importances: Float[Tensor, "features C"]) -> Int[Tensor, " C"]:
    """The columns that match the features, in their order, then the others by their largest entry."""
    matched, _ = identity_match(importances)
    matched = matched[matched < importances.shape[1]]
    rest = importances.amax(dim=0)
    rest[matched] = -1
    others = rest.argsort(descending=True, stable=True)[: importances.shape[1] - len(matched)]
    return torch.cat([matched, others])


@torch.no_grad()
def save_contributions(path: Path, decomposition: Decomposition) -> Path:
    """Neurons of all blocks across: target and subcomponents as two heat maps, and one against the other."""
    import matplotlib.pyplot as plt

    parts = [resid_mlp_contributions(decomposition, block) for block in range(decomposition.host.n_layers())]
    wanted, found = (torch.cat(sides, dim=1) for sides in zip(*parts, strict=True))
    limit = float(wanted.abs().max())
    figure, axes = plt.subplots(1, 3, figsize=(12.6, 4.2), layout="constrained", width_ratios=(1, 1, 1.05))
    image = None
    for axis, title, matrix in zip(axes, ("target", "subcomponent of the feature"), (wanted, found), strict=False):
        image = axis.imshow(
            matrix.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest", aspect="auto"
        )
        axis.set(title=title, xlabel="neuron (all blocks)", ylabel="feature")
        for block in range(1, len(parts)):
            axis.axvline(block * parts[0][0].shape[1] - 0.5, color="0.3", lw=0.8)
    assert image is not None
    figure.colorbar(image, ax=axes[:2].tolist(), label="contribution to the feature's own output", shrink=0.9)
    axes[2].scatter(wanted.flatten(), found.flatten(), s=3, alpha=0.4, linewidths=0)
    axes[2].plot((-limit, limit), (-limit, limit), color="0.5", lw=0.8)
    axes[2].set(title="one point per feature and neuron", xlabel="target", ylabel="subcomponent", aspect="equal")
    return _save(figure, path)


@torch.no_grad()
def save_vectors(path: Path, decomposition: Decomposition) -> Path:
    """Arrows in the two hidden dimensions, a colour per feature."""
    import matplotlib.pyplot as plt

    encoder = decomposition["W_enc"]
    G = decomposition.importance(one_hot_inputs(len(encoder.target_weight)))["W_enc"]
    shown = [int(c) for c in columns_in_order(G) if alive(G)[c]]
    panels = [("target W", encoder.target_weight), ("sum of all", encoder.weight)]
    panels += [(f"subcomponent {c}", torch.outer(encoder.V[:, c], encoder.U[c])) for c in shown]
    columns = min(len(panels), 7)
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.7 * columns, 1.9 * rows), squeeze=False, layout="constrained")
    for axis in axes.ravel():
        axis.axis("off")
    limit = 1.15 * float(encoder.target_weight.norm(dim=1).max())
    for axis, (title, matrix) in zip(axes.ravel(), panels, strict=False):
        _arrows(axis, matrix, limit)
        axis.set_title(title, fontsize=9)
    return _save(figure, path)


def _arrows(axis: Axes, matrix: Float[Tensor, "features 2"], limit: float) -> None:
    axis.axis("on")
    for feature, (x, y) in enumerate(matrix.tolist()):
        axis.annotate(
            "",
            (x, y),
            (0, 0),
            arrowprops={"arrowstyle": "->", "color": f"C{feature}", "lw": 1.6, "shrinkA": 0, "shrinkB": 0},
        )
    axis.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[])
    axis.axhline(0, color="0.85", lw=0.6, zorder=0)
    axis.axvline(0, color="0.85", lw=0.6, zorder=0)


def _save(figure: Any, path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
