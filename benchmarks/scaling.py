"""How time and memory of a step grow: `python benchmarks/scaling.py` prints a table and draws `docs/scaling.png`.

Configuration c, varied in one size at a time: subcomponents C, tokens, number of decomposed matrices in a model of
fixed depth, and depth with every matrix decomposed. Steps of all sizes of one sweep alternate.

An exponent is the slope of log(value) over log(size) by least squares. Where a step is mostly Python calls, time says
nothing about the work: sizes count only where the step takes at least `CLEAR` times as long as the same step with tiny
matrices (same number of calls). For memory the same sizes count. `work` is the slope of the necessary matrix
products (`benchmarks/work.py`): below 1 where part of a step does not depend on the size.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

if __package__ in (None, ""):  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.configurations import ProductStep, build
from benchmarks.machine import Clock, provenance, rounded
from benchmarks.measure import alternate, drop_workspace, kept_workspace, peak_memory
from benchmarks.work import count_work

CLEAR = 5.0
TINY = {
    "d_model": 8,
    "n_heads": 2,
    "d_mlp": 8,
    "d_vocab": 8,
    "batch": 1,
    "pos": 2,
    "n_subcomponents": 2,
    "gate_width": 2,
}


@dataclass(frozen=True)
class Sweep:
    """`changes(size)` of configuration c; time and memory should grow with the power `expected`, or slower."""

    name: str
    sizes: tuple[int, ...]
    changes: Callable[[int], dict[str, Any]]
    expected: float = 1.0


@dataclass(frozen=True)
class Point:
    """One size of a sweep; `call_ms` is the same step with tiny matrices."""

    size: int
    step_ms: float
    call_ms: float
    memory_mb: float
    gflop: float

    @property
    def counts(self) -> bool:
        """Whether the step is long enough to tell something about the work."""
        return self.step_ms >= CLEAR * self.call_ms


def _some_blocks(n_sites: int) -> dict[str, Any]:
    return {"n_layers": 8, "sites": tuple(f"blocks.{i}.*" for i in range(n_sites // 6))}


SWEEPS = (
    Sweep("C", (128, 256, 512, 1024, 2048), lambda C: {"n_subcomponents": C}),
    Sweep("tokens", (64, 128, 256, 512, 1024, 2048), lambda n: {"batch": n // 64}),
    Sweep("sites", (6, 12, 24, 48), _some_blocks),
    Sweep("depth", (1, 2, 4, 8), lambda n: {"n_layers": n}),
)


def measure(sweep: Sweep, rounds: int) -> list[Point]:
    """Median CPU time, peak memory above the model and necessary work of every size."""
    clock = Clock(torch.device("cpu"))
    built = {size: build("transformer", **sweep.changes(size)) for size in sweep.sizes}
    tiny = {size: build("transformer", **{**sweep.changes(size), **TINY}) for size in sweep.sizes}
    steps = {str(size): _step(b) for size, b in built.items()}
    calls = {f"tiny {size}": _step(b) for size, b in tiny.items()}
    times = alternate(steps | calls, rounds, clock, warm_up=1)
    points = []
    for size, b in built.items():
        drop_workspace()
        memory = peak_memory(steps[str(size)], clock.device) + kept_workspace()
        seconds, of_calls = (statistics.median(times[name]) for name in (str(size), f"tiny {size}"))
        gflop = count_work(b.decomposition, b.config, b.batch).flops() / 1e9
        points.append(Point(size, 1e3 * seconds, 1e3 * of_calls, memory / 1e6, gflop))
    return points


def _step(built: Any) -> Callable[[], object]:
    product = ProductStep(built.decomposition, built.config)
    return lambda: product.step(built.batch)


def fit_exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The power with which values grow: slope of log(value) over log(size) by least squares; NaN for fewer than two."""
    if len(sizes) < 2:
        return math.nan
    x, y = [math.log(s) for s in sizes], [math.log(v) for v in values]
    return statistics.linear_regression(x, y).slope


def exponents(points: Sequence[Point]) -> dict[str, float]:
    """Of time, memory and necessary work, over the sizes that count."""
    kept = [p for p in points if p.counts]
    return {
        name: fit_exponent([p.size for p in kept], [getattr(p, attribute) for p in kept])
        for name, attribute in (("time", "step_ms"), ("memory", "memory_mb"), ("work", "gflop"))
    }


def table(results: dict[str, list[Point]]) -> str:
    """Sizes that do not count are in brackets."""
    lines = [f"{'':8}{'size':>8}{'step ms':>10}{'calls ms':>10}{'memory MB':>11}{'GFLOP':>8}"]
    for sweep in SWEEPS:
        points = results[sweep.name]
        for p in points:
            size = str(p.size) if p.counts else f"({p.size})"
            lines.append(f"{sweep.name:8}{size:>8}{p.step_ms:10.1f}{p.call_ms:10.1f}{p.memory_mb:11.1f}{p.gflop:8.2f}")
        fitted = ", ".join(f"{name} {value:.2f}" for name, value in exponents(points).items())
        lines.append(f"{'':8}exponents: {fitted}; expected at most {sweep.expected:g}\n")
    return "\n".join(lines)


def draw(results: dict[str, list[Point]], path: Path) -> None:
    """Time above, memory below, a column for each sweep."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FixedLocator, LogLocator, NullLocator, ScalarFormatter

    labels = {
        "C": "subcomponents C", "tokens": "tokens in a batch", "sites": "decomposed matrices (of 48)",
        "depth": "blocks, all decomposed",
    }  # fmt: skip
    figure, axes = plt.subplots(2, len(SWEEPS), figsize=(13, 6.2), layout="constrained")
    rows = (("step_ms", "step, ms of CPU time", "time"), ("memory_mb", "peak memory above the model, MB", "memory"))
    for column, sweep in enumerate(SWEEPS):
        points = results[sweep.name]
        kept, fitted = [p for p in points if p.counts], exponents(points)
        for row, (attribute, label, key) in enumerate(rows):
            ax, values = axes[row][column], [getattr(p, attribute) for p in points]
            ax.loglog(sweep.sizes, values, "o", mfc="white", color="tab:blue", label="not in the fit")
            ax.loglog(
                [p.size for p in kept], [getattr(p, attribute) for p in kept], "o", color="tab:blue", label="measured"
            )
            ends = [sweep.sizes[0], sweep.sizes[-1]]
            ax.loglog(ends, [values[-1] * (s / ends[1]) ** sweep.expected for s in ends], ":", color="gray",
                      label=f"exponent {sweep.expected:g}")  # fmt: skip
            if kept:
                middle = [statistics.geometric_mean(getattr(p, a) for p in kept) for a in ("size", attribute)]
                line = [middle[1] * (s / middle[0]) ** fitted[key] for s in ends]
                ax.loglog(ends, line, color="tab:orange", label="fitted")
            of_work = f" (FLOPs: {fitted['work']:.2f})" if row == 0 else ""
            ax.set_title(f"exponent {fitted[key]:.2f}{of_work}", fontsize=11)
            ax.xaxis.set_major_locator(FixedLocator(list(sweep.sizes)))
            ax.xaxis.set_major_formatter(ScalarFormatter())
            ax.xaxis.set_minor_locator(NullLocator())
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter(ScalarFormatter())
            ax.yaxis.set_minor_locator(NullLocator())
            ax.grid(alpha=0.3)
            if column == 0:
                ax.set_ylabel(label)
            if row == 1:
                ax.set_xlabel(labels[sweep.name])
    axes[0][0].legend(fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
    rounds: Annotated[int, typer.Option(help="timed steps of every size")] = 7,
    plot: Annotated[Path, typer.Option(help="where the picture goes")] = Path("docs/scaling.png"),
) -> None:
    """Measure how a step grows with its sizes."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results = {sweep.name: measure(sweep, rounds) for sweep in SWEEPS}
    draw(results, plot)
    if not as_json:
        print(table(results))
        return
    sweeps = {
        sweep.name: {
            "expected": sweep.expected,
            "exponents": exponents(results[sweep.name]),
            "points": [dataclasses.asdict(p) | {"counts": p.counts} for p in results[sweep.name]],
        }
        for sweep in SWEEPS
    }
    command = " ".join(["python", "benchmarks/scaling.py", *sys.argv[1:]])
    described = {"sweeps": sweeps, "rounds": rounds, **provenance(torch.device("cpu")), "command": command}
    print(json.dumps(rounded(described)))


if __name__ == "__main__":
    typer.run(main)
