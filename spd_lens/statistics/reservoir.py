"""`Reservoir`: a few windows of text for each of many groups, those whose keys are largest, in bounded memory.

With the strength of firing as key these are the top examples; with a random number as key, a uniform random sample.
Random numbers are made from what stands in the row and where, so that a sample depends on the data alone: parts of the
data may be read in any order, on any machine, and merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

_GOLDEN = -7046029254386353131  # 2**64 / the golden ratio, as a signed number
_FIELDS = ("keys", "tokens", "importances", "activations")


def mixed(x: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Every bit of a 64-bit number changes every bit of the result (the finaliser of SplitMix64)."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * -4658895280553007687
    x = (x ^ ((x >> 27) & (2**37 - 1))) * -7723592293110705685
    return x ^ ((x >> 31) & (2**33 - 1))


def row_hashes(tokens: Int[Tensor, "batch pos"], seed: int) -> Int[Tensor, " batch"]:
    """A number for each row, from its tokens and their places."""
    places = torch.arange(1, tokens.shape[1] + 1, device=tokens.device) * _GOLDEN
    return mixed(mixed(tokens + places).sum(1) + seed)


def random_keys(hashes: Int[Tensor, " n"], at: Int[Tensor, " n"], salt: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Uniform numbers in (0, 1), one for each position `at` of the row with that hash; `salt` tells draws apart."""
    bits = mixed(mixed(hashes + at * _GOLDEN) + salt * _GOLDEN)
    return (((bits >> 11) & (2**53 - 1)).double() + 0.5) / 2**53


@dataclass(frozen=True)
class SeenBatch:
    """What windows are cut from: tokens `[batch pos]`, importances and activations `[batch pos C]`."""

    tokens: Tensor
    g: Tensor
    a: Tensor


class Reservoir:
    """`k` windows for each group, by falling key; an empty place has the key `-inf` and tokens -1.

    A window has `before` tokens, the one it is about, and `after` more; places outside the row are -1.
    """

    def __init__(self, n_groups: int, k: int, *, before: int, after: int) -> None:
        self.k, self.before, self.after = k, before, after
        width = before + 1 + after
        self.keys = torch.full((n_groups, k), -torch.inf, dtype=torch.float64)
        self.tokens = torch.full((n_groups, k, width), -1, dtype=torch.int32)
        self.importances = torch.zeros(n_groups, k, width)
        self.activations = torch.zeros(n_groups, k, width)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that it holds."""
        return {name: getattr(self, name) for name in _FIELDS}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Take what `tensors` gave. Raises ValueError for other shapes."""
        for name in _FIELDS:
            own = getattr(self, name)
            if saved[name].shape != own.shape or saved[name].dtype != own.dtype:
                raise ValueError(f"{name} are {tuple(saved[name].shape)}; expected {tuple(own.shape)}, {own.dtype}")
            setattr(self, name, saved[name])

    def offer(self, group: Tensor, key: Tensor, where: tuple[Tensor, Tensor, Tensor], seen: SeenBatch) -> None:
        """Candidates: their groups, keys, and `(row, position, subcomponent)` in the batch. All on the CPU."""
        if not self.k:
            return
        enters = key > self.keys[group, -1]
        group, key = group[enters], key[enters]
        if not len(group):
            return
        order = key.argsort(descending=True, stable=True)
        order = order[group[order].argsort(stable=True)]
        group, key = group[order], key[order]
        groups, counts = group.unique_consecutive(return_counts=True)
        index = torch.arange(len(groups)).repeat_interleave(counts)
        rank = torch.arange(len(group)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        first = rank < self.k
        chosen = [place[enters][order][first] for place in where]
        new = Reservoir(len(groups), self.k, before=self.before, after=self.after)
        place = (index[first], rank[first])
        new.keys[place] = key[first]
        new.tokens[place], new.importances[place], new.activations[place] = self._windows(chosen, seen)
        self._take(groups, new)

    def _windows(self, chosen: list[Tensor], seen: SeenBatch) -> tuple[Tensor, Tensor, Tensor]:
        device, length = seen.tokens.device, seen.tokens.shape[1]
        row, at, c = (place.to(device) for place in chosen)
        index = at[:, None] + torch.arange(-self.before, self.after + 1, device=device)
        inside = (index >= 0) & (index < length)
        index = index.clamp(0, length - 1)
        tokens = torch.where(inside, seen.tokens[row[:, None], index], -1)
        values = [torch.where(inside, v[row[:, None], index, c[:, None]], 0.0).float() for v in (seen.g, seen.a)]
        return tokens.int().cpu(), values[0].cpu(), values[1].cpu()

    def merge(self, other: Reservoir) -> None:
        """What one reservoir would hold that had been offered all that both were."""
        self._take(torch.arange(len(self.keys)), other)

    def _take(self, groups: Tensor, new: Reservoir) -> None:
        own = {name: value[groups] for name, value in self.tensors().items()}
        keys = torch.cat([own["keys"], new.keys], dim=1)
        keys, keep = keys.topk(self.k, dim=1)
        self.keys[groups] = keys
        for name in _FIELDS[1:]:
            together = torch.cat([own[name], getattr(new, name)], dim=1)
            getattr(self, name)[groups] = together.gather(1, keep[..., None].expand(-1, -1, together.shape[2]))
