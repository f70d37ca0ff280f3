"""One training step: everything that changes while training (`Learner`), and the losses of a step.

Nothing in here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.masks import sample_masks
from spd_lens.core.passes import CleanPass
from spd_lens.core.routing import sample_routing
from spd_lens.core.squashings import lower_squash, upper_squash
from spd_lens.data.batches import Batch
from spd_lens.objective.adversary import PersistentSources, ascend, random_sources
from spd_lens.objective.divergences import log_probs
from spd_lens.objective.losses import faithfulness_loss, frequency_loss, hidden_reconstruction_loss, minimality_loss
from spd_lens.objective.reconstruction import reconstruction_passes
from spd_lens.training.checkpoint import load_optimizer_tensors, optimizer_tensors
from spd_lens.training.config import Reconstruction, TrainConfig


@dataclass
class Learner:
    """Everything that changes while training, and so everything that a checkpoint holds."""

    decomposition: Decomposition
    config: TrainConfig
    optimizer: torch.optim.Optimizer
    generators: dict[str, torch.Generator]
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    sum_over_processes: Callable[[Tensor], Tensor] | None = None
    adversaries: dict[str, PersistentSources] = field(default_factory=dict)
    targets: dict[str, Tensor] = field(default_factory=dict)
    minimality_factors: dict[str, float] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        tensors = {f"decomposition.{name}": t for name, t in self.decomposition.tensors().items()}
        tensors |= optimizer_tensors(self.optimizer, "adam")
        tensors |= {f"generator.{name}": g.get_state() for name, g in self.generators.items()}
        for term, adversary in self.adversaries.items():
            tensors |= {f"adversary.{term}|{key}": value for key, value in adversary.tensors_by_name().items()}
        return tensors

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        def below(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        self.decomposition.load_tensors(below("decomposition."))
        load_optimizer_tensors(self.optimizer, "adam", tensors)
        for name, generator in self.generators.items():
            generator.set_state(tensors[f"generator.{name}"])
        for name in {key.removeprefix("adversary.").split("|")[0] for key in tensors if key.startswith("adversary.")}:
            saved = below(f"adversary.{name}|")
            self.adversaries[name] = PersistentSources.from_tensors(saved, device=self.decomposition.device)


def accumulate_gradients(learner: Learner, batch: Batch, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All terms of the loss at a step, by name and unweighted, and the importances `g`; gradients of the weighted sum
    are added to the parameters.

    Every masked pass is differentiated before the next one is computed, down to the importances, and the gates once
    at the end: one pass's graph is alive at a time instead of those of all terms.
    """
    config = learner.config
    clean, lower, upper = _clean_importances(learner, batch)
    reached = {name: g.detach().requires_grad_() for name, g in lower.items()}
    losses: dict[str, Tensor] = {}
    for name, part in _reconstructions(learner, batch, clean, reached):
        (coefficient(config, name) * part).backward()
        losses[name] = losses[name] + part.detach() if name in losses else part.detach()
    del clean
    total: Tensor | None = None
    for name, loss in _losses_of_importances(learner, batch, upper, step):
        weighted = coefficient(config, name) * loss
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


def coefficient(config: TrainConfig, name: str) -> float:
    """The weight of a term in the total loss."""
    for term in config.reconstructions:
        if term.name == name:
            return term.coefficient
    return getattr(config, name)


def _clean_importances(learner: Learner, batch: Batch) -> tuple[CleanPass, dict[str, Tensor], dict[str, Tensor]]:
    """The clean pass, and the importances on it under both squashings."""
    decomposition, config = learner.decomposition, learner.config
    with learner.autocast():
        clean = decomposition.clean_pass(batch.inputs, start_at=batch.start_at, hidden_points=config.hidden_points)
        pre = decomposition.pre_importances(clean.inputs)
    pre = {name: p if p.dtype == torch.float64 else p.float() for name, p in pre.items()}
    lower = {name: lower_squash(p, variant=config.squash) for name, p in pre.items()}
    upper = {name: upper_squash(p) for name, p in pre.items()}
    return clean, lower, upper


def _losses_of_importances(
    learner: Learner, batch: Batch, upper: Mapping[str, Tensor], step: int
) -> Iterator[tuple[str, Tensor]]:
    config, exponent = learner.config, learner.config.p_at(step)
    if config.minimality > 0:
        yield (
            "minimality",
            minimality_loss(upper, p=exponent, position_mask=batch.position_mask, factors=learner.minimality_factors),
        )
    if config.frequency > 0:
        yield (
            "frequency",
            frequency_loss(
                upper, p=exponent, position_mask=batch.position_mask, sum_over_processes=learner.sum_over_processes
            ),
        )


def _reconstructions(
    learner: Learner, batch: Batch, clean: CleanPass, lower: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Every pass under masks as (term, its summand of the term); each is computed when it is asked for."""
    config = learner.config
    # Shared by all terms.
    clean_output = log_probs(clean.output) if config.divergence == "kl" else clean.output
    for term in config.reconstructions:
        for summand in _reconstruction(learner, term, batch, clean_output, clean.residuals, lower):
            yield term.name, summand
    if config.hidden > 0:
        masks = sample_masks(lower, delta=config.delta, generator=learner.generators["masks"])
        with learner.autocast():
            hidden = learner.decomposition.masked_hidden(
                batch.inputs, masks, config.hidden_points, start_at=batch.start_at
            )
        yield "hidden", hidden_reconstruction_loss(clean.hidden, hidden, position_mask=batch.position_mask)


def _reconstruction(
    learner: Learner,
    term: Reconstruction,
    batch: Batch,
    clean_output: Tensor,
    residuals: Mapping[int, Tensor],
    lower: Mapping[str, Tensor],
) -> Iterator[Tensor]:
    """The summands of one reconstruction term; adversaries climb the very passes that the loss then uses."""
    config, generators = learner.config, learner.generators

    def forward(masks: Mapping[str, Any]) -> Tensor:
        with learner.autocast():
            return learner.decomposition.masked_forward(
                batch.inputs, masks, start_at=batch.start_at, residuals=residuals
            )

    def summands(g: Mapping[str, Tensor], masks: Any, routing: Any, draws: int = 1) -> Iterator[Tensor]:
        return reconstruction_passes(
            forward,
            clean_output,
            g,
            masks=masks,
            routing=routing,
            kind=config.divergence,
            delta=config.delta,
            draws=draws,
            position_mask=batch.position_mask,
            clean_is_log_probs=config.divergence == "kl",
            generator=generators["masks"],
            routing_generator=generators["routing"],
        )

    if term.masks not in ("pgd", "persistent"):
        return summands(lower, term.masks, term.routing, term.draws)
    detached = {name: g.detach() for name, g in lower.items()}
    shapes = {name: g.shape[:-1] for name, g in lower.items()}

    def objective(sources: Mapping[str, Tensor]) -> Tensor:
        return torch.stack(list(summands(detached, sources, passes))).sum()

    passes = sample_routing(shapes, term.routing, generator=generators["routing"])
    if term.masks == "pgd":
        start = random_sources(detached, term.pgd.scope, generators["adversary"])
        sources = ascend(objective, start, term.pgd)
        return summands(lower, sources, passes)
    if term.name not in learner.adversaries:
        learner.adversaries[term.name] = PersistentSources(
            detached, warm_steps=term.pgd.steps, generator=generators["adversary"]
        )
    adversary = learner.adversaries[term.name]
    adversary.warm(objective)
    return summands(lower, adversary.tensors(), passes)


def faithfulness(learner: Learner) -> Tensor:
    weights = learner.decomposition
    return faithfulness_loss((learner.targets[name], w.V, w.U) for name, w in weights.items() if w.tied_to is None)
