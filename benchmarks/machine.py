"""How fast this machine multiplies, moves and evaluates, and what it is: the rates that a floor is computed with."""

from __future__ import annotations

import dataclasses
import datetime
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.work import Matmul, Work
from spd_lens.support import block_entries, library_versions

# Seconds that one rate is measured for, the least number of repetitions, and how many numbers are copied.
BUDGET, LEAST, COPIED = 0.02, 5, 2**24


class Clock:
    """Seconds of one thread's CPU time; of wall time with more threads; of the device's own events on CUDA."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def time(self, function: Callable[[], object]) -> float:
        """What one call takes."""
        if self.device.type != "cuda":
            started = self.seconds()
            function()
            return self.seconds() - started
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize(self.device)
        return begin.elapsed_time(end) / 1e3

    def now(self) -> float:
        """For time marks inside a step; waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter()
        return self.seconds()

    def median(self, function: Callable[[], object]) -> float:
        """Median of repeated calls, after one that does not count."""
        function()
        times: list[float] = []
        while len(times) < LEAST or sum(times) < BUDGET:
            times.append(self.time(function))
        return statistics.median(times)


@dataclass(frozen=True)
class Rates:
    """Seconds per product of each shape, per number moved, drawn, and put through GELU or its derivative; and what a
    large square product reaches."""

    seconds: dict[Matmul, float]
    moved: float
    drawn: float
    gelu: float
    gelu_derivative: float
    square_flops_per_second: float

    def matmul_seconds(self, products: Iterable[Matmul]) -> float:
        """At the rate that each shape has here."""
        return sum(self.seconds[product] for product in products)

    def floor_seconds(self, work: Work) -> float:
        """Everything one after the other."""
        products = self.matmul_seconds(product for term in work.matmuls.values() for product in term)
        return products + (
            sum(work.moved.values()) * self.moved
            + work.drawn * self.drawn
            + work.gelus * self.gelu
            + work.gelu_derivatives * self.gelu_derivative
        )


def measure_rates(work: Work, clock: Clock, dtype: torch.dtype) -> Rates:
    """The rates of this moment, each product in its own shape and layout.

    Traffic is a copy between two tensors of 16 million numbers; GELUs and draws are timed on blocks as scalar gates
    use them.
    """
    device = clock.device
    shapes = Counter(product for term in work.matmuls.values() for product in term)
    numbers = _random(COPIED, device, dtype)
    copy = torch.empty_like(numbers)
    n = min(block_entries(device), numbers.numel())
    block, above, out = (_random(n, device, dtype) for _ in range(3))
    generator = torch.Generator(device).manual_seed(0)
    backward = torch.ops.aten.gelu_backward.grad_input
    square = Matmul(1024, 1024, 1024)
    return Rates(
        seconds={shape: clock.median(product_of(shape, device, dtype)) for shape in shapes},
        moved=clock.median(lambda: copy.copy_(numbers)) / (2 * numbers.numel()),
        drawn=clock.median(lambda: torch.rand(n, generator=generator, device=device, dtype=dtype, out=out)) / n,
        gelu=clock.median(lambda: torch.ops.aten.gelu.out(block, out=out)) / n,
        gelu_derivative=clock.median(lambda: backward(above, block, grad_input=out)) / n,
        square_flops_per_second=square.flops / clock.median(product_of(square, device, dtype)),
    )


def mean_rates(first: Rates, second: Rates) -> Rates:
    """Of two measurements, one before and one after what they are compared with."""
    plain = {
        f.name: (getattr(first, f.name) + getattr(second, f.name)) / 2
        for f in dataclasses.fields(Rates)
        if f.name != "seconds"
    }
    return Rates({shape: (first.seconds[shape] + second.seconds[shape]) / 2 for shape in first.seconds}, **plain)


def product_of(product: Matmul, device: torch.device, dtype: torch.dtype) -> Callable[[], Tensor]:
    """A call that multiplies random matrices of this shape and layout."""
    left, right = (product.m, product.k), (product.k, product.n)
    a = _stored(product.batch, left, product.layout[0] == "t", device, dtype)
    b = _stored(product.batch, right, product.layout[1] == "t", device, dtype)
    return (lambda: a @ b) if product.batch > 1 else (lambda: a[0] @ b[0])


def _stored(batch: int, shape: tuple[int, int], transposed: bool, device: torch.device, dtype: torch.dtype) -> Tensor:
    rows, columns = shape[::-1] if transposed else shape
    values = _random(batch * rows * columns, device, dtype).view(batch, rows, columns)
    return values.mT if transposed else values


def _random(n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(0)).to(device=device, dtype=dtype)


def processor() -> str:
    """The processor's name as the system tells it."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.is_file()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def provenance(device: torch.device) -> dict[str, object]:
    """Where and with what numbers were made."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"machine": name, "threads": torch.get_num_threads(), "versions": library_versions(), "date": today}


def rounded(value: Any) -> Any:
    """Four significant digits everywhere, also inside dicts and lists."""
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
