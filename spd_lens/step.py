"""One training step: everything that changes while training (`Learner`), and the losses of a step.

Nothing in here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spd_lens.adversary import PersistentSources, ascend, random_sources
from spd_lens.config import Reconstruction, TrainConfig
from spd_lens.data import Batch
from spd_lens.decomposition import Decomposition
from spd_lens.gates import lower_squash, upper_squash
from spd_lens.losses import (
    faithfulness_loss,
    frequency_loss,
    hidden_reconstruction_loss,
    log_probs,
    minimality_loss,
    reconstruction_loss,
)
from spd_lens.masks import sample_masks, sample_routing
from spd_lens.run_files import load_optimizer_tensors, optimizer_tensors


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


def training_losses(learner: Learner, batch: Batch, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All terms of the loss at a step, by name and unweighted, and the importances `g` (lower squashing)."""
    decomposition, config = learner.decomposition, learner.config
    with learner.autocast():
        clean = decomposition.clean_pass(batch.inputs, start_at=batch.start_at, hidden_points=config.hidden_points)
        pre = decomposition.pre_importances(clean.inputs)
    pre = {name: p if p.dtype == torch.float64 else p.float() for name, p in pre.items()}
    lower = {name: lower_squash(p, variant=config.squash) for name, p in pre.items()}
    upper = {name: upper_squash(p) for name, p in pre.items()}

    losses: dict[str, Tensor] = {}
    if config.faithfulness > 0:
        losses["faithfulness"] = faithfulness(learner)
    exponent = config.p_at(step)
    if config.minimality > 0:
        losses["minimality"] = minimality_loss(upper, p=exponent, position_mask=batch.position_mask)
    if config.frequency > 0:
        losses["frequency"] = frequency_loss(
            upper, p=exponent, position_mask=batch.position_mask, sum_over_processes=learner.sum_over_processes
        )
    # Shared by all terms.
    clean_output = log_probs(clean.output) if config.divergence == "kl" else clean.output
    for term in config.reconstructions:
        losses[term.name] = _reconstruction(learner, term, batch, clean_output, clean.residuals, lower)
    if config.hidden > 0:
        masks = sample_masks(lower, delta=config.delta, generator=learner.generators["masks"])
        with learner.autocast():
            hidden = decomposition.masked_hidden(batch.inputs, masks, config.hidden_points, start_at=batch.start_at)
        losses["hidden"] = hidden_reconstruction_loss(clean.hidden, hidden, position_mask=batch.position_mask)
    return losses, lower


def _reconstruction(
    learner: Learner,
    term: Reconstruction,
    batch: Batch,
    clean_output: Tensor,
    residuals: Mapping[int, Tensor],
    lower: Mapping[str, Tensor],
) -> Tensor:
    """One reconstruction term; adversaries climb the very passes that the loss then uses."""
    config, generators = learner.config, learner.generators

    def forward(masks: Mapping[str, Any]) -> Tensor:
        with learner.autocast():
            return learner.decomposition.masked_forward(
                batch.inputs, masks, start_at=batch.start_at, residuals=residuals
            )

    def loss(g: Mapping[str, Tensor], masks: Any, routing: Any, draws: int = 1) -> Tensor:
        return reconstruction_loss(
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
        return loss(lower, term.masks, term.routing, term.draws)
    detached = {name: g.detach() for name, g in lower.items()}
    shapes = {name: g.shape[:-1] for name, g in lower.items()}
    passes = sample_routing(shapes, term.routing, generator=generators["routing"])
    if term.masks == "pgd":
        start = random_sources(detached, term.pgd.scope, generators["adversary"])
        sources = ascend(lambda s: loss(detached, s, passes), start, term.pgd)
        return loss(lower, sources, passes)
    if term.name not in learner.adversaries:
        learner.adversaries[term.name] = PersistentSources(
            detached, warm_steps=term.pgd.steps, generator=generators["adversary"]
        )
    adversary = learner.adversaries[term.name]
    adversary.warm(lambda s: loss(detached, s, passes))
    return loss(lower, adversary.tensors(), passes)


def faithfulness(learner: Learner) -> Tensor:
    weights = learner.decomposition
    return faithfulness_loss((learner.targets[name], w.V, w.U) for name, w in weights.items() if w.tied_to is None)
