"""The directory of a training run: its configuration, its log and its checkpoints.

    run/config.json            the TrainConfig, and what the run belongs to
    run/log.jsonl              one line of metrics every `log_every` steps, always written
    run/checkpoints/step-00000500/{state.safetensors, state.json}
    run/running.json           while a process trains here: which one
    run/abandoned-1/           checkpoints and log lines that came after an older checkpoint from which the run went on

A checkpoint holds everything that the next step depends on: subcomponents, gates, Adam's moments, every generator,
adversary sources, and the data position. It is written to a temporary name and renamed, so a run killed at any
moment finds the newest complete one. Only the process that holds `running.json` changes anything.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from spd_lens.data.processes import Processes
from spd_lens.support.checked_json import CheckedContent, read_checked, write_checked
from spd_lens.support.files import (
    given_directory,
    given_path,
    in_words,
    made_directory,
    numbers,
    plain,
    write_text,
)
from spd_lens.support.owners import clear_dead_temporaries, discard, held, temporary_beside
from spd_lens.training.belonging import FREE
from spd_lens.training.checkpoint import (
    FORMAT,
    FORMAT_VERSION,
    STATE,
    Checkpoint,
    checkpoint_name,
    read_checkpoint,
    write_checkpoint,
    write_shards,
)
from spd_lens.training.config import TrainConfig
from spd_lens.training.loggers import Logger

_CHECKPOINT_NAME = re.compile(r"step-\d{8,}")
_HEADER: dict[str, Any] = {
    "format_name": FORMAT,
    "version": FORMAT_VERSION,
    "free": [("config", name) for name in FREE],
}


class RunConfig(CheckedContent):
    """The fields of a run's `config.json`."""

    config: dict[str, Any]
    belongs: dict[str, Any]


@dataclass
class RunFiles:
    """The files of one run; `loggers` get every line of the log as well.

    `is_named`: whether the user chose the directory; another name is taken if it is there already otherwise.
    """

    directory: Path
    loggers: Sequence[Logger] = field(default_factory=tuple)
    is_named: bool = True

    @property
    def log_path(self) -> Path:
        """The JSONL log."""
        return self.directory / "log.jsonl"

    @property
    def checkpoint_directory(self) -> Path:
        """Where checkpoints are."""
        return self.directory / "checkpoints"

    @property
    def config_path(self) -> Path:
        """The configuration."""
        return self.directory / "config.json"

    # -- one process at a time ---------------------------------------------------------------------------------

    @contextmanager
    def held(self) -> Iterator[None]:
        """The run is this process's until the block ends. Raises ValueError, naming the owner, if it is another's."""
        if self.is_named:
            made_directory(self.directory, "out_dir")
        else:
            self.directory = _claimed(self.directory)
        with held(self.directory / "running.json", "training"):
            for place in (self.directory, self.checkpoint_directory):
                clear_dead_temporaries(place)
            yield

    def begin(self, config: TrainConfig, belongs: Mapping[str, Any]) -> None:
        """Start a new run in a directory that is held. Raises ValueError if there is one already."""
        self.require_new()
        write_checked(self.config_path, {"config": config.to_json(), "belongs": belongs}, **_HEADER)

    def require_new(self) -> None:
        """ValueError if there is a run here."""
        if self.is_named and (self.log_path.exists() or self.checkpoint_directory.exists()):
            raise ValueError(
                f"{self.directory} already holds a run; continue it with resume_from={str(self.directory)!r}, or "
                "choose another out_dir"
            )

    def read_config(self) -> TrainConfig:
        """The configuration that the run was started with."""
        values = self._read().config
        try:
            return TrainConfig.from_json(values)
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"{self.config_path} is not a configuration of this spd_lens: {error}") from error

    def config_values(self) -> dict[str, Any]:
        """The configuration as it stands in the file."""
        return self._read().config

    def belongs(self) -> dict[str, Any]:
        """What the run was started on (see `training.belonging`)."""
        return self._read().belongs

    def _read(self) -> RunConfig:
        if not self.config_path.is_file():
            raise ValueError(f"{self.config_path} is missing: {self.directory} does not hold a run")
        return read_checked(self.config_path, RunConfig, **_HEADER)

    # -- the log -----------------------------------------------------------------------------------------------

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line; numbers that are not finite are written as text."""
        line = json.dumps(plain({"step": step, **values}), allow_nan=False)
        with in_words(self.log_path), self.log_path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        for logger in self.loggers:
            logger(step, values)

    def read_log(self) -> list[dict[str, Any]]:
        """All lines of the log. Raises ValueError for a line that is none; a half-written last one does not count."""
        try:
            lines = self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return []
        found = []
        for i, text in enumerate(lines):
            try:
                line = numbers(json.loads(text))
                if not isinstance(line, dict) or isinstance(line["step"], bool) or not isinstance(line["step"], int):
                    raise ValueError("it has no step")
            except (ValueError, KeyError, RecursionError) as error:
                if i == len(lines) - 1:
                    break
                raise ValueError(
                    f"{self.log_path}, line {i + 1}, is damaged ({error}); remove the line, or the file, to go on"
                ) from error
            found.append(line)
        return found

    # -- checkpoints -------------------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        *,
        keep: int,
        belongs: Mapping[str, Any],
        data: Mapping[str, Any],
        together: Processes | None = None,
    ) -> Path:
        """Write the checkpoint of `step` finished steps and delete all but the newest `keep`.

        `together`: all processes call this and write their shards; the first one does the rest.
        """
        path = self.checkpoint_directory / checkpoint_name(step)
        if together is None:
            write_checkpoint(path, step, tensors, belongs=belongs, data=data)
        else:
            write_shards(path, step, tensors, belongs=belongs, data=data, processes=together)
            if not together.is_main:
                return path
        for old in self.checkpoints()[: -max(keep, 1)]:
            if old != path:
                # Renamed first: half a checkpoint never has a checkpoint's name.
                doomed = temporary_beside(old)
                os.rename(old, doomed)
                discard(doomed)
        return path

    def checkpoints(self) -> list[Path]:
        """Checkpoints, oldest first. Changes nothing, so it may be asked of a run that is going on."""
        try:
            names = os.listdir(self.checkpoint_directory)
        except (FileNotFoundError, NotADirectoryError):
            return []
        found = [self.checkpoint_directory / name for name in names if _CHECKPOINT_NAME.fullmatch(name)]
        return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint, or None if there is none yet.

        Raises ValueError if it is damaged, and names the newest one that is whole.
        """
        while found := self.checkpoints():
            try:
                return read_checkpoint(found[-1])
            except ValueError as error:
                if not found[-1].exists():
                    continue  # a live run has written a newer one and deleted this one
                raise ValueError(f"{error}. {self._older(found[:-1])}") from error
        return None

    def _older(self, candidates: Sequence[Path]) -> str:
        for path in reversed(candidates):
            try:
                read_checkpoint(path)
            except ValueError:
                continue
            return f"An older checkpoint is whole: resume_from={str(path)!r}"
        return "No older checkpoint is whole; start a new run"

    def continue_from(self, checkpoint: Checkpoint | None, *, newest: bool) -> None:
        """Make `checkpoint` the run's newest (None: the start); what came after it is set aside, not deleted.

        The directory is held. With `newest` nothing may have come after it since it was read.
        """
        step = 0 if checkpoint is None else checkpoint.step
        later = [p for p in self.checkpoints() if int(p.name.removeprefix("step-")) > step]
        if later and newest:
            raise ValueError(f"the run in {self.directory} went on meanwhile ({later[-1].name}); resume it again")
        lines = self.read_log()
        kept = [line for line in lines if line["step"] < step]
        if later:
            aside = _next_free(self.directory, "abandoned")
            write_text(aside / "log.jsonl", _as_lines(line for line in lines if line["step"] >= step))
            # The newest first: whatever moment this is stopped at, what is left is one history.
            for path in reversed(later):
                os.rename(path, aside / path.name)
        if self.log_path.exists():
            write_text(self.log_path, _as_lines(kept))


def _as_lines(lines: Any) -> str:
    return "".join(json.dumps(plain(line), allow_nan=False) + "\n" for line in lines)


def _next_free(parent: Path, stem: str) -> Path:
    n = 1
    while True:
        try:
            (path := parent / f"{stem}-{n}").mkdir()
        except FileExistsError:
            n += 1
            continue
        return path


def open_run(
    out_dir: str | Path | None, resume_from: str | Path | None, loggers: Sequence[Logger]
) -> tuple[RunFiles, Checkpoint | None]:
    """The files of a run and the checkpoint to continue from (None: from the start).

    `resume_from` is a run's directory (its newest checkpoint is used) or one checkpoint's. A new run without
    `out_dir` goes to `runs/<date>-<time>`.
    """
    if resume_from is None:
        if out_dir is None:
            return RunFiles(Path("runs"), loggers, is_named=False), None
        files = RunFiles(given_directory(out_dir, "out_dir"), loggers)
        files.require_new()
        return files, None
    start = given_path(resume_from, "resume_from")
    if not start.is_dir():
        raise ValueError(f"resume_from={str(resume_from)!r} is not a directory of a run")
    is_checkpoint = (start / STATE).is_file() or _CHECKPOINT_NAME.fullmatch(start.resolve().name) is not None
    files = RunFiles(start.resolve().parent.parent if is_checkpoint else start, loggers)
    if not files.config_path.is_file():
        raise ValueError(f"resume_from={str(resume_from)!r} holds neither a run nor a checkpoint")
    if is_checkpoint and start.resolve().parent != files.checkpoint_directory.resolve():
        raise ValueError(
            f"resume_from={str(resume_from)!r} is not in {files.checkpoint_directory}; move it there to go on from it"
        )
    checkpoint = read_checkpoint(start.resolve()) if is_checkpoint else files.newest()
    if out_dir is not None and given_path(out_dir, "out_dir").resolve() != files.directory.resolve():
        raise ValueError("resume_from continues a run in its own directory; leave out_dir away")
    steps = files.config_values().get("steps")
    if checkpoint is not None and (not isinstance(steps, int) or checkpoint.step > steps):
        raise ValueError(f"{checkpoint.path} is of step {checkpoint.step}, but that run has {steps}")
    return files, checkpoint


def _claimed(parent: Path) -> Path:
    """A new directory `parent/<date>-<time>`, made by this call and by no other."""
    made_directory(parent, "the directory of runs")
    name, n = time.strftime("%Y%m%d-%H%M%S"), 0
    while True:
        path = parent / (name if n == 0 else f"{name}-{n}")
        try:
            path.mkdir()
        except FileExistsError:
            n += 1
            continue
        return path
