"""`train_many`: many independent small decompositions in one batched run: seeds, and sweeps over coefficients.

The members (same architecture, same C, same kind of gate; targets of their own) are stacked along a leading axis,
and `torch.vmap` maps the very functions that train one over it. A member's draws come from its own generator in the
order of a single run, so it ends where `train` would have brought it, up to the order of floating-point sums.

Cost: the arithmetic of the members' steps; what is saved is a Python call per operation and member, which is most
of a toy model's step. Left out on purpose: adversaries and subset routing (which rows are computed would differ by
member), the global gate, mixed precision, and TransformerBridges.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.masks import SiteMask, sample_masks
from spd_lens.core.routing import route, sample_routing
from spd_lens.core.squashings import lower_squash, upper_squash
from spd_lens.core.units import ALIVE_ABOVE
from spd_lens.data.batches import Batch
from spd_lens.data.streams import endless_batches
from spd_lens.hosts.site import match_sites
from spd_lens.objective.divergences import divergence
from spd_lens.objective.mask_sources import SampledMasks, mask_source
from spd_lens.support.checked_json import CheckedContent, read_checked, write_checked
from spd_lens.support.files import given_directory, plain
from spd_lens.support.progress import tqdm
from spd_lens.training.belonging import FREE, SeenData, belongs_to, check_belongs, same_data, started
from spd_lens.training.checkpoint import Checkpoint
from spd_lens.training.conditions import stop_on_signals, training_conditions
from spd_lens.training.config import TrainConfig
from spd_lens.training.member_adam import MemberAdam
from spd_lens.training.run_files import RunFiles
from spd_lens.training.terms import IMPORTANCE_TERMS, StepView, coefficient
from spd_lens.training.terms import faithfulness as faithfulness_term

# What members may differ in; everything else decides which operations a step consists of.
MAY_DIFFER = ("seed", "lr", "gate_lr", "faithfulness_warmup_lr", "faithfulness", "minimality", "frequency")
FORMAT = "spd_lens run of many"
FORMAT_VERSION = 2


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


def train_many(
    decompositions: Sequence[Decomposition],
    batches: Sequence[Iterable[Any]],
    configs: TrainConfig | Sequence[TrainConfig],
    *,
    out_dir: str | Path | None = None,
) -> ManyResult:
    """Train every decomposition on batches of its own; each ends as after `train(decomposition, batches, config)`.

    - `configs`: one for all, or one for each; they may differ in seed, learning rates and coefficients.
    - `out_dir`: where checkpoints go; a run that finds its own there is continued, on the same models and data only.
      None: no files.

    Members do not influence each other: one whose loss becomes infinite or NaN is reported in `failed`.
    Ctrl-C finishes the step, writes a checkpoint if there is an `out_dir`, and returns with `interrupted=True`.
    Raises ValueError for members that do not fit together, and for choices that this does not support.
    """
    members = _checked_configs(decompositions, batches, configs)
    config, n_members = members[0], len(members)
    interrupted = False
    with stop_on_signals() as stop, ExitStack() as running:
        for decomposition in decompositions:
            running.enter_context(training_conditions(decomposition))
        stack = _Stack(decompositions)
        run = _Run(stack, members)
        files, belongs, checkpoint = None, {}, None
        if out_dir is not None:
            files = RunFiles(given_directory(out_dir, "out_dir"))
            belongs = _belongs(decompositions, members, batches)
            running.enter_context(files.held())
            checkpoint = _opened(files, members, belongs)
        step = 0 if checkpoint is None else checkpoint.step
        log: list[dict[str, Any]] = []
        seen, streams = _data(batches, decompositions, checkpoint, goes_on=step < config.steps)
        if files is not None:
            files.continue_from(checkpoint, newest=True)
            log = files.read_log()
        if checkpoint is not None:
            run.load(checkpoint.tensors)
        else:
            run.warm_up_faithfulness()
        bar = tqdm(total=config.steps, initial=step, desc=f"SPD x {n_members}", unit="step")
        while step < config.steps and not interrupted:
            given = [own.note(next(stream)) for own, stream in zip(seen, streams, strict=True)]
            losses, importances = run.step(torch.stack([_inputs(batch) for batch in given]).to(stack.device), step)
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
                files.save(step, run.tensors(), keep=config.keep_checkpoints, belongs=belongs, data=data)
        bar.close()
        stack.write_back()
    for decomposition, member in zip(decompositions, members, strict=True):
        decomposition.training_record = {"config": member.to_json(), "steps": step}
    failed = [_first_failure(log, i) for i in range(n_members)]
    return ManyResult(step, members, log, failed, interrupted)


def _first_failure(log: Sequence[Mapping[str, Any]], member: int) -> int | None:
    return next((line["step"] for line in log if not math.isfinite(line["loss"][member])), None)


class _Stack:
    """The parameters of all members, each stacked to `[S ...]`, and calls that are mapped over them."""

    def __init__(self, decompositions: Sequence[Decomposition]) -> None:
        self.members = decompositions
        self.template = decompositions[0]
        self.device = self.template.device
        self._caller = _Caller(self.template.model)
        groups = {
            "subcomponents": {id(p) for p in self.template.subcomponent_parameters()},
            "gates": {id(p) for p in self.template.gate_parameters()},
        }
        self.trained: dict[str, dict[str, Tensor]] = {group: {} for group in groups}
        self._frozen: dict[str, Tensor] = {}
        states = [_tensors(_Caller(d.model)) for d in decompositions]
        for name, own in states[0].items():
            shapes = {tuple(state[name].shape) if name in state else None for state in states}
            if len(shapes) > 1:
                raise ValueError(f"the members do not have the same shape: {name} is {sorted(map(str, shapes))}")
            stacked = torch.stack([state[name].detach() for state in states])
            group = next((g for g, ids in groups.items() if id(own) in ids), None)
            if group is None:
                self._frozen[name] = stacked
            else:
                self.trained[group][name] = stacked.requires_grad_()

    @property
    def parameters(self) -> dict[str, Tensor]:
        """All trained tensors by name."""
        return {name: p for group in self.trained.values() for name, p in group.items()}

    def call(self, function: Callable[..., Any], *stacked: Any) -> Any:
        """`function(*arguments)` of every member, with its parameters in the template's place."""

        def of_one(trained: dict[str, Tensor], frozen: dict[str, Tensor], *arguments: Any) -> Any:
            return functional_call(self._caller, {**trained, **frozen}, (function, *arguments))

        return torch.vmap(of_one)(self.parameters, self._frozen, *stacked)

    def clean_pass(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Clean output and inputs of all sites."""

        def of_one(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            clean = self.template.clean_pass(x)
            return clean.output, clean.inputs

        with torch.no_grad():
            return self.call(of_one, x)

    def masked_forward(self, x: Tensor, masks: Mapping[str, SiteMask]) -> Tensor:
        """The outputs under masks."""
        given = {
            name: {key: value for key, value in (("mask", m.mask), ("delta", m.delta)) if value is not None}
            for name, m in masks.items()
        }

        def of_one(x: Tensor, given: dict[str, dict[str, Tensor]]) -> Tensor:
            return self.template.masked_forward(x, {name: SiteMask(**values) for name, values in given.items()})

        return self.call(of_one, x, given)

    def faithfulness(self, config: TrainConfig) -> Tensor:
        """L1 of every member, `[S]`."""
        weights = [weight for weight in self.template.values() if weight.tied_to is None]
        return self.call(lambda: faithfulness_term(config, ((w.target_weight.detach(), w.V, w.U) for w in weights)))

    @torch.no_grad()
    def write_back(self) -> None:
        """Copy every member's slice into its decomposition."""
        for i, decomposition in enumerate(self.members):
            own = _tensors(_Caller(decomposition.model))
            for name, stacked in self.parameters.items():
                own[name].copy_(stacked[i])


class _Caller(nn.Module):
    """Calls any function while `functional_call` has replaced the model's parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)


class _Run:
    """What changes while training, and one step of it."""

    def __init__(self, stack: _Stack, members: Sequence[TrainConfig]) -> None:
        self.stack, self.members, self.config = stack, members, members[0]
        device = stack.device
        gate_lrs = [m.lr if m.gate_lr is None else m.gate_lr for m in members]
        self.optimizers = {
            "subcomponents": MemberAdam(stack.trained["subcomponents"], _float64([m.lr for m in members])),
            "gates": MemberAdam(stack.trained["gates"], _float64(gate_lrs)),
        }
        # Seeded as `train` does.
        self.minimality_factors = match_sites(self.config.minimality_factors, stack.template)
        self.generators = [torch.Generator(device).manual_seed(m.seed * 1_000_003 + 1) for m in members]

    def warm_up_faithfulness(self) -> None:
        """L8, with an optimiser that is thrown away."""
        rates = _float64([m.faithfulness_warmup_lr for m in self.members])
        adam = MemberAdam(self.stack.trained["subcomponents"], rates)
        for _ in range(self.config.faithfulness_warmup):
            self.stack.faithfulness(self.config).sum().backward()
            adam.step(1.0)

    def step(self, x: Tensor, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One training step; the losses `[S]` (with the weighted sum as `"loss"`) and the importances."""
        losses, lower = self._losses(x, step)
        weighted = [
            loss.new_tensor([coefficient(m, name) for m in self.members]) * loss for name, loss in losses.items()
        ]
        total = torch.stack(weighted).sum(0)
        total.sum().backward()
        factor = self.config.lr_factor(step)
        self.optimizers["subcomponents"].step(factor, self.config.clip_subcomponents)
        self.optimizers["gates"].step(factor, self.config.clip_gates)
        return {"loss": total, **losses}, lower

    def _losses(self, x: Tensor, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        stack, config = self.stack, self.config
        clean_output, inputs = stack.clean_pass(x)
        pre = stack.call(stack.template.pre_importances, inputs)
        lower = {name: lower_squash(p, variant=config.squash) for name, p in pre.items()}
        upper = {name: upper_squash(p) for name, p in pre.items()}
        losses: dict[str, Tensor] = {}
        if any(m.faithfulness > 0 for m in self.members):
            losses["faithfulness"] = stack.faithfulness(config)
        view = StepView(config, step, {}, minimality_factors=self.minimality_factors)
        for name, term in IMPORTANCE_TERMS.items():
            if any(coefficient(m, name) > 0 for m in self.members):
                losses[name] = torch.vmap(lambda g, term=term: term(dataclasses.replace(view, upper=g)))(upper)
        distance = torch.vmap(lambda clean, masked: divergence(clean, masked, kind=config.divergence))
        for term in config.reconstructions:
            passes = []
            for _ in range(term.draws):
                for routed in sample_routing(dict.fromkeys(lower, torch.Size()), term.routing, generator=_NO_DRAWS):
                    chosen = {name: lower[name] for name in routed}
                    kind: Any = term.masks
                    masks = sample_masks(chosen, kind=kind, delta=config.delta, generator=self.generators)
                    passes.append(distance(clean_output, stack.masked_forward(x, route(masks, routed))))
            losses[term.name] = torch.stack(passes).mean(0)
        return losses, lower

    def tensors(self) -> dict[str, Tensor]:
        """Everything that the next step depends on."""
        tensors = {f"parameter|{name}": p.detach() for name, p in self.stack.parameters.items()}
        for group, adam in self.optimizers.items():
            tensors |= {f"adam.{group}|{key}": value for key, value in adam.tensors().items()}
        return tensors | {f"generator|{i}": g.get_state() for i, g in enumerate(self.generators)}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Undo `tensors`."""
        for name, p in self.stack.parameters.items():
            p.copy_(tensors[f"parameter|{name}"])
        for group, adam in self.optimizers.items():
            prefix = f"adam.{group}|"
            adam.load({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        for i, generator in enumerate(self.generators):
            generator.set_state(tensors[f"generator|{i}"])


# Routing of all sites and of one site at a time draws nothing.
_NO_DRAWS = torch.Generator()


def _float64(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _log_values(losses: Mapping[str, Tensor], importances: Mapping[str, Tensor]) -> dict[str, list[float]]:
    l0 = [(g.detach() > ALIVE_ABOVE).float().sum(-1).flatten(1).mean(1) for g in importances.values()]
    return {name: v.detach().float().tolist() for name, v in {**losses, "L0": torch.stack(l0).sum(0)}.items()}


def _inputs(batch: Batch) -> Tensor:
    if batch.start_at is not None or batch.position_mask is not None:
        raise ValueError("train_many takes whole inputs without position masks; use train for these batches")
    return batch.inputs


class _Members(CheckedContent):
    """The fields of `members.json`."""

    members: list[dict[str, Any]]
    belongs: dict[str, Any]


def _belongs(
    decompositions: Sequence[Decomposition], members: Sequence[TrainConfig], batches: Sequence[Any]
) -> dict[str, Any]:
    """What the files of a run belong to, by member."""
    each = zip(decompositions, members, batches, strict=True)
    return {f"member {i}": belongs_to(d, m, source) for i, (d, m, source) in enumerate(each)}


def _opened(files: RunFiles, members: Sequence[TrainConfig], belongs: Mapping[str, Any]) -> Checkpoint | None:
    """Begin a run in a directory that is held, or find the checkpoint of the one that is there.

    Raises ValueError, naming the difference, if that one is another.
    """
    path = files.directory / "members.json"
    if not path.is_file():
        files.begin(members[0], {})
        content = {"members": [m.to_json() for m in members], "belongs": belongs}
        write_checked(path, content, format_name=FORMAT, version=FORMAT_VERSION)
        return None
    saved = read_checked(path, _Members, format_name=FORMAT, version=FORMAT_VERSION)
    numbers = [{k: v for k, v in m.to_json().items() if k not in FREE} for m in members]
    if [{k: v for k, v in m.items() if k not in FREE} for m in plain(saved.members)] != plain(numbers):
        raise ValueError(
            f"{files.directory} holds a run of {len(saved.members)} members with other configurations; choose another "
            "out_dir"
        )
    checkpoint = files.newest()
    for name, own in belongs.items():
        then = saved.belongs if checkpoint is None else checkpoint.belongs
        found = then.get(name)
        if not isinstance(found, dict):
            raise ValueError(f"{path} is damaged: it does not say what {name} belongs to")
        if checkpoint is None:
            found, own = {**found, "data": {}}, {**own, "data": {}}
        check_belongs(found, own, f"{files.directory} ({name})")
    return checkpoint


def _data(
    batches: Sequence[Any], decompositions: Sequence[Decomposition], checkpoint: Checkpoint | None, *, goes_on: bool
) -> tuple[list[SeenData], list[Iterator[Batch]]]:
    """For every member the record of its data and the batches that come next; ValueError for other data than before."""
    seen, streams = [], []
    for i, (source, member) in enumerate(zip(batches, decompositions, strict=True)):
        before = None if checkpoint is None else checkpoint.data[str(i)]
        if checkpoint is not None:
            source = same_data(source, before, f"{checkpoint.path} (member {i})")
        stream = endless_batches(source, member, start=0 if checkpoint is None else checkpoint.step)
        seen.append(SeenData(before))
        streams.append(started(stream) if checkpoint is not None and goes_on else stream)
    return seen, streams


def _checked_configs(
    decompositions: Sequence[Decomposition],
    batches: Sequence[Iterable[Any]],
    configs: TrainConfig | Sequence[TrainConfig],
) -> tuple[TrainConfig, ...]:
    if not decompositions:
        raise ValueError("train_many was given no decomposition")
    members = (configs,) * len(decompositions) if isinstance(configs, TrainConfig) else tuple(configs)
    if not len(decompositions) == len(batches) == len(members):
        raise ValueError(
            f"{len(decompositions)} decompositions, {len(batches)} sources of batches, {len(members)} configs; "
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
        terms = tuple(
            dataclasses.replace(term, coefficient=own.coefficient)
            for term, own in zip(member.reconstructions, first.reconstructions, strict=False)
        )
        if dataclasses.replace(member, **same, reconstructions=terms) != first:
            raise ValueError(
                f"the configuration of member {i} differs from the first in more than {', '.join(MAY_DIFFER)} and "
                "coefficients; train them in runs of their own"
            )
    for term in first.reconstructions:
        if not isinstance(mask_source(term.masks), SampledMasks) or term.routing not in ("all", "layerwise"):
            raise ValueError(
                f"{term.name}: train_many supports random masks with routing 'all' or 'layerwise'; use train"
            )
    if first.extra_terms:
        raise ValueError("train_many supports no terms of one's own (extra_terms); use train")
    if first.hidden > 0 or first.precision != "fp32" or not decompositions[0].gates.is_by_site:
        raise ValueError("train_many supports neither hidden reconstruction, bf16, nor the global gate; use train")
    return members
