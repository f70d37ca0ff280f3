"""Rows of one tensor in several files, mapped into memory: what is asked for is read, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# Of a file, unless told otherwise: large enough to be read fast, small enough to be copied, checked and lost alone.
FILE_BYTES = 2**30
# numpy has no bfloat16: its bits are kept as whole numbers of the same width.
_KEPT_AS = {torch.bfloat16: torch.int16}


class RowFiles:
    """`[n ...]`, the rows of files one behind the other, each of `per_file` rows but for the last.

    `files[rows]` for whole numbers `[k]` reads those rows. Mapped copy-on-write: torch wants memory that can be
    written.
    """

    def __init__(self, paths: Sequence[Path], dtype: torch.dtype) -> None:
        self._parts = [torch.from_numpy(np.load(path, mmap_mode="c")).view(dtype) for path in paths]
        self._per_file = len(self._parts[0])
        self.shape = torch.Size((sum(map(len, self._parts)), *self._parts[0].shape[1:]))
        self.dtype = dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Tensor) -> Tensor:
        if len(self._parts) == 1:
            return self._parts[0][rows]
        found = torch.empty((len(rows), *self.shape[1:]), dtype=self.dtype)
        file = rows // self._per_file
        for k in file.unique().tolist():
            found[file == k] = self._parts[k][rows[file == k] - k * self._per_file]
        return found


class RowWriter:
    """Writes `n_rows` rows, given in parts, to the files at `paths`, of `per_file` rows each but for the last."""

    def __init__(self, paths: Sequence[Path], n_rows: int, per_file: int) -> None:
        self._paths, self._n_rows, self._per_file = paths, n_rows, per_file
        self._at = 0
        self._open: np.ndarray | None = None

    def add(self, rows: Tensor) -> None:
        """The next rows."""
        while len(rows):
            inside = self._at % self._per_file
            if inside == 0:
                self._open = self._begun(rows)
            assert self._open is not None
            here = rows[: self._per_file - inside]
            kept = here.view(_KEPT_AS.get(here.dtype, here.dtype)).cpu().numpy()
            self._open[inside : inside + len(here)] = kept
            self._at += len(here)
            rows = rows[len(here) :]
        if isinstance(self._open, np.memmap):
            self._open.flush()

    def _begun(self, like: Tensor) -> np.ndarray:
        number = self._at // self._per_file
        kept_as = _KEPT_AS.get(like.dtype, like.dtype)
        shape = (min(self._per_file, self._n_rows - self._at), *like.shape[1:])
        dtype = torch.empty(0, dtype=kept_as).numpy().dtype
        return np.lib.format.open_memmap(self._paths[number], mode="w+", dtype=dtype, shape=shape)
