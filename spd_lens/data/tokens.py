"""Tokens: windows of equal length from texts and data sets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from spd_lens.support.given import given_whole


def pack_tokens(
    texts: Iterable[str],
    tokenizer: Any,
    context: int,
    *,
    prepend_bos: bool = False,
    max_rows: int | None = None,
    skip_empty: bool = False,
) -> Int[Tensor, "n context"]:
    """Tokenise texts, join them (with the end-of-text token between them), and cut windows of `context` tokens.

    The last, incomplete window is dropped. With `prepend_bos` every window starts with the tokenizer's BOS. Texts
    are read lazily, so a streamed data set works with `max_rows`. An empty text adds nothing; None (a null row of a
    data set) is an error, unless `skip_empty` says to leave such rows out. Time and memory are linear in the text.

    Raises TypeError for one text instead of a list of texts and for rows that are no text, naming the row; ValueError
    for texts that do not fill one window.
    """
    if isinstance(texts, (str, bytes)) or not isinstance(texts, Iterable):
        raise TypeError(f"texts is a {type(texts).__name__}; expected a list of texts: pack_tokens([text], ...)")
    body, lead, separator = layout(tokenizer, context, prepend_bos, max_rows)
    buffer: list[int] = []
    parts: list[Tensor] = []
    n_rows = 0
    for text in _checked_texts(texts, skip_empty):
        # verbose=False: a text longer than the model's context is cut here, not fed whole.
        buffer += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + separator
        if len(buffer) >= body:
            whole = len(buffer) - len(buffer) % body
            parts.append(torch.tensor(buffer[:whole]))
            n_rows += whole // body
            buffer = buffer[whole:]
        if max_rows is not None and n_rows >= max_rows:
            break
    if not parts:
        raise ValueError(f"the texts give fewer than {body} tokens: not one window of context={context}")
    return cut_windows(torch.cat(parts), context, bos=lead)[:max_rows]


def cut_windows(
    token_ids: Int[Tensor, " n_tokens"], context: int, *, bos: int | None = None
) -> Int[Tensor, "n context"]:
    """Consecutive windows `[n, context]` of one row of tokens, each with `bos` before it if that is given.

    A remainder too short for a window is dropped.
    """
    if token_ids.ndim != 1:
        raise ValueError(f"token_ids has shape {tuple(token_ids.shape)}; expected one row, [n_tokens]")
    if context < 2:
        raise ValueError(f"context={context}; expected at least 2")
    body = context if bos is None else context - 1
    n = len(token_ids) // body
    windows = token_ids[: n * body].reshape(n, body)
    return windows if bos is None else torch.cat([token_ids.new_full((n, 1), bos), windows], dim=1)


def layout(tokenizer: Any, context: int, prepend_bos: bool, max_rows: int | None) -> tuple[int, int | None, list[int]]:
    """Tokens of text in a window, the token before them, and what stands between texts."""
    for name, number, least in (("context", context, 2), ("max_rows", max_rows, 1)):
        if name == "max_rows" and number is None:
            continue
        given_whole(name, number, least=least)
    if not (callable(tokenizer) and hasattr(tokenizer, "eos_token_id")):
        raise TypeError(f"tokenizer is a {type(tokenizer).__name__}; expected a tokenizer such as model.tokenizer")
    if prepend_bos and tokenizer.bos_token_id is None:
        raise ValueError("prepend_bos=True, but this tokenizer has no BOS token")
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return context - int(prepend_bos), tokenizer.bos_token_id if prepend_bos else None, separator


def _checked_texts(texts: Iterable[Any], skip_empty: bool) -> Iterator[str]:
    for i, text in enumerate(texts):
        if text is None:
            if skip_empty:
                continue
            raise TypeError(f"text {i} is None; skip_empty=True leaves such rows out")
        if isinstance(text, Mapping):
            raise TypeError(
                f"text {i} is a {type(text).__name__} with keys {sorted(map(str, text))}; expected a text: "
                "load_tokens(dataset, tokenizer, context, column=...) reads rows of a data set"
            )
        if not isinstance(text, str):
            raise TypeError(f"text {i} is a {type(text).__name__}; expected a text")
        if text:
            yield text


def load_tokens(
    dataset: str | Any,
    tokenizer: Any,
    context: int,
    *,
    column: str = "text",
    split: str = "train",
    streaming: bool = True,
    max_rows: int | None = None,
    prepend_bos: bool = False,
    skip_empty: bool = False,
    **load_arguments: Any,
) -> Int[Tensor, "n context"]:
    """Token windows `[n context]` from a Hugging Face data set, loaded, tokenised and packed.

    `dataset` is a name or path for `datasets.load_dataset` (further arguments are passed on), or the rows of a loaded
    data set, `{column: text}` each. With `streaming` (the default) only as much is downloaded as `max_rows` windows
    need. The rest is as in `pack_tokens`.
    """
    if isinstance(dataset, str):
        from datasets import load_dataset

        try:
            dataset = load_dataset(dataset, split=split, streaming=streaming, **load_arguments)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"the data set {dataset!r} cannot be loaded ({error}); expected the name or path of one, or its rows"
            ) from error
    if isinstance(dataset, Mapping):
        names = ", ".join(repr(str(name)) for name in dataset)
        raise ValueError(
            f"given a {type(dataset).__name__} with the splits {names}; choose one of them, as in dataset['train']"
        )
    if not isinstance(dataset, Iterable):
        raise TypeError(f"dataset is a {type(dataset).__name__}; expected a name, a loaded data set, or its rows")
    rows = iter(dataset)
    first = next(rows, None)
    if first is None:
        raise ValueError("the data set is empty; expected at least one row of text")
    if not isinstance(first, Mapping):
        raise TypeError(
            f"the rows are of type {type(first).__name__}; expected {{{column!r}: text}} (for a list of texts: "
            "pack_tokens)"
        )
    if column not in first:
        raise ValueError(f"the data set has no column {column!r}; its columns: {sorted(first)}")
    # What is no text among them is refused there.
    texts: Any = (row.get(column) for row in chain([first], rows))
    return pack_tokens(texts, tokenizer, context, prepend_bos=prepend_bos, max_rows=max_rows, skip_empty=skip_empty)
