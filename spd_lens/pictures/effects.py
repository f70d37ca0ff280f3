"""Pictures of patching and ablation results, and of importances over a text, for notebooks.

Heat maps follow TransformerLens's style: plotly, RdBu, white at 0, tokens labelled `"{token}_{position}"` so that
repeated tokens stay apart. plotly is imported when a figure is drawn (extra `plots`). Text from models and data is
escaped.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from spd_lens.patching.effects import Effects

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def token_labels(tokens: Sequence[str]) -> list[str]:
    """`"{token}_{position}"`, line breaks and tabs made visible; for axes, where equal labels would be merged."""
    return [f"{token.replace(chr(10), '⏎').replace(chr(9), '⇥')}_{i}" for i, token in enumerate(tokens)]


def effects_heatmap(
    effects: Effects, site: str, tokens: Sequence[str] | None = None, *, recovered: bool = False
) -> Figure:
    """The effects of one site's subcomponents: positions across, subcomponents down, blue above 0 and red below.

    `tokens` are those of the prompt, all of them; without tokens positions are numbers. `recovered=True` shows the
    share of the metric that a patch restores (see `Effects.recovered`) instead of the effect.

    Raises ValueError if nothing was measured at `site`, or there are fewer tokens than positions.
    """
    import plotly.graph_objects as go

    if recovered:
        shares = effects.recovered.unsqueeze(-1)
        effects = replace(effects, values=shares, baseline=shares.new_zeros(1), target=None)
    grid = effects.grid(site)
    ids = [c for c in range(grid.shape[1]) if not bool(grid[:, c].isnan().all())]
    figure = go.Figure(
        go.Heatmap(
            z=grid[:, ids].T.tolist(),
            x=_position_labels(effects, tokens),
            y=[f"{c}" for c in ids],
            colorscale="RdBu",
            zmid=0,
            colorbar={"title": {"text": "recovered" if recovered else "effect"}},
            hovertemplate="subcomponent %{y} at %{x}: %{z:.4g}<extra></extra>",
        )
    )
    figure.update_layout(title=f"{effects.what}: {html.escape(site)}", height=180 + 18 * max(6, len(ids)))
    figure.update_xaxes(title="position", type="category", tickangle=-45)
    figure.update_yaxes(title="subcomponent", type="category", autorange="reversed")
    return figure


def _position_labels(effects: Effects, tokens: Sequence[str] | None) -> list[str]:
    if effects.positions is None:
        return ["all positions"]
    if tokens is None:
        return [str(position) for position in effects.positions]
    if len(tokens) <= max(effects.positions):
        raise ValueError(
            f"{len(tokens)} tokens for positions up to {max(effects.positions)}; give all tokens of the prompt"
        )
    # plotly reads tags in labels.
    labels = [html.escape(label) for label in token_labels(tokens)]
    return [labels[position] for position in effects.positions]
