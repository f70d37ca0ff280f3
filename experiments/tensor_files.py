"""Trained tensors of runs, and `tensors.json`: the SHA-256 of every file and the command that makes it again.

The repository keeps what is read (JSON, JSONL, PNG), and the tensors of run 0 where they are small, so that a test can
compute its verdict again. All other tensor files are made by `command`; on the same machine and versions their hashes
are those of `tensors.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from spd_lens.support import file_hash, read_tensors, write_json, write_tensors

MANIFEST = "tensors.json"


def command_for(results: Path) -> str:
    """What makes all tensors of an experiment again, in a directory of their own."""
    return f"python experiments/reproduce.py {results.name} --seeds {_n_runs(results)} --results runs/again"


def write_run_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the tensors of a run and note their hash beside them."""
    write_tensors(path, dict(tensors))
    note(path)


def note(path: Path) -> None:
    """Enter a tensor file into the `tensors.json` of its directory."""
    files = known_files(path.parent)
    files[path.name] = {"sha256": file_hash(path), "bytes": path.stat().st_size}
    _write(path.parent, files)


def known_files(results: Path) -> dict[str, dict[str, str | int]]:
    """The files that `tensors.json` names, there or not."""
    path = results / MANIFEST
    return json.loads(path.read_text(encoding="utf-8"))["files"] if path.is_file() else {}


def read_run_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a run.

    Raises FileNotFoundError with the command that makes them where they are not kept, ValueError where the file is not
    the one that was noted.
    """
    noted = known_files(path.parent).get(path.name)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not kept in the repository; make it again with: {command_for(path.parent)} "
            "and read it there (--results runs/again)"
        )
    if noted is not None and file_hash(path) != noted["sha256"]:
        raise ValueError(f"{path} is not the file that {path.parent / MANIFEST} names: its SHA-256 differs")
    return read_tensors(path)


def _write(results: Path, files: Mapping[str, Mapping[str, str | int]]) -> None:
    write_json(results / MANIFEST, {"command": command_for(results), "files": dict(sorted(files.items()))})


def _n_runs(results: Path) -> int:
    return max(1, len({*known_files(results)} | {p.name for p in results.glob("run-*.safetensors")}))
