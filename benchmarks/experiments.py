"""The experiments that `reproduce.py` runs, by name: target, its acceptance rule, decomposition, settings and metrics.

An `Experiment` is what differs between them. To add one is to add a line to `EXPERIMENTS` and, for another kind of
target, its four functions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from spd_lens import Decomposition, TrainConfig, decompose
from spd_lens.config import Reconstruction
from spd_lens.factors import InitKind
from spd_lens.known_solution import ResidMLPReport, TMSReport, tms_report
from spd_lens.toys.features import SparseFeatures
from spd_lens.toys.tms import TMS
from spd_lens.toys.train_target import tms_target_report, train_many_tms

Report = TMSReport | ResidMLPReport


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
    - `published`: mean MMCS and ML2R of the paper.
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

    def decompose(self, target: nn.Module, seed: int) -> Decomposition:
        """The untrained decomposition of `target`, which is changed."""
        return decompose(
            target, dict(self.n_subcomponents), gate="scalar", gate_width=self.gate_width, init=self.init, seed=seed
        )

    def settings(self) -> dict[str, Any]:
        """Everything that a result depends on besides the seeds, as plain values."""
        data = self.features(0)
        config = {k: v for k, v in self.config.to_json().items() if k not in _BOOKKEEPING}
        return {
            "n_subcomponents": dict(self.n_subcomponents),
            "gate": {"kind": "scalar", "width": self.gate_width},
            "init": self.init,
            "batch_size": data.batch_size,
            "feature_probability": data.probability,
            "rows": type(data).__name__,
            "config": config,
        }


# Fields of the configuration that do not change what is computed, or that differ from run to run.
_BOOKKEEPING = ("seed", "log_every", "checkpoint_every", "keep_checkpoints")

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


class ActiveRows(SparseFeatures):
    """Sparse features without the rows in which none is on: `batch_size` rows that have at least one.

    On an all-zero row every activation is 0, so reconstruction is exact under all masks and nothing is learned but that
    a gate should be 0 at 0, which the other rows teach as well. With 5 features at probability 0.05 they are 77 % of
    all rows: 256 active rows tell as much as 1,131 of the paper's.
    """

    def batch(self, index: int) -> Float[Tensor, "batch features"]:
        """Batch number `index`."""
        share = 1 - (1 - self.probability) ** self.n_features
        draw = int(1.3 * self.batch_size / share) + 200
        source = SparseFeatures(
            self.n_features, draw, probability=self.probability, low=self.low, high=self.high, seed=self.seed
        )
        x = source.batch(index)
        x = x[x.any(dim=1)][: self.batch_size]
        assert len(x) == self.batch_size, "seven standard deviations below the expected number of active rows"
        return x


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
        n_subcomponents={"W_enc": 200, "W_id": 200, "W_dec": 200},
        config=TMS_CONFIG.changed(steps=4_000, minimality=3e-4),
        published={"mmcs": 1.000, "ml2r": 1.031},
    ),
)  # fmt: skip
EXPERIMENTS: dict[str, Experiment] = {experiment.name: experiment for experiment in _ALL}


def load_target(experiment: Experiment, tensors: dict[str, Tensor]) -> nn.Module:
    """A target with the trained weights of a `state_dict`; variants that share them differ in fixed buffers."""
    model = experiment.new_target()
    own = model.state_dict()
    missing = dict(model.named_parameters()).keys() - tensors.keys()
    if missing:
        raise ValueError(f"the saved target of {experiment.name} has no {sorted(missing)}")
    model.load_state_dict({**own, **{name: value for name, value in tensors.items() if name in own}})
    return model
