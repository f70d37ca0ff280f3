"""Windows of one stream of documents: packed in linear time, shuffled in blocks, with a place to go on from.

Shuffling is local: `shuffle` windows are read, given in an order of their own, and the next ones are read. The place
therefore is that of the block's beginning and a number, whatever the block holds: a few numbers in a checkpoint, and at
most one block is read again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any, Literal

import numpy as np

from spd_lens.data.documents import Document

Documents = Literal["joined", "apart"]


@dataclass(frozen=True)
class Cutting:
    """How documents become windows.

    - `body`: tokens of text in a window, `lead`: what stands before them (BOS, or nothing).
    - `documents`: "joined": one after another with `separator` behind each, windows run over their borders, and what
      is left at the end of the data is dropped; "apart": no window holds two of them, and the last of each is shorter.
    """

    body: int
    lead: tuple[int, ...]
    separator: tuple[int, ...]
    documents: Documents

    def windows(self, carry: list[int], ids: list[int]) -> tuple[int, list[int]]:
        """How many windows `carry` and a document give, and all their tokens."""
        tokens = [*carry, *ids, *self.separator]
        n = len(tokens) // self.body
        return (n if self.documents == "joined" or len(tokens) == n * self.body else n + 1), tokens

    def window(self, tokens: list[int], k: int) -> list[int]:
        """Window number `k` of those tokens."""
        return [*self.lead, *tokens[k * self.body : (k + 1) * self.body]]

    def left(self, tokens: list[int]) -> list[int]:
        """The tokens for the windows of the next document."""
        return tokens[len(tokens) - len(tokens) % self.body :] if self.documents == "joined" else []


@dataclass(frozen=True)
class StreamPlace:
    """Where a window begins: before which document (the data set's state), behind what, and which of their windows.

    `first` and `here`: digests of the stream's first document and of this one, compared when the reading goes on.
    """

    epoch: int = 0
    source: dict[str, Any] | None = None
    carry: tuple[int, ...] = ()
    cut: int = 0
    first: str | None = None
    here: str | None = None


class WindowStream:
    """Endless windows of one stream; `position` is the place behind the last one that was given.

    `read(state)` gives the documents from a state of the data set on, to its end.
    """

    def __init__(
        self,
        read: Callable[[dict[str, Any] | None], Iterator[Document]],
        cutting: Cutting,
        *,
        shuffle: int,
        seed: tuple[int, ...],
        position: Mapping[str, Any] | None = None,
    ) -> None:
        self._read = read
        self._cutting = cutting
        self._shuffle = max(shuffle, 1)
        self._seed = seed
        given = {"place": {}, "block": 0, "within": 0} if position is None else position
        self._place = StreamPlace(**{**given["place"], "carry": tuple(given["place"].get("carry", ()))})
        self._block, self._within = int(given["block"]), int(given["within"])

    @property
    def position(self) -> dict[str, Any]:
        """For a checkpoint, in values for JSON."""
        place = {**asdict(self._place), "carry": list(self._place.carry)}
        return {"place": place, "block": self._block, "within": self._within}

    def __iter__(self) -> Iterator[list[int]]:
        ordered = self._ordered(self._place)
        first_block, skipped = self._block, self._within
        while True:
            block = list(islice(ordered, self._shuffle))
            order = self._order(len(block))
            for k in range(skipped if self._block == first_block else 0, len(block)):
                self._place, self._within = block[0][1], k + 1
                yield block[order[k]][0]
            self._block, self._within = self._block + 1, 0

    def _order(self, n: int) -> list[int]:
        return np.random.default_rng((*self._seed, self._block)).permutation(n).tolist()

    def _ordered(self, place: StreamPlace) -> Iterator[tuple[list[int], StreamPlace]]:
        """Windows in the order of the documents, each with its place."""
        cutting = self._cutting
        first, expected = place.first, place
        if first is not None and place.source is not None:
            _compare(next(self._read(None), None), first, "first")
        while True:
            carry, cut, n_given = list(place.carry), place.cut, int(expected.here is not None)
            for document in self._read(place.source):
                first = first or document.digest
                if expected.here is not None:
                    _compare(document, expected.here, "next")
                    expected = StreamPlace()
                n, tokens = cutting.windows(carry, document.ids)
                begins = StreamPlace(place.epoch, document.before, tuple(carry), 0, first, document.digest)
                for k in range(cut, n):
                    yield cutting.window(tokens, k), replace(begins, cut=k)
                n_given += n
                carry, cut = cutting.left(tokens), 0
            if not n_given:
                raise ValueError(
                    f"a stream's documents give fewer than {cutting.body} tokens: not one window; expected more text, "
                    "or fewer streams"
                )
            place = StreamPlace(epoch=place.epoch + 1)


def _compare(document: Document | None, expected: str, which: str) -> None:
    if document is None or document.digest != expected:
        raise ValueError(
            f"the checkpoint belongs to a run on other data: the {which} document of a stream is another than then, or "
            "they come in another order. Resume on the same data (without the data set's own shuffle(buffer_size=...), "
            "whose buffer no state holds: TokenStream(shuffle=...) can be resumed)"
        )
