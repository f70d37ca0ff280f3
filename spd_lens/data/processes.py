"""Several processes that train one decomposition: the only file that knows ranks.

Started by `torchrun` or `accelerate launch` (anything that sets `WORLD_SIZE` and `RANK`), every process calls `train`
with the same arguments. Process `r` of `n` takes rows `r, r + n, ...` of every batch; gradients are averaged after the
backward pass. Random numbers are those that one process draws for the same rows (`core.draws`), so `n` processes train
what one trains, to the rounding of sums, and their state is the same everywhere, but for adversaries with sources of
their own in every row.

Nothing of the user's is changed: an `Accelerator` or a process group of theirs stays as it is. In a group that is
opened here, a process that dies ends the others at their next exchange, and one that stalls after
`SPD_LENS_TIMEOUT` seconds (600).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from spd_lens.data.batches import Batch
from spd_lens.support.given import given_number

TIMEOUT = "SPD_LENS_TIMEOUT"
TIMEOUT_SECONDS = 600.0
# Gradients are summed in parts of this size, each sent while the next is gathered.
BUCKET_BYTES = 25 * 1024 * 1024


@dataclass(frozen=True)
class Processes:
    """How many processes train together, and which of them this one is."""

    count: int = 1
    rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    @staticmethod
    def now() -> Processes:
        """Those of the process group that is open; one alone where none is."""
        if dist.is_available() and dist.is_initialized():
            return Processes(dist.get_world_size(), dist.get_rank())
        return Processes()

    def share_of(self, things: Sequence[Any]) -> Sequence[Any]:
        """This process's part of a list that all have."""
        return things[self.rank :: self.count]

    # -- batches ---------------------------------------------------------------------------------------------------

    def own_rows(self, batch: Batch) -> Batch:
        """This process's rows of a batch. Raises ValueError for a batch that does not divide."""
        if self.count == 1:
            return batch
        n_rows = len(batch.inputs)
        if n_rows % self.count:
            raise ValueError(
                f"a batch has {n_rows} rows for {self.count} processes; expected a batch size that is a multiple of "
                f"{self.count} (and drop the last, smaller batch)"
            )
        return every(batch, self.rank, self.count)

    def weight(self, position_mask: Tensor | None) -> Tensor | None:
        """What the mean over this process's positions counts in the mean over processes (None: 1).

        Processes whose rows have fewer positions that count weigh less.
        """
        if self.count == 1 or position_mask is None:
            return None
        own = position_mask.sum().float()
        whole = own.clone()
        dist.all_reduce(whole)
        return own * self.count / whole.clamp_min(1)

    # -- sums ------------------------------------------------------------------------------------------------------

    def send_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> Callable[[], None]:
        """`send` the gradients of these parameters; a missing one counts as zeros.

        Those of parameters that are shared out are averaged already.
        """
        if self.count == 1:
            return _nothing
        parameters = list(parameters)
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if any(map(is_shared, parameters)):
            return _nothing
        return self.send([p.grad for p in parameters if p.grad is not None])

    def average_tensors(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their means over the processes, in buckets that are sent while the next is gathered."""
        self.send(tensors)()

    def send(self, tensors: Sequence[Tensor]) -> Callable[[], None]:
        """Begin to average tensors, which must not change until what this returns was called: it puts the means there.

        Whatever is computed in between is computed while they are under way.
        """
        if self.count == 1:
            return _nothing
        sent = []
        for bucket in _buckets(tensors):
            flat = torch.cat([t.flatten() for t in bucket])
            sent.append((bucket, flat, dist.all_reduce(flat, async_op=True)))

        def receive() -> None:
            for bucket, flat, work in sent:
                work.wait()
                flat /= self.count
                for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                    tensor.copy_(part.view_as(tensor))

        return receive

    def whole_batch(self, gradients: Sequence[Tensor], shared: bool) -> None:
        """Make of gradients of this process's rows those of the whole batch, for sources that all rows share or not."""
        if shared:
            self.average_tensors(gradients)
        else:
            for gradient in gradients:
                gradient /= self.count

    def sum_with_gradients(self, value: Tensor) -> Tensor:
        """The sum over the processes; gradients that come back to it are summed over them, too."""
        return value if self.count == 1 else _Sum.apply(value)  # pyright: ignore[reportReturnType]

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the processes."""
        if self.count > 1:
            value = value.clone()
            dist.all_reduce(value)
            value /= self.count
        return value

    def largest(self, value: Tensor) -> Tensor:
        """The elementwise largest value over the processes."""
        if self.count > 1:
            value = value.clone()
            dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return value

    # -- agreeing --------------------------------------------------------------------------------------------------

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

    def of_all(self, value: Any) -> list[Any]:
        """The values of all processes, in all of them."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.count > 1:
            dist.barrier()

    # -- rows that do not divide -----------------------------------------------------------------------------------

    def some_rows(self, batch: Batch) -> Batch:
        """As `own_rows`, for any number of rows: some processes may have one more than others.

        Raises ValueError for fewer rows than processes.
        """
        if self.count == 1:
            return batch
        if len(batch.inputs) < self.count:
            raise ValueError(
                f"a batch has {len(batch.inputs)} rows for {self.count} processes; expected at least one row for each"
            )
        return every(batch, self.rank, self.count)

    def whole_rows(self, own: Tensor, n_rows: int) -> Tensor:
        """All `n_rows` rows of a batch, from those that `some_rows` gave every process."""
        if self.count == 1:
            return own
        room = own.new_zeros((-(-n_rows // self.count), *own.shape[1:]))
        room[: len(own)] = own
        as_bytes = room.dtype == torch.bool
        found = self.join_rows(room.to(torch.uint8) if as_bytes else room)[:n_rows]
        return found.to(own.dtype) if as_bytes else found

    def sum(self, value: Tensor) -> Tensor:
        """The sum over the processes."""
        if self.count > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    # -- state that differs between processes ----------------------------------------------------------------------

    def join_rows(self, own: Tensor) -> Tensor:
        """Rows of the whole batch, from those of every process."""
        if self.count == 1 or own.ndim == 0:
            return own
        found = [torch.empty_like(own) for _ in range(self.count)]
        dist.all_gather(found, own.contiguous())
        return torch.stack(found, dim=1).flatten(0, 1)

    def take_rows(self, whole: Tensor) -> Tensor:
        """Undo `join_rows`, with whatever number of processes. Raises ValueError for rows that do not divide."""
        if self.count == 1 or whole.ndim == 0:
            return whole
        if len(whole) % self.count:
            raise ValueError(f"the checkpoint has adversaries of {len(whole)} rows, which {self.count} cannot share")
        return whole[self.rank :: self.count].contiguous()


def is_shared(tensor: Tensor) -> bool:
    """Whether every process has only its part of this tensor (`TrainConfig.shard`)."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, in every process; all of them have to ask for it if they share it."""
    return tensor.full_tensor() if is_shared(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def _nothing() -> None:
    """There is nobody to average with."""


def every(batch: Batch, rank: int, count: int) -> Batch:
    """Rows `rank, rank + count, ...` of a batch."""
    rows = {name: v[rank::count] for name, v in vars(batch).items() if isinstance(v, Tensor)}
    return replace(batch, **rows)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone()
        dist.all_reduce(total)
        return total


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Tensors of one dtype in lists of about `BUCKET_BYTES`."""
    buckets: list[list[Tensor]] = []
    room = 0
    for tensor in sorted(tensors, key=lambda t: str(t.dtype)):
        if not buckets or room < tensor.nbytes or buckets[-1][0].dtype != tensor.dtype:
            buckets.append([])
            room = BUCKET_BYTES
        buckets[-1].append(tensor)
        room -= tensor.nbytes
    return buckets


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
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_timeout())
    processes = Processes.now()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if processes.count > 1 and device.type == "cuda" and device.index != local:
        raise ValueError(
            f"process {processes.rank} should run on cuda:{local}, but its decomposition is on {device}; move it there "
            "with decomposition.to(...) before train()"
        )
    return processes


def _timeout() -> timedelta:
    given = os.environ.get(TIMEOUT, str(TIMEOUT_SECONDS))
    try:
        return timedelta(seconds=given_number(TIMEOUT, float(given), above=0))
    except ValueError:
        raise ValueError(f"{TIMEOUT}={given!r} in the environment; expected seconds, such as 600") from None


def leave_processes() -> None:
    """Close the process group, at the end of a program: without it a process can abort on its way out."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
