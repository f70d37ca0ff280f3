"""`evaluate`: how good a decomposition is, on the four things that count at once (E1, E2, E5).

Faithfulness per site; reconstruction (cross-entropy and KL) in six mask regimes; minimality (L0 at several
thresholds); and the worst case, a fresh PGD adversary whose budget stands beside its number. Masks set to the
importance itself, or rounded, are for monitoring only: that they work does not make the active subcomponents a
circuit (E3).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.masks import MaskKind, SiteMask, sample_masks
from spd_lens.core.passes import CleanPass
from spd_lens.core.squashings import importance_of
from spd_lens.core.subcomponents import relative_faithfulness, smallest_relative_error
from spd_lens.data.batches import Batch, as_batch
from spd_lens.evaluation.report import THRESHOLDS, EvaluationReport, SiteReport, failure_modes
from spd_lens.objective.adversary import PGD, ascend, random_sources
from spd_lens.objective.divergences import Divergence, divergence, log_probs
from spd_lens.objective.reconstruction import reconstruction_loss

# E5, in the order of the table: name, kind of `sample_masks`, whether the delta takes part at random.
REGIMES: dict[str, MaskKind] = {
    "importance": "importance",
    "all on, no delta": "none",
    "stochastic": "stochastic",
    "rounded": "rounded",
    "random": "random",
    "all off": "off",
}


@torch.no_grad()
def evaluate(
    decomposition: Decomposition,
    batches: Iterable[Any],
    *,
    max_batches: int = 8,
    adversary_steps: Sequence[int] = (20,),
    adversary_step_size: float = 0.1,
    kind: Divergence = "kl",
    seed: int = 0,
) -> EvaluationReport:
    """Measure a decomposition on the first `max_batches` of `batches` (what `train` accepts is accepted here).

    Cost per batch: 8 forward passes, and for every adversary `steps` forward and backward passes; set
    `adversary_steps=()` to leave them out. Positions outside a batch's `position_mask` count nowhere (M5).
    Raises ValueError if there is no batch.
    """
    source = batches.once() if hasattr(batches, "once") else batches  # pyright: ignore[reportAttributeAccessIssue]
    chosen = [as_batch(item) for item in islice(source, max_batches)]
    if not chosen:
        raise ValueError("the data is empty: not one batch to evaluate on")
    sums = _Sums(decomposition)
    generator = torch.Generator(decomposition.device).manual_seed(seed)
    for item in tqdm(chosen, desc="evaluate", leave=False):
        batch = item.to(decomposition.device)
        clean = decomposition.clean_pass(batch.inputs, start_at=batch.start_at)
        pre = decomposition.pre_importances(clean.inputs)
        g = {name: importance_of(p) for name, p in pre.items()}
        count = _count(batch, clean.output)
        sums.add_importances(g, batch.position_mask)
        sums.add("ce", "target", _cross_entropy(clean.output, batch), count)
        for regime, mask_kind in REGIMES.items():
            masks = sample_masks(g, kind=mask_kind, generator=generator)
            output = decomposition.masked_forward(
                batch.inputs, masks, start_at=batch.start_at, residuals=clean.residuals
            )
            value = divergence(clean.output, output, kind=kind, position_mask=batch.position_mask)
            sums.add("divergence", regime, value, count)
            sums.add("ce", regime, _cross_entropy(output, batch), count)
        for steps in adversary_steps:
            pgd = PGD(steps, adversary_step_size, "batch")
            value = worst_case(decomposition, batch, clean, g, pgd, kind=kind, generator=generator)
            sums.add("adversarial", steps, value, count)
    return sums.report(decomposition, kind)


def worst_case(
    decomposition: Decomposition,
    batch: Batch,
    clean: CleanPass,
    importances: Mapping[str, Float[Tensor, "*batch _"]],
    pgd: PGD,
    *,
    kind: Divergence,
    generator: torch.Generator,
) -> Float[Tensor, ""]:
    """Divergence under masks that a fresh PGD adversary chose within the importances (K3, E1)."""

    clean_output = log_probs(clean.output) if kind == "kl" else clean.output

    def forward(masks: Mapping[str, SiteMask]) -> Tensor:
        return decomposition.masked_forward(batch.inputs, masks, start_at=batch.start_at, residuals=clean.residuals)

    def loss(sources: Mapping[str, Tensor]) -> Tensor:
        return reconstruction_loss(
            forward,
            clean_output,
            importances,
            masks=sources,
            kind=kind,
            position_mask=batch.position_mask,
            clean_is_log_probs=kind == "kl",
            generator=generator,
        )

    sources = ascend(loss, random_sources(importances, pgd.scope, generator), pgd)
    return loss(sources)


def _cross_entropy(output: Tensor, batch: Batch) -> Tensor | None:
    """Mean next-token cross-entropy over positions that count; None for models that do not predict tokens."""
    if batch.tokens is None or output.ndim != 3 or batch.tokens.shape[1] < 2:
        return None
    if int(batch.tokens.max()) >= output.shape[-1]:  # outputs are not over the input's vocabulary
        return None
    losses = F.cross_entropy(output[:, :-1].flatten(0, 1).float(), batch.tokens[:, 1:].flatten(), reduction="none")
    if batch.position_mask is None:
        return losses.mean()
    kept = (batch.position_mask[:, :-1] & batch.position_mask[:, 1:]).flatten()
    return losses[kept].mean()


def _count(batch: Batch, output: Tensor) -> int:
    return output.shape[:-1].numel() if batch.position_mask is None else int(batch.position_mask.sum())


class _Sums:
    """Running sums over batches, weighted by their number of positions."""

    def __init__(self, decomposition: Decomposition) -> None:
        self.weighted: dict[tuple[str, Any], float] = {}
        self.weights: dict[tuple[str, Any], int] = {}
        self.positions = 0
        device = decomposition.device
        self.l0 = {name: torch.zeros(len(THRESHOLDS), device=device) for name in decomposition}
        self.l0_count = dict.fromkeys(decomposition, 0)
        self.largest = {name: torch.zeros(w.n_subcomponents, device=device) for name, w in decomposition.items()}

    def add(self, group: str, name: Any, value: Tensor | None, count: int) -> None:
        if value is not None:
            key = (group, name)
            self.weighted[key] = self.weighted.get(key, 0.0) + float(value) * count
            self.weights[key] = self.weights.get(key, 0) + count

    def add_importances(
        self, g: Mapping[str, Float[Tensor, "*batch _"]], position_mask: Bool[Tensor, "batch pos"] | None
    ) -> None:
        for name, importance in g.items():
            kept = importance.flatten(0, -2) if position_mask is None else importance[position_mask].flatten(0, -2)
            for i, threshold in enumerate(THRESHOLDS):
                self.l0[name][i] += (kept > threshold).sum()
            self.l0_count[name] += len(kept)
            if len(kept):
                self.largest[name] = torch.maximum(self.largest[name], kept.amax(0))
        self.positions += len(kept) if g else 0

    def group(self, group: str) -> dict[Any, float]:
        return {name: v / self.weights[g, name] for (g, name), v in self.weighted.items() if g == group}

    def report(self, decomposition: Decomposition, kind: Divergence) -> EvaluationReport:
        sites = {}
        for name, w in decomposition.items():
            W = w.target_weight
            per_threshold = (self.l0[name] / max(1, self.l0_count[name])).tolist()
            sites[name] = SiteReport(
                n_subcomponents=w.n_subcomponents,
                rank_bound=w.rank_bound,
                relative_faithfulness=float(relative_faithfulness(W, w.V, w.U)),
                smallest_possible=smallest_relative_error(W, w.n_subcomponents),
                l0=dict(zip(THRESHOLDS, per_threshold, strict=True)),
                alive=int((self.largest[name] > 0.1).sum()),
            )
        values = self.group("divergence")
        return EvaluationReport(
            sites=sites,
            divergence=values,
            cross_entropy=self.group("ce"),
            adversarial=self.group("adversarial"),
            kind=kind,
            positions=self.positions,
            warnings=tuple(failure_modes(sites, values)),
        )
