"""What is measured on a decomposed toy transformer: which subcomponents are used, and what is left with them alone.

A subcomponent is **used** if its importance is above 0.1 at more than 5 % of the positions that count.

**Always on** is the strictest reading of a set: importance 1 for its members and 0 for all others, at every
position, whatever the gates say. Then an adversary (one source for batch and positions) chooses the masks of all
others and of the delta. What it reaches says whether the set alone is enough.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from spd_lens import Decomposition, evaluate
from spd_lens.core import lower_squash, upper_squash
from spd_lens.data import as_batch
from spd_lens.evaluation import worst_case
from spd_lens.objective import divergence, log_probs, mask_source, minimality_loss, reconstruction_loss
from spd_lens.training import TrainConfig

ON_ABOVE, USED_ABOVE = 0.1, 0.05
ADVERSARY_STEPS = 20
Ids = dict[str, list[int]]


def firing_rates(importances: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Share of positions at which each subcomponent's importance is above 0.1."""
    return {name: (g.flatten(0, -2) > ON_ABOVE).float().mean(0) for name, g in importances.items()}


def used_ids(rates: Mapping[str, Tensor]) -> Ids:
    """Subcomponents that are on at more than 5 % of the positions."""
    return {name: (rate > USED_ABOVE).nonzero().flatten().tolist() for name, rate in rates.items()}


def others(decomposition: Decomposition, ids: Ids) -> Ids:
    """All subcomponents that are not in `ids`."""
    return {n: [c for c in range(decomposition[n].n_subcomponents) if c not in ids[n]] for n in ids}


def counts(ids: Ids) -> dict[str, int]:
    """How many there are at each site, and in all."""
    return {**{name: len(own) for name, own in ids.items()}, "all": sum(map(len, ids.values()))}


def summary(
    decomposition: Decomposition, batches: Sequence[Any], adversary_steps: Sequence[int] = (20, 80)
) -> dict[str, Any]:
    """Return what `evaluate` measures, in plain values."""
    report = asdict(evaluate(decomposition, batches, max_batches=len(batches), adversary_steps=adversary_steps))
    return {k: report[k] for k in ("divergence", "adversarial", "positions")} | {
        "L0": {name: site["l0"][ON_ABOVE] for name, site in report["sites"].items()},
        "relative_faithfulness": {name: site["relative_faithfulness"] for name, site in report["sites"].items()},
    }


@torch.no_grad()
def divergence_with(decomposition: Decomposition, inputs: Tensor, hooks: list[Any]) -> float:
    """KL per position from the target to the model under `hooks`."""
    model = decomposition.model
    return float(divergence(model(inputs), model.run_with_hooks(inputs, fwd_hooks=hooks)))


@torch.no_grad()
def always_on(decomposition: Decomposition, ids: Ids, inputs: Tensor, seed: int = 0) -> dict[str, float]:
    """KL when `ids` are always on and all else is random, and when an adversary chooses all else."""
    generator = torch.Generator().manual_seed(seed)
    clean = decomposition.clean_pass(inputs)
    g = {}
    for name, x in clean.inputs.items():
        kept = torch.zeros(decomposition[name].n_subcomponents)
        kept[ids[name]] = 1
        positions = x.shape if not x.is_floating_point() else x.shape[:-1]
        g[name] = kept.expand(*positions, -1).contiguous()
    stochastic = reconstruction_loss(
        lambda masks: decomposition.masked_forward(inputs, masks), clean.output, g, generator=generator
    )
    adversarial = worst_case(decomposition, [inputs], steps=(ADVERSARY_STEPS,), importances=g, seed=seed)
    return {"stochastic": float(stochastic), "adversarial": adversarial.divergence[ADVERSARY_STEPS]}


@torch.no_grad()
def objective(decomposition: Decomposition, batches: Iterable[Any], config: TrainConfig) -> dict[str, float]:
    """The training loss and its terms, unweighted, as means over `batches`; adversarial terms are left out."""
    generator, sums = torch.Generator().manual_seed(0), dict[str, float]()
    inputs_of = [as_batch(item).inputs for item in batches]
    for inputs in inputs_of:
        clean = decomposition.clean_pass(inputs)
        pre = decomposition.pre_importances(clean.inputs)
        values = {
            "minimality": minimality_loss(
                {name: upper_squash(p) for name, p in pre.items()}, penalty=config.penalty_at(config.steps - 1)
            )
        }
        lower = {name: lower_squash(p) for name, p in pre.items()}
        for term in config.reconstructions:
            if not mask_source(term.masks).climbs:
                values[term.name] = reconstruction_loss(
                    lambda masks, inputs=inputs: decomposition.masked_forward(inputs, masks),
                    log_probs(clean.output), lower, masks=term.masks, routing=term.routing, clean_is_log_probs=True,
                    generator=generator,
                )  # fmt: skip
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    means = {name: total / len(inputs_of) for name, total in sums.items()}
    weights = {"minimality": config.minimality} | {term.name: term.coefficient for term in config.reconstructions}
    return {"total": sum(weights[name] * value for name, value in means.items()), **means}


def singular_ranks(singular: Decomposition, inputs: Tensor, below: float) -> Ids:
    """The first k singular vectors of each matrix, with the smallest k at which keeping these alone leaves a KL under
    `below`; all other matrices stay. `singular` has `singular_subcomponents`."""
    ranks = {}
    for name, weight in singular.items():
        for k in range(weight.n_subcomponents + 1):
            ranks[name] = list(range(k))
            if divergence_with(singular, inputs, singular.keep({name: ranks[name]})) < below:
                break
    return ranks


def nothing(ids: Ids) -> Ids:
    """No subcomponent at any of these sites."""
    return {name: [] for name in ids}
