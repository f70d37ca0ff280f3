"""The picture of the sensitivity maps: SPD for every C beside APD, with one colour scale and one verdict.

Both axes of every panel but that of smooth L0 are centred on the setting used elsewhere (outlined), the coefficient
over two decades, the second setting over one. The colour is the share of runs that found one subcomponent per feature;
the number in a cell is the mean ML2R of those runs, which is 1 where lengths are right."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spd_lens.toys import ML2R_RANGE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

N_FEATURES = 5
# Methods in the order of their panels, by the names that a reader sees.
METHODS = {
    "spd": "SPD",
    "spd_falling": "SPD, p 2 to .5",
    "spd_smooth": "SPD, smooth L0",
    "spd_adversary": "SPD, adversary",
    "spd_share": "share, smooth L0",
    "spd_tolerance": "tolerance, smooth L0",
    "apd": "APD",
}
# The coefficient's name, the second setting's, and its key in the records.
AXES = {
    **dict.fromkeys(METHODS, ("minimality coefficient", "learning rate", "lr")),
    "spd_share": ("share of everything off", "learning rate", "lr"),
    "spd_tolerance": ("tolerance, share of everything off", "learning rate", "lr"),
    "apd": ("simplicity coefficient", "k: active components per input", "k"),
}
# Their middle is no setting that is used elsewhere.
NOT_USED = ("spd_smooth", "spd_share", "spd_tolerance")


def save_map(
    path: Path, summary: Mapping[str, Any], used_C: Mapping[str, int], methods: Sequence[str] = tuple(METHODS)
) -> Path:
    """Draw the maps of `methods` in `summary` (of `sensitivity.summarise_map`) and return the path.

    `used_C`: C elsewhere, of every method.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [
        (method, C, [cell for cell in summary[method]["cells"] if cell["C"] == C])
        for method in methods
        if method in summary
        for C in sorted({cell["C"] for cell in summary[method]["cells"]})
    ]
    # A narrow empty column keeps apart what has other axes.
    widths = [0.12 if label is None else 1.0 for label in _with_gap([AXES[method][0] for method, _, _ in panels])]
    figure, grid = plt.subplots(
        1,
        len(widths),
        figsize=(2.55 * sum(widths) + 1.6, 4.3),
        squeeze=False,
        layout="constrained",
        width_ratios=widths,
    )
    axes = [axis for axis, width in zip(grid[0], widths, strict=True) if width == 1.0]
    for axis in set(grid[0]) - set(axes):
        axis.axis("off")
    image = None
    for index, (axis, (method, C, cells)) in enumerate(zip(axes, panels, strict=True)):
        coefficient, second, key = AXES[method]
        outline = "" if method in NOT_USED else "-" if used_C[method] == C else ":"
        image = _panel(axis, cells, key, outline)
        axis.set_title(f"{METHODS[method]}, C = {C}\n({C / N_FEATURES:g} per feature)", fontsize=10)
        found, runs, right = (sum(cell[name] for cell in cells) for name in ("found", "runs", "successes"))
        per_cell = "/".join(str(n) for n in sorted({cell["runs"] for cell in cells}))
        counts = f"found: {found} of {runs} runs ({per_cell} per cell)\nright length too: {right}"
        axis.set_xlabel(f"{second}\n\n{counts}", fontsize=9)
        first = index == 0 or _ordinate(*panels[index - 1]) != _ordinate(method, C, cells)
        axis.set_ylabel(coefficient if first else "", fontsize=9)
        axis.tick_params(labelleft=first)
    assert image is not None
    bar = figure.colorbar(
        image, ax=axes, label="share of runs that found\none subcomponent per feature", shrink=0.7, aspect=14
    )
    bar.set_ticks([0, 1 / 3, 2 / 3, 1], labels=["none", "1/3", "2/3", "all"])
    low, high = ML2R_RANGE
    about = (
        f"Number: mean length of what was found over the true length ({low} to {high} is right; else in brackets).  "
        "Orange: the setting used elsewhere (dotted: with another C)."
    )
    title = "How much the settings matter: does a run find one subcomponent per feature of TMS 5-2, in its direction?"
    figure.suptitle("\n".join([title, *textwrap.wrap(about, int(12 * figure.get_figwidth()))]), fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _with_gap(labels: Sequence[str]) -> list[str | None]:
    """The labels of the panels' axes, with None where another begins."""
    spaced: list[str | None] = []
    for label in labels:
        if spaced and spaced[-1] != label:
            spaced.append(None)
        spaced.append(label)
    return spaced


def _ordinate(method: str, C: int, cells: Sequence[Mapping[str, Any]]) -> tuple[str, list[float], int]:
    """What goes upwards in a panel, its name and values, and the number of columns, on which their height depends."""
    name, _, second = AXES[method]
    return name, sorted({cell["coefficient"] for cell in cells}), len({cell[second] for cell in cells})


def _panel(axis: Axes, cells: Sequence[Mapping[str, Any]], second: str, outline: str) -> Any:
    """A heat map of one C: the coefficient upwards, the second setting to the right, a line around the middle."""
    from matplotlib.patches import Rectangle

    rows, columns = (sorted({cell[name] for cell in cells}) for name in ("coefficient", second))
    shares = np.full((len(rows), len(columns)), np.nan)
    low, high = ML2R_RANGE
    for cell in cells:
        row, column = rows.index(cell["coefficient"]), columns.index(cell[second])
        share = shares[row, column] = cell["found"] / cell["runs"]
        length = cell["ml2r_of_found"]
        if length is not None:
            text = f"{length:.2f}" if low <= length <= high else f"({length:.2f})"
            colour = "white" if share > 0.6 else "0.15"
            axis.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, origin="lower", aspect="equal")
    if outline:
        corner = len(columns) // 2 - 0.5, len(rows) // 2 - 0.5
        axis.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="C1", lw=2.2, zorder=3, ls=outline))
    axis.set_xticks(range(len(columns)), [_short(value) for value in columns], fontsize=7.5)
    axis.set_yticks(range(len(rows)), [_short(value) for value in rows], fontsize=7.5)
    axis.tick_params(length=2)
    # Lines between cells.
    axis.set_xticks(np.arange(len(columns) - 1) + 0.5, minor=True)
    axis.set_yticks(np.arange(len(rows) - 1) + 0.5, minor=True)
    axis.grid(which="minor", color="0.85", lw=0.6)
    axis.tick_params(which="minor", length=0)
    return image


def _short(value: float) -> str:
    """`0.0095` as `9.5e-3`."""
    if value >= 0.05:
        return f"{value:.2g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
