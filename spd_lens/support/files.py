"""Writing directories and files so that a reader never sees half of one, and reading safetensors with clear errors.

Everything is written under a temporary name beside its final place, flushed to the disk, and renamed. No pickle.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

# A write that fails with one of these ran out of room, not into a bug.
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def new_directory(path: Path, *, replace: bool) -> Iterator[Path]:
    """A temporary directory that becomes `path` when the block ends without an error, and vanishes otherwise.

    With `replace`, an existing `path` is swapped out only after the new one is complete and on disk.
    Raises OSError with what to do when the disk is full; what was at `path` before is then intact.
    """
    if path.exists() and not replace:
        raise ValueError(f"{path} exists already; choose another name or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    tag = uuid.uuid4().hex[:8]
    temporary = path.parent / f".{path.name}.{tag}.tmp"
    try:
        temporary.mkdir()
        yield temporary
        for file in temporary.iterdir():
            _flush(file)
        _put_in_place(temporary, path, path.parent / f".{path.name}.{tag}.old")
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if _is_no_room(error):
            raise OSError(
                errno.ENOSPC,
                f"no room to write {path} ({error}); nothing was changed there. Free some space and save again",
            ) from error
        raise


def _is_no_room(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in _NO_ROOM
    # safetensors wraps the operating system's error into its own, keeping only the text.
    text = str(error)
    return isinstance(error, SafetensorError) and any(f"os error {code}" in text for code in _NO_ROOM)


def _put_in_place(temporary: Path, path: Path, aside: Path) -> None:
    if path.exists():
        os.rename(path, aside)
        try:
            os.rename(temporary, path)
        except BaseException:
            os.rename(aside, path)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    else:
        os.rename(temporary, path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file and return its SHA-256."""
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)
    return file_hash(path)


def read_tensors(path: Path, expected_hash: str | None = None) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU. Raises ValueError for a missing, truncated or altered file."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: this is not a complete save")
    if expected_hash is not None and file_hash(path) != expected_hash:
        raise ValueError(f"{path} is damaged: its contents differ from what was saved (SHA-256 mismatch)")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write readable JSON."""
    path.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")


def read_json(path: Path, *, format_name: str, newest_version: int) -> dict[str, Any]:
    """Read JSON that `format_name` wrote. Raises ValueError if it is absent, foreign, damaged or from the future."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: {path.parent} does not hold a {format_name}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict) or content.get("format") != format_name:
        raise ValueError(f"{path} was not written as a {format_name} by spd_lens")
    if not isinstance(content.get("format_version"), int) or content["format_version"] > newest_version:
        raise ValueError(
            f"{path} has format version {content.get('format_version')}; this spd_lens reads up to "
            f"{newest_version}. Upgrade spd_lens"
        )
    return content


def write_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name beside `path` and rename it; parent directories are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        temporary.write_text(text, encoding="utf-8")
        _flush(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if _is_no_room(error):
            raise OSError(errno.ENOSPC, f"no room to write {path} ({error}); nothing was changed there") from error
        raise


def file_hash(path: Path) -> str:
    """SHA-256 of a file's contents."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 of a matrix's values as float32 and its shape, independent of device and memory layout."""
    values = tensor.detach().to(device="cpu", dtype=torch.float32).contiguous()
    digest = hashlib.sha256(str(tuple(values.shape)).encode())
    digest.update(values.numpy().tobytes())
    return digest.hexdigest()
