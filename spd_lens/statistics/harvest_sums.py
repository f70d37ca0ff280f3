"""`HarvestSums`: what a harvest has counted so far, of all sites, and what is common to them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spd_lens.statistics.events import EventSample
from spd_lens.statistics.reservoir import random_keys, row_hashes
from spd_lens.statistics.sums import HarvestSettings, Positions, SiteSums
from spd_lens.support.shown import short_repr


@dataclass(eq=False)
class Background:
    """Random windows of the data, and which subcomponents fire anywhere in each: `fires[site] [n C]`."""

    keys: Tensor
    tokens: Tensor
    fires: dict[str, Tensor]

    @classmethod
    def empty(cls, counts: Mapping[str, int], settings: HarvestSettings) -> Background:
        """No window yet."""
        n, width = settings.n_background, settings.before + 1 + settings.after
        return cls(
            torch.full((n,), -torch.inf, dtype=torch.float64),
            torch.full((n, width), -1, dtype=torch.int32),
            {name: torch.zeros(n, C, dtype=torch.bool) for name, C in counts.items()},
        )

    def tensors(self) -> dict[str, Tensor]:
        """Everything that it holds."""
        return {"keys": self.keys, "tokens": self.tokens, **{f"fires.{name}": t for name, t in self.fires.items()}}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Take what `tensors` gave. Raises ValueError for other shapes."""
        for name, own in self.tensors().items():
            if saved[name].shape != own.shape or saved[name].dtype != own.dtype:
                raise ValueError(f"background.{name} is {tuple(saved[name].shape)}; expected {tuple(own.shape)}")
        self.keys, self.tokens = saved["keys"], saved["tokens"]
        self.fires = {name: saved[f"fires.{name}"] for name in self.fires}

    def take(self, keys: Tensor, tokens: Tensor, fires: Mapping[str, Tensor]) -> None:
        """Keep the windows with the largest keys of one's own and these."""
        n = len(self.keys)
        self.keys, keep = torch.cat([self.keys, keys]).topk(n)
        self.tokens = torch.cat([self.tokens, tokens])[keep]
        self.fires = {name: torch.cat([own, fires[name]])[keep] for name, own in self.fires.items()}


@dataclass(eq=False)
class HarvestSums:
    """Sums over the batches that were read, by site, with the totals of tokens that all sites share.

    `read` is a hash of all tokens read, in order; of sums that were merged the hash of each, with `+` between them.
    `effect_positions`: positions on which ablations were measured.
    """

    counts: dict[str, int]
    d_vocab: int
    settings: HarvestSettings
    n_positions: int = 0
    n_batches: int = 0
    effect_positions: int = 0
    read: str = ""
    sites: dict[str, SiteSums] = field(init=False)
    background: Background = field(init=False)
    events: EventSample = field(init=False)
    input_totals: Tensor = field(init=False)
    predicted_totals: Tensor = field(init=False)

    __repr__ = short_repr

    def __post_init__(self) -> None:
        self.sites = {
            name: SiteSums(C, self.d_vocab, self.settings, salt=_salt(name)) for name, C in self.counts.items()
        }
        self.background = Background.empty(self.counts, self.settings)
        self.events = EventSample(self.settings.n_events, sum(self.counts.values()))
        self.input_totals = torch.zeros(self.d_vocab, dtype=torch.int64)
        self.predicted_totals = torch.zeros(self.d_vocab, dtype=torch.int64)

    def add(self, importances: Mapping[str, Tensor], activations: Mapping[str, Tensor], positions: Positions) -> None:
        """One batch; importances are 0 where a position does not count."""
        for name, sums in self.sites.items():
            sums.add(importances[name], activations[name], positions)
        counted = positions.counted
        tokens = positions.tokens if counted is None else positions.tokens[counted]
        self.input_totals += torch.bincount(tokens.flatten(), minlength=self.d_vocab).cpu()
        if positions.predicted is not None:
            predicted = positions.predicted if counted is None else positions.predicted[counted]
            self.predicted_totals += torch.bincount(predicted.flatten(), minlength=self.d_vocab).cpu()
        self.n_positions += tokens.numel()
        self._add_background(importances, positions)
        self._add_events(importances, positions)

    def _add_events(self, importances: Mapping[str, Tensor], positions: Positions) -> None:
        """All that fires at a random sample of positions, numbered over all sites."""
        row, at, key = _places(positions, salt=-2)
        enters = -key < self.events.largest()
        row, at, key = row[enters], at[enters], -key[enters]
        if positions.counted is not None:
            counted = positions.counted.cpu()[row, at]
            row, at, key = row[counted], at[counted], key[counted]
        for part in torch.arange(len(key)).split(256):
            here = [
                importances[name][row[part].to(g.device), at[part].to(g.device)] > self.settings.threshold
                for name, g in importances.items()
            ]
            fires = torch.cat(here, dim=1).cpu()
            self.events.add(key[part], fires.sum(1), fires.nonzero()[:, 1])

    def _add_background(self, importances: Mapping[str, Tensor], positions: Positions) -> None:
        settings, tokens = self.settings, positions.tokens
        length = tokens.shape[1]
        row, at, key = _places(positions, salt=-1)
        if positions.counted is not None:
            key = key.masked_fill(~positions.counted.flatten().cpu(), -torch.inf)
        if not settings.n_background:
            return
        best, chosen = key.topk(min(settings.n_background, len(key)))
        enters = best > self.background.keys.min()
        best, row, at = best[enters], row[chosen[enters]], at[chosen[enters]]
        if not len(best):
            return
        index = at[:, None] + torch.arange(-settings.before, settings.after + 1)
        inside, index = (index >= 0) & (index < length), index.clamp(0, length - 1)
        windows = torch.where(inside, tokens.cpu()[row[:, None], index], -1).int()
        fires = {}
        for name, g in importances.items():
            found = torch.zeros(len(best), g.shape[2], dtype=torch.bool)
            for k in range(len(best)):
                found[k] = (g[row[k], index[k][inside[k]].to(g.device)] > settings.threshold).any(0).cpu()
            fires[name] = found
        self.background.take(best, windows, fires)

    def note_read(self, tokens: Tensor) -> None:
        """Count a batch as read and take its tokens into the hash."""
        self.read = hash_of_read(self.read, tokens)
        self.n_batches += 1

    def merge(self, other: HarvestSums) -> None:
        """As if everything that `other` read had been read here."""
        for name, sums in self.sites.items():
            sums.merge(other.sites[name])
        self.background.take(other.background.keys, other.background.tokens, other.background.fires)
        self.events.merge(other.events)
        self.input_totals += other.input_totals
        self.predicted_totals += other.predicted_totals
        self.n_positions += other.n_positions
        self.n_batches += other.n_batches
        self.effect_positions += other.effect_positions
        self.read = f"{self.read}+{other.read}"

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name; `load` takes them back."""
        found = {"input_totals": self.input_totals, "predicted_totals": self.predicted_totals}
        found |= {f"background.{name}": t for name, t in self.background.tensors().items()}
        found |= {f"events.{name}": t for name, t in self.events.tensors().items()}
        for site, sums in self.sites.items():
            found |= {f"{site}|{name}": t for name, t in sums.tensors().items()}
        return found

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Take what `tensors` gave. Raises ValueError for tensors that do not fit the settings."""
        if saved.keys() != self.tensors().keys():
            odd = sorted(saved.keys() ^ self.tensors().keys())
            raise ValueError(f"the tensors are not those of these sites; first differences: {odd[:3]}")
        for name in ("input_totals", "predicted_totals"):
            if saved[name].shape != (self.d_vocab,) or saved[name].dtype != torch.int64:
                raise ValueError(f"{name} is {tuple(saved[name].shape)}; expected ({self.d_vocab},)")
            setattr(self, name, saved[name])
        prefix = "background."
        self.background.load({k.removeprefix(prefix): t for k, t in saved.items() if k.startswith(prefix)})
        prefix = "events."
        self.events.load({k.removeprefix(prefix): t for k, t in saved.items() if k.startswith(prefix)})
        for site, sums in self.sites.items():
            prefix = f"{site}|"
            try:
                sums.load({k.removeprefix(prefix): t for k, t in saved.items() if k.startswith(prefix)})
            except ValueError as error:
                raise ValueError(f"{site}: {error}") from error

    def bytes(self) -> int:
        """Memory of everything that it holds."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())


def _places(positions: Positions, *, salt: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row, position and random number of every position."""
    batch, length = positions.tokens.shape
    row, at = torch.arange(batch).repeat_interleave(length), torch.arange(length).repeat(batch)
    return row, at, random_keys(positions.hashes.cpu()[row], at, torch.full_like(at, salt))


def hash_of_read(before: str, tokens: Tensor) -> str:
    """The hash of everything that was read, `tokens` last."""
    digest = hashlib.sha256(before.encode())
    digest.update(str(tuple(tokens.shape)).encode())
    digest.update(tokens.to(torch.int64).cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _salt(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


def positions_of(
    tokens: Tensor, predicted: Tensor | None, counted: Tensor | None, settings: HarvestSettings
) -> Positions:
    """A batch as the sums see it."""
    return Positions(tokens, predicted, counted, row_hashes(tokens, settings.seed))
