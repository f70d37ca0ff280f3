"""`Learner`: everything that changes while training, and so everything that a checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.draws import RowsGenerator
from spd_lens.data.processes import Processes, is_shared
from spd_lens.hosts.site import match_sites
from spd_lens.objective.mask_sources import AdversarialMasks, MaskSource, PersistentMasks, mask_source
from spd_lens.support.shown import short_repr
from spd_lens.training.checkpoint import load_optimizer_tensors, optimizer_tensors
from spd_lens.training.config import TrainConfig
from spd_lens.training.shards import shared_like
from spd_lens.training.weights import Weights


@dataclass
class Learner:
    """Everything that changes while training, and so everything that a checkpoint holds."""

    decomposition: Decomposition
    config: TrainConfig
    optimizer: torch.optim.Optimizer
    generators: dict[str, torch.Generator]
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    sum_over_processes: Callable[[Tensor], Tensor] | None = None
    processes: Processes = field(default_factory=Processes)
    sources: dict[str, MaskSource] = field(init=False)
    targets: dict[str, Tensor] = field(default_factory=dict)
    minimality_factors: dict[str, float] = field(default_factory=dict)
    weights: Weights = field(init=False)

    __repr__ = short_repr

    def __post_init__(self) -> None:
        self.sources = {term.name: mask_source(term.masks) for term in self.config.reconstructions}
        self.weights = Weights([self.config], (), like=next(iter(self.decomposition.values())).V)
        if self.processes.count > 1:
            for source in self.sources.values():
                source.whole_batch = self.processes.whole_batch

    def tensors(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, by name; the same in every process, and for any number of them."""
        tensors = {f"decomposition.{name}": t for name, t in self.decomposition.tensors().items()}
        tensors |= optimizer_tensors(self.optimizer, "adam")
        tensors |= {f"generator.{name}": g.get_state() for name, g in self.generators.items()}
        tensors |= {f"weights.{name}": value for name, value in self.weights.tensors().items()}
        for term, source in self.sources.items():
            state = source.state()
            if source.by_rows:
                state = {key: self.processes.join_rows(value) for key, value in state.items()}
            tensors |= {f"masks.{term}|{key}": value for key, value in state.items()}
        return tensors

    def shared(self) -> dict[str, Tensor]:
        """Those of `tensors` of which every process has its part, by name, each as a parameter of its kind."""
        found = {f"decomposition.{name}": t for name, t in self.decomposition.tensors().items()}
        for i, p in enumerate(p for group in self.optimizer.param_groups for p in group["params"]):
            found |= {f"adam.{i}.{key}": p for key in ("exp_avg", "exp_avg_sq")}
        return {name: t for name, t in found.items() if is_shared(t)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Undo `tensors`, which may be whole where this learner shares them out."""

        def below(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        if shared := self.shared():
            # A checkpoint of whole tensors; those of shards have been read as shards.
            tensors = {
                name: shared_like(t, shared[name]) if name in shared and not is_shared(t) else t
                for name, t in tensors.items()
            }
        self.decomposition.load_tensors(below("decomposition."))
        load_optimizer_tensors(self.optimizer, "adam", tensors)
        self.weights.load(below("weights."))
        for name, generator in self.generators.items():
            generator.set_state(tensors[f"generator.{name}"])
        for name, source in self.sources.items():
            state = below(f"masks.{name}|")
            if source.by_rows:
                state = {key: self.processes.take_rows(value) for key, value in state.items()}
            source.load(state, self.decomposition.device)


def make_learner(decomposition: Decomposition, config: TrainConfig, processes: Processes | None = None) -> Learner:
    """Everything that changes while training; `accumulate_gradients(learner, batch, step)` then takes a step."""
    processes = processes or Processes()
    decomposition.starts.require_stop(config.stop_at)
    groups = [{"params": decomposition.subcomponent_parameters()}, {"params": decomposition.gate_parameters()}]
    device = decomposition.device
    _check_accumulated(config)
    seed = config.seed * 1_000_003
    shares = processes.count > 1 or config.accumulate > 1
    generators: dict[str, torch.Generator] = {
        "masks": _generator(device, seed + 1, processes, shares),
        "adversary": _generator(device, seed + 2, processes, shares),
        # On the CPU, so that which rows are routed is known without waiting for the device.
        "routing": _generator(torch.device("cpu"), seed + 3, processes, shares),
    }
    adam = torch.optim.Adam(groups, lr=config.lr, fused=True, capturable=device.type == "cuda")
    learner = Learner(decomposition, config, adam, generators, processes=processes)
    if config.precision == "bf16":
        learner.autocast = partial(torch.autocast, device.type, torch.bfloat16)
    learner.minimality_factors = match_sites(config.minimality_factors, decomposition)
    learner.targets = {name: w.target_weight.detach() for name, w in decomposition.items()}
    if processes.count > 1:
        learner.sum_over_processes = processes.sum_with_gradients
    return learner


def _generator(device: torch.device, seed: int, processes: Processes, shares: bool) -> torch.Generator:
    if not shares:
        return torch.Generator(device).manual_seed(seed)
    return RowsGenerator.of(device, seed, rank=processes.rank, count=processes.count)


def _check_accumulated(config: TrainConfig) -> None:
    """ValueError for a climbing mask source of one's own with a batch in parts: it would want masks of all rows."""
    for term in config.reconstructions:
        source = mask_source(term.masks)
        if config.accumulate > 1 and source.climbs and not isinstance(source, (AdversarialMasks, PersistentMasks)):
            raise ValueError(
                f"accumulate={config.accumulate} with the climbing mask source {source.name!r} of your own, which asks "
                "for masks of a whole batch; expected accumulate=1, or PGD, Persistent or Merged"
            )
