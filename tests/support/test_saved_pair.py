"""Two files that are one save: whatever moment it is stopped at, the old save loads or the new one."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch

from spd_lens.support import CheckedContent, SavedPair, checked_text, own_mark, read_checked
from tests.support.killing import killed_at_every_operation


class Content(CheckedContent):
    sha256: str
    number: int


def _read(path: Path) -> Content:
    return read_checked(path, Content, format_name="test", version=1)


def pair(directory: Path) -> SavedPair[Content]:
    return SavedPair(directory, "t.safetensors", "c.json", _read, lambda content: content.sha256)


def save(directory: Path, number: int) -> None:
    def text(digest: str) -> str:
        return checked_text({"sha256": digest, "number": number}, format_name="test", version=1)

    pair(directory).write({"x": torch.full((3,), float(number))}, text, {"note.md": f"note {number}"})


def loaded(directory: Path) -> int:
    content, tensors = pair(directory).load()
    assert tensors["x"].tolist() == [float(content.number)] * 3, "tensors and JSON are of two saves"
    return content.number


def hidden(directory: Path) -> list[str]:
    return [name for name in os.listdir(directory) if name.startswith(".")]


def test_a_kill_at_any_operation_leaves_the_old_save_or_the_new_one(tmp_path: Path) -> None:
    found = []
    for k in killed_at_every_operation(lambda: save(tmp_path / "save", 2)):
        if k == 0:
            save(tmp_path / "save", 1)
        found.append(loaded(tmp_path / "save") if k else 1)
        # What the kill left is cleared away by the next save, which also tells the two apart for the next round.
        save(tmp_path / "save", 1)
        assert hidden(tmp_path / "save") == []
    print(f"{len(found)} kills: {found.count(1)} times the old save, {found.count(2)} times the new one")
    assert len(found) > 10
    assert set(found) == {1, 2}
    assert found == sorted(found)


def test_a_first_save_that_is_killed_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    found = []
    for _ in killed_at_every_operation(lambda: save(tmp_path / "save", 2)):
        try:
            found.append(loaded(tmp_path / "save"))
        except ValueError:
            found.append(0)
        shutil.rmtree(tmp_path / "save", ignore_errors=True)
    assert set(found) == {0, 2}
    assert found == sorted(found)


def test_a_save_that_was_killed_between_its_files_is_finished_by_the_next_writer(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for _ in killed_at_every_operation(lambda: save(tmp_path, 2)):
        if loaded(tmp_path) == 2:
            break
    # The next writer fails before it has written anything of its own: the save of 2 must not go back to 1, nor break.
    with pytest.raises(ZeroDivisionError):
        pair(tmp_path).write({"x": torch.ones(2)}, lambda digest: str(1 / 0))
    assert loaded(tmp_path) == 2
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("after", range(3))
def test_an_interrupt_during_the_renames_leaves_one_save(
    tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    real, calls = os.replace, []

    def replace(a: object, b: object) -> None:
        real(a, b)  # type: ignore[arg-type]
        calls.append(b)
        # The first one is inside the writing of the tensors' own temporary.
        if len(calls) == after + 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2)
    assert loaded(tmp_path) == 2
    assert hidden(tmp_path) == []


def test_a_full_disk_loses_nothing_whichever_write_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    real = os.fsync
    for failing in range(3):
        calls = []

        def fsync(handle: int, calls: list[int] = calls, failing: int = failing) -> None:
            calls.append(handle)
            if len(calls) == failing + 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(handle)

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="no room to write"):
            save(tmp_path, 2)
        monkeypatch.setattr(os, "fsync", real)
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_what_is_mixed_from_two_saves_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "a", 1)
    save(tmp_path / "b", 2)
    shutil.copy(tmp_path / "b" / "t.safetensors", tmp_path / "a" / "t.safetensors")
    with pytest.raises(ValueError, match=r"t.safetensors is damaged"):
        loaded(tmp_path / "a")


def test_links_to_directories_and_to_files_are_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "place").symlink_to("disk", target_is_directory=True)
    save(tmp_path / "place", 1)
    assert (tmp_path / "place").is_symlink()
    assert loaded(tmp_path / "disk") == 1
    os.rename(tmp_path / "disk" / "t.safetensors", tmp_path / "elsewhere")
    (tmp_path / "disk" / "t.safetensors").symlink_to(tmp_path / "elsewhere")
    before = (tmp_path / "elsewhere").read_bytes()
    save(tmp_path / "place", 2)
    assert (tmp_path / "disk" / "t.safetensors").is_symlink()
    assert (tmp_path / "elsewhere").read_bytes() != before
    assert loaded(tmp_path / "place") == 2
    assert sorted(os.listdir(tmp_path)) == ["disk", "elsewhere", "place"]


def test_the_working_directory_and_a_parent_that_is_read_only_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "parent" / "place"
    place.mkdir(parents=True)
    monkeypatch.chdir(place)
    place.parent.chmod(0o500)
    try:
        save(Path(), 1)
        save(place, 2)
    finally:
        place.parent.chmod(0o700)
    assert loaded(Path()) == 2
    assert os.path.samefile(Path(), place)


def test_temporaries_of_the_living_and_of_users_are_left_alone(tmp_path: Path) -> None:
    save(tmp_path, 1)
    living = f".c.json.{own_mark()}-00000000.tmp"
    machine = own_mark().split("-")[0]
    dead, foreign = f".c.json.{machine}-4194305-77-00000000.tmp", ".c.json.00000000-1-1-00000000.tmp"
    for name in (living, dead, foreign, ".mine.tmp", ".c.json.swp"):
        (tmp_path / name).write_text("x")
    save(tmp_path, 2)
    assert set(hidden(tmp_path)) == {living, foreign, ".mine.tmp", ".c.json.swp"}
    # Whether the process of another machine lives cannot be known; after a day it is taken for dead.
    os.utime(tmp_path / foreign, (1, 1))
    save(tmp_path, 3)
    assert set(hidden(tmp_path)) == {living, ".mine.tmp", ".c.json.swp"}
    assert loaded(tmp_path) == 3
