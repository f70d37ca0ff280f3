"""`spd-lens train`: train what a run's file describes, stop in order, go on where it stopped."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from spd_lens.cli.output import STOPPED, JsonFlag, ends_in_words, show
from spd_lens.cli.run_file import ModelSection, RunFile
from spd_lens.cli.runs import DECOMPOSITION, RUN_FILE, decompose_run, load_run_data, open_run_model
from spd_lens.cli.yaml_file import ConfigError
from spd_lens.training import Logger, TrainResult, join_processes, leave_processes, train

HELP = """Train the decomposition that CONFIG describes, and save it to OUT/decomposition.

Checkpoints and the log go to OUT. On SIGTERM, SIGINT (Ctrl-C) a checkpoint is written and the status is 75: the same
command with --resume auto goes on, bit for bit. A second Ctrl-C ends at once.

Examples:

    spd-lens train config.yaml

    spd-lens train config.yaml --set train.steps=500 --set train.lr=1e-3 --out runs/short

    spd-lens train config.yaml --resume auto        (in a job script: begins, or goes on)

    torchrun --nproc-per-node 2 -m spd_lens train config.yaml --resume auto
"""


@ends_in_words
def command(
    config: Annotated[Path, typer.Argument(help="The run's YAML file; `spd-lens demo --config` prints one.")],
    set: Annotated[list[str] | None, typer.Option("--set", help="FIELD=VALUE, for example train.steps=100.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run's directory, instead of the file's out_dir.")] = None,
    resume: Annotated[
        str, typer.Option(help="never, auto (go on if OUT holds a run), or the directory of a checkpoint.")
    ] = "never",
    json: JsonFlag = False,
) -> None:
    run = RunFile.read(config, set or [])
    directory = out or (Path(run.out_dir) if run.out_dir else None)
    if directory is None:
        raise ConfigError(f"{config} has no out_dir; add it, or give --out")
    result = train_run(run, directory, resume=resume)
    leave_processes()
    line = {
        "steps": result.steps,
        "of": result.config.steps,
        "interrupted": result.interrupted,
        "out_dir": str(directory),
        "final": result.final,
        "decomposition": None if result.interrupted else str(directory / DECOMPOSITION),
    }
    if result.interrupted:
        text = f"stopped after {result.steps} of {result.config.steps} steps; --resume auto goes on"
    else:
        text = f"{result!r}\nsaved: {directory / DECOMPOSITION}\nnext: spd-lens evaluate {directory}"
    show(text, line, as_json=json)
    if result.interrupted:
        raise typer.Exit(STOPPED)


def train_run(run: RunFile, out_dir: Path, *, resume: str = "never", loggers: Sequence[Logger] = ()) -> TrainResult:
    """Train a run in `out_dir` and save the decomposition there; SIGTERM writes a checkpoint and returns.

    `resume`: "never", "auto" (go on if there is a run, else begin), or the directory of a checkpoint. Raises
    ConfigError if there is a run and `resume` is "never".
    """
    model = open_run_model(_on_own_device(run.model))
    decomposition = decompose_run(model, run.decompose)
    processes = join_processes(decomposition.device)
    resume_from = processes.same(_where_to_resume(out_dir, resume) if processes.is_main else None)
    batches = load_run_data(run.data, decomposition)
    if processes.is_main:
        run.write(out_dir / RUN_FILE)
    with _sigterm_returns():
        result = train(
            decomposition,
            batches,
            run.train_config,
            out_dir=None if resume_from else out_dir,
            resume_from=resume_from,
            loggers=loggers,
        )
    if processes.is_main and not result.interrupted:
        decomposition.save_pretrained(out_dir / DECOMPOSITION)
    processes.wait()
    return result


def _where_to_resume(out_dir: Path, resume: str) -> str | None:
    has_run = (out_dir / "config.json").is_file()
    if resume == "never":
        if has_run:
            raise ConfigError(f"{out_dir} already holds a run; go on with --resume auto, or choose another --out")
        return None
    if resume == "auto":
        return str(out_dir) if has_run else None
    if not Path(resume).is_dir():
        raise ConfigError(f"--resume {resume!r}: there is no such directory; expected never, auto, or a checkpoint's")
    return resume


def _on_own_device(section: ModelSection) -> ModelSection:
    """Under torchrun every process has a GPU of its own."""
    local = os.environ.get("LOCAL_RANK")
    if section.device != "cuda" or local is None:
        return section
    return section.model_copy(update={"device": f"cuda:{local}"})


@contextmanager
def _sigterm_returns() -> Iterator[None]:
    """`train` ends the process by SIGTERM after its checkpoint; here the command ends, with a status of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: Any = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
