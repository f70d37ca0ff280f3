"""Locks and temporaries know whether their owner lives."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from spd_lens.support import held, own_mark


def _child_that_holds(path: Path) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            with held(path, "training"):
                (path.parent / "ready").write_text(own_mark())
                time.sleep(60)
        finally:
            os._exit(0)
    while not (path.parent / "ready").exists() or not (path.parent / "ready").read_text():
        time.sleep(0.01)
    return pid


def test_a_lock_names_its_owner_and_outlives_no_process(tmp_path: Path) -> None:
    lock = tmp_path / "running.json"
    pid = _child_that_holds(lock)
    try:
        with (
            pytest.raises(ValueError, match=rf"is already in use: process {pid} on .*, is training there"),
            held(lock, "training"),
        ):
            raise AssertionError("two owners")
        assert json.loads(lock.read_text())["pid"] == pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert lock.exists()
    with held(lock, "training"):
        assert json.loads(lock.read_text())["pid"] == os.getpid()
    assert not lock.exists()


def test_a_second_run_in_the_same_process_is_refused_too(tmp_path: Path) -> None:
    lock = tmp_path / "running.json"
    with held(lock, "training"), pytest.raises(ValueError, match="already in use"), held(lock, "training"):
        raise AssertionError("two owners")


def test_a_lock_is_free_again_after_an_error(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(KeyError), held(tmp_path / "running.json", "training"):
            raise KeyError
    assert os.listdir(tmp_path) == []


def test_of_many_processes_one_has_the_lock(tmp_path: Path) -> None:
    def child(i: int) -> None:
        try:
            with held(tmp_path / "lock", "training"):
                inside = tmp_path / "inside"
                inside.mkdir()  # fails if another one is inside
                time.sleep(0.02)
                inside.rmdir()
                (tmp_path / f"had-{i}").touch()
        except ValueError:
            pass

    children = []
    for i in range(8):
        pid = os.fork()
        if pid == 0:
            try:
                child(i)
            except BaseException:
                os._exit(1)
            os._exit(0)
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * 8
    assert list(tmp_path.glob("had-*"))
