"""Pictures of groupings: what they show is what was computed."""

from __future__ import annotations

import io

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure
from numpy.typing import NDArray

from spd_lens.components import merge_subcomponents
from spd_lens.pictures import coactivation_figure, dendrogram_figure, description_length_figure
from spd_lens.statistics import CoActivation

HOSTILE = "$\\frac{1}{$ <b>\u202e\nW"


def fires() -> NDArray[np.bool_]:
    rng = np.random.default_rng(0)
    active = rng.random((300, 5)) < 0.2
    return np.repeat(active, 3, axis=1) & (rng.random((300, 15)) < 0.9)


def drawn(figure: Figure) -> Figure:
    """Drawn for real, so that what cannot be drawn raises."""
    figure.savefig(io.BytesIO(), format="png")
    plt.close(figure)
    return figure


def test_the_curve_is_that_of_the_merges_and_the_minimum_is_marked() -> None:
    merging = merge_subcomponents(CoActivation.of({"W": fires()}))
    (axis,) = drawn(description_length_figure(merging)).axes
    curve, _, marked = axis.lines
    np.testing.assert_allclose(curve.get_ydata(), merging.description_lengths)
    np.testing.assert_array_equal(curve.get_xdata(), 15 - np.arange(len(merging.description_lengths)))
    assert marked.get_xdata()[0] == len(merging.groups) == 5
    assert marked.get_ydata()[0] == merging.description_lengths.min()
    assert "minimum: 5 groups" in axis.texts[0].get_text()


def test_the_matrix_has_overlaps_in_the_order_of_groups() -> None:
    together = CoActivation.of({"W": fires()[:, ::2], HOSTILE: fires()[:, 1::2]})
    groups = merge_subcomponents(together).groups
    axis = drawn(coactivation_figure(together, groups)).axes[0]
    columns = {("W", c): fires()[:, 2 * c] for c in range(8)} | {(HOSTILE, c): fires()[:, 2 * c + 1] for c in range(7)}
    order = [columns[member] for group in groups for member in group]
    expected = [[(a & b).sum() / (a | b).sum() for b in order] for a in order]
    np.testing.assert_allclose(np.asarray(axis.images[0].get_array()), expected)
    frames = [patch.get_width() for patch in axis.patches]
    assert frames == [len(group) for group in groups if len(group) > 1]
    few = drawn(coactivation_figure(together, groups, max_members=7)).axes[0]
    assert np.asarray(few.images[0].get_array()).shape == (6, 6)
    assert f"the first 2 of {len(groups)} groups" in few.get_title(loc="left")
    with pytest.raises(ValueError, match="max_members=0; expected a whole number, at least 1"):
        coactivation_figure(together, groups, max_members=0)
    with pytest.raises(ValueError, match="there are no groups to draw"):
        coactivation_figure(together, [])


def test_the_tree_joins_members_of_a_group_below_all_others() -> None:
    merging = merge_subcomponents(CoActivation.of({HOSTILE: fires()}))
    (axis,) = drawn(dendrogram_figure(merging)).axes
    joints = [path for collection in axis.collections for path in collection.get_paths()]
    assert len(joints) == 14
    coloured = [
        path
        for collection in axis.collections
        for path in collection.get_paths()
        if len(set(np.round(collection.get_edgecolor()[0][:3], 3))) > 1
    ]
    assert len(coloured) == merging.n_merges == 10
    heights = sorted(1 - merging.overlaps[: merging.n_merges])
    tops = sorted(path.vertices[:, 1].max() for path in coloured)
    assert tops[-1] == pytest.approx(heights[-1])
    few = drawn(dendrogram_figure(merging, max_members=6)).axes[0]
    assert len(few.get_xticklabels()) == 6
    assert "the largest 2 of them" in few.get_title(loc="left")


def test_a_single_subcomponent_is_drawn_too() -> None:
    together = CoActivation.of({"W": np.ones((4, 1), bool)})
    merging = merge_subcomponents(together)
    for figure in (
        description_length_figure(merging),
        coactivation_figure(together, merging.groups),
        dendrogram_figure(merging),
    ):
        drawn(figure)
