"""One training step of a `Learner`: its losses and their gradients.

Nothing in here waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from spd_lens.core.masks import SiteMask, sample_masks
from spd_lens.core.passes import CleanPass
from spd_lens.core.routing import sample_routing
from spd_lens.core.squashings import lower_squash, upper_squash
from spd_lens.data.batches import Batch
from spd_lens.objective.divergences import log_probs
from spd_lens.objective.losses import hidden_reconstruction_loss
from spd_lens.objective.mask_sources import Climb, SampledMasks
from spd_lens.objective.reconstruction import reconstruction_passes
from spd_lens.training.config import Reconstruction
from spd_lens.training.learner import Learner
from spd_lens.training.terms import IMPORTANCE_TERMS, StepView, coefficient
from spd_lens.training.terms import faithfulness as faithfulness_term


def accumulate_gradients(learner: Learner, batch: Batch, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All terms of the loss at a step, by name and unweighted, and the importances `g`; gradients of the weighted sum
    are added to the parameters.

    Every masked pass is differentiated before the next one is computed, down to the importances, and the gates once
    at the end: one pass's graph is alive at a time instead of those of all terms.
    """
    config = learner.config
    clean, lower, upper = _clean_importances(learner, batch)
    weight = learner.processes.weight(batch.position_mask)
    reached = {name: g.detach().requires_grad_() for name, g in lower.items()}
    losses: dict[str, Tensor] = {}
    for name, part in _reconstructions(learner, batch, clean, reached, step):
        _weighed(coefficient(config, name) * part, weight).backward()
        losses[name] = losses[name] + part.detach() if name in losses else part.detach()
    del clean
    total: Tensor | None = None
    for name, loss in _losses_without_passes(learner, batch, upper, step):
        # What is summed over the processes already, or is no mean over positions, weighs the same everywhere.
        weighted = _weighed(coefficient(config, name) * loss, weight if name == "minimality" else None)
        total = weighted if total is None else total + weighted
        losses[name] = loss.detach()
    roots = [g for name, g in lower.items() if reached[name].grad is not None]
    gradients: list[Tensor | None] = [r.grad for r in reached.values() if r.grad is not None]
    if total is not None:
        roots, gradients = [*roots, total], [*gradients, None]
    if roots:
        torch.autograd.backward(roots, gradients)
    if config.faithfulness > 0:
        loss = faithfulness(learner)
        (config.faithfulness * loss).backward()
        losses["faithfulness"] = loss.detach()
    return losses, {name: g.detach() for name, g in lower.items()}


def _weighed(loss: Tensor, weight: Tensor | None) -> Tensor:
    """A mean over this process's positions, as its part of the mean over all."""
    return loss if weight is None else weight * loss


def _clean_importances(learner: Learner, batch: Batch) -> tuple[CleanPass, dict[str, Tensor], dict[str, Tensor]]:
    """The clean pass, and the importances on it under both squashings."""
    decomposition, config = learner.decomposition, learner.config
    with learner.autocast():
        clean = decomposition.clean_pass(
            batch.inputs,
            start_at=batch.start_at,
            stop_at=config.stop_at,
            hidden_points=config.hidden_points,
            attention_mask=batch.attention_mask,
        )
        pre = decomposition.pre_importances(clean.inputs)
    pre = {name: p if p.dtype == torch.float64 else p.float() for name, p in pre.items()}
    lower = {name: lower_squash(p, variant=config.squash) for name, p in pre.items()}
    upper = {name: upper_squash(p) for name, p in pre.items()}
    return clean, lower, upper


def _losses_without_passes(
    learner: Learner, batch: Batch, upper: Mapping[str, Tensor], step: int
) -> Iterator[tuple[str, Tensor]]:
    config = learner.config
    view = StepView(config, step, upper, batch.position_mask, learner.minimality_factors, learner.sum_over_processes)
    for name, term in IMPORTANCE_TERMS.items():
        if coefficient(config, name) > 0:
            yield name, term(view)
    for extra in config.extra_terms:
        yield extra.name, extra(view, learner.decomposition)


def _reconstructions(
    learner: Learner, batch: Batch, clean: CleanPass, lower: Mapping[str, Tensor], step: int
) -> Iterator[tuple[str, Tensor]]:
    """Every pass under masks as (term, its summand of the term); each is computed when it is asked for."""
    config = learner.config
    # Shared by all terms.
    clean_output = log_probs(clean.output) if config.divergence == "kl" else clean.output
    sizes = None
    if config.readout is not None:
        sizes = config.readout.sizes(clean.output)
        clean_output = config.readout.read(clean.output, sizes)
    for term in config.reconstructions:
        for summand in _reconstruction(learner, term, batch, clean_output, sizes, clean.residuals, lower, step):
            yield term.name, summand
    if config.hidden > 0:
        masks = sample_masks(lower, delta=config.delta, generator=learner.generators["masks"])
        with learner.autocast():
            hidden = learner.decomposition.masked_hidden(
                batch.inputs,
                masks,
                config.hidden_points,
                start_at=batch.start_at,
                stop_at=config.stop_at,
                attention_mask=batch.attention_mask,
            )
        yield "hidden", hidden_reconstruction_loss(clean.hidden, hidden, position_mask=batch.position_mask)


def _reconstruction(
    learner: Learner,
    term: Reconstruction,
    batch: Batch,
    clean_output: Tensor,
    sizes: Tensor | None,
    residuals: Mapping[int, Tensor],
    lower: Mapping[str, Tensor],
    step: int,
) -> Iterator[Tensor]:
    """The summands of one reconstruction term; adversaries climb the very passes that the loss then uses."""
    config, generators, source = learner.config, learner.generators, learner.sources[term.name]

    def summands(g: Mapping[str, Tensor], masks: Any, routing: Any, rows: int | None, draws: int) -> Iterator[Tensor]:
        first = slice(rows)

        def forward(given: Mapping[str, Any]) -> Tensor:
            with learner.autocast():
                output = learner.decomposition.masked_forward(
                    batch.inputs[first],
                    given,
                    start_at=batch.start_at,
                    stop_at=config.stop_at,
                    residuals={layer: residual[first] for layer, residual in residuals.items()},
                    attention_mask=None if batch.attention_mask is None else batch.attention_mask[first],
                )
            return output if sizes is None else config.readout.read(output, sizes[first])

        return reconstruction_passes(
            forward,
            clean_output[first],
            g,
            masks=masks,
            routing=routing,
            kind=config.divergence,
            delta=config.delta,
            draws=draws,
            position_mask=None if batch.position_mask is None else batch.position_mask[first],
            clean_is_log_probs=config.divergence == "kl",
            generator=generators["masks"],
            routing_generator=generators["routing"],
        )

    if not source.climbs:
        return summands(lower, source, term.routing, None, term.draws)
    shapes = {name: g.shape[:-1] for name, g in lower.items()}
    passes = sample_routing(shapes, term.routing, generator=generators["routing"])

    def objective(masks: Mapping[str, Any], rows: int | None) -> Tensor:
        routed = passes if rows is None else [dict.fromkeys(one) for one in passes]
        counted = None if batch.position_mask is None else batch.position_mask[:rows]
        found = torch.stack(list(summands(lower, _Given(masks), routed, rows, 1))).sum()
        return _weighed(found, learner.processes.weight(counted))

    on = Climb(
        objective,
        {name: g.detach() for name, g in lower.items()},
        generators["adversary"],
        delta=config.delta,
        progress=step / config.steps,
    )
    source.climb(on)
    return summands(lower, source, passes, None, 1)


class _Given(SampledMasks):
    """Masks that are there already."""

    def __init__(self, given: Mapping[str, SiteMask]) -> None:
        super().__init__("stochastic")
        self._given = given

    def masks(
        self, importances: Mapping[str, Tensor], *, delta: bool, generator: torch.Generator
    ) -> dict[str, SiteMask]:
        return {name: self._given[name] for name in importances}


def faithfulness(learner: Learner) -> Tensor:
    """The faithfulness term of a step; tied matrices count once."""
    weights = learner.decomposition
    sites = ((learner.targets[name], w.V, w.U) for name, w in weights.items() if w.tied_to is None)
    return faithfulness_term(learner.config, sites)


def take_step(
    learner: Learner, batch: Batch, step: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """One whole step of a single process: learning rates, gradients, clipping, Adam, persistent adversaries.

    Returns the losses by name (unweighted), the importances `g`, and gradient norms before clipping.
    """
    set_learning_rates(learner, step)
    losses, importances = accumulate_gradients(learner, batch, step)
    return losses, importances, apply_gradients(learner)


def set_learning_rates(learner: Learner, step: int) -> None:
    """The schedule's learning rates for a step."""
    config = learner.config
    factor = config.lr_factor(step)
    subcomponents, gates = learner.optimizer.param_groups
    subcomponents["lr"] = config.lr * factor
    gates["lr"] = (config.lr if config.gate_lr is None else config.gate_lr) * factor


def apply_gradients(learner: Learner) -> dict[str, Tensor]:
    """Clip subcomponents and gates separately, descend, and let persistent adversaries climb; returns the norms before
    clipping."""
    norms = {}
    limits = (learner.config.clip_subcomponents, learner.config.clip_gates)
    for name, group, limit in zip(("subcomponents", "gates"), learner.optimizer.param_groups, limits, strict=True):
        if limit is not None:
            norms[f"grad_norm_{name}"] = torch.nn.utils.clip_grad_norm_(group["params"], limit)
    learner.optimizer.step()
    learner.optimizer.zero_grad(set_to_none=True)
    for source in learner.sources.values():
        source.after_backward()
    return norms
