"""The experiments that `reproduce.py` runs, by name: target, its acceptance rule, decomposition, settings and metrics.

An `Experiment` is what differs between them. To add one is to add a line to `EXPERIMENTS` and, for another kind of
target, its four functions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from experiments.resid_mlp import n_used_directions, recruit, resid_mlp_problems, start, train_resid_mlps
from spd_lens import Decomposition, TrainConfig, decompose
from spd_lens.core import InitKind
from spd_lens.toys import (
    TMS,
    ActiveRows,
    ResidMLP,
    ResidMLPReport,
    SparseFeatures,
    TMSReport,
    resid_mlp_report,
    tms_report,
    tms_target_report,
    train_many_tms,
)
from spd_lens.training import Reconstruction

Report = TMSReport | ResidMLPReport


@dataclass(frozen=True)
class Stage:
    """A part of training, on the sites whose names end with `sites` ("": all of them).

    It has `share` of the experiment's steps, a coefficient of minimality of its own, and a whole schedule of the
    learning rates. What the stages before it learned is where it starts. `factors` are `minimality_factors`;
    `recruits`: before it, what nothing uses starts again (`Experiment.recruit`).
    """

    sites: str
    share: float
    minimality: float
    factors: Mapping[str, float] = dataclasses.field(default_factory=dict)
    recruits: bool = False

    def config(self, whole: TrainConfig, n_sites: int) -> TrainConfig:
        """The settings of this stage; with one site, one site at a time is the same as all."""
        terms = whole.reconstructions if n_sites > 1 else whole.reconstructions[:1]
        steps = max(1, round(self.share * whole.steps))
        own = {"minimality": self.minimality, "minimality_factors": self.factors}
        return whole.changed(steps=steps, reconstructions=terms, **own)

    def to_json(self) -> dict[str, Any]:
        """Plain values, without what a stage leaves out: runs from before there was a choice have it neither."""
        optional = ("factors", "recruits")
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in optional or value}


@dataclass(frozen=True)
class Experiment:
    """One row of the table.

    - `runs`: how many the full experiment has; `group`: how many are trained in one batched program.
    - `targets`: name under which trained targets are cached (variants of the same weights share them), so many seeds
      to a file (`targets_per_file`).
    - `train_targets(seeds)`; `target_problems(model)`: why a target is rejected, on the target alone; `new_target()`:
      an untrained one, into which saved weights are loaded.
    - `features(seed)`: the data of one decomposition; `report(decomposition)`: the metrics and the verdict.
    - `n_subcomponents`: C per site, with `gate_width` and `init` the arguments of `decompose`; `config`: all else.
    - `stages`: parts of training, one after the other; none: all sites from the first step to the last. `start(
      decomposition, data, seed)` sets V and U before the first step; None: as `init` says. `recruit`, with the same
      arguments: see `Stage`. `remarks`: what else a reader of the settings should know.
    - `published`: mean MMCS and ML2R of the paper, where it gives them.
    """

    name: str
    runs: int
    group: int
    targets: str
    targets_per_file: int
    train_targets: Callable[[Sequence[int]], Sequence[nn.Module]]
    target_problems: Callable[[Any], Sequence[str]]
    new_target: Callable[[], nn.Module]
    features: Callable[[int], SparseFeatures]
    report: Callable[[Decomposition], Report]
    n_subcomponents: dict[str, int]
    config: TrainConfig
    gate_width: int = 16
    init: InitKind = "normal"
    published: dict[str, float] = dataclasses.field(default_factory=dict)
    stages: tuple[Stage, ...] = ()
    start: Callable[[Decomposition, Any, int], None] | None = None
    recruit: Callable[[Decomposition, Any, int], None] | None = None
    remarks: dict[str, Any] = dataclasses.field(default_factory=dict)

    def decompose(self, target: nn.Module, seed: int, sites: str = "") -> Decomposition:
        """The untrained decomposition of `target`, which is changed, at the sites whose names end with `sites`."""
        sizes = {name: C for name, C in self.n_subcomponents.items() if name.endswith(sites)}
        decomposition = decompose(target, sizes, gate="scalar", gate_width=self.gate_width, init=self.init, seed=seed)
        if self.start is not None:
            self.start(decomposition, self.features(seed), seed)
        return decomposition

    def settings(self) -> dict[str, Any]:
        """Everything that a result depends on besides the seeds, as plain values."""
        data = self.features(0)
        config = {k: v for k, v in self.config.to_json().items() if k not in _BOOKKEEPING}
        staged = {"stages": [stage.to_json() for stage in self.stages]} if self.stages else {}
        return {
            "n_subcomponents": dict(self.n_subcomponents),
            "gate": {"kind": "scalar", "width": self.gate_width},
            "init": self.init,
            "batch_size": data.batch_size,
            "feature_probability": data.probability,
            "rows": type(data).__name__,
            "config": config,
            **staged,
            **self.remarks,
        }


# Fields of the configuration that do not change what is computed, or that differ from run to run.
# Factors on minimality belong to stages.
_BOOKKEEPING = ("seed", "log_every", "checkpoint_every", "keep_checkpoints", "minimality_factors")

# Found on 5-2: with lr = gate_lr = 1e-3 decoders' gates stay blunt (they fire on a neighbouring feature), with gate_lr
# alone at 1e-2 they decide before V and U have sorted themselves into features; both raised, neither happens. From a
# random start (init "normal", 200 steps of faithfulness warm-up) 5 of 100 runs still ended with merged features; from
# init "exact" none did.
TMS_CONFIG = TrainConfig(
    divergence="mse",
    reconstructions=(Reconstruction(), Reconstruction(routing="layerwise")),
    faithfulness=0.0,
    lr=3e-3,
    gate_lr=1e-2,
    log_every=500,
    checkpoint_every=500,
    keep_checkpoints=1,
)


def _tms(n_features: int, n_hidden: int, *, identity: bool, target_batch: int, batch: int, **rest: Any) -> Experiment:
    size = f"tms_{n_features}-{n_hidden}"
    return Experiment(
        name=size + ("_id" if identity else ""),
        targets=size,
        train_targets=partial(train_many_tms, n_features, n_hidden, identity=identity, batch_size=target_batch),
        target_problems=lambda model: tms_target_report(model).problems,
        new_target=partial(TMS, n_features, n_hidden, identity=identity),
        features=lambda seed: ActiveRows(n_features, batch, probability=0.05, seed=seed),
        report=tms_report,
        init="exact",
        **rest,
    )


# The first stages sort W_in at a low coefficient, which would leave several subcomponents for some features; a short
# one at a higher coefficient removes them. Of two blocks the first, sorted at 4e-5 from the start, had features that
# share subcomponents (86 alive for 100), and the second was sorted better together with the first than alone. In the
# last stage W_in keeps a coefficient of its own: at that of W_out, a subcomponent in block 1 that is on for every
# feature pays.
RESID_MLP_CONFIG = TMS_CONFIG.changed(log_every=250, checkpoint_every=250)


def _resid_mlp(
    n_features: int, n_layers: int, d_mlp: int, *, target_steps: int, batch: int, C: tuple[int, int], **rest: Any
) -> Experiment:
    """C of every `W_in`, and of every `W_out`."""
    name = f"resid_mlp_{n_layers}"
    sites = {f"blocks.{i}.mlp.{kind}": c for i in range(n_layers) for kind, c in zip(("W_in", "W_out"), C, strict=True)}
    used = n_used_directions(n_features, n_layers, d_mlp)
    return Experiment(
        name=name,
        targets=f"{name}_{target_steps}",
        group=1,
        targets_per_file=1,
        train_targets=partial(train_resid_mlps, n_features, n_layers, d_mlp, steps=target_steps),
        target_problems=resid_mlp_problems,
        new_target=partial(ResidMLP, n_features, used, n_layers, d_mlp),
        features=lambda seed: ActiveRows(n_features, batch, probability=0.01, low=-1.0, high=1.0, seed=seed),
        report=resid_mlp_report,
        n_subcomponents=sites,
        init="normal",
        start=start,
        recruit=recruit,
        remarks={"feature_values": [-1, 1], "target_steps": target_steps, "residual_directions_used": used,
                 "start": "W_in from inputs, W_out from a basis"},
        **rest,
    )  # fmt: skip


_ALL = (
    _tms(
        5, 2, identity=False, target_batch=1024, batch=256, runs=100, group=25, targets_per_file=25,
        n_subcomponents={"W_enc": 20, "W_dec": 20},
        config=TMS_CONFIG.changed(steps=4_000, minimality=3e-3),
        published={"mmcs": 1.000, "ml2r": 0.993},
    ),
    _tms(
        5, 2, identity=True, target_batch=1024, batch=256, runs=20, group=20, targets_per_file=25,
        n_subcomponents={"W_enc": 20, "W_id": 20, "W_dec": 20},
        config=TMS_CONFIG.changed(steps=4_000, minimality=3e-3),
        published={"mmcs": 1.000, "ml2r": 0.992},
    ),
    _tms(
        40, 10, identity=False, target_batch=8192, batch=512, runs=20, group=10, targets_per_file=5,
        n_subcomponents={"W_enc": 200, "W_dec": 200},
        config=TMS_CONFIG.changed(steps=4_000, minimality=3e-4),
        published={"mmcs": 1.000, "ml2r": 1.010},
    ),
    _tms(
        40, 10, identity=True, target_batch=8192, batch=512, runs=10, group=10, targets_per_file=5,
        # With 3e-4 features merge: in 8 of 10 runs with 200 subcomponents for W_id, in 2 of 3 (seeds 10 to 12) with 20.
        n_subcomponents={"W_enc": 200, "W_id": 20, "W_dec": 200},
        config=TMS_CONFIG.changed(steps=6_000, minimality=1.5e-4),
        published={"mmcs": 1.000, "ml2r": 1.031},
    ),
    _resid_mlp(
        100, 1, 50, target_steps=1_000, batch=384, C=(200, 100), runs=3,
        config=RESID_MLP_CONFIG.changed(steps=4_800),
        stages=(Stage("W_in", 1 / 2, 4e-5), Stage("W_in", 1 / 6, 1e-4), Stage("", 1 / 3, 2e-6)),
    ),
    _resid_mlp(
        100, 2, 25, target_steps=1_000, batch=384, C=(200, 100), runs=6,
        config=RESID_MLP_CONFIG.changed(steps=12_000),
        stages=(Stage("0.mlp.W_in", 0.12, 1e-5), Stage("0.mlp.W_in", 0.05, 3e-5), Stage("W_in", 0.33, 4e-5),
                Stage("W_in", 0.17, 4e-5, recruits=True), Stage("", 0.33, 1e-6, {"*.W_in": 40.0})),
    ),
    _resid_mlp(
        102, 3, 17, target_steps=10_000, batch=384, C=(200, 100), runs=1,
        config=RESID_MLP_CONFIG.changed(steps=20_000),
        stages=(Stage("0.mlp.W_in", 0.07, 6e-6), Stage("0.mlp.W_in", 0.035, 1.5e-5), Stage("W_in", 0.224, 2e-5),
                Stage("W_in", 0.14, 2e-5, recruits=True),
                *3 * (Stage("W_in", 0.1, 2e-5, {"blocks.0.*": 0.7}, recruits=True),),
                Stage("", 0.231, 7e-7, {"*.W_in": 32.0, "blocks.0.mlp.W_in": 20.0})),
    ),
)  # fmt: skip
EXPERIMENTS: dict[str, Experiment] = {experiment.name: experiment for experiment in _ALL}


# The same for all targets of an experiment, and not part of what variants of the weights share.
FIXED_BUFFERS = frozenset({"W_id"})


def target_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What tells one target of an experiment from another: trained weights, and an embedding drawn from the seed."""
    return {name: tensor.detach() for name, tensor in model.state_dict().items() if name not in FIXED_BUFFERS}


def load_target(experiment: Experiment, tensors: dict[str, Tensor]) -> nn.Module:
    """A target with the tensors that `target_tensors` gave; variants that share them differ in fixed buffers."""
    model = experiment.new_target()
    own = model.state_dict()
    missing = own.keys() - tensors.keys() - FIXED_BUFFERS
    if missing:
        raise ValueError(f"the saved target of {experiment.name} has no {sorted(missing)}")
    model.load_state_dict({**own, **{name: value for name, value in tensors.items() if name in own}})
    return model
