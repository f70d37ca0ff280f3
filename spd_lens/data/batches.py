"""Batches: token windows from text or data sets, cached residual streams, and what `train` accepts.

`train` and `evaluate` take any iterable of token tensors `[batch pos]`, input tensors `[batch ...]`, `Batch`es, or
dicts with `"tokens"` or `"input_ids"`. `TokenBatches` is the one that knows its position, so that a resumed run
finds its place without reading again what it has seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One batch.

    - `inputs`: tokens `[batch pos]`, model inputs, or with `start_at` the residual stream `[batch pos d_model]`.
    - `start_at`: the block that `inputs` enters, or None for a whole pass.
    - `tokens`: the tokens, where `inputs` are not tokens (labels of the cross-entropy, contexts of examples).
    - `position_mask`: True where a position counts in losses and metrics (M5); None: everywhere.
    """

    inputs: Tensor
    start_at: int | None = None
    tokens: Int[Tensor, "batch pos"] | None = None
    position_mask: Bool[Tensor, "batch pos"] | None = None

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`."""
        move = {n: v.to(device) for n, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **move)

    @property
    def n_positions(self) -> int:
        """Number of positions (tokens) in the batch."""
        rows = self.tokens if self.tokens is not None else self.inputs
        return rows.numel() if not rows.is_floating_point() else rows.shape[:-1].numel()


def as_batch(item: Any) -> Batch:
    """A `Batch` from whatever a user's iterable yields."""
    if isinstance(item, Batch):
        return item
    if isinstance(item, Mapping):
        key = next((k for k in ("tokens", "input_ids") if k in item), None)
        if key is None:
            raise ValueError(f"a batch has keys {sorted(item)}; expected 'tokens' or 'input_ids' among them")
        mask = item.get("attention_mask")
        return Batch(torch.as_tensor(item[key]), position_mask=None if mask is None else torch.as_tensor(mask).bool())
    if isinstance(item, (list, tuple)) and len(item) > 0 and isinstance(item[0], Tensor):
        return as_batch(item[0])
    if not isinstance(item, Tensor):
        raise TypeError(
            f"a batch is a {type(item).__name__}; expected a Tensor (tokens [batch pos] or inputs), a Batch, or a "
            "dict with 'tokens'"
        )
    if item.numel() == 0:
        raise ValueError(f"a batch has shape {tuple(item.shape)}: it is empty")
    return Batch(item, tokens=item if not item.is_floating_point() else None)


class TokenBatches:
    """Endless shuffled batches of the rows of `tokens [n pos]`, the same for the same seed.

    Every epoch is a fresh permutation; the last, incomplete batch of an epoch is dropped. `batches_from(k)` starts
    at the k-th batch at no cost. `exclude` names token ids (padding, BOS) whose positions are left out of losses
    and metrics.
    """

    def __init__(
        self,
        tokens: Tensor,
        batch_size: int,
        *,
        seed: int = 0,
        exclude: Iterable[int] = (),
    ) -> None:
        if tokens.ndim != 2 or tokens.is_floating_point():
            raise ValueError(f"tokens have shape {tuple(tokens.shape)}, {tokens.dtype}; expected integers [n pos]")
        if not 1 <= batch_size <= len(tokens):
            raise ValueError(
                f"batch_size={batch_size} with {len(tokens)} rows of tokens; expected between 1 and that number"
            )
        self.tokens = tokens
        self.batch_size = batch_size
        self.seed = seed
        self.exclude = tuple(exclude)

    @property
    def per_epoch(self) -> int:
        """Number of batches in one epoch."""
        return len(self.tokens) // self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        return self.batches_from(0)

    def batches_from(self, start: int) -> Iterator[Batch]:
        """The batches from number `start` on, without end."""
        index = start
        while True:
            epoch, within = divmod(index, self.per_epoch)
            order = self._order(epoch)
            for k in range(within, self.per_epoch):
                yield self._batch(order[k * self.batch_size : (k + 1) * self.batch_size])
                index += 1

    def once(self) -> Iterator[Batch]:
        """One pass over all rows in their own order, the last batch possibly smaller."""
        for rows in torch.arange(len(self.tokens)).split(self.batch_size):
            yield self._batch(rows)

    def _order(self, epoch: int) -> Int[Tensor, " n"]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.tokens), generator=generator)

    def _mask(self, tokens: Tensor) -> Tensor | None:
        if not self.exclude:
            return None
        return ~torch.isin(tokens, torch.tensor(self.exclude, device=tokens.device))

    def _batch(self, rows: Tensor) -> Batch:
        tokens = self.tokens[rows]
        return Batch(tokens, tokens=tokens, position_mask=self._mask(tokens))
