"""Pictures: importance of subcomponents over the tokens of a text, as a figure and as a self-contained HTML page.

matplotlib is imported when a figure is drawn (extra `plots`). All text that comes from models or data is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens.support.pages import filled_page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Importances below this are not worth a row.
SHOWN_ABOVE = 0.1


def strongest(importance: Float[Tensor, "pos C"], n: int) -> list[int]:
    """Ids of at most `n` subcomponents worth showing, in the order of the tokens that they are shown for.

    Every position in turn names the subcomponent (with importance above 0.1 there) that stands out most against its own
    mean over the text, so that one position where everything fires does not fill the picture.
    """
    contrast = importance - importance.mean(dim=0)
    contrast = contrast.masked_fill(importance <= SHOWN_ABOVE, -torch.inf)
    position_order = contrast.amax(dim=1).argsort(descending=True, stable=True).tolist()
    ranked = contrast.argsort(dim=1, descending=True, stable=True)
    chosen: dict[int, int] = {}
    next_rank = [0] * len(position_order)
    progress = True
    while progress and len(chosen) < n:
        progress = False
        for position in position_order:
            while next_rank[position] < ranked.shape[1]:
                c = int(ranked[position, next_rank[position]])
                next_rank[position] += 1
                if contrast[position, c] == -torch.inf:
                    next_rank[position] = ranked.shape[1]
                elif c not in chosen:
                    chosen[c], progress = position, True
                    break
            if len(chosen) == n:
                break
    return sorted(chosen, key=lambda c: (chosen[c], c))


def importance_figure(
    importances: Mapping[str, Float[Tensor, "pos C"]], tokens: Sequence[str], *, rows_per_site: int = 16
) -> Figure:
    """A heat map per site: tokens across, the strongest subcomponents down, colour = importance in [0, 1]."""
    import matplotlib.pyplot as plt

    ids = {name: strongest(g, rows_per_site) for name, g in importances.items()}
    heights = [max(1, len(chosen)) for chosen in ids.values()]
    width = min(16.0, 3.0 + 0.42 * len(tokens))
    figure, axes = plt.subplots(
        len(ids),
        1,
        figsize=(width, 1.6 + 0.24 * sum(heights) + 0.3 * len(ids)),
        gridspec_kw={"height_ratios": heights},
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    image = None
    for axis, (name, chosen) in zip(axes[:, 0], ids.items(), strict=True):
        axis.set_title(f"{name}: {len(chosen)} strongest of {importances[name].shape[1]}", loc="left", fontsize=10)
        if not chosen:
            axis.text(0.5, 0.5, "no importance above 0.1", ha="center", va="center", transform=axis.transAxes)
            axis.set_yticks([])
            continue
        values = importances[name][:, chosen].T.detach().float().cpu().numpy()
        image = axis.imshow(values, aspect="auto", cmap="magma_r", vmin=0, vmax=1, interpolation="nearest")
        axis.set_yticks(range(len(chosen)), [str(c) for c in chosen], fontsize=7)
        axis.set_ylabel("subcomponent", fontsize=8)
    labels = [_visible(token) for token in tokens]
    axes[-1, 0].set_xticks(range(len(tokens)), labels, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    if image is not None:
        figure.colorbar(image, ax=axes[:, 0].tolist(), label="importance", shrink=0.6, pad=0.01)
    return figure


def _visible(token: str) -> str:
    shown = token.replace("\n", "⏎").replace("\t", "⇥").strip(" ") or "␣"
    shown = shown if len(shown) <= 14 else shown[:13] + "…"
    # matplotlib would read $ as the start of a formula.
    return shown.replace("$", r"\$")


def importance_page(
    importances: Mapping[str, Float[Tensor, "pos C"]],
    tokens: Sequence[str],
    *,
    title: str = "Importance of subcomponents",
    rows_per_site: int = 64,
) -> str:
    """A self-contained HTML page: the text, and buttons that colour it by one subcomponent's importance."""
    sites: list[dict[str, Any]] = []
    for name, g in importances.items():
        rows = [{"id": c, "values": [round(float(v), 3) for v in g[:, c]]} for c in sorted(strongest(g, rows_per_site))]
        sites.append({"name": name, "rows": rows, "active": (g > SHOWN_ABOVE).sum(-1).tolist()})
    return filled_page("importance.html", title=title, data={"tokens": list(tokens), "sites": sites})


def save_importance(
    importances: Mapping[str, Float[Tensor, "pos C"]], tokens: Sequence[str], directory: str | Path, *, title: str
) -> tuple[Path, Path]:
    """Write `importance.png` and `importance.html` to `directory`; returns both paths."""
    import matplotlib.pyplot as plt

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    picture, page = directory / "importance.png", directory / "importance.html"
    figure = importance_figure(importances, tokens)
    figure.suptitle(title, fontsize=11)
    figure.savefig(picture, dpi=130)
    plt.close(figure)
    page.write_text(importance_page(importances, tokens, title=title), encoding="utf-8")
    return picture, page
