"""Loggers: functions `(step, values)` that get every line of a run's log."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from spd_lens.support.files import given_directory

Logger = Callable[[int, Mapping[str, float]], None]


def wandb_logger(**init_arguments: Any) -> Logger:
    """A logger that sends every log line to Weights & Biases; arguments go to `wandb.init`."""
    import wandb

    run = wandb.init(**init_arguments)
    return lambda step, values: run.log(dict(values), step=step)


def tensorboard_logger(directory: str | Path) -> Logger:
    """A logger that writes every log line for TensorBoard."""
    path = given_directory(directory)
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(path))

    def write(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return write
