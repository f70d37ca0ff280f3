"""HookPoints that the swap makes of the host's, or adds: those that a site reads, heads' results, unknown importance.

Existing HookPoints become one of these by having their class changed, so every name, alias, hook and reference that
the host or the user holds stays valid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from transformer_lens.hook_points import HookPoint

from spd_lens.hosts.site import is_from_transformer_lens
from spd_lens.support.compiling import not_compiled


class Reader(Protocol):
    """What reads at these points: a `DecomposedWeight`."""

    def receive_input(self, x: Tensor) -> None:
        """Keep the input that the matmul is about to read."""

    def masked_heads(self, results: Tensor) -> Tensor:
        """What each head adds, masked."""
        ...


def has_hook(point: HookPoint) -> bool:
    """Whether anybody has put a hook of any kind on it, TransformerLens's or plain PyTorch's."""
    return bool(point._forward_hooks or point._backward_hooks or point._forward_pre_hooks or point._backward_pre_hooks)


class ReadPoint(HookPoint):
    """A HookPoint that hands what it returns, after all its hooks have run, to the sites that read it.

    `__call__` rather than a hook is used because hooks that a user adds later would run after ours. Compiled graphs
    leave it out: they would remember which hooks there were at first.
    """

    readers: Sequence[Reader] = ()

    @not_compiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = super().__call__(*args, **kwargs)
        for weight in self.readers:
            weight.receive_input(out)
        return out


class HeadResults(HookPoint):
    """What each head adds to `W_O`'s output, where the host computes that: masks act here, before the user's hooks.

    A hook that ablates a head then ablates what the masked weight makes of it.
    """

    weights: Sequence[Reader] = ()

    @not_compiled
    def forward(self, x: Tensor) -> Tensor:
        """`[batch pos head d_out]`, masked."""
        return x if not self.weights else self.weights[0].masked_heads(x)


@dataclass(frozen=True, eq=False)
class MaskedAlready:
    """Stands for the input of a site whose masks have acted head by head; `rest` is what belongs to no head."""

    rest: Tensor | None


class UnknownImportance(HookPoint):
    """The importance point of a site whose importance no single pass knows (the global gate): it never fires.

    TransformerLens's caches hook every point there is and may; anybody else is told what to call.
    """

    def add_hook(self, hook: Any, *args: Any, **kwargs: Any) -> Any:
        """As a HookPoint, but ValueError for a hook that is not one of TransformerLens's caches."""
        if not is_from_transformer_lens(hook):
            raise ValueError(
                f"{self.name} never fires: the global gate needs the inputs of all sites before it can say anything "
                "about one; use decomposition.importance(tokens) instead of hooking the importance (a hook of your own "
                "on all points: leave this one out)"
            )
        return super().add_hook(hook, *args, **kwargs)
