"""Several processes that train one decomposition: the only file that knows ranks.

Started by `torchrun` or `accelerate launch` (anything that sets `WORLD_SIZE` and `RANK`), every process calls `train`
with the same arguments, takes batches of its own from the stream, and gradients are averaged after the backward pass.
Nothing of the user's is changed: an `Accelerator` or a process group of theirs stays as it is.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

# Names of checkpointed tensors that differ between processes: random state, and what adversaries remember.
OF_ONE_PROCESS = ("generator.", "masks.")


@dataclass(frozen=True)
class Processes:
    """How many processes train together, and which of them this one is."""

    count: int = 1
    rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def average(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace every gradient by its mean over the processes, in one reduction per dtype."""
        if self.count == 1:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for p in parameters:
            if p.grad is not None:
                by_dtype.setdefault(p.grad.dtype, []).append(p.grad)
        for gradients in by_dtype.values():
            flat = torch.cat([g.flatten() for g in gradients])
            dist.all_reduce(flat)
            flat /= self.count
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def largest(self, value: Tensor) -> Tensor:
        """The elementwise largest value over the processes."""
        if self.count > 1:
            value = value.clone()
            dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return value

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is set in any process; with several, this waits for the device."""
        if self.count == 1:
            return flag
        return bool(self.largest(torch.tensor(int(flag), device=device)))

    def same(self, value: Any) -> Any:
        """The first process's value, in all of them."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def every_rank(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the first process, and those that differ between processes of the others (`rank1|name`)."""
        if self.count == 1:
            return dict(own)
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, {name: t.cpu() for name, t in own.items() if name.startswith(OF_ONE_PROCESS)})
        others = {f"rank{r}|{k}": v for r, tensors in enumerate(found) if r for k, v in tensors.items()}
        return {**own, **others}

    def own(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Undo `every_rank`: this process's tensors. Raises ValueError if they are of another number of processes."""
        ranks = {0} | {int(name.split("|")[0].removeprefix("rank")) for name in tensors if _is_of_rank(name)}
        if len(ranks) != self.count:
            raise ValueError(
                f"the checkpoint is of {len(ranks)} processes and this run has {self.count}; resume with the same "
                "number of them"
            )
        common = {name: t for name, t in tensors.items() if not _is_of_rank(name)}
        prefix = f"rank{self.rank}|"
        return common | {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.count > 1:
            dist.barrier()


def _is_of_rank(name: str) -> bool:
    head, found, _ = name.partition("|")
    return bool(found) and head.startswith("rank") and head.removeprefix("rank").isdigit()


def join_processes(device: torch.device) -> Processes:
    """The processes that were started together; one alone unless a launcher set `WORLD_SIZE`.

    Opens the default process group if nobody has. Raises ValueError if the decomposition is not on the device that this
    process's local rank says.
    """
    if not dist.is_available():
        return Processes()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if not dist.is_initialized():
        if world == 1:
            return Processes()
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    processes = Processes(dist.get_world_size(), dist.get_rank())
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if processes.count > 1 and device.type == "cuda" and device.index != local:
        raise ValueError(
            f"process {processes.rank} should run on cuda:{local}, but its decomposition is on {device}; move it there "
            "with decomposition.to(...) before train()"
        )
    return processes
