"""Strips of text coloured by one number per token."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens.pictures.importance import strongest

if TYPE_CHECKING:
    pass


class HtmlText(str):
    """HTML that notebooks show as such."""

    def _repr_html_(self) -> str:
        return str(self)


def token_strips(
    importances: Mapping[str, Float[Tensor, "pos C"]],
    tokens: Sequence[str],
    ids: Mapping[str, Sequence[int]] | None = None,
    *,
    rows_per_site: int = 12,
) -> HtmlText:
    """The text once for every subcomponent, each token as dark as the importance there (white 0, purple 1).

    `ids` says which subcomponents of each site; None takes those that stand out most (at most `rows_per_site`). A
    static piece of HTML without scripts or outside resources; hovering over a token gives the number.
    """
    chosen = {site: strongest(g, rows_per_site) for site, g in importances.items()} if ids is None else ids
    blocks = []
    for site, subcomponents in chosen.items():
        g = importances[site].detach().float().cpu()
        if len(g) != len(tokens):
            raise ValueError(f"{site} has importances at {len(g)} positions, but there are {len(tokens)} tokens")
        rows = [_strip(c, g[:, c], tokens) for c in subcomponents] or ["<div>no importance above 0.1</div>"]
        blocks.append(f'<div style="margin:.6em 0"><code>{html.escape(site)}</code>{"".join(rows)}</div>')
    return HtmlText(
        f'<div style="font:13px/1.7 ui-monospace,monospace;color:#222;background:#fff">{"".join(blocks)}</div>'
    )


def _strip(c: int, values: Float[Tensor, " pos"], tokens: Sequence[str]) -> str:
    spans = []
    for token, value in zip(tokens, torch.nan_to_num(values).clamp(0, 1).tolist(), strict=True):
        colour = ";color:#fff" if value > 0.6 else ""
        text = html.escape(token.replace("\n", "⏎").replace("\t", "⇥"))
        spans.append(
            f'<span title="importance {value:.3f}" style="background:rgba(122,31,107,{0.75 * value:.3f}){colour}">'
            f"{text}</span>"
        )
    label = f'<span style="display:inline-block;width:4em;color:#666">{c}</span>'
    return f'<div style="white-space:pre-wrap">{label}{"".join(spans)}</div>'
