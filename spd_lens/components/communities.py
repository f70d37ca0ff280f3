"""Leiden communities of the graph of what fires together, to set beside the groups of `merge_subcomponents`.

An edge is two subcomponents that ever fire together, its weight the Jaccard index of their events. The quality is the
constant Potts model: the sum over groups of their inner weights minus `resolution` per pair in them, so groups come out
whose inner weights are above `resolution` on average. Needs leidenalg (`pip install "spd-lens[components]"`).

Memory: one edge per pair that fires together, unlike merging, which keeps no pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Int64

from spd_lens.components.merging import How, labels_by_size, members_by_label
from spd_lens.statistics.coactivations import CoActivation, CountedIn
from spd_lens.support.given import given_instance, given_number, given_whole


@dataclass(frozen=True, eq=False, repr=False)
class Communities:
    """What `leiden` found: the group of every member that fires (0: the largest), and the quality of the partition."""

    members: tuple[tuple[str, int], ...]
    labels: Int64[np.ndarray, " members"]
    quality: float
    resolution: float
    seed: int
    counted_in: CountedIn
    found_in: Mapping[str, str] | None = None

    @property
    def groups(self) -> list[tuple[tuple[str, int], ...]]:
        """The groups, the largest first."""
        return members_by_label(self.members, self.labels)

    def how(self) -> How:
        """How the groups were found, as plain values."""
        chosen: How = {"method": "leiden", "quality": self.quality, "resolution": self.resolution, "seed": self.seed}
        return {**chosen, **asdict(self.counted_in)}

    def __repr__(self) -> str:
        sizes = np.bincount(self.labels)
        several = int((sizes > 1).sum())
        return f"Communities({len(self.labels):,} subcomponents: {len(sizes):,} groups, {several:,} of several)"


def leiden(together: CoActivation, *, resolution: float = 0.3, seed: int = 0) -> Communities:
    """Communities of what fires together; larger `resolution`, smaller groups.

    Raises ValueError where nothing fires and for a resolution outside 0..1, ModuleNotFoundError without leidenalg.
    """
    given_instance("together", together, CoActivation, "coactivation(decomposition, batches)")
    resolution = given_number("resolution", resolution, above=0.0, most=1.0)
    seed = given_whole("seed", seed, least=0)
    if not len(together.ids):
        raise ValueError("nothing fires in these co-activations, so there is nothing to group; give other data")
    try:
        import igraph
        import leidenalg
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'leiden needs leidenalg and igraph, which are not installed: pip install "spd-lens[components]"'
        ) from error
    from scipy.sparse import triu

    alive = np.unique(together.ids)
    pairs = triu(together.pair_counts_of(alive), k=1).tocoo()
    counts = together.counts[alive]
    weights = pairs.data / (counts[pairs.row] + counts[pairs.col] - pairs.data)
    graph = igraph.Graph(n=len(alive), edges=np.stack([pairs.row, pairs.col], axis=1))
    found = leidenalg.find_partition(
        graph,
        leidenalg.CPMVertexPartition,
        weights=weights.tolist(),
        resolution_parameter=resolution,
        seed=seed,
        n_iterations=-1,
    )
    labels = labels_by_size(np.array(found.membership, np.int64))
    # leidenalg counts every pair of an undirected graph twice.
    quality = float(found.quality()) / 2
    return Communities(
        tuple(together.members(alive)), labels, quality, resolution, seed, together.counted_in(), together.found_in
    )
