"""One training step of a `Learner`: its losses and their gradients.

Nothing in here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.units import ALIVE_ABOVE
from spd_lens.data.batches import Batch
from spd_lens.data.processes import whole
from spd_lens.objective.divergences import mean_over_positions
from spd_lens.support.compiling import compiled_regions
from spd_lens.training.learner import Learner
from spd_lens.training.masked_terms import Passes, climbed, everything_off, masked_terms, weighed
from spd_lens.training.parts import BatchPart, BatchParts
from spd_lens.training.sharding import with_whole_factors
from spd_lens.training.terms import IMPORTANCE_TERMS, LossTerm, StepView, coefficient
from spd_lens.training.terms import faithfulness as faithfulness_term
from spd_lens.training.totals import Totals


def accumulate_gradients(learner: Learner, batch: Batch, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All terms of the loss at a step, by name and unweighted, and the L0 of every site (mean number of subcomponents
    with importance above 0.01 per position); gradients of the weighted sum are added to the parameters, and averaged
    over processes.

    Every masked pass is differentiated before the next one is computed, down to the importances, and the gates once
    at the end: one pass's graph is alive at a time instead of those of all terms. With `accumulate` neither are those
    of the batch's parts alive together.
    """
    with compiled_regions(learner.config.compile):
        return _accumulate(learner, batch, step)


def _accumulate(learner: Learner, batch: Batch, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    config = learner.config
    parts = BatchParts(learner, batch)
    weight = learner.processes.weight(batch.position_mask)
    totals = _frequency_totals(learner, parts, step)
    passes = climbed(learner, parts, step)
    if learner.weights.measures(step):
        learner.weights.measure(everything_off(learner, parts))
    losses: dict[str, Tensor] = {}
    active: dict[str, Tensor] = {}
    shares = parts.shares()
    for k, part in parts.trained():
        found, own = _train_part(learner, part, k, parts.count, passes, totals, (shares[k], weight), step)
        for name, value in found.items():
            # The frequency term is that of all rows in every part.
            losses[name] = losses[name] + value if name in losses and name != "frequency" else value
        for name, value in own.items():
            active[name] = active[name] + value if name in active else value
    if config.tolerance is not None:
        spent = weighed(learner.weights.mean_reconstruction(losses), weight)
        learner.weights.spend(learner.processes.mean(spent), step)
    # Gates are done: their gradients are under way while those of faithfulness are computed.
    receive = learner.processes.send_gradients(learner.decomposition.gate_parameters())
    if config.faithfulness > 0:
        loss = faithfulness(learner)
        (config.faithfulness * loss).backward()
        losses["faithfulness"] = loss.detach()
    receive_others = learner.processes.send_gradients(learner.decomposition.subcomponent_parameters())
    receive()
    receive_others()
    return losses, active


def _train_part(
    learner: Learner,
    part: BatchPart,
    k: int,
    count: int,
    passes: Mapping[str, Passes],
    totals: Totals | None,
    weights: tuple[Tensor | float | None, Tensor | None],
    step: int,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of part k of `count`; its summands of the losses and of every site's L0.

    `weights`: what its mean counts in that of this process, and that in the mean over processes.
    """
    share, weight = weights
    losses: dict[str, Tensor] = {}
    reached = {name: g.detach().requires_grad_() for name, g in part.lower.items()}
    for name, loss in masked_terms(learner, part, reached, passes, k, count):
        weighed(learner.weights.of(name) * loss, share, weight).backward()
        value = weighed(loss.detach(), share)
        losses[name] = losses[name] + value if name in losses else value
    total: Tensor | None = None
    for name, loss in _losses_without_passes(learner, part, totals, step):
        # What is summed over everything already weighs 1; of terms of one's own every part and process weighs the same.
        own = {"minimality": share, "frequency": None}.get(name, None if count == 1 else 1 / count)
        weighted = weighed(learner.weights.of(name) * loss, own, weight if name == "minimality" else None)
        total = weighted if total is None else total + weighted
        losses[name] = weighed(loss.detach(), own)
    roots = [g for name, g in part.lower.items() if reached[name].grad is not None]
    gradients: list[Tensor | None] = [r.grad for r in reached.values() if r.grad is not None]
    if total is not None:
        roots, gradients = [*roots, total], [*gradients, None]
    if roots:
        with _gates_are_shares(", ".join(own.name for own in learner.config.extra_terms)):
            torch.autograd.backward(roots, gradients)
    mask = part.batch.position_mask
    return losses, {name: weighed(_mean_active(g, mask), share) for name, g in part.lower.items()}


def _mean_active(g: Tensor, position_mask: Tensor | None) -> Tensor:
    """Mean number of active subcomponents over the positions that count (and over heads, where there are any)."""
    active = (g.detach() > ALIVE_ABOVE).float().sum(-1)
    if position_mask is None:
        return active.mean()
    counts = position_mask.reshape(*position_mask.shape, *[1] * (active.ndim - position_mask.ndim))
    return mean_over_positions(active, counts.expand_as(active))


def _frequency_totals(learner: Learner, parts: BatchParts, step: int) -> Totals | None:
    """The frequency term's sums over all parts; None where there is one part, or no such term."""
    if parts.count == 1 or learner.config.frequency == 0:
        return None
    totals = Totals(learner.sum_over_processes, learner.processes.count)
    for k in range(parts.count):
        totals.start()
        with torch.no_grad():
            IMPORTANCE_TERMS["frequency"](_view(learner, parts.prepared(k), step, totals.collect))
    totals.close()
    return totals


def _view(learner: Learner, part: BatchPart, step: int, add: Callable[[Tensor], Tensor] | None) -> StepView:
    return StepView(learner.config, step, part.upper, part.batch.position_mask, learner.minimality_factors, add)


def _losses_without_passes(
    learner: Learner, part: BatchPart, totals: Totals | None, step: int
) -> Iterator[tuple[str, Tensor]]:
    if totals is not None:
        totals.start()
    view = _view(learner, part, step, learner.sum_over_processes if totals is None else totals.of_all)
    for name, term in IMPORTANCE_TERMS.items():
        if coefficient(learner.config, name) > 0:
            yield name, term(view)
    for extra in learner.config.extra_terms:
        yield extra.name, _of_ones_own(extra, view, learner.decomposition)


def _of_ones_own(term: LossTerm, view: StepView, decomposition: Decomposition) -> Tensor:
    """A term of the user's, which reads whole V and U also where they are shared out.

    Of gates it then has this process's share; what it sums of those alone is summed over processes.
    """
    with _gates_are_shares(term.name):
        return whole(with_whole_factors(decomposition, lambda: term(view, decomposition)))


@contextmanager
def _gates_are_shares(names: str) -> Iterator[None]:
    """What torch says of shares and whole tensors in one operation, in words."""
    try:
        yield
    except RuntimeError as error:
        if "DTensor" not in str(error):
            raise
        raise ValueError(
            f"the term {names} computes with the tensors of gates, of which every process has its part (shard=True), "
            f"and with whole tensors at once ({error}); compute of gates what is a sum of theirs alone, in a term of "
            "its own, or train with shard=False"
        ) from error


def faithfulness(learner: Learner) -> Tensor:
    """The faithfulness term of a step."""
    return faithfulness_term(learner.config, ((w, learner.targets[name]) for name, w in learner.decomposition.items()))


def take_step(
    learner: Learner, batch: Batch, step: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """One whole step: learning rates, gradients, clipping, Adam, persistent adversaries.

    Returns the losses by name (unweighted), the L0 of every site, and gradient norms before clipping.
    """
    set_learning_rates(learner, step)
    losses, active = accumulate_gradients(learner, batch, step)
    return losses, active, apply_gradients(learner)


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
            norms[f"grad_norm_{name}"] = whole(torch.nn.utils.clip_grad_norm_(group["params"], limit))
    learner.optimizer.step()
    learner.optimizer.zero_grad(set_to_none=True)
    for source in learner.sources.values():
        source.after_backward()
    learner.weights.adapt()
    return norms
