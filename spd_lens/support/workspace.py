"""How much is worked on at a time where a computation goes block by block instead of through main memory."""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class Kept(threading.local):
    """The tensors that a thread keeps, by dtype."""

    def __init__(self) -> None:
        self.rooms: dict[torch.dtype, list[Tensor]] = {}


_kept = Kept()


def block_entries(device: torch.device) -> int:
    """Entries of one block: what a core's cache holds on a CPU; far more elsewhere, where launches cost more than
    traffic."""
    return 2**19 if device.type == "cpu" else 2**26


def workspace(count: int, entries: int, like: Tensor) -> list[Tensor]:
    """`count` flat tensors of `entries` numbers to write into, kept by the thread from one call to the next.

    Fresh memory costs a page fault for every 4 KB, several times what is then computed in it. What is in them is
    undefined, and nothing may be kept in them after the caller returns.
    """
    if like.device.type != "cpu":
        return [like.new_empty(entries) for _ in range(count)]
    rooms = _kept.rooms
    own = rooms.setdefault(like.dtype, [])
    if len(own) < count or len(own[0]) < entries:
        size = max(entries, block_entries(like.device))
        # Not as inference tensors, which nothing outside inference mode could write into.
        with torch.inference_mode(False):
            own = [torch.empty(size, dtype=like.dtype, device=like.device) for _ in range(count)]
        rooms[like.dtype] = own
    return [room[:entries] for room in own[:count]]
