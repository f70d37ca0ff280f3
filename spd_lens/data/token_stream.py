"""`TokenStream`: batches of tokens from a data set that is read while it is trained on.

Nothing but a block of windows is in memory. Row `j` of every batch comes from stream `j mod streams`, so a process
that has rows `r, r + n, ...` reads the streams `r, r + n, ...` and no others, and any number of processes that divides
`streams` gets the same batches.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spd_lens.data.batches import Batch, token_ids
from spd_lens.data.documents import documents as read_documents
from spd_lens.data.documents import opened_source
from spd_lens.data.tokens import layout
from spd_lens.data.window_stream import Cutting, Documents, WindowStream
from spd_lens.support.files import given_path, replacing
from spd_lens.support.given import given_one_of, given_seed, given_whole


class TokenStream:
    """Endless batches `[batch_size context]` from a data set that is never read whole.

    - `source`: a data set of `datasets` (streamed or not, of texts or of rows of token ids), its name or folder (with
      `split` and further arguments of `load_dataset`), a folder of `save_to_disk`, or a list of text files.
    - `column`: of texts, which `tokenizer` cuts, or of token ids.
    - `documents`: "joined" (packed, the tokenizer's end-of-text or `separator` behind each) or "apart" (no window holds
      two; the last window of each is padded, and padding is left out of losses and metrics).
    - `streams`: how many parts of the data set are read side by side; a multiple of the number of processes, and a
      divisor of `batch_size`. A data set of so many files (or a multiple) is not read twice.
    - `shuffle`: so many windows of each stream are read and given in an order drawn from `seed`; 0: in their own order.
    - `exclude`: token ids whose positions are left out of losses and metrics.

    At the end of a stream it begins again. `train` keeps the place in checkpoints; a run that goes on reads at most one
    block of `shuffle` windows again, and the data set skips what came before by its own `state_dict` (whole files
    unread; within a file by passing over its rows, which are not tokenised again).

    Raises ValueError or TypeError for a source that cannot be opened and for choices that do not fit each other.
    """

    def __init__(
        self,
        source: Any,
        tokenizer: Any = None,
        *,
        context: int,
        batch_size: int,
        column: str = "text",
        split: str = "train",
        documents: Documents = "joined",
        separator: int | None = None,
        prepend_bos: bool = False,
        streams: int = 1,
        shuffle: int = 0,
        seed: int = 0,
        exclude: Iterable[int] = (),
        skip_empty: bool = False,
        **load_arguments: Any,
    ) -> None:
        self.batch_size = given_whole("batch_size", batch_size, least=1)
        self.streams = given_whole("streams", streams, least=1)
        if self.batch_size % self.streams:
            raise ValueError(f"batch_size={batch_size} with streams={streams}; expected a multiple of streams")
        self.context = given_whole("context", context, least=2)
        self.shuffle = given_whole("shuffle", shuffle, least=0)
        self.seed = given_seed(seed)
        self.exclude = token_ids(exclude)
        given_one_of("documents", documents, ("joined", "apart"))
        self._cutting = _cutting(tokenizer, context, prepend_bos, separator, documents)
        self._source = opened_source(source, split=split, streams=self.streams, **load_arguments)
        self._read = partial(read_documents, self._source, column, tokenizer, streams=streams, skip_empty=skip_empty)
        self._column = column
        # Which rows of every batch are given: every `count`-th, from `rank` on.
        self._share = (0, 1)
        self._start: Mapping[str, Any] = {"batch": 0, "streams": {}}
        self._position: Mapping[str, Any] = self._start

    def __repr__(self) -> str:
        how = f"{self.streams} streams, {self._cutting.documents}, shuffled in blocks of {self.shuffle}"
        return f"{type(self).__name__}({self.batch_size} rows of {self.context} tokens; {how})"

    def __iter__(self) -> Iterator[Batch]:
        return self.batches_from(0)

    def batches_from(self, start: int) -> Iterator[Batch]:
        """The batches from number `start` on, without end; those before the position of `at` are not read again."""
        rank, count = self._share
        begins = self._start if self._start["batch"] <= start else {"batch": 0, "streams": {}}
        opened = {s: self._window_stream(s, begins["streams"].get(str(s))) for s in range(rank, self.streams, count)}
        running = {s: iter(stream) for s, stream in opened.items()}
        index = begins["batch"]
        while True:
            windows = [next(running[row % self.streams]) for row in range(rank, self.batch_size, count)]
            index += 1
            self._position = {"batch": index, "streams": {str(s): stream.position for s, stream in opened.items()}}
            if index > start:
                yield self._batch(windows)

    def position(self) -> dict[str, Any]:
        """The place behind the last batch that was taken, of this process's streams; for `at`."""
        return dict(self._position)

    def at(self, position: Mapping[str, Any]) -> TokenStream:
        """The same batches, read from a place on. Documents are compared with those of then as they are read."""
        moved = copy.copy(self)
        moved._start = moved._position = position
        return moved

    def for_process(self, rank: int, count: int) -> TokenStream:
        """The same batches with rows `rank, rank + count, ...` of each alone; other streams are not read.

        Raises ValueError for a number of streams that `count` does not divide.
        """
        if self.streams % count:
            raise ValueError(
                f"{self.streams} streams for {count} processes; expected TokenStream(streams={count}) or a multiple"
            )
        shared = copy.copy(self)
        shared._share = (rank, count)
        return shared

    def fingerprint(self) -> dict[str, Any]:
        """What can be said of the batches without reading them."""
        cutting = self._cutting
        return {
            "batch_size": self.batch_size,
            "seed": self.seed,
            "exclude": list(self.exclude),
            "context": self.context,
            "streams": self.streams,
            "shuffle": self.shuffle,
            "column": self._column,
            "documents": cutting.documents,
            "lead": list(cutting.lead),
            "separator": list(cutting.separator),
        }

    def write_tokens(self, path: str | Path, rows: int) -> Path:
        """The first `rows` windows as a `.npy` file `[rows context]`, batch by batch; returns the path.

        `TokenBatches(np.load(path, mmap_mode="r"), ...)` reads them, also where they do not fit into memory. int32.
        Raises ValueError for padded windows, whose padding the file would not show.
        """
        n_rows = given_whole("rows", rows, least=1)
        if self._cutting.documents == "apart":
            raise ValueError("documents='apart' pads windows, which a file of tokens does not show; use 'joined'")
        written = given_path(path)
        with replacing(written) as temporary:
            file = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.int32, shape=(n_rows, self.context))
            at = 0
            for batch in self:
                part = batch.inputs[: n_rows - at]
                file[at : at + len(part)] = part.numpy()
                at += len(part)
                if at == n_rows:
                    break
            file.flush()
        return written

    def _window_stream(self, stream: int, position: Mapping[str, Any] | None) -> WindowStream:
        return WindowStream(
            lambda start: self._read(stream=stream, start=start),
            self._cutting,
            shuffle=self.shuffle,
            seed=(self.seed % 2**64, stream),
            position=position,
        )

    def _batch(self, windows: list[list[int]]) -> Batch:
        lengths = torch.tensor([len(window) for window in windows])
        padding = self.exclude[0] if self.exclude else next(iter(self._cutting.separator), 0)
        rows = [window + [padding] * (self.context - len(window)) for window in windows]
        tokens = torch.tensor(rows)
        apart = self._cutting.documents == "apart"
        kept = torch.arange(self.context) < lengths[:, None]
        counts = kept & ~torch.isin(tokens, torch.tensor(self.exclude)) if self.exclude else kept
        # Also where no row of this process is padded: processes ask each other about the masks that all of them have.
        return Batch(
            tokens,
            tokens=tokens,
            position_mask=counts if apart or self.exclude else None,
            attention_mask=kept if apart else None,
        )


def _cutting(tokenizer: Any, context: int, prepend_bos: bool, separator: int | None, documents: Documents) -> Cutting:
    if tokenizer is None:
        if prepend_bos:
            raise ValueError("prepend_bos=True without a tokenizer; expected one that has a BOS token")
        return Cutting(context, (), () if separator is None else (separator,), documents)
    body, lead, between = layout(tokenizer, context, prepend_bos, None)
    ends = between if separator is None else [separator]
    return Cutting(body, () if lead is None else (lead,), tuple(ends), documents)
