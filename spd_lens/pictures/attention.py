"""Heat maps of how subcomponents of `W_Q` and `W_K` act on each other in attention scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from spd_lens.statistics.attention_pairs import QKInteractions

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def qk_figure(
    interactions: QKInteractions, *, heads: Sequence[int] | None = None, rows: int = 16, columns: int = 16
) -> Figure:
    """A heat map for every head (down) and offset (across): query subcomponents by key subcomponents.

    Shown are the `rows` queries and `columns` keys that reach the largest absolute strength anywhere in the figure, in
    the order of their ids, on one scale, so that panels can be compared. Blue draws attention to the key, red away.
    """
    import matplotlib.pyplot as plt

    count = len(interactions.values)
    shown_heads = list(range(count)) if heads is None else list(heads)
    odd = [h for h in shown_heads if not 0 <= h < count]
    if odd or not shown_heads:
        raise ValueError(f"heads={shown_heads}; expected at least one of 0..{count - 1}")
    values = interactions.values[shown_heads].float().cpu()
    most = values.abs().amax((0, 1))
    q = sorted(most.amax(1).argsort(descending=True, stable=True)[:rows].tolist())
    k = sorted(most.amax(0).argsort(descending=True, stable=True)[:columns].tolist())
    limit = float(most[q][:, k].max()) or 1.0
    offsets = interactions.offsets
    figure, axes = plt.subplots(
        len(shown_heads),
        len(offsets),
        figsize=(
            1.6 + 0.16 * len(k) * len(offsets) + 0.5 * len(offsets),
            1.2 + (0.16 * len(q) + 0.5) * len(shown_heads),
        ),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    image = None
    for i, head in enumerate(shown_heads):
        for j, offset in enumerate(offsets):
            axis = axes[i, j]
            image = axis.imshow(
                values[i, j][q][:, k].numpy(),
                cmap="RdBu",
                vmin=-limit,
                vmax=limit,
                aspect="auto",
                interpolation="nearest",
            )
            where = "same position" if offset == 0 else f"{offset} back"
            axis.set_title(f"head {head}, key {where}", fontsize=8)
            axis.set_xticks(range(len(k)), [str(interactions.keys[c]) for c in k], fontsize=5, rotation=90)
            axis.set_yticks(range(len(q)), [str(interactions.queries[c]) for c in q], fontsize=5)
    unit = "attention score at root mean square activations" if interactions.in_scores else "score per unit activations"
    figure.supxlabel(f"subcomponent of blocks.{interactions.layer}.attn.W_K", fontsize=9)
    figure.supylabel(f"subcomponent of blocks.{interactions.layer}.attn.W_Q", fontsize=9)
    figure.suptitle(f"Pairs of queries and keys, block {interactions.layer}", fontsize=10)
    assert image is not None
    figure.colorbar(image, ax=axes.ravel().tolist(), shrink=0.6, pad=0.01).set_label(unit, fontsize=8)
    return figure
