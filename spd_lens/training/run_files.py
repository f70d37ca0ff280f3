"""The directory of a training run: its configuration, its log and its checkpoints.

    run/config.json            the TrainConfig
    run/log.jsonl              one line of metrics every `log_every` steps, always written
    run/checkpoints/step-00000500/{state.safetensors, state.json}

A checkpoint holds everything that the next step depends on: subcomponents, gates, Adam's moments, every generator,
adversary sources, and the data position. It is written to a temporary name and renamed, so a run killed at any
moment finds the newest complete one.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from spd_lens.support.files import new_directory, read_json, write_json, write_tensors
from spd_lens.training.checkpoint import FORMAT, FORMAT_VERSION, Checkpoint, read_checkpoint
from spd_lens.training.config import TrainConfig
from spd_lens.training.loggers import Logger


@dataclass
class RunFiles:
    """The files of one run; `loggers` get every line of the log as well."""

    directory: Path
    loggers: Sequence[Logger] = field(default_factory=tuple)

    @property
    def log_path(self) -> Path:
        """The JSONL log."""
        return self.directory / "log.jsonl"

    @property
    def checkpoint_directory(self) -> Path:
        """Where checkpoints are."""
        return self.directory / "checkpoints"

    def begin(self, config: TrainConfig) -> None:
        """Start a new run here. Raises ValueError if there is one already."""
        if self.log_path.exists() or self.checkpoint_directory.exists():
            raise ValueError(
                f"{self.directory} already holds a run; continue it with resume_from={str(self.directory)!r}, or "
                "choose another out_dir"
            )
        self.directory.mkdir(parents=True, exist_ok=True)
        write_json(
            self.directory / "config.json",
            {"format": FORMAT, "format_version": FORMAT_VERSION, "config": config.to_json()},
        )

    def read_config(self) -> TrainConfig:
        """The configuration that the run was started with."""
        content = read_json(self.directory / "config.json", format_name=FORMAT, newest_version=FORMAT_VERSION)
        return TrainConfig.from_json(content["config"])

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line."""
        line = json.dumps({"step": step, **values})
        with self.log_path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        for logger in self.loggers:
            logger(step, values)

    def forget_log_after(self, step: int) -> None:
        """Drop log lines of steps that a resumed run will do again; a half-written last line goes too."""
        if not self.log_path.exists():
            return
        kept = []
        for line in self.log_path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] < step:
                    kept.append(line)
            except (json.JSONDecodeError, KeyError):
                continue
        temporary = self.log_path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        temporary.replace(self.log_path)

    def read_log(self) -> list[dict[str, Any]]:
        """All lines of the log."""
        if not self.log_path.exists():
            return []
        return [json.loads(line) for line in self.log_path.read_text(encoding="utf-8").splitlines()]

    def save(self, step: int, tensors: Mapping[str, Tensor], *, keep: int) -> Path:
        """Write the checkpoint of `step` finished steps and delete all but the newest `keep`."""
        path = self.checkpoint_directory / f"step-{step:08d}"
        with new_directory(path, replace=True) as temporary:
            digest = write_tensors(temporary / "state.safetensors", tensors)
            write_json(
                temporary / "state.json",
                {"format": FORMAT, "format_version": FORMAT_VERSION, "step": step, "sha256": digest},
            )
        for old in self.checkpoints()[: -max(keep, 1)]:
            shutil.rmtree(old, ignore_errors=True)
        return path

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first; also clears away what a killed process left half-written."""
        if not self.checkpoint_directory.exists():
            return []
        for leftover in self.checkpoint_directory.glob(".*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        return sorted(p for p in self.checkpoint_directory.glob("step-*") if (p / "state.json").is_file())

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint, or None if the run was killed before its first."""
        found = self.checkpoints()
        return read_checkpoint(found[-1]) if found else None


def open_run(
    out_dir: str | Path | None, resume_from: str | Path | None, loggers: Sequence[Logger]
) -> tuple[RunFiles, Checkpoint | None]:
    """The files of a run and the checkpoint to continue from (None: from the start).

    `resume_from` is a run's directory (its newest checkpoint is used) or one checkpoint's. A new run without
    `out_dir` goes to `runs/<date>-<time>`.
    """
    if resume_from is None:
        directory = Path(out_dir) if out_dir is not None else _fresh_name(Path("runs"))
        return RunFiles(directory, loggers), None
    source = Path(resume_from)
    if not source.is_dir():
        raise ValueError(f"resume_from={str(source)!r} is not a directory of a run")
    if (source / "state.json").is_file():
        files = RunFiles(source.parent.parent, loggers)
        checkpoint: Checkpoint | None = read_checkpoint(source)
    else:
        files = RunFiles(source, loggers)
        if not (source / "config.json").is_file():
            raise ValueError(f"resume_from={str(source)!r} holds neither a run nor a checkpoint")
        checkpoint = files.newest()
    if out_dir is not None and Path(out_dir).resolve() != files.directory.resolve():
        raise ValueError("resume_from continues a run in its own directory; leave out_dir away")
    return files, checkpoint


def _fresh_name(parent: Path) -> Path:
    base = parent / time.strftime("%Y%m%d-%H%M%S")
    path, n = base, 1
    while path.exists():
        path, n = base.with_name(f"{base.name}-{n}"), n + 1
    return path
