"""Block by block: a model's decomposition as one job for every block, and the decompositions put together again.

A block's job needs the block, what enters it and what follows it, and nothing of other jobs; they may run on as many
machines as there are blocks. `merge_decompositions` gives the decomposition of all of them, which can be trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from spd_lens.core.decomposing import decompose
from spd_lens.core.decomposition import Decomposition
from spd_lens.core.settings import Settings


def sites_by_block(sites: Mapping[str, int]) -> dict[int, dict[str, int]]:
    """`{block: {site: C}}`, in the order of the blocks.

    Raises ValueError for sites that are in no block: no job of a block could train them.
    """
    found: dict[int, dict[str, int]] = {}
    for site, count in sites.items():
        parts = site.split(".")
        if parts[0] != "blocks":
            raise ValueError(f"{site} is in no block; leave it out of jobs by block, and train it with the merged ones")
        found.setdefault(int(parts[1]), {})[site] = count
    return dict(sorted(found.items()))


def merge_decompositions(model: nn.Module, directories: Sequence[str | Path]) -> Decomposition:
    """One decomposition of `model` from saved ones of different sites (of different blocks).

    What each part was trained with goes along: `training_record["merged"]` has one record a part, with its sites.

    Raises ValueError for none, for sites that two of them have, for gates of different kinds or widths, and for a
    global gate, which serves the sites of one decomposition only. The model is then unchanged.
    """
    tensors: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    records: list[dict[str, Any]] = []
    first: Settings | None = None
    for directory in directories:
        part = Decomposition.from_pretrained(str(directory), model)
        try:
            _check_fits(part, counts, first, directory)
            first = first or part.settings
            counts |= part.settings.n_subcomponents
            records.append({"sites": list(part), **part.training_record})
            tensors |= {name: tensor.detach().clone() for name, tensor in part.tensors().items()}
        finally:
            part.remove()
    if first is None:
        raise ValueError("there is nothing to merge; expected directories of saved decompositions")
    merged = decompose(model, dict(counts), gate=first.gate, gate_width=first.gate_width)  # pyright: ignore[reportArgumentType]
    merged.load_tensors(tensors)
    merged.training_record = {"merged": records}
    return merged


def _check_fits(part: Decomposition, counts: Mapping[str, int], first: Settings | None, where: Any) -> None:
    own = part.settings
    if own.gate in ("global", "own"):
        raise ValueError(f"{where} has a {own.gate} gate; only gates of single sites can be merged")
    if twice := sorted(set(own.n_subcomponents) & set(counts)):
        raise ValueError(f"{where} has {twice[0]}, which another has too; merge decompositions of different sites")
    if first is not None and (own.gate, own.gate_width) != (first.gate, first.gate_width):
        raise ValueError(
            f"{where} has {own.gate} gates of width {own.gate_width}, the first {first.gate} gates of width "
            f"{first.gate_width}; expected the same"
        )
