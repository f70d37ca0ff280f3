"""The terms of a step's loss that are passes under masks, and the adversaries that climb on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from spd_lens.core.masks import SiteMask, sample_masks
from spd_lens.core.routing import sample_routing
from spd_lens.objective.losses import hidden_reconstruction_loss
from spd_lens.objective.mask_sources import Climb, MaskSource, SampledMasks
from spd_lens.objective.reconstruction import reconstruction_passes
from spd_lens.training.learner import Learner
from spd_lens.training.part_climb import ClimbOverParts, PartObjective
from spd_lens.training.parts import BatchPart, BatchParts
from spd_lens.training.reconstruction import Reconstruction

# Routing of every pass of a term: where each of its sites is routed.
Passes = list[dict[str, Tensor | None]]


def weighed(loss: Tensor, *weights: Tensor | float | None) -> Tensor:
    """A mean over some positions, as its part of the mean over more (None: 1)."""
    for weight in weights:
        loss = loss if weight is None else weight * loss
    return loss


def climbed(learner: Learner, parts: BatchParts, step: int) -> dict[str, Passes]:
    """The routing of every pass, by term, for all rows. Adversaries have climbed the very passes that the loss uses."""
    config, generators = learner.config, learner.generators
    shapes = _shapes(learner, parts)
    found: dict[str, Passes] = {}
    for term in config.reconstructions:
        draws = [sample_routing(shapes, term.routing, generator=generators["routing"]) for _ in range(term.draws)]
        found[term.name] = passes = [one for draw in draws for one in draw]
        source = learner.sources[term.name]
        if source.climbs:
            source.climb(_climb(learner, parts, term, passes, step))
    return found


def _shapes(learner: Learner, parts: BatchParts) -> dict[str, torch.Size]:
    """Positions of every site in all rows; unknown where nothing asks and to know would cost a pass."""
    config = learner.config
    asked = any(learner.sources[t.name].climbs or t.routing not in ("all", "layerwise") for t in config.reconstructions)
    if parts.count > 1 and not asked:
        return dict.fromkeys(learner.decomposition, torch.Size())
    first = parts.prepared(0).lower
    return {name: torch.Size((g.shape[0] * parts.count, *g.shape[1:-1])) for name, g in first.items()}


def _climb(learner: Learner, parts: BatchParts, term: Reconstruction, passes: Passes, step: int) -> Climb:
    """What the adversary of one term climbs on."""
    config, mask = learner.config, parts.batch.position_mask

    def objective(part: BatchPart, k: int, share: Tensor | float | None, rows: int | None) -> Callable[[Any], Tensor]:
        routed = _of_part(passes, k, parts.count)
        if rows is not None:
            routed = [dict.fromkeys(one) for one in routed]
        whole = None if rows is None else rows * parts.count
        weight = learner.processes.weight(mask if mask is None else mask[:whole])

        def loss(masks: Mapping[str, SiteMask]) -> Tensor:
            summands = _summands(learner, term, part, part.lower, _Given(masks), routed, rows)
            return weighed(torch.stack(list(summands)).sum(), share, weight)

        return loss

    given = {"delta": config.delta, "progress": step / config.steps}
    generator = learner.generators["adversary"]
    first = parts.prepared(0)
    if parts.count == 1:
        importances = {name: g.detach() for name, g in first.lower.items()}
        return Climb(lambda masks, rows: objective(first, 0, None, rows)(masks), importances, generator, **given)

    def in_turn(rows: int | None) -> Iterator[PartObjective]:
        for k, share in enumerate(parts.shares(rows)):
            part = parts.prepared(k)
            yield part.lower, objective(part, k, share, rows)

    like = {name: g.new_empty(()).expand(g.shape[0] * parts.count, *g.shape[1:]) for name, g in first.lower.items()}
    return ClimbOverParts(_no_whole, like, generator, parts=in_turn, count=parts.count, **given)


def _no_whole(masks: Mapping[str, SiteMask], rows: int | None) -> Tensor:
    raise ValueError("a batch in parts has no masks of all its rows; expected Climb.of(sources)")


def _of_part(passes: Passes, k: int, count: int) -> Passes:
    """Routing of the rows of part k."""
    if count == 1:
        return passes
    return [{name: None if where is None else where[k::count] for name, where in one.items()} for one in passes]


@torch.no_grad()
def everything_off(learner: Learner, parts: BatchParts) -> Tensor:
    """The divergence of this batch, over all parts and processes, with all subcomponents and deltas off."""
    off, term, found = SampledMasks("off"), learner.config.reconstructions[0], []
    for k, share in enumerate(parts.shares()):
        part = parts.prepared(k)
        (cost,) = _summands(learner, term, part, part.lower, off, [dict.fromkeys(part.lower)], None)
        found.append(weighed(cost, share))
    processes, mask = learner.processes, parts.batch.position_mask
    return processes.mean(weighed(torch.stack(found).sum(), processes.weight(mask)))


def masked_terms(
    learner: Learner, part: BatchPart, lower: Mapping[str, Tensor], passes: Mapping[str, Passes], k: int, count: int
) -> Iterator[tuple[str, Tensor]]:
    """Every pass under masks as (term, its summand of the term), on part k; each is computed when it is asked for."""
    config = learner.config
    for term in config.reconstructions:
        routed = _of_part(passes[term.name], k, count)
        for summand in _summands(learner, term, part, lower, learner.sources[term.name], routed, None):
            yield term.name, summand
    if config.hidden > 0:
        masks = sample_masks(lower, delta=config.delta, generator=learner.generators["masks"])
        with learner.autocast():
            hidden = learner.decomposition.masked_hidden(
                part.batch.inputs,
                masks,
                config.hidden_points,
                start_at=part.batch.start_at,
                stop_at=config.stop_at,
                attention_mask=part.batch.attention_mask,
            )
        yield "hidden", hidden_reconstruction_loss(part.hidden, hidden, position_mask=part.batch.position_mask)


def _summands(
    learner: Learner,
    term: Reconstruction,
    part: BatchPart,
    lower: Mapping[str, Tensor],
    masks: MaskSource,
    passes: Passes,
    rows: int | None,
) -> Iterator[Tensor]:
    """The summands of one reconstruction term, over all rows of a part or its first ones."""
    config, batch, first = learner.config, part.batch, slice(rows)

    def forward(given: Mapping[str, Any]) -> Tensor:
        with learner.autocast():
            output = learner.decomposition.masked_forward(
                batch.inputs[first],
                given,
                start_at=batch.start_at,
                stop_at=config.stop_at,
                residuals={layer: residual[first] for layer, residual in part.residuals.items()},
                attention_mask=None if batch.attention_mask is None else batch.attention_mask[first],
                recompute=config.recompute in ("passes", "all"),
            )
        if part.sizes is None:
            return output
        assert config.readout is not None
        return config.readout.read(output, part.sizes[first])

    return reconstruction_passes(
        forward,
        part.output[first],
        lower,
        masks=masks,
        routing=passes,
        kind=config.divergence,
        delta=config.delta,
        draws=1,
        position_mask=None if batch.position_mask is None else batch.position_mask[first],
        clean_is_log_probs=config.divergence == "kl",
        generator=learner.generators["masks"],
        routing_generator=learner.generators["routing"],
    )


class _Given(SampledMasks):
    """Masks that are there already."""

    def __init__(self, given: Mapping[str, SiteMask]) -> None:
        super().__init__("stochastic")
        self._given = given

    def masks(
        self, importances: Mapping[str, Tensor], *, delta: bool, generator: torch.Generator
    ) -> dict[str, SiteMask]:
        return {name: self._given[name] for name in importances}
