"""`InputReader`: gives what a module's matmul is about to read to the sites that stand for its weights."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from spd_lens.core.decomposed_weight import DecomposedWeight
from spd_lens.hosts.site import ModuleInput
from spd_lens.support.compiling import not_compiled


class InputReader:
    """Forward pre-hook on a module that multiplies: give its input to the sites that read it."""

    def __init__(self) -> None:
        self.readers: list[tuple[Callable[..., Tensor], DecomposedWeight]] = []

    @not_compiled
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for read, weight in self.readers:
            weight.receive_input(read(args, kwargs))
        hooks = module._forward_pre_hooks
        if next(reversed(hooks.values())) is self or not any(weight.is_needed() for _, weight in self.readers):
            return
        # A later pre-hook may still change what the matmul reads; being last next time costs nothing.
        own = next(key for key, hook in hooks.items() if hook is self)
        hooks.move_to_end(own)  # pyright: ignore[reportAttributeAccessIssue]
        raise RuntimeError(
            f"a PyTorch forward pre-hook was added to a {type(module).__name__} after it was decomposed, and runs "
            "after the input has been read. The order is put right now: run the pass again, or use a "
            "TransformerLens hook"
        )


def reader_on(module: nn.Module) -> InputReader | None:
    return next((hook for hook in module._forward_pre_hooks.values() if isinstance(hook, InputReader)), None)


class _Tap:
    """Stands among the readers of an input, and keeps what they get, by thread."""

    def __init__(self, weight: DecomposedWeight) -> None:
        self.weight = weight
        self.taken: dict[int, Tensor] = {}

    def is_needed(self) -> bool:
        return True

    def receive_input(self, x: Tensor) -> None:
        self.taken[threading.get_ident()] = self.weight.with_positions(x)


@contextmanager
def tapped_input(weight: DecomposedWeight) -> Iterator[dict[int, Tensor]]:
    """While open, a pass leaves what the site's matmul reads in the dict, under the number of its thread."""
    read_from, tap = weight.site.read_from, _Tap(weight)
    if isinstance(read_from, ModuleInput):
        reader = reader_on(read_from.module)
        assert reader is not None
        entry: Any = (read_from.read, tap)
        reader.readers.append(entry)
        try:
            yield tap.taken
        finally:
            reader.readers.remove(entry)
        return
    point: Any = read_from.point
    point.readers = [*point.readers, tap]
    try:
        yield tap.taken
    finally:
        point.readers = [r for r in point.readers if r is not tap]
