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
from spd_lens.cli.run_file import RunFile
from spd_lens.cli.runs import DECOMPOSITION, RUN_FILE, decompose_run, load_run_data, open_run_model
from spd_lens.cli.sections import LogSection, ModelSection
from spd_lens.cli.yaml_file import ConfigError, read_yaml, with_changes
from spd_lens.core import Decomposition
from spd_lens.support.files import read_tensors, write_tensors
from spd_lens.training import (
    Evaluations,
    Logger,
    Processes,
    TrainResult,
    TunedReadout,
    join_processes,
    leave_processes,
    tensorboard_logger,
    train,
    tune_readout,
    wandb_logger,
)

READOUT = "readout.safetensors"

HELP = """Train the decomposition that CONFIG describes, and save it to OUT/decomposition.

Checkpoints and the log go to OUT. On SIGTERM, SIGINT (Ctrl-C) a checkpoint is written and the status is 75: the same
command with --resume auto goes on, bit for bit. A second Ctrl-C ends at once.

Examples:

    spd-lens train config.yaml

    spd-lens train config.yaml --set train.steps=500 --set train.lr=1e-3 --out runs/short

    spd-lens train config.yaml --set log.tensorboard=true --set log.figures_every=100

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
    file = with_changes(read_yaml(config), set or [])
    run = RunFile.of(file)
    directory = out or (Path(run.out_dir) if run.out_dir else None)
    if directory is None:
        raise ConfigError(f"{config} has no out_dir; add it, or give --out")
    with file.named():
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
    config = run.train_config
    if run.readout is not None:
        config = config.changed(readout=_readout(run, decomposition, batches, out_dir, resume_from, processes))
    if processes.is_main:
        loggers = [*loggers, *run_loggers(run.log, out_dir)]
    with sigterm_returns():
        result = train(
            decomposition,
            batches,
            config,
            out_dir=None if resume_from else out_dir,
            resume_from=resume_from,
            loggers=loggers,
            evaluations=_evaluations(run, decomposition),
        )
    if processes.is_main and not result.interrupted:
        decomposition.save_pretrained(out_dir / DECOMPOSITION)
    processes.wait()
    return result


def run_loggers(section: LogSection, out_dir: Path) -> list[Logger]:
    """The loggers that a run's file asks for; their files go to the run's directory."""
    found: list[Logger] = []
    if section.tensorboard:
        found.append(tensorboard_logger(out_dir / "tensorboard", figures_every=section.figures_every))
    if section.wandb is not None:
        found.append(wandb_logger(figures_every=section.figures_every, **{"dir": str(out_dir), **section.wandb}))
    return found


def _evaluations(run: RunFile, decomposition: Decomposition) -> Evaluations | None:
    """The evaluations on the way, with the data and the choices of the section `evaluate`."""
    if run.evaluations is None:
        return None
    options = run.evaluate.model_dump(exclude={"data", "quick"})
    data = load_run_data(run.evaluation_data, decomposition)
    return Evaluations(data, run.evaluations.fast_every, run.evaluations.slow_every, options)


def _readout(
    run: RunFile,
    decomposition: Decomposition,
    batches: Any,
    out_dir: Path,
    resume_from: str | None,
    processes: Processes,
) -> TunedReadout:
    """The read-out that the run began with: tuned once, by the first process, and kept beside the run."""
    path, stop_at = out_dir / READOUT, run.train_config.stop_at
    assert run.readout is not None
    assert stop_at is not None
    if processes.is_main and (resume_from is None or not path.is_file()):
        tuned = tune_readout(decomposition, batches, stop_at, **run.readout.model_dump())
        write_tensors(path, {"matrix": tuned.matrix.cpu()})
    processes.wait()
    return TunedReadout(read_tensors(path)["matrix"].to(decomposition.device))


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
def sigterm_returns() -> Iterator[None]:
    """`train` ends the process by SIGTERM after its checkpoint; here the command ends, with a status of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: Any = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
