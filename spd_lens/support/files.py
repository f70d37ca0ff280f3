"""Writing files so that a reader never sees half of one, and reading them with clear errors.

Everything is written under a temporary name beside its final place, flushed to the disk, and renamed: a kill or a full
disk leaves what was there before. Links are followed, the umask is respected, and nothing else in the directory is
touched. No pickle. JSON that is checked as it is read is in `checked_json`, saves of two files in `saved_pair`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spd_lens.support.owners import clear_dead_temporaries, discard, temporary_beside

# A write that fails with one of these ran out of room, not into a bug.
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# And with one of these because of where it was to go.
_NO_PLACE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.ELOOP}
# File systems on networks and in user space answer so where they cannot flush.
_CANNOT_FLUSH = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EOPNOTSUPP}
# JSON has no words for these numbers; as in protocol buffers they are written as text.
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class CannotWrite(OSError, ValueError):
    """A path that cannot be written to, or a disk that is full: an error of the system and of what was given."""


# -- paths -----------------------------------------------------------------------------------------------------------


def given_path(path: str | os.PathLike[str], what: str = "path") -> Path:
    """The path that a user gave, with `~` expanded. Raises TypeError or ValueError for what is no path."""
    if not isinstance(path, (str, os.PathLike)) or isinstance(os.fspath(path), bytes):
        raise TypeError(f"{what} is a {type(path).__name__}; expected a str or a Path")
    if os.fspath(path) == "" or "\0" in os.fspath(path):
        raise ValueError(f"{what}={os.fspath(path)!r} is no path; '.' is the working directory")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{what}={os.fspath(path)!r}: {error} Give the whole path instead of ~") from error


def check_tokenizer(tokenizer: Any) -> None:
    """TypeError unless it is None or can be saved beside a model."""
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise TypeError(
            f"tokenizer is a {type(tokenizer).__name__}; expected one of transformers, such as model.tokenizer"
        )


def given_directory(path: str | os.PathLike[str], what: str = "directory") -> Path:
    """As `given_path`, for a directory that is there or can be made. Raises ValueError if a file is in the way."""
    directory = given_path(path, what)
    for place in (directory, *directory.parents):
        if place.exists():
            if not place.is_dir():
                raise ValueError(f"{what}={str(path)!r}: {place} is a file; expected a directory, or a name for one")
            break
    return directory


def made_directory(path: str | os.PathLike[str], what: str = "directory") -> Path:
    """As `given_directory`, and it is there then. Raises CannotWrite if it cannot be made."""
    directory = given_directory(path, what)
    with in_words(directory):
        directory.mkdir(parents=True, exist_ok=True)
    return directory


# -- writing -----------------------------------------------------------------------------------------------------------


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A temporary directory that becomes `path` when the block ends without an error, and vanishes otherwise.

    Raises ValueError if `path` exists, OSError with what to do when the disk is full.
    """
    if path.exists():
        raise ValueError(f"{path} exists already; choose another name or remove it")
    made_directory(path.parent)
    temporary = temporary_beside(path)
    with clean_failure(path, temporary):
        temporary.mkdir()
        yield temporary
        for file in temporary.iterdir():
            flush(file)
        flush(temporary)
        os.rename(temporary, path)
    flush(path.parent)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name for a file that becomes `path` when the block ends without an error; links are followed.

    Parent directories are made. Whatever fails, what was at `path` is intact and the temporary is gone.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a directory; expected a name for a file")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is a device or a pipe, which a file would replace; expected a name for a file")
    made_directory(path.parent, "the directory of the file")
    real = Path(os.path.realpath(path))
    clear_dead_temporaries(real.parent, real.name[:100])
    temporary = temporary_beside(real)
    with clean_failure(path, temporary):
        yield temporary
        flush(temporary)
        os.replace(temporary, real)
    flush(real.parent)


@contextmanager
def clean_failure(path: Path, *temporaries: Path) -> Iterator[None]:
    """On any failure remove the temporaries; a full disk and a forbidden place become a CannotWrite."""
    try:
        with in_words(path):
            yield
    except BaseException as error:
        for temporary in temporaries:
            discard(temporary)
        if isinstance(error, CannotWrite):
            what = str(error.strerror)
            for temporary in temporaries:
                what = what.replace(str(temporary), str(path))
            raise CannotWrite(error.errno, what) from error
        raise


@contextmanager
def in_words(path: Path) -> Iterator[None]:
    """While open, a full disk, or a place that cannot be written to, becomes a CannotWrite that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = _code(error)
        if isinstance(error, CannotWrite) or code not in _NO_ROOM | _NO_PLACE:
            raise
        if code in _NO_ROOM:
            code = errno.ENOSPC
            what = (
                f"no room to write {path} ({_reason(error)}); nothing was changed there. Free some space and save again"
            )
        else:
            what = f"{path} cannot be written ({_reason(error)}); nothing was changed there. Choose another place"
        raise CannotWrite(code, what) from error


def _reason(error: OSError | SafetensorError) -> str:
    """What happened, without the name of a temporary file that nobody asked for."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _code(error: OSError | SafetensorError) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    # safetensors wraps the operating system's error into its own, keeping only the text.
    found = re.search(r"os error (\d+)", str(error))
    return None if found is None else int(found[1])


def flush(path: Path) -> None:
    """Put a file or a directory on the disk, where the file system can do that.

    No file system has to flush a directory, and some cannot even open one; the file's own contents are another matter.
    """
    is_directory = path.is_dir()
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        if is_directory:
            return
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        if not is_directory and error.errno not in _CANNOT_FLUSH:
            raise
    finally:
        os.close(handle)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file, readable as the umask says, and return its SHA-256."""
    with replacing(path) as temporary:
        put_tensors(temporary, tensors)
        digest = file_hash(temporary)
    return digest


def put_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file straight to `path`, a temporary of the caller's, and flush it."""
    # safetensors makes a temporary of its own beside the file, readable by its owner only. It goes into a directory of
    # ours, whose name has an owner, so that it is found after a kill, and whose mode tells the umask.
    folder = temporary_beside(path)
    try:
        folder.mkdir()
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / "tensors")
        (folder / "tensors").chmod(folder.stat().st_mode & 0o666)
        flush(folder / "tensors")
        os.replace(folder / "tensors", path)
    finally:
        discard(folder)


def write_figure(path: Path, figure: Any, dpi: int) -> None:
    """Write a matplotlib figure, PNG, PDF or SVG by the suffix of `path`."""
    with replacing(path) as temporary:
        try:
            figure.savefig(temporary, dpi=dpi, format=path.suffix[1:] or None)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write readable JSON; numbers that are not finite become the texts "NaN", "Infinity" and "-Infinity"."""
    write_text(path, json_text(content))


def json_text(content: Mapping[str, Any]) -> str:
    """What `write_json` writes."""
    return json.dumps(plain(content), indent=2, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """The value in JSON's own types; see `write_json` for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return next(text for text, number in _NOT_FINITE.items() if str(number) == str(value))
    if isinstance(value, float):
        return float(value)
    if value is None or isinstance(value, (str, int, bool)):
        return value
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        return plain(value.item())
    return str(value)


def numbers(value: Any) -> Any:
    """Undo what `plain` does to numbers that are not finite."""
    if isinstance(value, dict):
        return {k: numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [numbers(v) for v in value]
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value


def write_text(path: Path, text: str) -> None:
    """Write a text file; what was at `path` stays until the new text is whole. Parent directories are made."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


# -- reading -----------------------------------------------------------------------------------------------------------


def read_tensors(path: Path, expected_hash: str | None = None) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU. Raises ValueError for a missing, truncated or altered file."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: this is not a complete save; expected both of its files")
    if expected_hash is not None and file_hash(path) != expected_hash:
        raise ValueError(f"{path} is damaged: its contents differ from what was saved (SHA-256 mismatch)")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: this is not a complete save; expected both of its files") from error
    except (SafetensorError, KeyError, ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error


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
