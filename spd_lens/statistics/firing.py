"""Statistics of subcomponents over a data set: what each fires on, how strongly, what it predicts, what it does.

One streamed pass. Memory does not grow with the data: a subcomponent takes 1 KB for numbers and histograms,
`16 * tokens_kept` bytes for each of two tables of tokens at most, and `12 * window` bytes for each example; besides,
4 bytes for all that fires at each of `n_events` positions (`benchmarks/browser.py` measures it). Cost: one clean pass
and the gates per batch, and on a CPU some microseconds for every position where something fires. `effect_batches` adds
one ablation per subcomponent and batch.
"""

from __future__ import annotations

from dataclasses import fields
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.inputs import checked_decomposition
from spd_lens.core.squashings import importance_of
from spd_lens.data.batch_hashes import check_same_hash
from spd_lens.data.batches import Batch
from spd_lens.data.processes import Processes, join_processes
from spd_lens.data.streams import first_batches
from spd_lens.objective.divergences import divergence_per_position
from spd_lens.patching.ablation import ablation_effects
from spd_lens.statistics.directions import site_directions
from spd_lens.statistics.harvest_sums import HarvestSums, hash_of_read, positions_of
from spd_lens.statistics.harvests import Harvest
from spd_lens.statistics.saved import MadeFrom, made_from, read_harvest, write_harvest
from spd_lens.statistics.sums import HarvestSettings
from spd_lens.support.files import given_directory
from spd_lens.support.given import given_flag, given_number
from spd_lens.support.progress import tqdm

# Ids of tokens of models that do not say how many there are.
_UNSAID_VOCABULARY = 2**17


@torch.no_grad()
def harvest(
    decomposition: Decomposition,
    batches: Any,
    *,
    max_batches: int | None = 64,
    top_k: int = 8,
    random_k: int = 8,
    bands: int = 4,
    per_band: int = 2,
    before: int = 10,
    after: int = 4,
    threshold: float = 0.1,
    tokens_kept: int = 256,
    n_background: int = 64,
    n_events: int = 8192,
    effect_batches: int = 0,
    seed: int = 0,
    out_dir: str | Path | None = None,
    save_every: int = 100,
    together: bool = False,
) -> Harvest:
    """What every subcomponent does over `batches`, by site: rates, tokens, examples, directions, effects.

    A subcomponent fires where its importance exceeds `threshold`. Examples have `before` and `after` tokens of context:
    the `top_k` by importance times `|activation|`, at most one of a row, `random_k` of all, and `per_band` of each of
    `bands` ranges of importance. Needs batches with tokens.

    What fires together is known from `n_events` random positions (`Harvest.coactivation`).

    On the first `effect_batches` batches every subcomponent is ablated alone and the KL divergence measured.

    With `out_dir` the harvest is saved there every `save_every` batches and at the end; called again with the same
    decomposition, data and settings, it goes on where it was, and adds nothing twice. `Harvest.load` reads it;
    `Harvest.merged` adds harvests of other parts of the data, made by other processes.

    `together`: the processes of a launcher (`torchrun`), all of which have to call this, share out the rows of every
    batch; the result is the same in all, and the first one writes the files.

    Raises ValueError for settings that make no sense, batches without tokens, and an `out_dir` whose harvest is of
    another decomposition, other data or other settings.
    """
    checked_decomposition(decomposition, "harvest")
    settings = HarvestSettings(
        threshold=given_number("threshold", threshold), top_k=top_k, random_k=random_k, bands=bands,
        per_band=per_band, before=before, after=after, tokens_kept=tokens_kept, n_background=n_background,
        n_events=n_events, seed=seed,
    )  # fmt: skip
    _check_settings(settings, effect_batches=effect_batches, save_every=save_every)
    processes = join_processes(decomposition.device) if given_flag("together", together) else Processes()
    stream = first_batches(batches, decomposition, max_batches, purpose="harvest")
    sums = _nothing_yet(decomposition, settings)
    made = None if out_dir is None else made_from(decomposition)
    resumed = _Resumed(out_dir, sums, made)
    if not processes.is_main:
        # What is saved is counted once.
        resumed.forget()
    for index, batch in enumerate(tqdm(stream, desc="harvest", leave=False)):
        if batch.tokens is None:
            raise ValueError("harvest needs tokens beside the inputs: give Batch(inputs, tokens=...)")
        if resumed.has(index, batch.tokens):
            continue
        sums = resumed.sums
        own = processes.some_rows(batch).to(decomposition.device)
        _add(sums, decomposition, own)
        if index < effect_batches:
            _add_effects(sums, decomposition, own)
        sums.note_read(batch.tokens)
        if out_dir is not None and sums.n_batches % save_every == 0:
            assert made is not None
            joined = _joined(sums, processes)
            if processes.is_main:
                write_harvest(out_dir, joined, made, directions={}, token_strings={}, finished=False)
    resumed.check_finished()
    found = _finished(decomposition, _joined(resumed.sums, processes), made or made_from(decomposition))
    if out_dir is not None and processes.is_main:
        found.save(out_dir)
    processes.wait()
    return found


def _joined(sums: HarvestSums, processes: Processes) -> HarvestSums:
    """What all processes have counted, in all of them; each goes on with its own."""
    if processes.count == 1:
        return sums
    check_same_hash(sums.read, processes)
    numbers = (sums.n_positions, sums.effect_positions)
    joined: HarvestSums | None = None
    for tensors, (n_positions, effect_positions) in processes.of_all((sums.tensors(), numbers)):
        part = HarvestSums(sums.counts, sums.d_vocab, sums.settings)
        part.load(tensors)
        part.n_positions, part.effect_positions = n_positions, effect_positions
        if joined is None:
            joined = part
        else:
            joined.merge(part)
    assert joined is not None
    joined.read, joined.n_batches = sums.read, sums.n_batches
    return joined


def _check_settings(settings: HarvestSettings, **others: int) -> None:
    least = {"top_k": 1, "bands": 1, "tokens_kept": 1, "save_every": 1}
    numbers = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name != "threshold"}
    for name, number in {**numbers, **others}.items():
        low = least.get(name, 0)
        if isinstance(number, bool) or not isinstance(number, Integral) or (number < low and name != "seed"):
            raise ValueError(f"{name}={number!r}; expected a whole number, at least {low}")
    if not 0 <= settings.threshold < 1:
        raise ValueError(
            f"threshold={settings.threshold!r}; expected a number in [0, 1), the least importance that fires"
        )


def _nothing_yet(decomposition: Decomposition, settings: HarvestSettings) -> HarvestSums:
    counts = {name: weight.n_subcomponents for name, weight in decomposition.items()}
    d_vocab = decomposition.host.vocabulary_size() or _UNSAID_VOCABULARY
    return HarvestSums(counts, d_vocab, settings)


class _Resumed:
    """Sums to go on from: those saved in `out_dir`, once the data has been seen to be the same, or none."""

    def __init__(self, out_dir: str | Path | None, fresh: HarvestSums, made: MadeFrom | None) -> None:
        self.sums, self._left, self._out_dir, self._seen = fresh, 0, out_dir, ""
        if out_dir is None or made is None:
            return
        saved = read_harvest(given_directory(out_dir, "out_dir"), missing_ok=True)
        if saved is None:
            return
        if saved.sums.settings != fresh.settings:
            changed = [
                f"{f.name} was {getattr(saved.sums.settings, f.name)} and is {getattr(fresh.settings, f.name)}"
                for f in fields(HarvestSettings)
                if getattr(saved.sums.settings, f.name) != getattr(fresh.settings, f.name)
            ]
            raise ValueError(
                f"{out_dir} holds a harvest with other settings ({', '.join(changed)}); choose another out_dir"
            )
        saved.made.check_same(made, f"the harvest in {out_dir}")
        self.saved, self._left = saved.sums, saved.sums.n_batches

    def has(self, index: int, tokens: Tensor) -> bool:
        """Whether this batch was counted before the interruption. Raises ValueError if it is another one."""
        if index >= self._left:
            return False
        self._seen = hash_of_read(self._seen, tokens)
        if index == self._left - 1:
            if self._seen != self.saved.read:
                raise ValueError(
                    f"the first {self._left} batches are not those that the harvest in {self._out_dir} was made from; "
                    "choose another out_dir, or give the same data in the same order"
                )
            self.sums, self._left = self.saved, 0
        return True

    def forget(self) -> None:
        """Go on from nothing, behind the same batches."""
        if self._left:
            own, before = self.sums, self.saved
            self.saved = HarvestSums(
                own.counts, own.d_vocab, own.settings, n_batches=before.n_batches, read=before.read
            )

    def check_finished(self) -> None:
        """ValueError if the data ended before what was counted."""
        if self._left:
            raise ValueError(
                f"the harvest in {self._out_dir} has counted {self._left} batches, and this data has fewer; choose "
                "another out_dir, or give the same data"
            )


def _add(sums: HarvestSums, decomposition: Decomposition, batch: Batch) -> None:
    assert batch.tokens is not None
    clean = decomposition.clean_pass(batch.inputs, start_at=batch.start_at, attention_mask=batch.attention_mask)
    pre = decomposition.pre_importances(clean.inputs)
    importances, activations = {}, {}
    for name, weight in decomposition.items():
        g, a = importance_of(pre[name]), weight.activations(clean.inputs[name])
        if g.ndim == 4:  # a head axis: the strongest head speaks for the position
            a, g = a.gather(2, a.abs().argmax(2, keepdim=True)).squeeze(2), g.amax(2)
        if batch.position_mask is not None:
            # Not a product: what does not count may be NaN.
            g = g.masked_fill(~batch.position_mask.unsqueeze(-1), 0.0)
        importances[name], activations[name] = g, a
    logits = clean.output
    is_text = logits.ndim == 3 and logits.shape[:2] == batch.tokens.shape and logits.shape[2] <= sums.d_vocab
    predicted = logits.argmax(-1) if is_text and decomposition.host.vocabulary_size() else None
    sums.add(importances, activations, positions_of(batch.tokens, predicted, batch.position_mask, sums.settings))


def _add_effects(sums: HarvestSums, decomposition: Decomposition, batch: Batch) -> None:
    """The KL divergence that the ablation of each subcomponent causes, summed over the positions that count."""
    assert batch.tokens is not None
    if batch.attention_mask is not None:
        raise ValueError("effect_batches needs batches without padding on the left; pad on the right, or set it to 0")
    mask = batch.position_mask
    counted = torch.ones_like(batch.tokens, dtype=torch.bool) if mask is None else mask
    clean = decomposition.clean_pass(batch.tokens).output

    def kl(logits: Tensor) -> Tensor:
        return divergence_per_position(clean, logits).masked_fill(~counted, 0.0).sum(1)

    for name, site in sums.sites.items():
        effects = ablation_effects(decomposition, batch.tokens, kl, {name: None})
        site.effect += effects.values.double().sum((1, 2)).cpu()
    sums.effect_positions += int(counted.sum())


def _finished(decomposition: Decomposition, sums: HarvestSums, made: MadeFrom) -> Harvest:
    directions = {name: site_directions(decomposition, name) for name in decomposition}
    ids = {int(t) for site in sums.sites.values() for t in _shown_tokens(site)}
    ids |= set(sums.background.tokens.unique().tolist())
    ids |= {
        int(t)
        for found in directions.values()
        for table in (found.raised_ids, found.lowered_ids)
        if table is not None
        for t in table.unique()
    }
    ids.discard(-1)
    names = sorted(ids)
    strings = dict(zip(names, decomposition.host.token_strings(names), strict=True))
    return Harvest(sums, made, directions, strings)


def _shown_tokens(site: Any) -> list[int]:
    windows = [reservoir.tokens.unique() for reservoir in (site.top, site.random, site.banded)]
    return torch.cat([*windows, site.inputs.used_tokens(), site.predicted.used_tokens()]).unique().tolist()
