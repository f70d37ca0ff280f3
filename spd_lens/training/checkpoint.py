"""Checkpoints of a run: everything that the next step depends on, as files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spd_lens.support.files import read_json, read_tensors

FORMAT = "spd_lens training checkpoint"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk: the number of finished steps and all tensors by name."""

    path: Path
    step: int
    tensors: dict[str, Tensor]


def read_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint. Raises ValueError for a damaged, foreign or newer one."""
    state = read_json(path / "state.json", format_name=FORMAT, newest_version=FORMAT_VERSION)
    return Checkpoint(path, state["step"], read_tensors(path / "state.safetensors", state["sha256"]))


# -- tensors of things that are not tensors ------------------------------------------------------------------------


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """Adam's moments and step counts by name; learning rates are set anew every step and are not state."""
    states = optimizer.state_dict()["state"]
    return {f"{prefix}.{index}.{key}": value for index, state in states.items() for key, value in state.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str, tensors: Mapping[str, Tensor]) -> None:
    """Undo `optimizer_tensors`."""
    states: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith(prefix + "."):
            index, key = name.removeprefix(prefix + ".").split(".")
            states.setdefault(int(index), {})[key] = value.clone()
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
