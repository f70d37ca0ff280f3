"""Pictures of a decomposed toy model, in the manner of the paper. Of the first run, good or bad: none is chosen.

`vectors.png` (two hidden dimensions): rows of the target's W, of the sum of all subcomponents, and of every alive
subcomponent. `importance.png`: importance on one-hot inputs, columns in the order of the features that they match.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spd_lens import Decomposition
from spd_lens.known_solution import alive, identity_match
from spd_lens.toys.features import one_hot_inputs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Columns of the importance picture: as many as features, and this many times more of the others, the largest first.
SHOWN_WIDTH = 2


def save_figures(directory: Path, decomposition: Decomposition) -> list[Path]:
    """Write the pictures of a decomposed TMS; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    paths = [save_importances(directory / "importance.png", decomposition)]
    if decomposition["W_enc"].target_weight.shape[1] == 2:
        paths.append(save_vectors(directory / "vectors.png", decomposition))
    return paths


@torch.no_grad()
def save_importances(path: Path, decomposition: Decomposition) -> Path:
    """A heat map per site: features down, subcomponents across."""
    import matplotlib.pyplot as plt

    n_features = len(decomposition["W_enc"].target_weight)
    importances = decomposition.importance(one_hot_inputs(n_features))
    small = n_features <= 10
    size = (2.6 * len(importances) + 1.2, 2.2) if small else (4.6 * len(importances) + 1.2, 3.6)
    figure, axes = plt.subplots(1, len(importances), figsize=size, squeeze=False, layout="constrained")
    image = None
    for axis, (name, G) in zip(axes[0], importances.items(), strict=True):
        order = columns_in_order(G)[: SHOWN_WIDTH * n_features]
        image = axis.imshow(G[:, order].numpy(), cmap="magma_r", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
        axis.set_title(f"{name}: {int(alive(G).sum())} of {G.shape[1]} alive", fontsize=9)
        axis.set_xlabel(f"subcomponent (first {len(order)})" if len(order) < G.shape[1] else "subcomponent", fontsize=8)
        axis.set_ylabel("feature that is on", fontsize=8)
        axis.set_xticks(range(0, len(order), 1 if small else 10))
        axis.set_yticks(range(0, n_features, 1 if small else 10))
        axis.tick_params(labelsize=7)
    assert image is not None
    figure.colorbar(image, ax=axes.ravel().tolist(), label="importance", shrink=0.9)
    return _save(figure, path)


def columns_in_order(importances: Float[Tensor, "features C"]) -> Int[Tensor, " C"]:
    """The columns that match the features, in their order, then the others by their largest entry."""
    matched, _ = identity_match(importances)
    matched = matched[matched < importances.shape[1]]
    rest = importances.amax(dim=0)
    rest[matched] = -1
    others = rest.argsort(descending=True, stable=True)[: importances.shape[1] - len(matched)]
    return torch.cat([matched, others])


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
