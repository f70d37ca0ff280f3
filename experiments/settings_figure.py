"""The picture of the settings study: which numbers work, by toy, one panel for every rule."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

Rows = Mapping[tuple[str, str, bool, str], Mapping[float, list[bool]]]
MEANS = {
    "absolute": "coefficient of minimality",
    "share": "share of everything off per subcomponent",
    "tolerance": "share of everything off that may be spent",
}
PENALTIES = {
    "power": "p 1",
    "falling": "p 2 to .5",
    "smooth": "smooth L0",
    "wide": "smooth L0 to gamma .2, sparser of two starts",
}


def save_basins(path: Path, rows: Rows) -> Path:
    """Draw the share of successes over the number, without and with adversary; return the path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = list(dict.fromkeys((rule, penalty) for rule, penalty, _, _ in rows))
    toys = list(dict.fromkeys(toy for *_, toy in rows))
    figure, grid = plt.subplots(
        len(kinds), 2, figsize=(11, (0.24 * len(toys) + 0.95) * len(kinds) + 0.7), squeeze=False, layout="constrained"
    )
    image = None
    for (rule, penalty), axes in zip(kinds, grid, strict=True):
        values = sorted({v for row, cells in rows.items() if row[:2] == (rule, penalty) for v in cells})
        for adversary, axis in zip((False, True), axes, strict=True):
            own = {toy: rows.get((rule, penalty, adversary, toy), {}) for toy in toys}
            image = _panel(axis, own, values)
            ends = ", adversary" if adversary else ""
            axis.set_title(f"{rule}, {PENALTIES[penalty]}{ends}", fontsize=9)
            axis.set_xlabel(MEANS[rule], fontsize=8)
    assert image is not None
    bar = figure.colorbar(image, ax=grid, label="share of runs that succeed", shrink=0.5, aspect=25)
    bar.set_ticks([0, 1 / 3, 2 / 3, 1], labels=["none", "1/3", "2/3", "all"])
    figure.suptitle(
        "One number for every toy? Successes of runs from an exact start, all sites at once (hatched: not run)",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _panel(axis: Axes, own: Mapping[str, Mapping[float, list[bool]]], values: list[float]) -> AxesImage:
    shares = np.full((len(own), len(values)), np.nan)
    for i, cells in enumerate(own.values()):
        for j, value in enumerate(values):
            if value in cells:
                shares[i, j] = sum(cells[value]) / len(cells[value])
                text = f"{sum(cells[value])}/{len(cells[value])}"
                axis.text(j, i, text, ha="center", va="center", fontsize=7, color="w" if shares[i, j] > 0.6 else "0.2")
    axis.set_facecolor("0.93")
    axis.patch.set_hatch("///")
    axis.patch.set_edgecolor("0.8")
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axis.set_xticks(range(len(values)), [f"{v:.2g}" for v in values], fontsize=7)
    axis.set_yticks(range(len(own)), list(own), fontsize=7)
    axis.tick_params(length=2)
    return image
