"""Loggers: functions `(step, values)` that get every line of a run's log; some of them get figures as well."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spd_lens.support.files import given_directory
from spd_lens.support.given import given_whole

Logger = Callable[[int, Mapping[str, float]], None]


@dataclass(frozen=True)
class FigureLogger:
    """A logger that also gets figures, every `figures_every` steps (None: none), as `figure(step, name, figure)`.

    Which figures there are: `spd_lens.training.importance_figures`.
    """

    write: Logger
    figure: Callable[[int, str, Any], None]
    figures_every: int | None = None

    def __post_init__(self) -> None:
        if self.figures_every is not None:
            given_whole("figures_every", self.figures_every, least=1)

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        self.write(step, values)


def wandb_logger(*, figures_every: int | None = None, **init_arguments: Any) -> FigureLogger:
    """A logger that sends every log line to Weights & Biases; arguments go to `wandb.init` (`mode="offline"` writes
    files that `wandb sync` sends later)."""
    try:
        import wandb
    except ModuleNotFoundError:
        raise ModuleNotFoundError("wandb is missing; pip install 'spd-lens[loggers]'") from None
    run = wandb.init(**init_arguments)

    def figure(step: int, name: str, drawn: Any) -> None:
        import matplotlib.pyplot  # noqa: F401  # wandb looks it up as an attribute of matplotlib and does not import it

        run.log({name: wandb.Image(drawn)}, step=step)

    return FigureLogger(lambda step, values: run.log(dict(values), step=step), figure, figures_every)


def tensorboard_logger(directory: str | Path, *, figures_every: int | None = None) -> FigureLogger:
    """A logger that writes every log line for TensorBoard."""
    path = given_directory(directory)
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError:
        raise ModuleNotFoundError("tensorboard is missing; pip install 'spd-lens[loggers]'") from None
    writer = SummaryWriter(str(path))

    def write(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    def figure(step: int, name: str, drawn: Any) -> None:
        writer.add_figure(name, drawn, step)
        writer.flush()

    return FigureLogger(write, figure, figures_every)
