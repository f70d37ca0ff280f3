"""Documents of a data set as tokens, one after another, with the place from which the reading can go on.

The data set is one of `datasets`: its own `state_dict` says where it is, so going on skips what was read instead of
reading it. `split_dataset_by_node` deals it out to streams: by shards (files) where their number is a multiple of the
streams', by rows otherwise (then every stream passes over the rows of the others without tokenising them).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from spd_lens.support.names import near_names


@dataclass(frozen=True)
class Document:
    """Token ids of one document; `before` is the data set's state from which it is read again (None: the start)."""

    ids: list[int]
    before: dict[str, Any] | None

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of the SHA-256 of its tokens."""
        return hashlib.sha256(np.asarray(self.ids, dtype=np.int64).tobytes()).hexdigest()[:16]


def opened_source(source: Any, *, split: str, streams: int, **load_arguments: Any) -> Any:
    """An `IterableDataset`: of one, of a `Dataset`, of text files, of a folder of `save_to_disk`, or of a name.

    Raises ValueError for what cannot be opened and for a dictionary of splits, TypeError for anything else.
    """
    import datasets

    if isinstance(source, (str, Path)):
        source = _loaded(str(source), split, load_arguments)
    elif isinstance(source, (list, tuple)) and source and all(isinstance(s, (str, Path)) for s in source):
        source = _text_files([str(path) for path in source])
    if isinstance(source, Mapping):
        names = ", ".join(repr(str(name)) for name in source)
        raise ValueError(f"given the splits {names}; choose one of them, as in dataset['train']")
    if isinstance(source, datasets.Dataset):
        if len(source) == 0:
            raise ValueError("the data set is empty; expected at least one row")
        return source.to_iterable_dataset(num_shards=min(streams, len(source)))
    if not isinstance(source, datasets.IterableDataset):
        raise TypeError(
            f"source is a {type(source).__name__}; expected a data set of `datasets`, its name or folder, or a list of "
            "text files (Dataset.from_dict({'text': texts}) makes one of texts)"
        )
    return source


def _loaded(name: str, split: str, load_arguments: Mapping[str, Any]) -> Any:
    import datasets

    try:
        if (Path(name) / "state.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(name)
            if not isinstance(saved, Mapping):
                return saved
            if split not in saved:
                raise ValueError(f"it has no split {split!r}; near: {near_names(split, map(str, saved))}")
            return saved[split]
        return datasets.load_dataset(name, split=split, streaming=True, **load_arguments)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the data set {name!r} cannot be loaded ({error}); expected a name, a folder of data files, or one that "
            "save_to_disk() wrote; text files are given as a list"
        ) from error


def _text_files(paths: Sequence[str]) -> Any:
    import datasets

    missing = [path for path in paths if not Path(path).is_file()]
    if missing:
        raise ValueError(f"there is no file {missing[0]}")
    # One file is one document; with streaming every file is a shard.
    return datasets.load_dataset("text", data_files=list(paths), sample_by="document", split="train", streaming=True)


def documents(
    source: Any,
    column: str,
    tokenizer: Any,
    *,
    stream: int,
    streams: int,
    start: dict[str, Any] | None,
    skip_empty: bool,
) -> Iterator[Document]:
    """The documents of one stream from the state `start` on, to the end of the data set; empty ones are left out.

    Raises ValueError for a column that is not there, TypeError for rows that are neither text nor tokens.
    """
    from datasets.distributed import split_dataset_by_node

    own = split_dataset_by_node(source, rank=stream, world_size=streams)
    if start is not None:
        own.load_state_dict(start)
    before = start
    for row in own:
        if column not in row:
            raise ValueError(f"the data set has no column {column!r}; near: {near_names(column, map(str, row))}")
        ids = _tokens_of(row[column], column, tokenizer, skip_empty)
        if ids:
            yield Document(ids, before)
        before = own.state_dict()


def _tokens_of(value: Any, column: str, tokenizer: Any, skip_empty: bool) -> list[int]:
    if value is None and skip_empty:
        return []
    if isinstance(value, str):
        if tokenizer is None:
            raise TypeError(f"column {column!r} holds text; give a tokenizer, such as model.tokenizer")
        # verbose=False: a text longer than the model's context is cut here, not fed whole.
        return tokenizer(value, add_special_tokens=False, verbose=False)["input_ids"] if value else []
    if isinstance(value, (np.ndarray, Tensor)):
        value = value.tolist()
    if isinstance(value, (list, tuple)) and all(isinstance(i, int) and not isinstance(i, bool) for i in value):
        return list(value)
    none = "; skip_empty=True leaves such rows out" if value is None else ""
    raise TypeError(f"column {column!r} holds a {type(value).__name__}; expected text, or a row of token ids{none}")
