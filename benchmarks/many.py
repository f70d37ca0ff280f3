"""What `train_many` costs per member and step: `python benchmarks/many.py` prints one JSON object.

TMS 5-2 and 40-10 (configurations a and b at batch 1024), 1, 5 and 25 members, against the step that `train` takes of
one decomposition. CPU time on one thread; runs alternate with blocks of single steps, medians over all steps after the
first of every run. A step of `train_many` is timed from one request for a batch to the next, so the loop is included;
batches are ready beforehand.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

if __package__ in (None, ""):  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.configurations import Configuration, ProductStep, build
from benchmarks.machine import provenance, rounded
from spd_lens.data import Batch
from spd_lens.training import train_many

MODELS: dict[str, dict[str, Any]] = {"tms_5_2": {"n_subcomponents": 20}, "tms_40_10": {"n_subcomponents": 200}}
MEMBERS = (1, 5, 25)


def steps_of_many(members: list[Configuration], steps: int) -> list[float]:
    """CPU seconds of every step of one `train_many` but the first."""
    marks: list[float] = []

    def requests(batch: Batch) -> Iterator[Batch]:
        while True:
            marks.append(time.process_time())
            yield batch

    # One step more than is timed, because its end is the next request.
    config = members[0].config.changed(steps=steps + 2, log_every=10**9, checkpoint_every=None)
    sources: list[Any] = [requests(members[0].batch), *([m.batch] for m in members[1:])]
    train_many([m.decomposition for m in members], sources, config)
    return [after - before for before, after in itertools.pairwise(marks[1:])]


def steps_of_one(member: Configuration, steps: int) -> list[float]:
    """CPU seconds of single steps."""
    product, times = ProductStep(member.decomposition, member.config), []
    product.step(member.batch)
    for _ in range(steps):
        started = time.process_time()
        product.step(member.batch)
        times.append(time.process_time() - started)
    return times


def measure(name: str, rounds: int, steps: int, batch: int, member_counts: tuple[int, ...]) -> dict[str, Any]:
    """Milliseconds of a single step, and per member and step for every number of members."""
    # They differ in nothing: costs do not depend on values.
    members = [build(name, batch=batch, **MODELS[name]) for _ in range(max(member_counts))]
    single: list[float] = []
    together: dict[int, list[float]] = {n: [] for n in member_counts}
    for _ in range(rounds):
        for n in member_counts:
            single += steps_of_one(members[0], steps)
            together[n] += steps_of_many(members[:n], steps)
    one_ms = 1e3 * statistics.median(single)
    per_member = {n: 1e3 * statistics.median(times) / n for n, times in together.items()}
    return {
        "batch": batch,
        **MODELS[name],
        "single_ms": one_ms,
        "ms_per_member": per_member,
        "speedup": {n: one_ms / ms for n, ms in per_member.items()},
    }


def main(
    rounds: Annotated[int, typer.Option(help="runs of every number of members")] = 3,
    steps: Annotated[int, typer.Option(help="timed steps of a run")] = 10,
    batch: int = 1024,
) -> None:
    """Measure train_many."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(sys.stderr):
        results = {name: measure(name, rounds, steps, batch, MEMBERS) for name in MODELS}
    command = " ".join(["python", "benchmarks/many.py", *sys.argv[1:]])
    described = {**results, "rounds": rounds, "steps": steps, **provenance(torch.device("cpu")), "command": command}
    print(json.dumps(rounded(described)))


if __name__ == "__main__":
    typer.run(main)
