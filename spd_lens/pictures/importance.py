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

from spd_lens.pictures.texts import checked_texts, drawn_text
from spd_lens.support.files import made_directory, write_figure, write_text
from spd_lens.support.given import given_instance, given_whole
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


def by_position(importances: Any, tokens: Any) -> tuple[dict[str, Float[Tensor, "pos C"]], list[str]]:
    """Importances `[pos C]` of every site on the CPU, and one text per position.

    A batch axis of one prompt is taken off. Raises TypeError or ValueError for anything that is no importance of one
    prompt, NaN included, and for tokens that do not fit.
    """
    if not isinstance(importances, Mapping) or not importances:
        raise TypeError(
            f"importances is {'empty' if isinstance(importances, Mapping) else f'a {type(importances).__name__}'}; "
            "expected {site: importance [pos C]}, as decomposition.importance(prompt) gives"
        )
    found = {}
    for name, g in importances.items():
        if not isinstance(g, Tensor) or g.ndim not in (2, 3) or (g.ndim == 3 and len(g) != 1):
            given = tuple(g.shape) if isinstance(g, Tensor) else type(g).__name__
            raise ValueError(
                f"the importance at {name} is {given}; expected [pos C], or [1 pos C], of one prompt: choose a row, "
                "{site: g[0] for site, g in importances.items()}"
            )
        g = (g[0] if g.ndim == 3 else g).detach().float().cpu()
        if bool(g.isnan().any()):
            raise ValueError(f"the importance at {name} is NaN at {int(g.isnan().sum())} places; its gate is broken")
        found[str(name)] = g
    lengths = {name: len(g) for name, g in found.items()}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise ValueError(f"the sites have importances at {lengths} positions; expected those of one prompt")
    return found, checked_texts(tokens, next(iter(lengths.values())), "the importances")


def importance_figure(
    importances: Mapping[str, Float[Tensor, ...]], tokens: Sequence[str] | None = None, *, rows_per_site: int = 16
) -> Figure:
    """A heat map per site: tokens across, the strongest subcomponents down, colour = importance in [0, 1].

    `importances` are those of one prompt, `[pos C]` or `[1 pos C]` per site; without tokens positions are numbers.
    """
    import matplotlib.pyplot as plt

    values, texts = by_position(importances, tokens)
    given_whole("rows_per_site", rows_per_site, least=1)
    ids = {name: strongest(g, rows_per_site) for name, g in values.items()}
    heights = [max(1, len(chosen)) for chosen in ids.values()]
    width = min(16.0, 3.0 + 0.42 * len(texts))
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
        title = f"{drawn_text(name, 80)}: {len(chosen)} strongest of {values[name].shape[1]}"
        axis.set_title(title, loc="left", fontsize=10, parse_math=False)
        if not chosen:
            note = f"no importance above {SHOWN_ABOVE:g}"
            axis.text(0.5, 0.5, note, ha="center", va="center", transform=axis.transAxes)
            axis.set_yticks([])
            continue
        shown = values[name][:, chosen].T.numpy()
        image = axis.imshow(shown, aspect="auto", cmap="magma_r", vmin=0, vmax=1, interpolation="nearest")
        axis.set_yticks(range(len(chosen)), [str(c) for c in chosen], fontsize=7)
        axis.set_ylabel("subcomponent", fontsize=8)
    look = {"rotation": 60, "ha": "right", "rotation_mode": "anchor", "fontsize": 8, "parse_math": False}
    axes[-1, 0].set_xticks(range(len(texts)), [drawn_text(text, 14) for text in texts], **look)
    if image is not None:
        figure.colorbar(image, ax=axes[:, 0].tolist(), label="importance", shrink=0.6, pad=0.01)
    return figure


def importance_page(
    importances: Mapping[str, Float[Tensor, ...]],
    tokens: Sequence[str] | None = None,
    *,
    title: str = "Importance of subcomponents",
    rows_per_site: int = 64,
) -> str:
    """A self-contained HTML page: the text, and buttons that colour it by one subcomponent's importance."""
    found, texts = by_position(importances, tokens)
    given_whole("rows_per_site", rows_per_site, least=1)
    given_instance("title", title, str, "the title of the page")
    sites: list[dict[str, Any]] = []
    for name, g in found.items():
        rows = [{"id": c, "values": [round(float(v), 3) for v in g[:, c]]} for c in sorted(strongest(g, rows_per_site))]
        sites.append({"name": name, "rows": rows, "active": (g > SHOWN_ABOVE).sum(-1).tolist()})
    return filled_page("importance.html", title=title, data={"tokens": texts, "sites": sites})


def save_importance(
    importances: Mapping[str, Float[Tensor, ...]],
    tokens: Sequence[str] | None,
    directory: str | Path,
    *,
    title: str,
) -> tuple[Path, Path]:
    """Write `importance.png` and `importance.html` to `directory`; returns both paths."""
    import matplotlib.pyplot as plt

    directory = made_directory(directory)
    given_instance("title", title, str, "the title of the page")
    figure = importance_figure(importances, tokens)
    picture, page = directory / "importance.png", directory / "importance.html"
    figure.suptitle(drawn_text(title, 120), fontsize=11, parse_math=False)
    write_figure(picture, figure, dpi=130)
    plt.close(figure)
    write_text(page, importance_page(importances, tokens, title=title))
    return picture, page
