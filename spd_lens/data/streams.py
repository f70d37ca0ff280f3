"""Streams of checked batches: what `train`, `evaluate`, `harvest` and the graphs make of the data they are given.

Accepted are a single batch (tokens `[batch pos]`, inputs, a `Batch`, a dict with `"input_ids"`), which is one batch and
never its rows one by one, and any iterable of batches: a list, a `DataLoader`, a generator, `TokenBatches`.
Values are looked at while a batch is on the CPU, where that makes nothing wait.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from numbers import Integral
from typing import Any

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.inputs import checked_tokens
from spd_lens.data.batches import Batch, TokenBatches, as_batch, is_one_batch, padding_is_seen

_EXPECTED = (
    "expected tokens [batch pos], a list of such tensors, a DataLoader, TokenBatches(tokens, batch_size), or another "
    "iterable of batches"
)


def endless_batches(
    batches: Any, decomposition: Decomposition, *, start: int = 0, whole: bool = True
) -> Iterator[Batch]:
    """Batches number `start`, `start + 1`, ... without end; the data is begun again when it ends.

    Not `whole`: they are one process's rows, of which it may be that no position counts.

    Raises ValueError for empty data, for data that cannot be begun again, and for a batch that cannot be run or in
    which no position counts.
    """
    return _endless(_collection(batches, decomposition), decomposition, start, whole)


def _endless(data: Any, decomposition: Decomposition, start: int, whole: bool) -> Iterator[Batch]:
    if hasattr(data, "batches_from"):
        items: Iterator[Any] = data.batches_from(start)
        skipped = 0
    else:
        items, skipped = _repeated(data), start
    for i, item in enumerate(islice(items, skipped, None)):
        batch = checked_batch(item, decomposition, f"batch {start + i}")
        if whole and counts_nowhere(batch):
            raise ValueError(
                f"batch {start + i}: its mask leaves out every position, so there is nothing to learn from; "
                "leave such rows out of the data"
            )
        yield batch


def first_batches(
    batches: Any, decomposition: Decomposition, max_batches: int | None, *, purpose: str
) -> Iterator[Batch]:
    """At most `max_batches` batches from the beginning of the data (None: all of it).

    Batches in which no position counts are passed over. Raises ValueError if there is none with one, TypeError or
    ValueError for data that cannot be run.
    """
    if max_batches is not None:
        if isinstance(max_batches, bool) or not isinstance(max_batches, Integral):
            raise TypeError(f"max_batches={max_batches!r}; expected a whole number")
        if max_batches < 1:
            raise ValueError(f"max_batches={max_batches}; expected at least 1")
    data = _collection(batches, decomposition)
    if max_batches is None and hasattr(data, "batches_from") and not hasattr(data, "once"):
        raise ValueError(f"max_batches=None with a {type(data).__name__}, which has no end; say how many")
    return _first(data, decomposition, max_batches, purpose)


def _first(data: Any, decomposition: Decomposition, max_batches: int | None, purpose: str) -> Iterator[Batch]:
    if hasattr(data, "once"):
        data = data.once()
    elif not isinstance(data, Iterable):
        data = data.batches_from(0)
    n_read = n_given = 0
    for item in islice(data, None if max_batches is None else int(max_batches)):
        batch = checked_batch(item, decomposition, f"batch {n_read}")
        n_read += 1
        if not counts_nowhere(batch):
            n_given += 1
            yield batch
    if not n_read:
        raise ValueError(
            f"the data is empty: not one batch to {purpose}; expected at least one (was a generator used up before?)"
        )
    if not n_given:
        raise ValueError(
            f"no position counts in any of the {n_read} batches to {purpose}: the masks leave out everything"
        )


def checked_batch(item: Any, decomposition: Decomposition, name: str = "the batch") -> Batch:
    """`item` as a `Batch` that this decomposition's model can run.

    Raises TypeError or ValueError, with `name` in the message, as `as_batch` and `checked_tokens`.
    """
    try:
        batch = as_batch(item)
        host = decomposition.host
        if batch.start_at is None:
            on_cpu = batch.inputs.device.type == "cpu"
            checked_tokens(batch.inputs, host, name="its tokens", values=on_cpu)
        elif not 0 <= batch.start_at < host.n_layers() or batch.inputs.shape[2:] != (host.d_model(),):
            raise ValueError(
                f"start_at={batch.start_at} with inputs {tuple(batch.inputs.shape)}; expected a residual stream "
                f"[batch pos {host.d_model()}] that enters one of the blocks 0..{host.n_layers() - 1}"
            )
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name}: {error}") from None
    mask = batch.attention_mask
    if mask is not None and host.is_causal() and mask.device.type == "cpu" and not padding_is_seen(mask):
        # Padding behind a text is out of its sight.
        batch = replace(batch, attention_mask=None)
    if batch.attention_mask is not None and decomposition.gates.looks_across_positions:
        raise ValueError(
            f"{name}: its attention_mask leaves out positions that others may see (padding on the left, or any where a "
            "model is not causal or the mask is not on the CPU), and this decomposition's gates look across positions, "
            "where they would see the padding; pad a causal model's texts on the right (tokenizer.padding_side = "
            "'right') and keep the mask on the CPU, or use a scalar, vector or shared gate"
        )
    return batch


def counts_nowhere(batch: Batch) -> bool:
    """Whether the batch's mask leaves out every position; not looked at on a GPU, where looking would wait."""
    mask = batch.position_mask
    return mask is not None and mask.device.type == "cpu" and not bool(mask.any())


def _collection(batches: Any, decomposition: Decomposition) -> Any:
    """`batches`, or the list of the one batch that it is."""
    if is_one_batch(batches):
        return [batches]
    if isinstance(batches, (str, bytes)):
        raise TypeError(f"the data is text; {_EXPECTED} (pack_tokens(texts, tokenizer, context) makes tokens)")
    if isinstance(batches, Mapping):
        raise TypeError(
            f"the data is a {type(batches).__name__} with keys {sorted(map(str, batches))}; {_EXPECTED}; for one batch "
            "a dict with 'input_ids', for a data set one of its splits"
        )
    if not isinstance(batches, Iterable) and not hasattr(batches, "batches_from"):
        raise TypeError(f"the data is a {type(batches).__name__}; {_EXPECTED}")
    check_fits = getattr(batches, "check_fits", None)
    if check_fits is not None:
        # Made for one target: see `cache_residuals`.
        check_fits(decomposition)
    if isinstance(batches, TokenBatches) and batches.tokens.device.type != "cpu":
        # Once, because the batches are then not looked at.
        checked_tokens(batches.tokens, decomposition.host, name="the tokens of TokenBatches")
    return batches


def _repeated(batches: Iterable[Any]) -> Iterator[Any]:
    count = 0
    while True:
        before = count
        for item in batches:
            count += 1
            yield item
        if count == before:
            raise ValueError(
                "the data is empty: not one batch came out of it; expected at least one"
                if count == 0
                else f"the data ended after {count} batches and cannot be started again; give a list, a DataLoader or "
                "TokenBatches instead of an iterator, or ask for fewer steps"
            )
