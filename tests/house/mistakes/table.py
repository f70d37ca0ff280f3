"""What the tables of mistakes share: `add(name, call)`, where `call(decomposition, model, directory)` makes the mistake."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spd_lens import Decomposition, TrainResult, decompose, train
from spd_lens.tasks import Task, induction_task
from tests.small_models import tiny_transformer, tokens

SITE = "blocks.1.mlp.W_in"
T = tokens(2)
Mistake = Callable[[Decomposition, Any, Path], Any]


class Table(dict[str, Mistake]):
    """Mistakes by name."""

    def add(self, name: str, mistake: Mistake) -> None:
        """One more; its name is new."""
        assert name not in self, name
        self[name] = mistake


def last(logits: Tensor) -> Tensor:
    return logits[:, -1, 0]


def removed() -> Decomposition:
    decomposition = decompose(tiny_transformer(), {SITE: 4})
    decomposition.remove()
    return decomposition


def other(seed: int = 1) -> Decomposition:
    return decompose(tiny_transformer(seed=seed), {SITE: 4})


def another() -> Decomposition:
    """With subcomponents of its own: those of `other` start equal."""
    return decompose(tiny_transformer(seed=1), {SITE: 4}, seed=1)


def plain_model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3))


def nan_model() -> nn.Module:
    model = tiny_transformer()
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "mlp" in name and p.ndim == 2)[0, 0] = float("nan")
    return model


def file_in(directory: Path) -> Path:
    file = directory / "a-file"
    file.write_text("x")
    return file


def saved(decomposition: Decomposition, directory: Path) -> Path:
    return decomposition.save_pretrained(directory / "s")


def result(decomposition: Decomposition, directory: Path) -> TrainResult:
    return train(decomposition, T, steps=2, out_dir=directory / "run", checkpoint_every=1)


def short(decomposition: Decomposition, batches: Any) -> TrainResult:
    return train(decomposition, batches, steps=2, out_dir="run")


def task() -> Task:
    return induction_task(40, 4, length=6)


def run(model: Any, hooks: Any) -> Any:
    return model.run_with_hooks(T, fwd_hooks=hooks)
