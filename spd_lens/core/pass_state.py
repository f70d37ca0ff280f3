"""What a running pass has read and not used yet, and what the library has asked of it: per thread, never shared.

A site's input is read in one place of a pass and used in another. In between anything may happen: another thread runs
the same model, or a hook runs it again. So every thread has a state of its own, and in it every running call of a block
has its own inputs, dropped when the call ends, also by an exception.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from spd_lens.core.masks import SiteMask
from spd_lens.hosts.host import Host
from spd_lens.support.compiling import not_compiled


class BlockCall:
    """One running call of a block: inputs that its sites have read, by site name, the newest last."""

    def __init__(self, layer: int | None, cached_positions: int) -> None:
        self.layer = layer
        self.cached_positions = cached_positions
        self.inputs: dict[str, list[Any]] = {}


class PassState(threading.local):
    """The state of one decomposition in the running thread.

    - `recording`: where a clean pass puts every site's input, or None.
    - `given`: masks that a pass without hooks uses, by site name.
    - `calls`: running calls of blocks with sites in them, the innermost last.
    - `outside`: the one input that a site outside these (an embedding, or a module that was called alone) has read.
    - `cached_positions`: how many earlier positions a key-value cache hid from the block that ended last.

    A copy or a pickle starts empty.
    """

    def __init__(self) -> None:
        self.recording: dict[str, Tensor] | None = None
        self.given: Mapping[str, SiteMask] = {}
        self.calls: list[BlockCall] = []
        self.outside: dict[str, Any] = {}
        self.cached_positions = 0

    def __reduce__(self) -> tuple[type[PassState], tuple[()]]:
        return PassState, ()

    def call_of(self, layer: int | None) -> BlockCall | None:
        """The innermost running call, if it is one of this block."""
        return self.calls[-1] if self.calls and self.calls[-1].layer == layer else None

    def keep(self, site: str, layer: int | None, x: Any) -> None:
        """Keep the input that a site has read, or what stands for it."""
        call = self.call_of(layer)
        if call is None:
            self.outside[site] = x
        else:
            call.inputs.setdefault(site, []).append(x)

    def forget(self, site: str, layer: int | None) -> None:
        """A site that nobody watches has read an input: one that an earlier pass has left behind is too old now."""
        if self.outside and self.call_of(layer) is None:
            self.outside.pop(site, None)

    def take(self, site: str, layer: int | None) -> Any:
        """The input that a site has read last and not used yet, or None."""
        call = self.call_of(layer)
        if call is None:
            return self.outside.pop(site, None)
        waiting = call.inputs.get(site)
        return waiting.pop() if waiting else None


class CallGuard:
    """Hooks on one block (or on a model without blocks) that begin and end its calls in `state`.

    With `asks_cache` every call notes how many positions a key-value cache hides, for gates that look across them.
    """

    def __init__(self, host: Host, layer: int | None, module: nn.Module, state: PassState, *, asks_cache: bool) -> None:
        self.host, self.layer, self.module, self.state, self.asks_cache = host, layer, module, state, asks_cache

    def install(self) -> None:
        """Add the hooks."""
        # First of all: where the module is itself what a site reads, that happens inside the call.
        self.module.register_forward_pre_hook(self.enter, with_kwargs=True, prepend=True)
        self.module.register_forward_hook(self.leave, always_call=True)

    def remove(self) -> None:
        """Take the hooks off again; what is off already is no error."""
        pre, post = self.module._forward_pre_hooks, self.module._forward_hooks
        # By what they are, not by handle: a deep copy's handle still refers to the original's hooks.
        for key in [key for key, hook in pre.items() if getattr(hook, "__self__", None) is self]:
            pre.pop(key)
            self.module._forward_pre_hooks_with_kwargs.pop(key, None)
        for key in [key for key, hook in post.items() if getattr(hook, "__self__", None) is self]:
            post.pop(key)
            self.module._forward_hooks_always_called.pop(key, None)

    @not_compiled
    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook."""
        cached = self.host.cached_positions(args, kwargs) if self.asks_cache else 0
        self.state.calls.append(BlockCall(self.layer, cached))

    @not_compiled
    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook, also called after an exception, even if that came before `enter`."""
        if self.state.call_of(self.layer) is not None:
            self.state.cached_positions = self.state.calls.pop().cached_positions
