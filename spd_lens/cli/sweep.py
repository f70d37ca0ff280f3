"""`spd-lens sweep`: many runs over any fields, several at once, resumable, with a Pareto picture at the end."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from spd_lens.cli.jobs import statuses_of
from spd_lens.cli.jobs import submit as submit_jobs
from spd_lens.cli.output import DONE, FAILED, STOPPED, JsonFlag, ends_in_words, refuse_options, show
from spd_lens.cli.run_file import RunFile
from spd_lens.cli.runs import DECOMPOSITION, RUN_FILE
from spd_lens.cli.sweep_batched import train_batched
from spd_lens.cli.yaml_file import ConfigError, YamlFile, read_yaml, with_changes
from spd_lens.evaluation import pareto
from spd_lens.support.files import write_json

REPORT = "evaluation.json"

HELP = """Train and evaluate CONFIG for every combination of the given values.

Every run is `spd-lens train --resume auto` and `spd-lens evaluate` in a process and a directory of its own. The same
command again goes on: what is finished is not done twice. At the end OUT/pareto.png and OUT/sweep.json. SIGTERM or
Ctrl-C lets the runs write their checkpoints and ends with status 75. Status 1 if a run failed; the others go on.

With --batched, runs that differ in seeds, learning rates or coefficients are trained together (`train_many`), which is
faster for small models. With --submit slurm (or local) submitit runs them, and this command waits for them.

Examples:

    spd-lens sweep config.yaml --over train.minimality=1e-5,1e-4,1e-3 --out runs/sweep

    spd-lens sweep config.yaml --over train.seed=0,1,2 --over decompose.seed=0,1,2 --zip --processes 2 --out runs/seeds

    spd-lens sweep config.yaml --over decompose.seed=0,1,2,3 --batched --out runs/seeds

    spd-lens sweep config.yaml --over train.lr=1e-3,3e-3 --submit slurm --job gpus_per_node=1 --out runs/lr
"""


@ends_in_words
def command(
    config: Annotated[Path, typer.Argument(help="The file that all runs share.")],
    over: Annotated[list[str], typer.Option(help="FIELD=VALUE,VALUE,...; may be repeated.")],
    out: Annotated[Path, typer.Option(help="The sweep's directory.")],
    zip: Annotated[bool, typer.Option("--zip", help="First values together, then second, ...")] = False,
    processes: Annotated[int, typer.Option(min=1, help="Runs at once.")] = 1,
    batched: Annotated[bool, typer.Option("--batched", help="Train all runs as one.")] = False,
    submit: Annotated[str | None, typer.Option(help="slurm or local: hand the runs to submitit.")] = None,
    job: Annotated[list[str] | None, typer.Option(help="NAME=VALUE for submitit; repeatable.")] = None,
    json: JsonFlag = False,
) -> None:
    if submit is None:
        refuse_options(["job"], "is for --submit")
    else:
        refuse_options(["processes"], "is for runs here; --submit hands them to submitit")
    cells = sweep_cells(read_yaml(config), over, out, zipped=zip)
    if batched and submit is not None:
        raise ConfigError("--batched with --submit; runs that are trained as one are one process")
    if batched and train_batched(config, [(cell.changes, cell.directory) for cell in cells], out / "batched"):
        statuses = dict.fromkeys([cell.directory for cell in cells], STOPPED)
    elif submit is not None:
        statuses = submit_cells(config, cells, out, submit, job or [])
    else:
        statuses = run_cells(config, cells, processes)
    finished = [cell for cell in cells if statuses[cell.directory] == DONE]
    picture = None
    if finished:
        picture = out / "pareto.png"
        pareto([cell.directory for cell in finished]).figure().savefig(picture, dpi=150)
    rows = [{"directory": str(c.directory), "set": c.changes, "status": statuses[c.directory]} for c in cells]
    result = {"runs": rows, "picture": None if picture is None else str(picture)}
    write_json(out / "sweep.json", result)
    words = {DONE: "done", STOPPED: "stopped, goes on with the same command"}
    lines = [f"{row['directory']}: {words.get(row['status'], 'failed, see log.txt there')}" for row in rows]
    show("\n".join([*lines, f"picture: {picture}"]), result, as_json=json)
    if STOPPED in statuses.values():
        raise typer.Exit(STOPPED)
    if len(finished) < len(cells):
        raise typer.Exit(FAILED)


@dataclass(frozen=True)
class SweepCell:
    """One run of a sweep: what is set in it, and its directory."""

    changes: list[str]
    directory: Path


def sweep_cells(file: YamlFile, over: list[str], out: Path, *, zipped: bool = False) -> list[SweepCell]:
    """The runs of a sweep, each checked before the first begins.

    Raises ConfigError for text that is no list of values, for values that make no sense, and (zipped) for lists of
    different lengths.
    """
    choices: list[list[str]] = []
    for text in over:
        name, found, values = text.partition("=")
        if not found or not values:
            raise ConfigError(f"--over {text!r}; expected FIELD=VALUE,VALUE, for example train.minimality=1e-4,1e-3")
        choices.append([f"{name}={value}" for value in _split(values)])
    lengths = {len(values) for values in choices}
    if zipped and len(lengths) > 1:
        raise ConfigError(f"--zip with lists of {sorted(lengths)} values; expected the same number in every --over")
    combined = list(zip(*choices, strict=True)) if zipped else list(itertools.product(*choices))
    cells = []
    for changes in combined:
        RunFile.of(with_changes(file, changes))
        cells.append(SweepCell(list(changes), out / _directory_name(changes)))
    if len({cell.directory for cell in cells}) < len(cells):
        raise ConfigError("two runs of this sweep are the same; expected different values")
    return cells


def _split(values: str) -> list[str]:
    """At commas that stand in no brackets."""
    return [part.strip() for part in re.split(r",(?![^\[{]*[\]}])", values)]


def _directory_name(changes: tuple[str, ...]) -> str:
    return "_".join(re.sub(r"[^\w.+-]+", "-", change.split(".", 1)[-1]) for change in changes)


def run_cells(config: Path, cells: list[SweepCell], processes: int) -> dict[Path, int]:
    """Train and evaluate every cell, `processes` at once; exit statuses by directory. What is finished is left."""
    _check_finished(config, cells)
    statuses = {cell.directory: DONE for cell in cells if (cell.directory / REPORT).is_file()}
    waiting = [cell for cell in cells if cell.directory not in statuses]
    running: dict[Path, tuple[subprocess.Popen[bytes], SweepCell, bool]] = {}
    with _asked_to_stop() as asked:
        while waiting or running:
            if asked and not running:
                break
            while waiting and len(running) < processes and not asked:
                cell = waiting.pop(0)
                trained = (cell.directory / DECOMPOSITION).is_dir()
                running[cell.directory] = (_start(config, cell, evaluates=trained), cell, trained)
            for directory, (process, cell, evaluates) in list(running.items()):
                if asked and not evaluates:
                    process.send_signal(signal.SIGTERM)
                if (status := process.poll()) is None:
                    continue
                del running[directory]
                if status == DONE and not evaluates and not asked:
                    running[directory] = (_start(config, cell, evaluates=True), cell, True)
                else:
                    statuses[directory] = status if status in (DONE, STOPPED) and evaluates else _as_status(status)
            time.sleep(0.2)
    return statuses | {cell.directory: STOPPED for cell in cells if cell.directory not in statuses}


def _check_finished(config: Path, cells: Sequence[SweepCell]) -> None:
    """ConfigError for a finished run of another file than `config` is now: its results would count as this sweep's."""
    for cell in cells:
        path = cell.directory / RUN_FILE
        if (cell.directory / REPORT).is_file() and path.is_file():
            wanted, found = (run.model_dump() for run in (RunFile.read(config, cell.changes), RunFile.read(path)))
            changed = [name for name in wanted if wanted[name] != found[name]]
            if changed:
                raise ConfigError(
                    f"{cell.directory} holds a finished run of a file with another {', '.join(changed)}; choose "
                    "another --out, or remove that directory to run it again"
                )


def submit_cells(
    config: Path, cells: list[SweepCell], out: Path, cluster: str, options: Sequence[str]
) -> dict[Path, int]:
    """Train and evaluate every cell in a job of submitit, and wait for them. What is finished is left."""
    _check_finished(config, cells)
    waiting = [cell for cell in cells if not (cell.directory / REPORT).is_file()]
    commands = [[_training(config, cell), _evaluation(cell)] for cell in waiting]
    jobs = submit_jobs(commands, out / "submitit", cluster=cluster, options=options) if waiting else []
    found = dict(zip([cell.directory for cell in waiting], statuses_of(jobs), strict=True))
    return {cell.directory: found.get(cell.directory, DONE) for cell in cells}


def _training(config: Path, cell: SweepCell) -> list[str]:
    settings = [part for change in cell.changes for part in ("--set", change)]
    return ["train", str(config), "--out", str(cell.directory), "--resume", "auto", *settings]


def _evaluation(cell: SweepCell) -> list[str]:
    return ["evaluate", str(cell.directory)]


def _as_status(status: int) -> int:
    """Of training that was the last thing a run did: it is not finished, whatever its status."""
    return STOPPED if status in (DONE, STOPPED) else FAILED


def _start(config: Path, cell: SweepCell, *, evaluates: bool) -> subprocess.Popen[bytes]:
    cell.directory.mkdir(parents=True, exist_ok=True)
    arguments = _evaluation(cell) if evaluates else _training(config, cell)
    # In a session of their own: Ctrl-C reaches them through us, once.
    with (cell.directory / "log.txt").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "spd_lens", *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=_environment(),
        )


def _environment() -> Mapping[str, str]:
    """Without a launcher's variables: every run is a job of its own."""
    return {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}


@contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """Signals that came, in a list that is empty until one does."""
    came: list[int] = []
    before: dict[int, Any] = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, lambda n, frame: came.append(n))
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
