"""Single files: whole or not at all, readable as the umask says, on file systems that can do less."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch

from spd_lens.support import new_directory, read_tensors, write_json, write_tensors, write_text
from tests.support.killing import killed_at_every_operation


def test_a_text_that_is_killed_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    path, found = tmp_path / "page.html", []
    write_text(path, "old")
    for _ in killed_at_every_operation(lambda: write_text(path, "new")):
        found.append(path.read_text())
        write_text(path, "old")
        assert os.listdir(tmp_path) == ["page.html"]
    assert set(found) == {"old", "new"}


def test_a_new_directory_that_is_killed_is_whole_or_not_there(tmp_path: Path) -> None:
    def write() -> None:
        with new_directory(tmp_path / "a") as temporary:
            write_tensors(temporary / "t", {"x": torch.ones(2)})
            write_text(temporary / "text", "b")

    count = 0
    for _ in killed_at_every_operation(write):
        count += 1
        if (tmp_path / "a").exists():
            assert sorted(os.listdir(tmp_path / "a")) == ["t", "text"]
            os.rename(tmp_path / "a", tmp_path / f"done-{count}")
    assert count > 5
    with pytest.raises(ValueError, match="a exists already"):
        write()


def test_a_file_system_that_cannot_flush_a_directory_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(tmp_path / "a", "text")
    assert (tmp_path / "a").read_text() == "text"

    def broken(handle: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error"):
        write_text(tmp_path / "a", "lost")
    assert (tmp_path / "a").read_text() == "text"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_tensors_are_readable_as_the_umask_says(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        digest = write_tensors(tmp_path / "t.safetensors", {"x": torch.arange(3)})
    finally:
        os.umask(before)
    assert (tmp_path / "t.safetensors").stat().st_mode & 0o777 == mode
    assert read_tensors(tmp_path / "t.safetensors", digest)["x"].tolist() == [0, 1, 2]


def test_numbers_that_json_has_no_word_for_are_text(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": [math.nan, math.inf, -math.inf], "b": np.float32(0.5), "c": (1, True)})

    def refuse(text: str) -> None:
        raise AssertionError(text)

    whole = json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse)
    assert whole == {"a": ["NaN", "Infinity", "-Infinity"], "b": 0.5, "c": [1, True]}


def test_a_directory_in_the_place_of_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a directory; expected a name for a file"):
        write_text(tmp_path, "x")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="file is a file; expected a directory"):
        write_text(tmp_path / "file" / "page.html", "x")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_device_or_a_pipe_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    """As root `/dev/null` would become a file."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ValueError, match="pipe is a device or a pipe, which a file would replace"):
        write_text(pipe, "text")
    assert stat.S_ISFIFO(pipe.stat().st_mode)
