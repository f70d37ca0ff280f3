"""Kills a process at every file operation of a function: `os._exit` in a forked child just before the k-th one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

OPERATIONS = (
    "open",
    "replace",
    "rename",
    "unlink",
    "rmdir",
    "mkdir",
    "fsync",
    "chmod",
    "remove",
    "ftruncate",
    "pwrite",
)


def killed_at_every_operation(act: Callable[[], Any]) -> Iterator[int]:
    """Runs `act` in a child again and again, killed one file operation later each time, until it comes to its end.

    Yields the number of operations done after each kill; the caller looks at the files and puts them back.
    """
    for k in range(10_000):
        pid = os.fork()
        if pid == 0:
            _count_down(k)
            try:
                act()
            except BaseException:
                os._exit(3)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status in (0, 9), f"the child failed by itself ({status}) with {k} operations allowed"
        if status == 0:
            return
        yield k


def _count_down(k: int) -> None:
    left = [k]

    def counted(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if left[0] == 0:
                os._exit(9)
            left[0] -= 1
            return real(*args, **kwargs)

        return call

    for name in OPERATIONS:
        setattr(os, name, counted(getattr(os, name)))
    Path.write_text = counted(Path.write_text)  # type: ignore[method-assign]
