"""Pictures of patching and ablation results, for notebooks.

Heat maps follow TransformerLens's style: plotly, RdBu, white at 0, tokens labelled `"{token}_{position}"` so that
repeated tokens stay apart. plotly is imported when a figure is drawn (extra `plots`). Text from models and data is
escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from spd_lens.patching.effects import Effects
from spd_lens.pictures.texts import checked_texts, plotly_text
from spd_lens.support.given import given_instance
from spd_lens.support.pages import shortened

if TYPE_CHECKING:
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

    given_instance("effects", effects, Effects, "ablation_effects(...) and activation_patching(...) give them")
    if recovered:
        shares = effects.recovered.unsqueeze(-1)
        effects = replace(effects, values=shares, baseline=shares.new_zeros(1), clean_metric=None)
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
    figure.update_layout(title=plotly_text(f"{effects.what}: {site}"), height=180 + 18 * max(6, len(ids)))
    figure.update_xaxes(title="position", type="category", tickangle=-45)
    figure.update_yaxes(title="subcomponent", type="category", autorange="reversed")
    return figure


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
    return [plotly_text(f"{shortened(texts[position], 40)}_{position}") for position in effects.positions]
