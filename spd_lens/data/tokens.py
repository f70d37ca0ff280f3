"""Tokens: windows of equal length from texts and data sets."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor


def pack_tokens(
    texts: Iterable[str], tokenizer: Any, context: int, *, prepend_bos: bool = False, max_rows: int | None = None
) -> Int[Tensor, "n context"]:
    """Tokenise texts, join them (with the end-of-text token between them), and cut windows of `context` tokens.

    The last, incomplete window is dropped. With `prepend_bos` every window starts with the tokenizer's BOS. Texts
    are read lazily, so a streamed data set works with `max_rows`.
    """
    if context < 2:
        raise ValueError(f"context={context}; expected at least 2")
    body = context - int(prepend_bos)
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    lead = [tokenizer.bos_token_id] if prepend_bos else []
    if prepend_bos and tokenizer.bos_token_id is None:
        raise ValueError("prepend_bos=True, but this tokenizer has no BOS token")
    buffer: list[int] = []
    rows: list[list[int]] = []
    for text in texts:
        # verbose=False: a text longer than the model's context is cut here, not fed whole.
        buffer += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + separator
        while len(buffer) >= body and (max_rows is None or len(rows) < max_rows):
            rows.append(lead + buffer[:body])
            del buffer[:body]
        if max_rows is not None and len(rows) >= max_rows:
            break
    if not rows:
        raise ValueError(f"the texts give fewer than {body} tokens: not one window of context={context}")
    return torch.tensor(rows)


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
    **load_arguments: Any,
) -> Int[Tensor, "n context"]:
    """Token windows `[n context]` from a Hugging Face data set, loaded, tokenised and packed.

    `dataset` is a name or path for `datasets.load_dataset` (further arguments are passed on), or a loaded data set.
    With `streaming` (the default) only as much is downloaded as `max_rows` windows need.
    """
    if isinstance(dataset, str):
        from datasets import load_dataset

        dataset = load_dataset(dataset, split=split, streaming=streaming, **load_arguments)
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError("the data set is empty")
    if column not in first:
        raise ValueError(f"the data set has no column {column!r}; its columns: {sorted(first)}")
    texts = (row[column] for row in dataset)
    return pack_tokens(texts, tokenizer, context, prepend_bos=prepend_bos, max_rows=max_rows)
