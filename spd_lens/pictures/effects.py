"""Pictures of patching and ablation results: `effects_heatmap` for notebooks, `effects_figure` for print.

Heat maps follow TransformerLens's style: RdBu, white at 0, tokens labelled `"{token}_{position}"` so that repeated
tokens stay apart. plotly and matplotlib are imported when a figure is drawn (extra `plots`). Text from models and data
is escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from spd_lens.patching.effects import Effects
from spd_lens.pictures.texts import checked_texts, drawn_text, plotly_text
from spd_lens.support.given import given_instance
from spd_lens.support.pages import shortened

if TYPE_CHECKING:
    from matplotlib.figure import Figure as DrawnFigure
    from plotly.graph_objects import Figure


def effects_heatmap(
    effects: Effects, site: str, tokens: Sequence[str] | None = None, *, recovered: bool = False
) -> Figure:
    """The effects of one site's subcomponents: positions across, subcomponents down, blue above 0 and red below.

    `tokens` are those of the prompt, all of them; without tokens positions are numbers. `recovered=True` shows the
    share of the metric that a patch restores (see `Effects.recovered`) instead of the effect.

    Raises ValueError if nothing was measured at `site`, or there are fewer tokens than positions.
    """
    import plotly.graph_objects as go

    grid, ids = _shown(effects, site, recovered)
    figure = go.Figure(
        go.Heatmap(
            z=grid.tolist(),
            x=[plotly_text(label) for label in _position_labels(effects, tokens)],
            y=[f"{c}" for c in ids],
            colorscale="RdBu",
            zmid=0,
            colorbar={"title": {"text": "recovered" if recovered else "effect"}},
            hovertemplate="subcomponent %{y} at %{x}: %{z:.4g}<extra></extra>",
        )
    )
    figure.update_layout(title=plotly_text(f"{effects.what}: {site}"), height=180 + 18 * max(6, len(ids)))
    figure.update_xaxes(title="position", type="category", tickangle=-45)
    figure.update_yaxes(title="subcomponent", type="category", autorange="reversed")
    return figure


def effects_figure(
    effects: Effects, site: str, tokens: Sequence[str] | None = None, *, recovered: bool = False
) -> DrawnFigure:
    """`effects_heatmap` drawn with Matplotlib, which needs no browser: `effects_figure(...).savefig("effects.png")`.

    Arguments and errors as there.
    """
    import matplotlib.pyplot as plt

    grid, ids = _shown(effects, site, recovered)
    labels = _position_labels(effects, tokens)
    size = (2.4 + 0.42 * max(4, len(labels)), 1.6 + 0.22 * max(4, len(ids)))
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    limit = float(grid.nan_to_num().abs().max()) or 1.0
    image: Any = axis.imshow(grid.numpy(), cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    axis.set_yticks(range(len(ids)), [str(c) for c in ids], fontsize=7)
    words = [drawn_text(label, 24) for label in labels]
    axis.set_xticks(range(len(labels)), words, fontsize=8, rotation=45, ha="right", parse_math=False)
    axis.set_xlabel("position")
    axis.set_ylabel("subcomponent")
    axis.set_title(drawn_text(f"{effects.what}: {site}", 120), loc="left", fontsize=10, parse_math=False)
    figure.colorbar(image, ax=axis, label="recovered" if recovered else "effect")
    return figure


def _shown(effects: Effects, site: str, recovered: bool) -> tuple[Float[Tensor, "C position"], list[int]]:
    """The numbers of a heat map, and the ids of its rows."""
    given_instance("effects", effects, Effects, "ablation_effects(...) and activation_patching(...) give them")
    if recovered:
        shares = effects.recovered.unsqueeze(-1)
        effects = replace(effects, values=shares, baseline=shares.new_zeros(1), clean_metric=None)
    grid = effects.grid(site)
    ids = [c for c in range(grid.shape[1]) if not bool(grid[:, c].isnan().all())]
    return grid[:, ids].T, ids


def _position_labels(effects: Effects, tokens: Sequence[str] | None) -> list[str]:
    if effects.positions is None:
        return ["all positions"]
    if tokens is None:
        return [str(position) for position in effects.positions]
    texts = checked_texts(tokens, len(tokens), "the prompt")
    if len(texts) <= max(effects.positions):
        raise ValueError(
            f"{len(texts)} tokens for positions up to {max(effects.positions)}; give all tokens of the prompt"
        )
    # With positions, so that equal tokens are not merged.
    return [f"{shortened(texts[position], 40)}_{position}" for position in effects.positions]
