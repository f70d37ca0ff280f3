"""A save of two files that belong together, tensors and the JSON that describes them, safe against kills.

Both are written beside their places first and then renamed, tensors before JSON. A kill between the two renames leaves
new tensors, old JSON, and the new JSON under its temporary name: readers find it there by the hash of the tensors that
it names, and the next writer puts it in its place. So at every moment either the old save loads or the new one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from torch import Tensor

from spd_lens.support.files import discard, file_hash, flush, in_words, made_directory, put_tensors, read_tensors
from spd_lens.support.owners import clear_dead_temporaries, directory_lock, temporaries, temporary_beside

T = TypeVar("T")


@dataclass(frozen=True)
class SavedPair(Generic[T]):
    """The two files of a save in `directory`; `read(path)` reads the JSON and `hash_of` finds the tensors' hash in it.

    `read` raises ValueError for anything that is not whole.
    """

    directory: Path
    tensors: str
    config: str
    read: Callable[[Path], T]
    hash_of: Callable[[T], str]

    def write(
        self, tensors: Mapping[str, Tensor], config: Callable[[str], str], others: Mapping[str, str] | None = None
    ) -> None:
        """Write the save; `config(sha256 of the tensors)` is the text of the JSON, `others` more texts by file name.

        Nothing else in the directory is touched. Raises OSError if the disk is full; what was there then still is.
        """
        made_directory(self.directory)
        names = (self.tensors, *(others or {}), self.config)
        real = {name: _real(self.directory / name) for name in names}
        with directory_lock(self.directory), in_words(self.directory):
            self._finish_interrupted()
            for place in {path.parent for path in real.values()}:
                clear_dead_temporaries(place)
            new = {name: temporary_beside(path) for name, path in real.items()}
            whole = False
            try:
                put_tensors(new[self.tensors], tensors)
                texts = {**(others or {}), self.config: config(file_hash(new[self.tensors]))}
                for name, text in texts.items():
                    new[name].write_text(text, encoding="utf-8")
                    flush(new[name])
                whole = True
                _move(new, real)
            except BaseException:
                if whole and not new[self.tensors].exists():
                    # The tensors are in their place, so this save counts: finish it. Should that fail too, readers
                    # find the JSON where it is.
                    with suppress(OSError):
                        _move(new, real)
                else:
                    for path in new.values():
                        discard(path)
                raise
        for place in {path.parent for path in real.values()}:
            flush(place)

    def load(self) -> tuple[T, dict[str, Tensor]]:
        """The JSON and the tensors that belong to it. Raises ValueError if one of them is not whole."""
        # Twice, because a writer may have been at work between the reading of one file and of the other.
        found = self._belonging() or self._belonging()
        config = self.read(self.directory / self.config) if found is None else found[1]
        return config, read_tensors(self.directory / self.tensors, self.hash_of(config))

    def _belonging(self) -> tuple[Path, T] | None:
        """The JSON that names the tensors that are there: in its place, or not yet renamed when its writer died."""
        place = _real(self.directory / self.config)
        try:
            digest = file_hash(self.directory / self.tensors)
        except OSError:
            return None
        for path in (place, *temporaries(place.parent, place.name)):
            with suppress(ValueError, OSError):
                config = self.read(path)
                if self.hash_of(config) == digest:
                    return path, config
        return None

    def _finish_interrupted(self) -> None:
        place = _real(self.directory / self.config)
        if temporaries(place.parent, place.name) and (found := self._belonging()) is not None and found[0] != place:
            os.replace(found[0], place)


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _move(new: Mapping[str, Path], real: Mapping[str, Path]) -> None:
    for name, path in new.items():
        if path.exists():
            os.replace(path, real[name])
