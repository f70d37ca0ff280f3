"""Tensors of a checkpoint as every process's own shards, by `torch.distributed.checkpoint`, in safetensors files.

Each process writes one file, of its rows of what is shared out and its part of the rest; any number of processes reads
them, each the rows that it needs. Its format without pickle is used (`HuggingFaceStorageWriter`).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spd_lens.data.processes import Processes, is_shared
from spd_lens.support.files import file_hash, flush


def put_shards(directory: Path, tensors: Mapping[str, Tensor], processes: Processes) -> dict[str, str]:
    """Write tensors, every process its own, into a directory that is there; the SHA-256 of every file."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    writer = HuggingFaceStorageWriter(str(directory), save_distributed=True)
    save({name: t.detach() for name, t in tensors.items()}, storage_writer=writer)
    processes.wait()
    own = processes.share_of(sorted(directory.iterdir()))
    for path in own:
        flush(path)
    found = processes.of_all({path.name: file_hash(path) for path in own})
    return {name: digest for digests in found for name, digest in digests.items()}


def check_shards(directory: Path, digests: Mapping[str, str]) -> None:
    """ValueError unless the files are there as they were written; every process looks at its part of them."""
    for name in sorted(digests):
        if not (directory / name).is_file():
            raise ValueError(f"{directory / name} is missing: this is not a complete checkpoint")
    for name in Processes.now().share_of(sorted(digests)):
        if file_hash(directory / name) != digests[name]:
            raise ValueError(f"{directory / name} is damaged: its contents differ from what was saved (SHA-256)")


def read_shards(directory: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors: whole ones, but for those that are shared out in `like`, of which every process reads its rows."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(directory))
    known: dict[str, Any] = reader.read_metadata().state_dict_metadata
    found: dict[str, Tensor] = {}
    for name, saved in known.items():
        if name in like and is_shared(like[name]):
            found[name] = torch.zeros_like(like[name].detach())
        else:
            found[name] = torch.zeros(saved.size, dtype=saved.properties.dtype)
    alone = not any(map(is_shared, found.values()))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # which is what is meant
        load(found, storage_reader=reader, no_dist=alone)
    return found


def shared_like(whole: Tensor, like: Tensor) -> Tensor:
    """This process's shard of a tensor that every process has whole."""
    from torch.distributed.tensor import distribute_tensor

    given: Any = like
    return distribute_tensor(whole.to(like.device), given.device_mesh, given.placements, src_data_rank=None)
