"""What a step really does: products as torch counts them, and the largest sum of bytes that are alive at once."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode


class PeakBytes(TorchDispatchMode):
    """Follows every tensor that is made inside, storage by storage; `peak` is the most that was alive at once.

    What was there `before` counts nowhere: views of it are made inside as well.
    """

    def __init__(self, before: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: set[int] = {tensor.untyped_storage()._cdata for tensor in before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        torch.utils._pytree.tree_map_only(Tensor, self._note, out)
        return out

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known and storage.nbytes() > 0:
            key, size = storage._cdata, storage.nbytes()
            self._known.add(key)
            self.alive += size
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._gone, key, size)
        return tensor

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def counted_flops(step: Callable[[], Any]) -> int:
    """Products of one call, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def peak_bytes(step: Callable[[], Any], before: Iterable[Tensor]) -> int:
    """The most bytes that one call has alive at once, of what it makes itself; `before`: what was there."""
    gc.collect()
    with PeakBytes(before) as counter:
        step()
    return counter.peak
