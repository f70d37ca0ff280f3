"""What an attribution graph was made with."""

from __future__ import annotations

from pydantic import Field

from spd_lens.support.checked_json import CheckedContent


class GraphSettings(CheckedContent):
    """What a graph was made with: it stands in the graph's file and decides what the graph can be used for.

    - `model`: the target's name. `decomposition`: the hash of the decomposition's tensors (None: not known).
    - `sites`: in running order. `frozen`: what gradients do not pass through, in words.
    - `importance_above`, `max_nodes`: what became a node; `left_out`: how many active subcomponents did not.
    - `readout_position`: of a prompt's graph, where the readouts are (None: a graph of a data set).
    - `n_prompts`, `n_positions`: of a data set's graph, how much was read.
    - `node_threshold`, `edge_threshold`: of a pruned graph.
    """

    model: str = "unknown"
    decomposition: str | None = None
    sites: tuple[str, ...] = Field(default=(), strict=False)
    frozen: str = ""
    importance_above: float | None = None
    max_nodes: int | None = None
    left_out: int = 0
    readout_position: int | None = None
    n_prompts: int | None = None
    n_positions: int | None = None
    node_threshold: float | None = None
    edge_threshold: float | None = None
