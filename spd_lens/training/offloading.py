"""Blocks of the target that a run never enters, kept off the device while it trains (`TrainConfig.offload`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from spd_lens.core.decomposition import Decomposition


@contextmanager
def only_entered_blocks(
    decomposition: Decomposition, start_at: int | None, stop_at: int | None, elsewhere: str = "cpu"
) -> Iterator[list[int]]:
    """While open, blocks before `start_at` and from `stop_at` on lie `elsewhere`; gives their numbers.

    A pass that enters one of them then fails. Embeddings and what follows the blocks stay where they are.

    Raises ValueError where every block is entered.
    """
    host = decomposition.host
    first, end = start_at or 0, host.n_layers() if stop_at is None else stop_at
    unused = [i for i in range(host.n_layers()) if not first <= i < end]
    if not unused:
        raise ValueError(
            "offload=True, but every block is entered: batches start at tokens, or at the first block, and passes end "
            "at the output; expected cached residual streams (cache_residuals), local training (stop_at), or "
            "offload=False"
        )
    device = decomposition.device
    moved: list[torch.nn.Module] = []
    try:
        for layer in unused:
            block = host.block(layer)
            assert block is not None
            moved.append(block)
            block.to(elsewhere)
        yield unused
    finally:
        for block in moved:
            block.to(device)
