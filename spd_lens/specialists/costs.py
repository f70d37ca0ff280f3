"""What a model costs: parameters, bytes, FLOPs of one row of tokens, and measured milliseconds."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from spd_lens.support.given import shown


@dataclass(frozen=True)
class Costs:
    """Of one model on one machine.

    - `parameters`: numbers that are stored, shared ones once. `nonzero`: those that are not 0.
    - `bytes`: of parameters and buffers.
    - `flops`: of the matrix products of a pass over `timed_on` tokens, as torch counts them (a multiply-add is two).
    - `milliseconds`: of such a pass, the shortest of several; other programs on the machine make it longer.
    - `cpu_milliseconds`: what the processor worked for it, all threads together: steadier on a busy machine.
    """

    parameters: int
    nonzero: int
    bytes: int
    flops: int
    milliseconds: float
    cpu_milliseconds: float
    timed_on: tuple[int, int]


@torch.no_grad()
def costs_of(model: nn.Module, tokens: Tensor, *, repeats: int = 5) -> Costs:
    """The costs of a model that is called with tokens `[batch pos]`."""
    if not isinstance(tokens, Tensor) or tokens.ndim != 2:
        raise TypeError(f"tokens={shown(tokens)}; expected token ids [batch pos]")
    parameters = list(model.parameters())
    stored = [*parameters, *model.buffers()]
    counter = FlopCounterMode(display=False)
    # The fused attention of a CPU is not in torch's table; written out it is two products.
    with counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens)
    seconds, worked = [], []
    for _ in range(repeats):
        _finish(tokens.device)
        start, start_cpu = time.perf_counter(), time.process_time()
        model(tokens)
        _finish(tokens.device)
        seconds.append(time.perf_counter() - start)
        worked.append(time.process_time() - start_cpu)
    return Costs(
        parameters=sum(p.numel() for p in parameters),
        nonzero=sum(int(p.count_nonzero()) for p in parameters),
        bytes=sum(t.numel() * t.element_size() for t in stored),
        flops=counter.get_total_flops(),
        milliseconds=1000 * min(seconds),
        cpu_milliseconds=1000 * min(worked),
        timed_on=(tokens.shape[0], tokens.shape[1]),
    )


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def mean_loss(model: nn.Module, rows: Tensor, *, per_pass: int = 32) -> float:
    """Cross-entropy of the next token, nats, mean over positions; infinite where one has no probability."""
    if rows.shape[-1] < 2:
        raise ValueError(f"rows {tuple(rows.shape)} have no next token to predict; expected at least two in a row")
    total, count = 0.0, 0
    for part in rows.split(per_pass):
        logp = model(part)[:, :-1].float().log_softmax(-1).gather(-1, part[:, 1:, None])
        total, count = total - float(logp.double().sum()), count + logp.numel()
    return total / count
