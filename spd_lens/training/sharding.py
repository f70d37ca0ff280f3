"""Parameters shared out over the processes of a run while it lasts (`TrainConfig.shard`), by FSDP2's `fully_shard`.

V and U of a site are one group, so is its gate, and so is every block of a global gate; nothing around them is wrapped.
A process keeps the `1 / n` of a group that is its own, with gradient and Adam's moments. A group is gathered where it
computes, forward and backward, and only for so long; its gradient is averaged and cut up behind each backward pass. A
step has several backward passes, so a group is gathered several times in it: that is what the memory costs.

The user's own modules are put aside meanwhile (in main memory), and get the values back at the end. Every process has
the whole decomposition before and after the run, without gradients and moments, and while it is evaluated or drawn.
The target is not shared out.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.gates import GlobalGate
from spd_lens.data.processes import is_shared
from spd_lens.training.last_good import Diverged

# Where a module stands: what holds it, and under which name.
Place = tuple[nn.Module, str]
Gathered = Callable[[], AbstractContextManager[None]]


@contextmanager
def sharded(decomposition: Decomposition) -> Iterator[Gathered]:
    """While open, parameters of the decomposition are shared out; without a process group nothing changes.

    Gives a context in which they are whole in every process, for what only reads them. All processes have to open it,
    and it needs the memory of a whole copy on each.

    When it ends, or breaks off in all processes at once (`Diverged`), they are whole again, with the values of then. If
    one process fails by itself, those of the beginning are put back, for which nobody has to be asked.
    """
    if not (dist.is_available() and dist.is_initialized()):
        yield nullcontext
        return
    device = decomposition.device
    aside = {(parent, name): getattr(parent, name) for parent, name in _groups(decomposition)}
    try:
        for (parent, name), own in aside.items():
            shared = copy.deepcopy(own)
            _move(own, torch.device("cpu"))
            _share(shared, device)
            setattr(parent, name, shared)
        try:
            with warnings.catch_warnings():
                # A global gate gives views of one tensor, into which nothing here writes.
                warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
                yield lambda: _gathered(aside)
        except Diverged:
            _gather(aside)
            raise
        _gather(aside)
    finally:
        for (parent, name), own in aside.items():
            _move(own, device)
            setattr(parent, name, own)


@contextmanager
def _gathered(aside: Mapping[Place, nn.Module]) -> Iterator[None]:
    """The modules that were put aside in their places, with the values of now; afterwards all is as it was."""
    shares = {(parent, name): getattr(parent, name) for parent, name in aside}
    beginning = [(p, p.data) for own in aside.values() for p in own.parameters()]
    try:
        _gather(aside)
        for (parent, name), own in aside.items():
            setattr(parent, name, own)
        yield
    finally:
        for (parent, name), shared in shares.items():
            setattr(parent, name, shared)
        for p, values in beginning:
            p.data = values


def with_whole_factors(decomposition: Decomposition, use: Callable[[], Tensor]) -> Tensor:
    """`use()` with V and U of all sites whole meanwhile, and again in its backward pass; gates stay shared out."""
    modules: list[Any] = [w.subcomponents for w in decomposition.values() if w.tied_to is None]
    if not is_shared(modules[0].V):
        return use()

    def innermost() -> Tensor:
        # What `use` itself gathers would be shared out again where that ends, under its hands.
        for module in modules:
            module.set_reshard_after_forward(False)
        try:
            return use()
        finally:
            for module in modules:
                module.set_reshard_after_forward(True)

    for module in modules:
        innermost = partial(module, innermost)
    return innermost()


def _groups(decomposition: Decomposition) -> Iterator[Place]:
    """Where the modules stand that are shared out."""
    for weight in decomposition.values():
        names = ["subcomponents"] if weight.tied_to is None else []
        for name in (*names, "gate", "global_gate"):
            if isinstance(weight._modules.get(name), nn.Module):
                yield weight, name


def _share(module: nn.Module, device: torch.device) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in module.blocks if isinstance(module, GlobalGate) else ():
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(module, mesh=mesh, reshard_after_forward=True)


@torch.no_grad()
def _gather(aside: Mapping[Place, nn.Module]) -> None:
    """The values of now, whole, in the modules that were put aside."""
    for (parent, name), own in aside.items():
        for whole, shard in zip(own.parameters(), getattr(parent, name).parameters(), strict=True):
            whole.data = shard.full_tensor()


def _move(module: nn.Module, device: torch.device) -> None:
    for p in module.parameters():
        p.data = p.data.to(device)
