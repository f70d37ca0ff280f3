"""Batches: what one is, what is accepted as one, and `TokenBatches`, which knows its position.

`train` and `evaluate` take any iterable of token tensors `[batch pos]`, input tensors `[batch ...]`, `Batch`es, or
dicts with `"tokens"` or `"input_ids"` (see `spd_lens.data.streams`). `TokenBatches` is the one that knows its position,
so that a resumed run finds its place without reading again what it has seen.
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from spd_lens.core.inputs import as_mask, as_tensor
from spd_lens.support.given import given_seed, given_whole
from spd_lens.support.shown import short_repr


@dataclass(frozen=True)
class Batch:
    """One batch.

    - `inputs`: tokens `[batch pos]`, model inputs, or with `start_at` the residual stream `[batch pos d_model]`.
    - `start_at`: the block that `inputs` enters, or None for a whole pass.
    - `tokens`: the tokens `[batch pos]`, where `inputs` are not tokens (labels of the cross-entropy, contexts of
      examples).
    - `position_mask` `[batch pos]`: True where a position counts in losses and metrics (M5); None: everywhere.
    - `attention_mask` `[batch pos]`: False where a position is padding, which the model must not attend to; None: no
      padding. It does not say which positions count.

    Integers become int64 and masks of 0 and 1 bool. Raises TypeError or ValueError for masks of other shapes or values.
    """

    inputs: Tensor
    start_at: int | None = None
    tokens: Tensor | None = None
    position_mask: Tensor | None = None
    attention_mask: Tensor | None = None

    __repr__ = short_repr

    def __post_init__(self) -> None:
        inputs = as_tensor(self.inputs, "the batch's inputs")
        if inputs.numel() == 0:
            raise ValueError(f"a batch has shape {tuple(inputs.shape)}: it is empty")
        if self.start_at is not None:
            object.__setattr__(self, "start_at", given_whole("start_at", self.start_at, least=0))
        tokens = self.tokens
        if inputs.is_complex():
            raise TypeError(f"the batch's inputs are {inputs.dtype}; expected token ids or real numbers")
        if tokens is None and self.start_at is None and not inputs.is_floating_point() and inputs.ndim == 2:
            tokens = inputs
        if tokens is not None:
            tokens = as_tensor(tokens, "the batch's tokens")
            fitting = inputs.shape[:2] if self.start_at is not None or not inputs.is_floating_point() else tokens.shape
            if tokens.is_floating_point() or tokens.ndim != 2 or tokens.shape != fitting:
                raise ValueError(
                    f"the batch's tokens are {tokens.dtype} {tuple(tokens.shape)} beside inputs {tuple(inputs.shape)}; "
                    "expected integers [batch pos]"
                )
        rows = inputs if tokens is None else tokens
        shape = rows.shape[:-1] if rows.is_floating_point() else rows.shape
        values: dict[str, Any] = {"inputs": inputs, "tokens": tokens}
        for name in ("position_mask", "attention_mask"):
            mask = getattr(self, name)
            values[name] = None if mask is None else as_mask(mask, shape, name)
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`."""
        move = {n: v.to(device) for n, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **move)

    @property
    def n_positions(self) -> int:
        """Number of positions (tokens) in the batch."""
        rows = self.tokens if self.tokens is not None else self.inputs
        return rows.numel() if not rows.is_floating_point() else rows.shape[:-1].numel()


# Masks that a dict may hold; the last one, which tokenizers give on request, is left alone.
_MASKS = ("attention_mask", "position_mask", "special_tokens_mask")


def is_one_batch(value: Any) -> bool:
    """Whether `value` is a batch rather than a collection of batches."""
    if isinstance(value, (Batch, Tensor, np.ndarray)):
        return True
    if isinstance(value, Mapping):
        return any(key in value for key in ("tokens", "input_ids"))
    # (tokens, mask): nobody means the mask as a second batch.
    return isinstance(value, tuple) and len(value) == 2 and getattr(value[1], "dtype", None) in (torch.bool, np.bool_)


def as_batch(item: Any) -> Batch:
    """A `Batch` from whatever a user's iterable yields.

    - A tensor, array or nested list: the tokens or inputs.
    - A dict with `"tokens"` or `"input_ids"`; its `"attention_mask"` says what is padding and what counts, its
      `"position_mask"` what counts.
    - `(tokens,)`, as a `TensorDataset` yields it, or `(tokens, mask)`; the mask says what counts.

    Raises TypeError or ValueError for anything else.
    """
    if isinstance(item, Batch):
        return item
    if isinstance(item, Mapping):
        return _from_mapping(item)
    if isinstance(item, (list, tuple)) and len(item) > 0 and isinstance(item[0], Tensor) and item[0].ndim > 0:
        return _from_tuple(item)
    if isinstance(item, (Tensor, np.ndarray, list, tuple, str)):
        return Batch(as_tensor(item, "a batch"))
    raise TypeError(
        f"a batch is a {type(item).__name__}; expected a Tensor (tokens [batch pos] or inputs), a Batch, or a "
        "dict with 'tokens'"
    )


def _from_mapping(item: Mapping[str, Any]) -> Batch:
    key = next((k for k in ("tokens", "input_ids") if k in item), None)
    if key is None:
        raise ValueError(f"a batch has keys {sorted(map(str, item))}; expected 'tokens' or 'input_ids' among them")
    inputs = as_tensor(item[key], f"batch[{key!r}]")
    odd = [k for k in item if str(k).endswith("mask") and k not in _MASKS]
    if odd:
        raise ValueError(
            f"a batch has a key {odd[0]!r}; say what that mask means: 'position_mask' is True where a position counts "
            "in losses and metrics, 'attention_mask' also says what is padding"
        )
    attention, counts = item.get("attention_mask"), item.get("position_mask")
    if attention is not None:
        attention = as_mask(attention, inputs.shape, "attention_mask")
        if attention.device.type == "cpu" and bool(attention.all()):
            attention = None
    if counts is None:
        counts = attention
    elif attention is not None:
        counts = as_mask(counts, inputs.shape, "position_mask").to(attention.device) & attention
    return Batch(inputs, position_mask=counts, attention_mask=attention)


def _from_tuple(item: list[Any] | tuple[Any, ...]) -> Batch:
    if len(item) == 1:
        return as_batch(item[0])
    tokens, mask = item[0], item[1]
    if len(item) > 2 or not isinstance(mask, Tensor):
        kinds = ", ".join(type(part).__name__ for part in item)
        raise ValueError(
            f"a batch is a {type(item).__name__} of {len(item)} ({kinds}); expected a tensor, (tokens, mask), a dict "
            "with 'input_ids', or a Batch"
        )
    shape = tokens.shape[:-1] if tokens.is_floating_point() else tokens.shape
    try:
        mask = as_mask(mask, shape, "mask")
    except ValueError as error:
        raise ValueError(
            f"a batch is a {type(item).__name__} of two tensors, and the second is no mask ({error}); give the first "
            "alone, or Batch(inputs, position_mask=...)"
        ) from None
    if mask.ndim == 2 and mask.device.type == "cpu" and padding_is_seen(mask):
        raise ValueError(
            "a batch is (tokens, mask) with a masked position before one that counts; say what the mask means: "
            "{'input_ids': tokens, 'attention_mask': mask} if these are padding, Batch(tokens, position_mask=mask) if "
            "the model should see them and only losses and metrics leave them out"
        )
    return Batch(tokens, position_mask=mask)


def padding_is_seen(mask: Tensor) -> bool:
    """Whether a position that the mask leaves out has one that counts behind it, so that attention would see it."""
    return bool((mask.int().diff(dim=1) > 0).any())


class TokenBatches:
    """Endless shuffled batches of the rows of `tokens [n pos]`, the same for the same seed.

    Every epoch is a fresh permutation; the last, incomplete batch of an epoch is dropped. `batches_from(k)` starts
    at the k-th batch at no cost. `exclude` names token ids (padding, BOS) whose positions are left out of losses
    and metrics. `tokens` may be a numpy array (also one mapped from a file); its integers are widened batch by batch.
    """

    def __init__(
        self,
        tokens: Any,
        batch_size: int,
        *,
        seed: int = 0,
        exclude: Iterable[int] = (),
    ) -> None:
        self.tokens = _table(tokens)
        batch_size = given_whole("batch_size", batch_size)
        if not 1 <= batch_size <= len(self.tokens):
            raise ValueError(
                f"batch_size={batch_size} with {len(self.tokens)} rows of tokens; expected between 1 and that number"
            )
        self.batch_size = batch_size
        self.seed = given_seed(seed)
        self.exclude = token_ids(exclude)
        # Which rows of every batch are given: every `count`-th, from `rank` on.
        self._share = (0, 1)

    @property
    def per_epoch(self) -> int:
        """Number of batches in one epoch."""
        return len(self.tokens) // self.batch_size

    def __repr__(self) -> str:
        rows, length = self.tokens.shape
        left_out = f", exclude={list(self.exclude)}" if self.exclude else ""
        return f"{type(self).__name__}({rows} rows of {length} tokens, {self.batch_size} a batch{left_out})"

    def __iter__(self) -> Iterator[Batch]:
        return self.batches_from(0)

    def batches_from(self, start: int) -> Iterator[Batch]:
        """The batches from number `start` on, without end."""
        index = start
        while True:
            epoch, within = divmod(index, self.per_epoch)
            order = self._order(epoch)
            for k in range(within, self.per_epoch):
                rank, count = self._share
                yield self._batch(order[k * self.batch_size : (k + 1) * self.batch_size][rank::count])
                index += 1

    def for_process(self, rank: int, count: int) -> TokenBatches:
        """The same batches with rows `rank, rank + count, ...` of each alone, the others unread.

        Raises ValueError for a batch size that `count` does not divide.
        """
        if self.batch_size % count:
            raise ValueError(
                f"a batch has {self.batch_size} rows for {count} processes; expected a multiple of that number"
            )
        shared = copy.copy(self)
        shared._share = (rank, count)
        return shared

    def once(self) -> Iterator[Batch]:
        """One pass over all rows in their own order, the last batch possibly smaller."""
        for rows in torch.arange(len(self.tokens)).split(self.batch_size):
            yield self._batch(rows)

    def fingerprint(self) -> dict[str, Any]:
        """What identifies these batches: two of the same fingerprint give the same batches."""
        rows = hashlib.sha256(str(tuple(self.tokens.shape)).encode())
        for part in self.tokens.split(4096):
            rows.update(part.cpu().to(torch.int64).contiguous().numpy().tobytes())
        return {
            "batch_size": self.batch_size,
            "seed": self.seed,
            "exclude": list(self.exclude),
            "tokens": rows.hexdigest(),
        }

    def _order(self, epoch: int) -> Int[Tensor, " n"]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.tokens), generator=generator)

    def _mask(self, tokens: Tensor) -> Tensor | None:
        if not self.exclude:
            return None
        return ~torch.isin(tokens, torch.tensor(self.exclude, device=tokens.device))

    def _batch(self, rows: Tensor) -> Batch:
        tokens = self.tokens[rows].long()
        return Batch(tokens, tokens=tokens, position_mask=self._mask(tokens))


def _table(tokens: Any) -> Tensor:
    """Rows of tokens, in the width in which they were given."""
    if isinstance(tokens, np.ndarray) and tokens.dtype.kind in "iu" and tokens.dtype != np.uint64:
        with warnings.catch_warnings():
            # torch warns of arrays that cannot be written (files mapped for reading); nothing is written here.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            tokens = torch.from_numpy(tokens)
    elif not isinstance(tokens, Tensor):
        tokens = as_tensor(tokens, "tokens")
    if tokens.ndim != 2 or tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise ValueError(f"tokens have shape {tuple(tokens.shape)}, {tokens.dtype}; expected integers [n pos]")
    if tokens.numel() == 0:
        raise ValueError(f"tokens have shape {tuple(tokens.shape)}: there are none; expected [n pos]")
    return tokens


def token_ids(ids: Any) -> tuple[int, ...]:
    """Token ids from a list of them. TypeError, with the argument's name `exclude`, for anything else."""
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Iterable):
        raise TypeError(f"exclude={ids!r}; expected a list of token ids, for example exclude=[tokenizer.pad_token_id]")
    chosen: list[Any] = [i.item() if isinstance(i, (Tensor, np.generic)) else i for i in ids]
    odd = [i for i in chosen if isinstance(i, bool) or not isinstance(i, int)]
    if odd:
        raise TypeError(f"exclude holds {odd[0]!r}; expected token ids (does this tokenizer have that token?)")
    return tuple(chosen)
