"""Pictures of a grouping: the description length on the way, what fires together in the order of groups, the tree.

matplotlib is imported when a figure is drawn (extra `plots`). Groups beyond what can be seen are left out, and the
title says how many.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from spd_lens.components.merging import Merging
from spd_lens.pictures.texts import drawn_text
from spd_lens.statistics.coactivations import CoActivation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Names of rows and columns are drawn up to this number of them.
_NAMED = 60
_COLOURS = 10


def description_length_figure(merging: Merging) -> Figure:
    """The description length after every merge, over the number of groups that are left; the minimum is marked.

    The axis of groups runs from many to few, in the direction of merging, on a logarithmic scale.
    """
    import matplotlib.pyplot as plt

    lengths = merging.description_lengths
    groups = len(merging.members) - np.arange(len(lengths))
    best = merging.n_merges
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    axis.plot(groups, lengths, color="tab:blue", linewidth=1.6)
    axis.axvline(groups[best], color="tab:red", linewidth=0.8, linestyle="--")
    axis.plot(groups[best], lengths[best], "o", color="tab:red")
    axis.set_xscale("log")
    axis.set_xlim(max(groups[0] * 1.08, 2), max(groups[-1] * 0.92, 0.8))
    low, high = float(lengths.min()), float(lengths.max())
    axis.set_ylim(low - 0.08 * (high - low) - 1e-9, high + 0.12 * (high - low) + 1e-9)
    left = groups[best] ** 2 > groups[0] * groups[-1]  # in the left half of the logarithmic axis
    axis.annotate(
        f"minimum: {groups[best]:,} groups, {lengths[best]:.4g} bits per event",
        (groups[best], high + 0.05 * (high - low)),
        xytext=(6 if left else -6, 0),
        textcoords="offset points",
        ha="left" if left else "right",
        va="center",
        color="tab:red",
    )
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_xlabel("groups left (merging goes to the right)")
    axis.set_ylabel("bits per event")
    title = f"Description length, alpha = {merging.alpha:g}, {len(merging.members):,} subcomponents"
    axis.set_title(title, loc="left", fontsize=11)
    return figure


def coactivation_figure(
    together: CoActivation, groups: Sequence[Sequence[tuple[str, int]]], *, max_members: int = 300
) -> Figure:
    """How much each two overlap in when they fire (Jaccard index, 0 to 1), in the order of `groups`, which are framed.

    `groups` are those of a `Merging`, an `Ensemble` or `Communities`, or components' members; the first ones whose
    members together are at most `max_members` are shown.
    """
    import matplotlib.pyplot as plt

    shown = _first_groups(groups, max_members)
    members = [member for group in shown for member in group]
    values = _jaccard(together, [together.number(*member) for member in members])
    size = min(12.0, max(4.5, 2.5 + 0.12 * len(members)))
    from matplotlib.patches import Rectangle

    figure, axis = plt.subplots(figsize=(size + 1, size), layout="constrained")
    image = axis.imshow(values, cmap="magma_r", vmin=0, vmax=1, interpolation="nearest")
    ends = np.cumsum([0, *map(len, shown)])
    for start, end in pairwise(ends):
        if end - start > 1:
            frame = Rectangle((start - 0.5, start - 0.5), end - start, end - start, fill=False, linewidth=1.0)
            frame.set_edgecolor("tab:cyan")
            axis.add_patch(frame)
    if len(members) <= _NAMED:
        axis.set_yticks(range(len(members)), _names(members), fontsize=7, parse_math=False)
        axis.set_xticks([])
    else:
        axis.set_xlabel("subcomponents, in the order of the groups")
        axis.set_ylabel("subcomponents")
    left = "" if len(shown) == len(groups) else f" (the first {len(shown)} of {len(groups):,} groups)"
    axis.set_title(f"What fires together, in the order of groups{left}", loc="left", fontsize=11)
    figure.colorbar(image, ax=axis, label="overlap: events with both / events with either", shrink=0.7)
    return figure


def dendrogram_figure(merging: Merging, *, max_members: int = 120) -> Figure:
    """The tree of merges: the height of a joint is the share of events in which only one of both is active (or that of
    a joint below it, if larger). Groups at the minimum are coloured; joints that came after it are grey.

    What never was merged hangs together at height 1. Of more than `max_members` subcomponents the largest groups are
    shown.
    """
    import matplotlib.pyplot as plt
    from scipy.cluster.hierarchy import dendrogram

    shown = _first_groups(merging.groups, max_members)
    place = {member: i for i, member in enumerate(merging.members)}
    leaves = [place[member] for group in shown for member in group]
    figure, axis = plt.subplots(figsize=(min(16.0, 3.0 + 0.16 * len(leaves)), 5), layout="constrained")
    names = _names([merging.members[i] for i in leaves])
    if len(leaves) < 2:
        axis.text(0.5, 0.5, "a single subcomponent: nothing to merge", ha="center", va="center")
        axis.set_axis_off()
        return figure
    tree, colours = _tree(merging, leaves)
    dendrogram(
        tree,
        ax=axis,
        labels=names,
        leaf_rotation=90,
        leaf_font_size=7 if len(leaves) <= _NAMED else 4,
        link_color_func=lambda node: colours[node - len(leaves)],
    )
    for label in axis.get_xticklabels():
        label.set_parse_math(False)
    axis.set_ylim(0, 1.03)
    axis.set_ylabel("share of events with only one of both")
    left = "" if len(shown) == len(merging.groups) else f", the largest {len(shown)} of them"
    title = f"Merges: {len(merging.groups):,} groups at the minimum{left} (coloured), later merges grey"
    axis.set_title(title, loc="left", fontsize=11)
    return figure


def _tree(merging: Merging, leaves: Sequence[int]) -> tuple[Float[np.ndarray, "joints 4"], list[str]]:
    """scipy's linkage of the merges among `leaves`, and a colour for every joint."""
    n, group_of = len(merging.members), merging.labels
    node = {member: i for i, member in enumerate(leaves)}  # a group of `merging` -> its node in the tree
    height, size, member_below = [0.0] * len(leaves), [1] * len(leaves), list(leaves)
    rows: list[tuple[float, float, float, float]] = []
    colours: list[str] = []

    def join(a: int, b: int, at: float, colour: str) -> int:
        height.append(max(at, height[a], height[b]))
        size.append(size[a] + size[b])
        member_below.append(member_below[a])
        rows.append((a, b, height[-1], size[-1]))
        colours.append(colour)
        return len(height) - 1

    for m, merge in enumerate(merging.merges.tolist()):
        parts = [node.pop(group) for group in merge if group in node]
        if len(parts) == 2:
            colour = f"C{group_of[member_below[parts[0]]] % _COLOURS}" if m < merging.n_merges else "0.75"
            node[n + m] = join(parts[0], parts[1], 1 - float(merging.overlaps[m]), colour)
        elif parts:
            node[n + m] = parts[0]
    top, *others = node.values()
    for other in others:
        top = join(top, other, 1.0, "0.75")
    return _sorted_by_height(np.array(rows, np.float64), colours, len(leaves))


def _sorted_by_height(rows: np.ndarray, colours: list[str], n: int) -> tuple[np.ndarray, list[str]]:
    """scipy draws joints in the order of their heights; ours are in the order of merging."""
    order = np.lexsort((np.arange(len(rows)), rows[:, 2]))
    number = np.arange(n + len(rows))
    number[n + order] = n + np.arange(len(rows))
    rows = rows[order].copy()
    rows[:, :2] = number[rows[:, :2].astype(int)]
    return rows, [colours[i] for i in order]


def _first_groups(groups: Sequence[Sequence[tuple[str, int]]], most: int) -> list[Sequence[tuple[str, int]]]:
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise ValueError(f"max_members={most!r}; expected a whole number, at least 1")
    if not groups:
        raise ValueError("there are no groups to draw")
    shown, count = [], 0
    for group in groups:
        if shown and count + len(group) > most:
            break
        shown.append(group)
        count += len(group)
    return shown


def _jaccard(together: CoActivation, numbers: Sequence[int]) -> Float[np.ndarray, "n n"]:
    both = np.asarray(together.pair_counts_of(numbers).todense(), np.float64)
    counts = both.diagonal()
    either = counts[:, None] + counts[None, :] - both
    return np.divide(both, either, out=np.zeros_like(both), where=either > 0)


def _names(members: Sequence[tuple[str, int]]) -> list[Any]:
    return [drawn_text(f"{site}[{c}]", 40) for site, c in members]
