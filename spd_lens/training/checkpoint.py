"""Checkpoints of a run: everything that the next step depends on, as files, and what it belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from spd_lens.data.processes import Processes
from spd_lens.support.checked_json import CheckedContent, read_checked, write_checked
from spd_lens.support.files import file_hash, given_path, new_directory, put_tensors, read_tensors
from spd_lens.support.shown import short_repr
from spd_lens.training.shards import check_shards, put_shards

FORMAT = "spd_lens training checkpoint"
FORMAT_VERSION = 2
TENSORS, STATE = "state.safetensors", "state.json"


class CheckpointState(CheckedContent):
    """The fields of `state.json`: finished steps, hash of the tensors, and what run it is of.

    With `shards` the tensors lie in these files, by name with the hash of each, and `sha256` is that of `shards`.
    """

    step: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    shards: dict[str, str] = Field(default_factory=dict)
    belongs: dict[str, Any]
    data: dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk: the number of finished steps, all tensors by name, and what it belongs to.

    With `shards` its tensors are in these files (`spd_lens.training.shards`), and none are here.
    """

    path: Path
    step: int
    tensors: dict[str, Tensor]
    belongs: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    shards: dict[str, str] = field(default_factory=dict)

    __repr__ = short_repr


def write_checkpoint(
    path: Path, step: int, tensors: Mapping[str, Tensor], *, belongs: Mapping[str, Any], data: Mapping[str, Any]
) -> None:
    """Write one checkpoint as the new directory `path`, which is there whole or not at all."""
    with new_directory(path) as temporary:
        put_tensors(temporary / TENSORS, tensors)
        content = {"step": step, "sha256": file_hash(temporary / TENSORS), "belongs": belongs, "data": data}
        write_checked(temporary / STATE, content, format_name=FORMAT, version=FORMAT_VERSION)


def write_shards(
    path: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    *,
    belongs: Mapping[str, Any],
    data: Mapping[str, Any],
    processes: Processes,
) -> None:
    """As `write_checkpoint`, by all processes together, each its own shards."""
    with new_directory(path) if processes.is_main else nullcontext() as made:
        temporary = Path(processes.same(str(made)))
        shards = put_shards(temporary, tensors, processes)
        if processes.is_main:
            content = {"step": step, "sha256": hash_of(shards), "shards": shards, "belongs": belongs, "data": data}
            write_checked(temporary / STATE, content, format_name=FORMAT, version=FORMAT_VERSION)
    processes.wait()


def hash_of(shards: Mapping[str, str]) -> str:
    """One hash of the hashes of all shards."""
    return hashlib.sha256("\n".join(f"{name} {shards[name]}" for name in sorted(shards)).encode()).hexdigest()


def read_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint. Raises ValueError for a damaged, foreign, renamed or newer one."""
    path = given_path(path, "the checkpoint")
    if not (path / STATE).is_file():
        raise ValueError(f"{path / STATE} is missing; expected a {FORMAT}, such as run/checkpoints/step-00000500")
    state = read_checked(path / STATE, CheckpointState, format_name=FORMAT, version=FORMAT_VERSION)
    if path.name != checkpoint_name(state.step):
        raise ValueError(f"{path} holds step {state.step}; expected the name {checkpoint_name(state.step)}")
    if state.shards:
        if hash_of(state.shards) != state.sha256:
            raise ValueError(f"{path / STATE} is damaged: it names other shards than were written")
        check_shards(path, state.shards)
        return Checkpoint(path, state.step, {}, state.belongs, state.data, state.shards)
    return Checkpoint(path, state.step, read_tensors(path / TENSORS, state.sha256), state.belongs, state.data)


def checkpoint_name(step: int) -> str:
    """Name of the directory of a step's checkpoint."""
    return f"step-{step:08d}"


# -- tensors of things that are not tensors ------------------------------------------------------------------------


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """Adam's moments and step counts by name; learning rates are set anew every step and are not state."""
    states = optimizer.state_dict()["state"]
    return {f"{prefix}.{index}.{key}": value for index, state in states.items() for key, value in state.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str, tensors: Mapping[str, Tensor]) -> None:
    """Undo `optimizer_tensors`. Raises ValueError for moments of other parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith(prefix + "."):
            index, key = name.removeprefix(prefix + ".").split(".")
            states.setdefault(int(index), {})[key] = value.clone()
    for index, state in states.items():
        shapes = {tuple(value.shape) for key, value in state.items() if key != "step"}
        if index >= len(parameters) or shapes != {tuple(parameters[index].shape)} or len(state) < 3:
            raise ValueError(f"the state of Adam ({prefix}.{index}) does not belong to these parameters")
    if not states:
        raise ValueError(f"the checkpoint is damaged: it has no state of Adam ({prefix})")
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
