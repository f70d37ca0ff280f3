"""`train_many`: many independent small decompositions in one batched run: seeds, and sweeps over coefficients.

The members (same architecture, same C, same kind of gate; targets of their own) are stacked along a leading axis,
and `torch.vmap` maps the very functions that train one over it. A member's draws come from its own generator in the
order of a single run, so it ends where `train` would have brought it, up to the order of floating-point sums.

Cost: the arithmetic of the members' steps; what is saved is a Python call per operation and member, which is most
of a toy model's step. Left out on purpose: persistent adversaries, subset routing (which rows are computed would differ
by member), the global gate, mixed precision, and TransformerBridges.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.inputs import checked_decomposition
from spd_lens.core.units import ALIVE_ABOVE
from spd_lens.data.batches import Batch, TokenBatches, is_one_batch
from spd_lens.objective.mask_sources import AdversarialMasks, SampledMasks, mask_source
from spd_lens.support.files import given_directory
from spd_lens.support.given import given_instance, given_list
from spd_lens.support.progress import tqdm
from spd_lens.support.shown import short_repr
from spd_lens.training.conditions import stop_on_signals, training_conditions
from spd_lens.training.config import TrainConfig
from spd_lens.training.graphed_members import GraphedMembers
from spd_lens.training.member_files import member_data, members_belong_to, open_members
from spd_lens.training.member_learner import MemberLearner
from spd_lens.training.run_files import RunFiles

# What members may differ in; everything else decides which operations a step consists of.
MAY_DIFFER = (
    "seed", "lr", "gate_lr", "faithfulness_warmup_lr", "faithfulness", "minimality", "frequency", "tolerance",
)  # fmt: skip


# A run has kept to its tolerance if it spent at most so many times as much.
KEPT = 2.0


@dataclasses.dataclass(frozen=True)
class ManyResult:
    """What a run of many leaves: steps done, and one dict of lists (one number per member) per logged step.

    `failed[i]` is the first logged step at which member i's loss was not finite, or None.
    """

    steps: int
    configs: tuple[TrainConfig, ...]
    log: list[dict[str, Any]]
    failed: list[int | None]
    interrupted: bool = False

    __repr__ = short_repr

    def sparsest(self, members: Sequence[int] | None = None) -> int:
        """The member (of `members`, or of all) with the lowest L0, where all were given the same `tolerance`.

        They then spend the same divergence, so one that needs more subcomponents for it is in a worse minimum: it has
        merged what belongs apart, or has two subcomponents for one thing. Members that differ in their seed, or in
        where the coefficient starts (`minimality`), are starts among which this chooses, knowing no right answer; how
        often it is right on toys is in docs/settings.md.

        Means over the last tenth of the log. A member whose reconstruction terms cost more than twice the
        tolerance counts only if all do, and then the one that spends least is it. ValueError without one tolerance for
        all, or where no member's loss stayed finite.
        """
        chosen = list(range(len(self.configs)) if members is None else members)
        wrong = [i for i in chosen if not 0 <= i < len(self.configs)]
        if wrong or not chosen:
            raise ValueError(f"members={chosen}; expected some of 0 to {len(self.configs) - 1}")
        tolerances = [self.configs[i].tolerance for i in chosen]
        tolerance = tolerances[0]
        if tolerance is None or len(set(tolerances)) > 1:
            raise ValueError(
                f"the members have tolerances {tolerances}; expected one and the same: L0 says which is better only "
                "where all spend the same divergence"
            )
        alive = [i for i in chosen if self.failed[i] is None]
        if not alive or not self.log:
            raise ValueError(f"no member of {chosen} has a finite loss in the log; nothing to choose among")
        spent = {i: self._last(lambda line, i=i: _spent(self.configs[i], line, i)) for i in alive}
        kept = [i for i in alive if spent[i] <= KEPT * tolerance]
        if not kept:
            return min(alive, key=lambda i: spent[i])
        return min(kept, key=lambda i: self._last(lambda line: line["L0"][i]))

    def _last(self, value: Callable[[Mapping[str, Any]], float]) -> float:
        tail = self.log[-max(1, len(self.log) // 10) :]
        return sum(value(line) for line in tail) / len(tail)


def _spent(config: TrainConfig, line: Mapping[str, Any], member: int) -> float:
    """What a tolerance is compared with: the reconstruction terms of a logged step, averaged by coefficient."""
    terms = config.reconstructions
    mean = sum(t.coefficient * line[t.name][member] for t in terms) / sum(t.coefficient for t in terms)
    return mean / line["everything_off"][member] if config.relative_reconstruction else mean


def train_many(
    decompositions: Sequence[Decomposition],
    batches: Sequence[Iterable[Any]],
    configs: TrainConfig | Sequence[TrainConfig],
    *,
    out_dir: str | Path | None = None,
    cuda_graphs: bool = False,
) -> ManyResult:
    """Train every decomposition on batches of its own; each ends as after `train(decomposition, batches, config)`.

    - `configs`: one for all, or one for each; they may differ in seed, learning rates and coefficients.
    - `out_dir`: where checkpoints go; a run that finds its own there is continued, on the same models and data only.
      None: no files.
    - `cuda_graphs`: steps are recorded and replayed (`spd_lens.training.graphed_members`), which takes a small model's
      step from the host to the card; annealed penalties then move in stairs. Needs decompositions on a CUDA device.

    Members that are given one and the same endless data (an object with `batches_from`) share its batches. Members do
    not influence each other: one whose loss becomes infinite or NaN is reported in `failed`.
    Ctrl-C finishes the step, writes a checkpoint if there is an `out_dir`, and returns with `interrupted=True`.
    Raises ValueError for members that do not fit together, and for choices that this does not support.
    """
    members = _checked_configs(decompositions, batches, configs)
    config, n_members = members[0], len(members)
    interrupted = False
    with stop_on_signals() as stop, ExitStack() as running:
        for decomposition in decompositions:
            running.enter_context(training_conditions(decomposition))
        learner = MemberLearner(decompositions, members)
        take_step = GraphedMembers(learner).step if cuda_graphs else learner.step
        files, belongs, checkpoint = None, {}, None
        if out_dir is not None:
            files = RunFiles(given_directory(out_dir, "out_dir"))
            belongs = members_belong_to(decompositions, members, batches)
            running.enter_context(files.held())
            checkpoint = open_members(files, members, belongs)
        step = 0 if checkpoint is None else checkpoint.step
        log: list[dict[str, Any]] = []
        seen, streams = member_data(batches, decompositions, checkpoint, goes_on=step < config.steps)
        if files is not None:
            files.continue_from(checkpoint, newest=True)
            log = files.read_log()
        if checkpoint is not None:
            learner.load(checkpoint.tensors)
        else:
            learner.warm_up_faithfulness()
        bar = tqdm(total=config.steps, initial=step, desc=f"SPD x {n_members}", unit="step")
        while step < config.steps and not interrupted:
            given = [own.note(next(stream)) for own, stream in zip(seen, streams, strict=True)]
            losses, importances = take_step(_stacked(given, learner.stack.device), step)
            step += 1
            bar.update()
            interrupted = stop.is_set()
            saves = step == config.steps or interrupted
            saves = saves or (config.checkpoint_every is not None and step % config.checkpoint_every == 0)
            if saves or (step - 1) % config.log_every == 0:
                values = _log_values(losses, importances)
                log.append({"step": step - 1, **values})
                if files is not None:
                    files.log(step - 1, values)
            if saves and files is not None:
                data = {str(i): own.until(b, step - 1) for i, (own, b) in enumerate(zip(seen, given, strict=True))}
                files.save(step, learner.tensors(), keep=config.keep_checkpoints, belongs=belongs, data=data)
        bar.close()
        learner.stack.write_back()
    for decomposition, member in zip(decompositions, members, strict=True):
        decomposition.training_record = {"config": member.to_json(), "steps": step}
    failed = [_first_failure(log, i) for i in range(n_members)]
    return ManyResult(step, members, log, failed, interrupted)


def _first_failure(log: Sequence[Mapping[str, Any]], member: int) -> int | None:
    return next((line["step"] for line in log if not math.isfinite(line["loss"][member])), None)


def _log_values(losses: Mapping[str, Tensor], importances: Mapping[str, Tensor]) -> dict[str, list[float]]:
    l0 = [(g.detach() > ALIVE_ABOVE).float().sum(-1).flatten(1).mean(1) for g in importances.values()]
    return {name: v.detach().float().tolist() for name, v in {**losses, "L0": torch.stack(l0).sum(0)}.items()}


def _stacked(batches: Sequence[Batch], device: torch.device) -> Tensor:
    """The inputs of all members, `[S ...]`; what members share is moved to the device once."""
    kept: dict[int, Tensor] = {}
    for batch in batches:
        kept.setdefault(id(batch.inputs), _inputs(batch))
    moved = torch.stack(list(kept.values())).to(device)
    if len(kept) == len(batches):
        return moved
    places = {key: place for place, key in enumerate(kept)}
    return moved[torch.tensor([places[id(batch.inputs)] for batch in batches], device=device)]


def _inputs(batch: Batch) -> Tensor:
    if batch.start_at is not None or batch.position_mask is not None:
        raise ValueError("train_many takes whole inputs without position masks; use train for these batches")
    return batch.inputs


def checked_members(decompositions: Any, batches: Any, configs: Any) -> list[Decomposition]:
    """The decompositions as a list; TypeError unless they, the batches and the configs are lists of such."""
    members = [] if isinstance(decompositions, Decomposition) else given_list("decompositions", decompositions, _EACH)
    if isinstance(decompositions, Decomposition) or is_one_batch(batches) or isinstance(batches, TokenBatches):
        what = "decompositions" if isinstance(decompositions, Decomposition) else "batches"
        given = decompositions if what == "decompositions" else batches
        raise TypeError(f"{what} is a {type(given).__name__}; expected a list of {_EACH}")
    given_list("batches", batches, _EACH)
    for decomposition in members:
        checked_decomposition(decomposition, "train_many")
    for config in [configs] if isinstance(configs, TrainConfig) else given_list("configs", configs, "TrainConfig"):
        given_instance("a config", config, TrainConfig, "TrainConfig(steps=100)")
    return members


# Of a list of decompositions or of batches.
_EACH = "one for every member (train takes a single one)"


def _checked_configs(
    decompositions: Sequence[Decomposition],
    batches: Sequence[Iterable[Any]],
    configs: TrainConfig | Sequence[TrainConfig],
) -> tuple[TrainConfig, ...]:
    checked_members(decompositions, batches, configs)
    if not decompositions:
        raise ValueError("train_many was given no decomposition; expected at least one")
    members = (configs,) * len(decompositions) if isinstance(configs, TrainConfig) else tuple(configs)
    if not len(decompositions) == len(batches) == len(members):
        raise ValueError(
            f"{len(decompositions)} decompositions, {len(batches)} sets of batches, {len(members)} configs; "
            "expected one of each for every member"
        )
    if len({id(d.model) for d in decompositions}) < len(decompositions):
        raise ValueError("two members share one model; give every member a copy of its own (copy.deepcopy)")
    if not decompositions[0].host.can_be_mapped():
        raise ValueError(
            "train_many cannot run a TransformerBridge: Hugging Face's code writes in place, which torch.vmap does not "
            "support; use train"
        )
    first = members[0]
    for i, member in enumerate(members):
        same = {name: getattr(first, name) for name in MAY_DIFFER}
        if (member.tolerance is None) != (first.tolerance is None):
            raise ValueError(f"member {i} has tolerance={member.tolerance}, the first {first.tolerance}; all or none")
        both = zip(member.reconstructions, first.reconstructions, strict=False)
        terms = tuple(dataclasses.replace(term, coefficient=own.coefficient) for term, own in both)
        terms += member.reconstructions[len(terms) :]
        if dataclasses.replace(member, **same, reconstructions=terms) != first:
            raise ValueError(
                f"the configuration of member {i} differs from the first in more than {', '.join(MAY_DIFFER)} and "
                "coefficients; train them in runs of their own"
            )
    for term in first.reconstructions:
        known = isinstance(mask_source(term.masks), SampledMasks | AdversarialMasks)
        if not known or term.routing not in ("all", "layerwise"):
            raise ValueError(
                f"{term.name}: train_many supports random masks and PGD with routing 'all' or 'layerwise'; use train"
            )
    if first.stop_at is not None:
        raise ValueError("train_many supports no local training (stop_at); use train")
    if first.accumulate > 1 or first.recompute != "none":
        raise ValueError("train_many supports neither accumulate nor recompute; use train, or fewer members at once")
    if first.extra_terms:
        raise ValueError("train_many supports no terms of one's own (extra_terms); use train")
    if first.hidden > 0 or first.precision != "fp32" or not decompositions[0].gates.is_by_site:
        raise ValueError("train_many supports neither hidden reconstruction, bf16, nor the global gate; use train")
    return members
