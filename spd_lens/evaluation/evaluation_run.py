"""`EvaluationRun`: what `evaluate` measures, regime by regime, and the report it makes of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional as F

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.draws import RowsGenerator
from spd_lens.core.masks import MaskKind
from spd_lens.data.batches import Batch
from spd_lens.data.processes import Processes
from spd_lens.evaluation.attack import Attack, WorstMasks
from spd_lens.evaluation.deletion import (
    NEVER_NEEDED,
    OTHERS_UNION,
    OWN_UNION,
    Deletion,
    Needs,
    keeping,
    mean_kept,
    needed_at,
    unions_of,
)  # fmt: skip
from spd_lens.evaluation.held import Held, Passes, hold
from spd_lens.evaluation.intervals import Tally, bootstrap_intervals, mean_per_position
from spd_lens.evaluation.report import AttackReport, EvaluationReport
from spd_lens.evaluation.site_report import ImportanceSums, failure_modes
from spd_lens.objective.divergences import Divergence
from spd_lens.objective.mask_sources import mask_source
from spd_lens.support.progress import tqdm

# E5, in the order of the table: name, and kind of `sample_masks`.
REGIMES: dict[str, MaskKind] = {
    "importance": "importance",
    "all on, no delta": "none",
    "stochastic": "stochastic",
    "rounded": "rounded",
    "random": "random",
    "all off": "off",
}


class EvaluationRun:
    """One run of `evaluate`: what is measured on the way."""

    def __init__(
        self,
        decomposition: Decomposition,
        batches: list[Batch],
        kind: Divergence,
        attack: Attack,
        seed: int,
        processes: Processes,
    ) -> None:
        self.decomposition, self.attack, self.seed = decomposition, attack, seed
        self.kind: Divergence = kind
        self.processes, self.batches = processes, batches
        own = [processes.some_rows(batch) for batch in batches]
        rank, count = processes.rank, processes.count
        self.generator = RowsGenerator.of(decomposition.device, seed, rank=rank, count=count)
        self.passes = Passes(decomposition, own, kind)
        self.tally = Tally(self._whole)
        # Rows of the running batch; None while every process computes all of them.
        self._n_rows: int | None = None
        self.labels: list[Tensor] = []
        self.sites = {
            name: ImportanceSums(w.n_subcomponents, decomposition.device) for name, w in decomposition.items()
        }
        self.n_vocabulary = 0
        self.attack_report: AttackReport | None = None
        self.deletion: Deletion | None = None

    def run(self, deletion: bool, deletion_sample: Iterable[Batch], token_counts: Tensor | None) -> EvaluationReport:
        needs = Needs(torch.Generator(self.decomposition.device).manual_seed(self.seed), len(self.passes))
        for held, n_rows in tqdm(self._in_turn(), desc="evaluate", total=len(self.passes), leave=False):
            self._regimes(held)
            if deletion:
                needs.add(self._needed(held), n_rows)
        if self.attack.steps:
            self._attack()
        if deletion:
            for batch in tqdm(deletion_sample, desc="deletion sample", leave=False):
                self._n_rows = n_rows = len(batch.inputs)
                sampled = hold(self.decomposition, self.processes.some_rows(batch), self.kind)
                needs.add(self._needed(sampled), n_rows, pooled=False)
            self._delete(needs)
        self._add_up()
        return self._report(token_counts)

    # -- rows of other processes ----------------------------------------------------------------------------------

    def _in_turn(self) -> Iterator[tuple[Held, int]]:
        """The held passes of this process's rows, with the number of all; what is drawn is drawn for all."""
        for held, batch in zip(self.passes, self.batches, strict=True):
            self._n_rows = self.generator.rows = len(batch.inputs)
            yield held, self._n_rows

    def _whole(self, own: Tensor) -> Tensor:
        """All rows of the running batch, from everybody's own."""
        return own if self._n_rows is None else self.processes.whole_rows(own, self._n_rows)

    def _needed(self, held: Held) -> dict[str, Bool[Tensor, "_row _pos _C"]]:
        """Where all rows of the running batch need what; sites that read the same for all texts have one row."""
        needed = {name: needed_at(g) for name, g in held.importances.items()}
        rows = len(held.counted)
        return {name: self._whole(own) if len(own) == rows else own for name, own in needed.items()}

    def _pairs(self, held: Held) -> tuple[Tensor, Tensor] | None:
        """As `_next_tokens`, unless some process has none."""
        pairs = _next_tokens(held)
        return None if self.processes.any(pairs is None, self.decomposition.device) else pairs

    def _add_up(self) -> None:
        """Sums of all processes in the place of this one's."""
        for sums in self.sites.values():
            sums.above, sums.count = self.processes.sum(sums.above), self.processes.sum(sums.count)
            sums.largest = self.processes.largest(sums.largest)

    # -- what is measured ---------------------------------------------------------------------------------------

    def _regimes(self, held: Held) -> None:
        for name, g in held.importances.items():
            self.sites[name].add(g, held.counted)
        pairs = self._pairs(held)
        if pairs is not None:
            self.labels.append(pairs[0][pairs[1]])
            self.n_vocabulary = held.clean.shape[-1]
            self._cross_entropy("target", held.clean, pairs)
        for regime, mask_kind in REGIMES.items():
            masks = mask_source(mask_kind).masks(held.importances, delta=True, generator=self.generator)
            self._measure(regime, held, held.forward(masks), pairs)

    def _measure(self, regime: str, held: Held, output: Tensor, pairs: tuple[Tensor, Tensor] | None) -> None:
        self.tally.add("divergence", regime, held.divergences(output), held.counted)
        if self.kind == "kl":
            self.tally.add("top changes", regime, output.argmax(-1) != held.clean.argmax(-1), held.counted)
        if pairs is not None:
            self._cross_entropy(regime, output, pairs)

    def _cross_entropy(self, regime: str, output: Tensor, pairs: tuple[Tensor, Tensor]) -> None:
        labels, counted = pairs
        losses = F.cross_entropy(output[:, :-1].flatten(0, 1).float(), labels.flatten(), reduction="none")
        self.tally.add("cross entropy", regime, losses.view(labels.shape), counted)

    def _attack(self) -> None:
        shares = self.processes.count > 1 and self.attack.span is None
        passes = self.passes if shares else Passes(self.decomposition, self.batches, self.kind)
        groups, adversary = passes.in_spans(self.attack.span), WorstMasks(self.attack)
        if shares:
            adversary.sum_over_processes = self.processes.sum
        total = len(groups) * self.attack.starts * max(self.attack.steps)
        with tqdm(total=total, desc="adversary", leave=False) as bar:
            for group in groups:
                adversary.search(group, self.generator, after_step=bar.update)
                for k, held in enumerate(group):
                    # Whole batches are in every process where they do not share the rows of the span.
                    self._n_rows = len(self.batches[k].inputs) if shares else None
                    pairs = self._pairs(held)
                    for steps in adversary.found.sources:
                        masks = adversary.masks(held.importances, delta=True, generator=self.generator, steps=steps)
                        self._measure(f"PGD {steps}", held, held.forward(masks), pairs)
        rows = [sum(len(batch.inputs) for batch in self.batches)]
        if not shares:
            rows = [sum(len(held.counted) for held in group) for group in groups]
        longest = max(held.counted[0].numel() for group in groups for held in group)
        self.attack_report = AttackReport(self.attack.step_size, self.attack.starts, min(rows), longest, len(groups))

    def _delete(self, needs: Needs) -> None:
        kept = {name: ever.unsqueeze(0) for name, ever in needs.ever.items()}
        unions: dict[str, list[Mapping[str, Tensor]]] = {NEVER_NEEDED: [kept]}
        first_text = 0
        several_texts = sum(len(batch.inputs) for batch in self.batches) > 1
        for held, n_rows in tqdm(self._in_turn(), desc="deletion", total=len(self.passes), leave=False):
            pairs = self._pairs(held)
            tests: dict[str, Mapping[str, Tensor]] = {NEVER_NEEDED: kept}
            if held.counted.ndim > 1 and several_texts:
                own, others = unions_of(self._needed(held), n_rows, needs, first_text)
                tests |= {OWN_UNION: own, OTHERS_UNION: others}
            for name, union in tests.items():
                rows = slice(self.processes.rank, None, self.processes.count)
                of_own = {site: ids[rows] if len(ids) == n_rows else ids for site, ids in union.items()}
                self._measure(name, held, held.forward(keeping(held, of_own)), pairs)
                if name != NEVER_NEEDED:
                    unions.setdefault(name, []).append(union)
            first_text += n_rows
        self.deletion = Deletion(
            divergence={},
            never_needed={name: int(never.sum()) for name, never in needs.never().items()},
            sample_positions=needs.positions,
            kept={name: mean_kept(own) for name, own in unions.items()},
        )

    # -- what is reported ---------------------------------------------------------------------------------------

    def _report(self, token_counts: Tensor | None) -> EvaluationReport:
        per_text = self.tally.texts()
        means = {
            quantity: {regime: m for regime, texts in own.items() if (m := mean_per_position(texts)) is not None}
            for quantity, own in per_text.items()
        }
        values = means["divergence"]
        self._refuse_nan(values)
        sites = {name: sums.report(self.decomposition[name]) for name, sums in self.sites.items()}
        deletion = self.deletion
        if deletion is not None:
            costs = {name: values[name] for name in (NEVER_NEEDED, OWN_UNION, OTHERS_UNION) if name in values}
            deletion = Deletion(costs, deletion.never_needed, deletion.sample_positions, deletion.kept)
        regimes = {name: values[name] for name in REGIMES}
        counted = per_text["divergence"]["stochastic"][1]
        return EvaluationReport(
            sites=sites,
            divergence=regimes,
            cross_entropy=means.get("cross entropy", {}),
            adversarial={steps: values[f"PGD {steps}"] for steps in sorted(set(self.attack.steps))},
            kind=self.kind,
            positions=round(sum(counted)),
            texts=sum(1 for count in counted if count),
            attack=self.attack_report,
            top_changes=means.get("top changes", {}),
            unigram_cross_entropy=self._unigram(token_counts),
            deletion=deletion,
            intervals=self._intervals(per_text),
            per_text=per_text,
            warnings=tuple(failure_modes(sites, regimes)),
        )

    def _refuse_nan(self, values: Mapping[str, float]) -> None:
        wrong = [regime for regime, value in values.items() if value != value]
        if not wrong:
            return
        tensors = {**self.decomposition.tensors(), **dict(self.decomposition.model.named_parameters())}
        bad = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
        where = f"not finite: {', '.join(bad[:4])}" if bad else "all parameters are finite, so the data is not"
        raise ValueError(f"the divergence is NaN under these masks: {', '.join(wrong)} ({where}); give another")

    def _unigram(self, token_counts: Tensor | None) -> float | None:
        """Cross-entropy of the evaluated tokens under token frequencies (E9)."""
        if not self.labels:
            return None
        seen = self.processes.sum(torch.cat(self.labels).bincount(minlength=self.n_vocabulary).double())
        if not bool(seen.any()):
            return None
        counts = seen if token_counts is None else token_counts.to(seen)
        if counts.shape != seen.shape:
            raise ValueError(
                f"token_counts has shape {tuple(counts.shape)}; expected {self.n_vocabulary} counts, one per token"
            )
        frequencies = (counts + 1 / self.n_vocabulary) / (counts.sum() + 1)
        return float(-(seen * frequencies.log()).sum() / seen.sum())

    def _intervals(self, per_text: Mapping[str, Any]) -> dict[str, dict[str, tuple[float, float]]]:
        keys = [(quantity, regime) for quantity, own in per_text.items() for regime in own]
        found = bootstrap_intervals([per_text[q][r] for q, r in keys], seed=self.seed)
        intervals: dict[str, dict[str, tuple[float, float]]] = {}
        for (quantity, regime), interval in zip(keys, found, strict=True):
            if interval is not None:
                intervals.setdefault(quantity, {})[regime] = interval
        return intervals


def _next_tokens(held: Held) -> tuple[Int[Tensor, "batch next"], Bool[Tensor, "batch next"]] | None:
    """The next tokens, and which of them count; None for models that do not predict their input's tokens."""
    tokens, shape = held.batch.tokens, held.clean.shape
    if tokens is None or len(shape) != 3 or tokens.shape != shape[:2] or shape[1] < 2:
        return None
    if int(tokens.max()) >= shape[2]:
        return None
    return tokens[:, 1:].long(), held.counted[:, :-1] & held.counted[:, 1:]
