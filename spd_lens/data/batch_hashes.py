"""Hashes of batches: whether data is that of another time, and whether several processes were given the same.

Processes take their rows of batches that all of them have, or that they read their rows of. Batches that differ (a
`DistributedSampler`, a seed that depends on the rank, an order from the global random state) would train on other rows
than one process does, or wait for each other for ever.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from spd_lens.data.batches import Batch
from spd_lens.data.processes import Processes, every

_FIX = (
    "give every process the same batches in the same order, each takes its rows itself: no DistributedSampler, no seed "
    "that depends on the rank, and for DataLoader(shuffle=True) generator=torch.Generator().manual_seed(0)"
)


def batch_hash(batch: Batch) -> str:
    """SHA-256 of a batch's tokens (of its inputs where there are none), the positions that count, and the padding."""
    digest = hashlib.sha256()
    for tensor in (batch.inputs if batch.tokens is None else batch.tokens, batch.position_mask):
        digest.update(_bytes(tensor) if tensor is not None else b"none")
    if batch.attention_mask is not None:
        digest.update(b"attention" + _bytes(batch.attention_mask))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    values = tensor.detach().cpu().contiguous()
    values = values if values.is_floating_point() else values.to(torch.int64)
    return f"{values.dtype} {tuple(values.shape)}".encode() + values.reshape(-1).view(torch.uint8).numpy().tobytes()


def check_same_rows(batch: Batch, processes: Processes, *, is_whole: bool) -> None:
    """ValueError, in all processes, unless their rows are those of the first process's batch, which is whole.

    `is_whole`: whether this process's batch is, too.
    """
    n_rows = len(batch.inputs)
    own = [batch_hash(every(batch, row, n_rows)) for row in range(n_rows)]
    first = processes.same(own)
    expected = first if is_whole else first[processes.rank :: processes.count]
    _raise_for(processes.of_all(own == expected), "its first batch differs")


def check_same_batches(batches: Sequence[Batch], processes: Processes) -> None:
    """ValueError, in all processes, unless all were given these batches."""
    if processes.count == 1:
        return
    hashes = processes.of_all([batch_hash(batch) for batch in batches])
    _raise_for([own == hashes[0] for own in hashes], "its batches differ")


def check_same_hash(own: str, processes: Processes) -> None:
    """ValueError, in all processes, unless the hash of what they have read is the same."""
    hashes = processes.of_all(own)
    _raise_for([other == hashes[0] for other in hashes], "its batches differ")


def _raise_for(same: Sequence[bool], what: str) -> None:
    if not all(same):
        raise ValueError(f"process {same.index(False)} was given other data than process 0 ({what}); {_FIX}")
