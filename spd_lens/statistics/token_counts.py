"""`TokenCounts`: how often each token goes with each subcomponent, in bounded memory, and what follows from it.

For `n` positions where a subcomponent fires, `k` of them at a token that occurs `m` times among `N` positions:

    precision = k / n        of the positions where it fires, the share at this token
    recall    = k / m        of this token's positions, the share where it fires
    PMI       = log(k N / (n m))   in nats; 0 if the two have nothing to do with each other

At most `kept` tokens are remembered for each subcomponent. Where there are more, counts are those of Misra and Gries'
summary: too small by at most `lost`, which is at most `n / (kept + 1)`; a token that is missing has at most `lost`
occurrences. `lost` is 0 and counts are exact for whatever fires on no more than `kept` different tokens. Summaries of
parts of the data can be merged (Agarwal et al. 2012) and keep that bound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

TokenOrder: TypeAlias = Literal["precision", "recall", "pmi"]

# Occurrences that are kept before they are counted together.
_PENDING = 2_000_000


@dataclass(frozen=True)
class TokenStatistic:
    """One token and one subcomponent: occurrences together, precision, recall, and pointwise mutual information."""

    token: int
    count: int
    precision: float
    recall: float
    pmi: float


class TokenCounts:
    """Counts of (group, token); see the module for what is exact."""

    def __init__(self, n_groups: int, d_vocab: int, kept: int) -> None:
        self.d_vocab, self.kept = d_vocab, kept
        self.keys = torch.zeros(0, dtype=torch.int64)  # group * d_vocab + token, rising
        self.counts = torch.zeros(0, dtype=torch.int64)
        self.lost = torch.zeros(n_groups, dtype=torch.int64)
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._n_pending = 0

    def add(self, group: Tensor, token: Tensor) -> None:
        """Count one occurrence of each pair; all on the CPU."""
        keys, counts = (group * self.d_vocab + token).unique(return_counts=True)
        self._pending.append((keys, counts))
        self._n_pending += len(keys)
        if self._n_pending > _PENDING:
            self.settle()

    def settle(self) -> None:
        """Count together what was added since."""
        if not self._pending:
            return
        keys = torch.cat([self.keys, *(keys for keys, _ in self._pending)])
        counts = torch.cat([self.counts, *(counts for _, counts in self._pending)])
        self._pending, self._n_pending = [], 0
        self.keys, where = keys.unique(return_inverse=True)
        self.counts = torch.zeros_like(self.keys).index_add_(0, where, counts)
        self._prune()

    def _prune(self) -> None:
        group = self.keys // self.d_vocab
        sizes = torch.zeros_like(self.lost).index_add_(0, group, torch.ones_like(group))
        if not len(sizes) or int(sizes.max()) <= self.kept:
            return
        order = self.counts.argsort(descending=True, stable=True)
        order = order[group[order].argsort(stable=True)]
        start = sizes.cumsum(0) - sizes
        rank = torch.arange(len(order)) - start[group[order]]
        beyond = order[rank == self.kept]
        taken = torch.zeros_like(self.lost)
        taken[group[beyond]] = self.counts[beyond]
        self.lost += taken
        counts = self.counts - taken[group]
        stays = counts > 0
        self.keys, self.counts = self.keys[stays], counts[stays]

    def merge(self, other: TokenCounts) -> None:
        """As if everything that `other` counted had been counted here."""
        other.settle()
        self.lost += other.lost
        self._pending.append((other.keys, other.counts))
        self.settle()

    def tensors(self) -> dict[str, Tensor]:
        """Everything that it holds."""
        self.settle()
        return {"keys": self.keys, "counts": self.counts, "lost": self.lost}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Take what `tensors` gave. Raises ValueError for what is no such table."""
        keys, counts, lost = saved["keys"], saved["counts"], saved["lost"]
        n_groups = len(self.lost)
        fits = keys.ndim == 1 and keys.shape == counts.shape and lost.shape == self.lost.shape
        if not fits or any(t.dtype != torch.int64 for t in (keys, counts, lost)):
            raise ValueError("the counts of tokens have other shapes than their settings say")
        if len(keys) and not (
            bool((keys.diff() > 0).all()) and 0 <= int(keys[0]) <= int(keys[-1]) < n_groups * self.d_vocab
        ):
            raise ValueError("the counts of tokens name subcomponents or tokens that there are not")
        self.keys, self.counts, self.lost = keys, counts, lost

    def statistics(
        self,
        group: int,
        *,
        n_group: int,
        totals: Tensor,
        n_positions: int,
        by: TokenOrder = "precision",
        n: int | None = None,
        least: int = 1,
    ) -> list[TokenStatistic]:
        """The group's tokens with at least `least` occurrences, the `n` first in the order asked for."""
        self.settle()
        bounds = torch.searchsorted(self.keys, torch.tensor([group, group + 1]) * self.d_vocab)
        low, high = int(bounds[0]), int(bounds[1])
        found = []
        for key, count in zip(self.keys[low:high].tolist(), self.counts[low:high].tolist(), strict=True):
            token = key - group * self.d_vocab
            total = int(totals[token])
            if count >= least:
                pmi = math.log(count * n_positions / (n_group * total))
                found.append(TokenStatistic(token, count, count / n_group, count / total, pmi))
        # Of equals the more frequent first, then the smaller id.
        found.sort(key=lambda s: (-getattr(s, by), -s.count, s.token))
        return found if n is None else found[:n]

    def most_frequent(self) -> Tensor:
        """Each group's most frequent token, -1 where there is none."""
        self.settle()
        group = self.keys // self.d_vocab
        order = self.counts.argsort(descending=True, stable=True)
        order = order[group[order].argsort(stable=True)]
        groups, sizes = group[order].unique_consecutive(return_counts=True)
        first = order[sizes.cumsum(0) - sizes]
        found = torch.full_like(self.lost, -1)
        found[groups] = self.keys[first] - groups * self.d_vocab
        return found

    def used_tokens(self) -> Tensor:
        """Ids of all tokens in the table."""
        self.settle()
        return (self.keys % self.d_vocab).unique()
