"""Several processes on one machine without starting Python anew: forks of the test, joined by gloo."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def start_processes(count: int, act: Callable[[int], Any], log: Path) -> list[int]:
    """`act(rank)` in `count` children, as a launcher starts them; their process ids."""
    port = free_port()
    sys.stdout.flush()
    pids = []
    for rank in range(count):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # newer Pythons warn of forks where there are threads
            pid = os.fork()
        if pid == 0:
            _child(act, rank, count, port, log)
        pids.append(pid)
    return pids


def _child(act: Callable[[int], Any], rank: int, count: int, port: int, log: Path) -> None:
    status = 1
    try:
        shared = {"WORLD_SIZE": count, "RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
        os.environ.update({name: str(value) for name, value in {**shared, "MASTER_PORT": port}.items()})
        torch.set_num_threads(1)
        act(rank)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        status = 0
    except BaseException:
        (log.parent / f"{log.name}-{rank}.txt").write_text(traceback.format_exc())
    finally:
        os._exit(status)


def wait_for(pids: list[int], log: Path, timeout: float = 400.0) -> list[int]:
    """Exit statuses of the children, negative for a signal; kills them all after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    statuses: dict[int, int] = {}
    while len(statuses) < len(pids):
        for pid in pids:
            if pid not in statuses:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    statuses[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            raise TimeoutError(f"processes did not end in {timeout} s; {errors_of(log)}")
        time.sleep(0.01)
    return [statuses[pid] for pid in pids]


def errors_of(log: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(log.parent.glob(f"{log.name}-*.txt")))


def run_processes(count: int, act: Callable[[int], Any], log: Path) -> None:
    """`act(rank)` in `count` children; raises with their tracebacks if one fails."""
    statuses = wait_for(start_processes(count, act, log), log)
    assert statuses == [0] * count, f"{statuses}\n{errors_of(log)}"
