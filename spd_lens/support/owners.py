"""Which process is writing where: temporaries that carry their owner's name, and locks that know a dead owner.

A temporary is called `.{name}.{owner}-{tag}.tmp`; the owner is machine, process and its start time. Only temporaries
whose owner is known to be dead are ever cleared away. Of a process on another machine that cannot be known, so its
temporaries stay for a day.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<owner>[0-9a-f]{8}-\d+-\d+)-[0-9a-f]{8}\.tmp")
# A day after its last change a temporary of another machine is taken for abandoned.
_FOREIGN_AGE = 24 * 3600.0
# How long a lock's file may name a dead owner while somebody else, who just took it, writes a new name.
_HANDOVER = 1.0


def own_mark() -> str:
    """This process as `machine-pid-start`: no other process, also of another container or after a restart, has it."""
    return f"{_machine()}-{os.getpid()}-{_start_time(os.getpid()) or 0}"


def _machine() -> str:
    parts = [socket.gethostname()]
    # A process number means something only within one boot and one namespace (container).
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def _start_time(pid: int) -> int | None:
    """When a process started, in ticks since boot; 0 for one that has ended but was not collected; None if unknown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return 0 if fields[0] in "ZX" else int(fields[19])


def is_dead(mark: str) -> bool:
    """Whether the process called `mark` has certainly ended; False where that cannot be known."""
    machine, pid, start = mark.split("-")
    if machine != _machine() or os.name == "nt":
        return False
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass
    now = _start_time(int(pid))
    return now is not None and now != int(start)


# -- temporaries -----------------------------------------------------------------------------------------------------


def temporary_beside(path: Path) -> Path:
    """A name, not yet taken, for something that will become `path`."""
    return path.parent / f".{path.name[:100]}.{own_mark()}-{uuid.uuid4().hex[:8]}.tmp"


def temporaries(directory: Path, name: str | None = None) -> list[Path]:
    """Temporaries of any process in `directory`, of `name` or of all names."""
    found = []
    with suppress(OSError):
        for path in directory.iterdir():
            match = _TEMPORARY.fullmatch(path.name)
            if match and name in (None, match["name"]):
                found.append(path)
    return sorted(found)


def clear_dead_temporaries(directory: Path, name: str | None = None) -> None:
    """Remove what dead processes left in `directory`; of live ones nothing is touched."""
    for path in temporaries(directory, name):
        match = _TEMPORARY.fullmatch(path.name)
        assert match is not None
        if is_dead(match["owner"]) or _is_foreign_and_old(path, match["owner"]):
            discard(path)


def _is_foreign_and_old(path: Path, mark: str) -> bool:
    if mark.split("-")[0] == _machine():
        return False
    with suppress(OSError):
        return time.time() - path.stat().st_mtime > _FOREIGN_AGE
    return False


def discard(path: Path) -> None:
    """Remove a file or a directory of ours; that it is gone already, or cannot be removed, is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


# -- locks -----------------------------------------------------------------------------------------------------------


@contextmanager
def directory_lock(directory: Path) -> Iterator[None]:
    """One process (or thread) at a time is inside for one directory; others wait. Leaves no file.

    File systems that cannot lock a directory give no protection; what is written is then still whole, file by file.
    """
    handle = None
    if fcntl is not None:
        with suppress(OSError):
            handle = os.open(directory, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


@contextmanager
def held(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path`, which names this process, until the block ends; then it is gone.

    Raises ValueError with the owner if another process has it. One that a dead process left is taken over.
    """
    handle = _acquire(path, what)
    try:
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(handle, 0)
        os.pwrite(handle, (json.dumps(owner | {"mark": own_mark()}) + "\n").encode(), 0)
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(handle)


def _acquire(path: Path, what: str) -> int:
    patience = time.monotonic() + _HANDOVER
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        free, owner = _try_lock(handle), _owner(handle)
        dead = is_dead(owner.get("mark", "")) if owner else None
        if free is None:
            # No locks here: what the file says is all there is.
            free = owner is None or bool(dead)
        if free and _is_still(path, handle):
            return handle
        os.close(handle)
        if free or (dead and time.monotonic() < patience):
            time.sleep(0.02)
            continue
        if dead:
            # Its lock lives on in a process that it had started; that one does not write here.
            with suppress(OSError):
                path.unlink()
            continue
        who = "another process"
        if owner is not None:
            who = f"process {owner.get('pid')} on {owner.get('host')}, since {owner.get('since')}"
        raise ValueError(
            f"{path.parent} is already in use: {who}, is {what} there. Wait for it, or choose another directory (if "
            f"that process has ended, remove {path})"
        )


def _try_lock(handle: int) -> bool | None:
    """Whether the lock was free and is ours now; None where the file system has no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


def _is_still(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except OSError:
        return False


def _owner(handle: int) -> dict[str, Any] | None:
    try:
        owner = json.loads(os.pread(handle, 4096, 0))
    except ValueError:
        return None
    is_ours = isinstance(owner, dict) and re.fullmatch(r"[0-9a-f]{8}-\d+-\d+", str(owner.get("mark")))
    return owner if is_ours else None
