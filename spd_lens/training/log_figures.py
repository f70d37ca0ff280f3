"""Figures of a training step for loggers: the importances of one batch as histograms, densities, and L0 by site.

They cost a pass and wait for the device, so they are drawn every so many steps only, by the first process, of its rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.squashings import importance_of
from spd_lens.core.units import ALIVE_ABOVE
from spd_lens.data.batches import Batch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Beyond so many sites one figure has a line of its own for the busiest only.
MOST_SITES = 24


def figure_steps(loggers: Sequence[Any]) -> list[int]:
    """Every how many steps somebody wants figures."""
    return sorted({every for own in loggers if (every := getattr(own, "figures_every", None))})


def show_figures(
    loggers: Sequence[Any], step: int, decomposition: Decomposition, batch: Batch, stop_at: int | None
) -> None:
    """Give those loggers that want figures at this step theirs: `logger.figure(step, name, figure)`.

    A logger wants them every `logger.figures_every` steps; plain functions never. Costs a clean pass of the batch when
    somebody wants them.
    """
    due = [own for own in loggers if (every := getattr(own, "figures_every", None)) and step % every == 0]
    if not due:
        return
    with torch.no_grad():
        clean = decomposition.clean_pass(
            batch.inputs, start_at=batch.start_at, attention_mask=batch.attention_mask, stop_at=stop_at
        )
        importances = {name: importance_of(pre) for name, pre in decomposition.pre_importances(clean.inputs).items()}
    for name, figure in importance_figures(importances, batch.position_mask).items():
        for logger in due:
            logger.figure(step, name, figure)


def importance_figures(importances: Mapping[str, Tensor], position_mask: Tensor | None) -> dict[str, Figure]:
    """Three Matplotlib figures of the importances `{site: [*batch C]}` at the positions that count.

    - `importance/histogram`: how many importances of each site are how large (log scale).
    - `importance/density`: of each subcomponent, the share of positions where its importance is above 0, largest first.
    - `importance/L0`: subcomponents on at a position, by site.
    """
    values = {name: _counted(g, position_mask) for name, g in importances.items()}
    density = {name: np.sort((rows > ALIVE_ABOVE).mean(0))[::-1] for name, rows in values.items()}
    busiest = sorted(density, key=lambda name: -density[name].sum())[:MOST_SITES]
    return {
        "importance/histogram": _histogram({name: values[name] for name in busiest}),
        "importance/density": _density({name: density[name] for name in busiest}),
        "importance/L0": _bars({name: float(own.sum()) for name, own in density.items()}),
    }


def _counted(g: Tensor, position_mask: Tensor | None) -> np.ndarray:
    """`[n C]`, one row for every position that counts (and every head)."""
    rows = g.detach()
    if position_mask is not None:
        rows = rows[position_mask.to(rows.device, torch.bool)]
    return rows.reshape(-1, rows.shape[-1]).float().cpu().numpy()


def _axes(title: str, x: str, y: str, height: float = 4.0) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(True, alpha=0.2)
    axes.set_axisbelow(True)
    return figure, axes


def _colours(names: Sequence[str]) -> dict[str, Any]:
    from matplotlib import colormaps

    shades = colormaps["viridis"](np.linspace(0.0, 0.9, max(len(names), 2)))
    return dict(zip(names, shades, strict=False))


def _histogram(values: Mapping[str, np.ndarray]) -> Figure:
    figure, axes = _axes("How large are importances?", "importance", "how many (log scale)")
    edges = np.linspace(0.0, 1.0, 41)
    for name, colour in _colours(list(values)).items():
        counts, _ = np.histogram(values[name].clip(0.0, 1.0), bins=edges)
        axes.stairs(counts, edges, label=name, color=colour)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, frameon=False)
    return figure


def _density(density: Mapping[str, np.ndarray]) -> Figure:
    figure, axes = _axes(
        "How often is each subcomponent on?", "subcomponents, the most used first", "share of positions (log scale)"
    )
    lowest = min((own[own > 0].min() for own in density.values() if own.any()), default=1e-3)
    for name, colour in _colours(list(density)).items():
        used = density[name][density[name] > 0]
        # Those that are never on have no place on a log scale: the line ends before them.
        axes.plot(
            np.arange(1, len(used) + 1), used, label=f"{name} ({len(used)} of {len(density[name])})", color=colour
        )
    axes.set_yscale("log")
    axes.set_ylim(lowest * 0.8, 1.2)
    axes.legend(fontsize=8, frameon=False)
    return figure


def _bars(l0: Mapping[str, float]) -> Figure:
    figure, axes = _axes("Subcomponents on at a position", "L0", "", height=max(2.0, 0.3 * len(l0) + 1.0))
    places = np.arange(len(l0))[::-1]
    axes.barh(places, list(l0.values()), color="#1b6ca8", height=0.7)
    axes.set_yticks(places, list(l0), fontsize=8)
    for place, value in zip(places, l0.values(), strict=True):
        axes.annotate(
            f"{value:.3g}", (value, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.set_xlim(right=max([*l0.values(), 1e-3]) * 1.12)
    return figure
