"""Attribution-based Parameter Decomposition of toys (APD; Braun et al. 2025, arXiv 2501.14926), SPD's predecessor.

The parameters `theta` are written as a sum of C components that each span *all* matrices,

    theta = sum_c P_c,    P_c at a matrix = sum_m V[c, m, :]^T U[c, m, :],    V [C m d_in], U [C m d_out]

(what the APD paper calls U is called V here, as in the rest of this package: the side of the input). How much c matters
for the outputs f on an input x is its attribution

    A_c(x) = sqrt((1 / d_out) sum_o (sum_theta df_o/dtheta * P_c)^2),

the root mean square over outputs of f's derivative in the direction P_c. The largest `k * batch` attributions of a
batch are active, `s_c(x) = 1`, the others 0. Trained are V and U, on

    faithfulness  |theta* - sum_c P_c|^2 / N                                       (N the number of entries of theta)
    minimality    D(f(x; theta*), f(x; sum_c s_c(x) P_c)), the mean squared difference; `beta` is its coefficient
    simplicity    sum_c s_c(x) sum_{matrices, m} (|V[c, m]|^2 |U[c, m]|^2)^(p/2) / N, mean over x; `alpha`
    hidden        as minimality, on the activations after the ReLU

The paper's appendix writes faithfulness and simplicity as sums; its coefficients belong to these means, which its main
text has for faithfulness and the authors' public code for both. As in the paper, biases are not decomposed but always
on, and a matrix that the target uses twice (TMS: encoder and decoder) is one matrix of one component.

Attributions are computed in closed form, for all outputs at once, where gradients would take a backward pass for each
output. Inputs without any active feature are left out: they have no attribution and no error (should k ask for more
pairs than the others have, all of those are active).

Cost per step: about 4 C forward passes on the other inputs, and 16 bytes for each of the `C m (d_in + d_out)` numbers
per matrix. Left out on purpose: TMS with +ID (where APD is published to fail), residual MLPs of
several blocks, and the paper's variant without top-k.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from spd_lens.baselines.apd_targets import Matrices, Target, between_features, components_between_features, target_of
from spd_lens.support.checked_json import CheckedContent, checked_text, read_checked
from spd_lens.support.files import given_directory, numbers, plain, tensor_hash
from spd_lens.support.owners import held
from spd_lens.support.progress import tqdm
from spd_lens.support.saved_pair import SavedPair
from spd_lens.toys.resid_mlp import ResidMLP
from spd_lens.toys.tms import TMS
from spd_lens.training.checkpoint import load_optimizer_tensors, optimizer_tensors

# Under the root of the simplicity loss, as in the authors' code: its gradient at 0 is infinite for p < 1.
EPSILON = 1e-16


# Attributions of as many components are taken together as keep the tensors in the processor's cache.
ENTRIES_AT_ONCE = 250_000
FORMAT = "spd_lens APD run"
FORMAT_VERSION = 2


# What the members of one run may differ in; everything else decides the shapes and the operations of a step.
COEFFICIENTS = ("faithfulness", "minimality", "simplicity", "hidden")
MAY_DIFFER = ("seed", "k", *COEFFICIENTS)


@dataclass(frozen=True)
class APDConfig:
    """All choices of an APD run; the presets below are the paper's.

    - `n_components` C; `rank` m, terms per component and matrix (None: `min(d_in, d_out)`); `k`: active components per
      input, on the average over a batch.
    - `minimality` beta, `simplicity` alpha with exponent `p`, `hidden` and `faithfulness`: coefficients.
    - `attributions_from`: whether derivatives are taken at the target's parameters or at `sum_c P_c`.
    - `unit_norm`: every V[c, m] is kept at length 1, its gradient at a right angle to it.
    - `lr` of Adam (no weight decay) with a linear warm-up over a fraction `warmup` of the steps; `"cosine"` is a
      quarter of a period, `cos(pi t / 2)` with t from 0 to 1, as in the authors' code.
    - `init_scale`: V, U start normal with standard deviation `init_scale * sqrt(2 / (C m d))`, d the length of a row.
    - `seed`: of the initial values and of the data.
    """

    n_components: int
    k: float
    lr: float
    steps: int
    batch_size: int = 2048
    rank: int | None = None
    faithfulness: float = 1.0
    minimality: float = 1.0
    simplicity: float = 1.0
    p: float = 1.0
    hidden: float = 0.0
    attributions_from: Literal["target", "components"] = "target"
    unit_norm: bool = False
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: float = 0.05
    init_scale: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("n_components", "k", "lr", "steps", "batch_size", "p", "init_scale"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}; expected a positive number")
        if self.n_active < 1:
            raise ValueError(f"k={self.k} of {self.batch_size} inputs: no component would ever be active")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup={self.warmup}; expected a fraction of the steps, at least 0 and below 1")

    @property
    def n_active(self) -> int:
        """Pairs of input and component that are active in a batch, `floor(k * batch_size)`."""
        return math.floor(self.k * self.batch_size)

    def changed(self, **changes: Any) -> APDConfig:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def lr_factor(self, step: int) -> float:
        """What the learning rate is multiplied with at a step."""
        warm = int(self.warmup * self.steps)
        if step < warm:
            return (step + 1) / warm
        if self.schedule == "constant":
            return 1.0
        return math.cos(0.5 * math.pi * (step - warm) / max(1, self.steps - warm))


# Appendix D of the paper. Its 5-2 runs have as many components as features (the authors' code).
APD_TMS_5_2 = APDConfig(
    n_components=5, k=0.211, lr=0.03, steps=20_000, minimality=1.0, simplicity=0.7, p=1.0,
    attributions_from="components",
)  # fmt: skip


APD_TMS_40_10 = APDConfig(
    n_components=50, k=1.0, lr=1e-3, steps=20_000, minimality=10.0, simplicity=20.0, p=0.9, schedule="cosine"
)


# Batch 256 is that of appendix C.2 and of the authors' code; appendix D says 2048.
APD_RESID_MLP_1 = APDConfig(
    n_components=130, k=1.28, lr=1e-3, steps=40_000, batch_size=256, minimality=1.0, simplicity=10.0, p=0.9, hidden=1.0,
    unit_norm=True, schedule="cosine", warmup=0.01, init_scale=2.0,
)  # fmt: skip


# -- attributions and top-k ------------------------------------------------------------------------------------------


def attributions(
    target: Target, matrices: Matrices, P: Matrices, constants: Matrices, x: Float[Tensor, "batch features"]
) -> Float[Tensor, "batch C"]:
    """`A_c(x)` at the parameters `matrices`, for components `P [C d_in d_out]`; see the head of this file."""

    at_once = max(1, ENTRIES_AT_ONCE // max(1, x.numel()))
    sizes = []
    for start in range(0, len(next(iter(P.values()))), at_once):
        some = {name: p[start : start + at_once] for name, p in P.items()}
        sizes.append(target.derivatives(matrices, some, constants, x).square().mean(-1).sqrt())
    return torch.cat(sizes).mT


def batch_top_k(
    scores: Float[Tensor, "member batch C"], counts: Int[Tensor, " member"]
) -> Float[Tensor, "member batch C"]:
    """1 for each member's `counts` largest scores over inputs and components together, else 0."""
    flat = scores.flatten(1)
    largest = min(int(counts.max()), flat.shape[1])
    where = flat.topk(largest, dim=1).indices
    counted = torch.arange(largest, device=flat.device) < counts[:, None]
    return torch.zeros_like(flat).scatter_(1, where, counted.to(flat)).view_as(scores)


# -- losses ----------------------------------------------------------------------------------------------------------


def simplicity_loss(V: Matrices, U: Matrices, rates: Float[Tensor, " C"], p: float) -> Float[Tensor, ""]:
    """`sum_c rates_c sum_{matrices, m} (|V[c, m]|^2 |U[c, m]|^2)^(p/2) / N`, `rates_c` the mean of s_c over inputs.

    `|V[c, m]| |U[c, m]|` stand for the singular values of P_c: summed they are at least as large as its Schatten norm.
    """
    total = rates.new_zeros(())
    for name, v in V.items():
        squares = v.square().sum(-1) * U[name].square().sum(-1)
        total = total + (rates * (squares + EPSILON).pow(p / 2).sum(-1)).sum()
    return total / _n_entries(V, U)


def faithfulness_loss(V: Matrices, U: Matrices, matrices: Matrices) -> Float[Tensor, ""]:
    """`|theta* - sum_c P_c|^2 / N`, of whole matrices."""
    sums = {name: v.flatten(0, 1).mT @ U[name].flatten(0, 1) for name, v in V.items()}
    return torch.stack([(sums[name] - W).square().sum() for name, W in matrices.items()]).sum() / _n_entries(V, U)


def sparse_forward(
    target: Target,
    P: Matrices,
    constants: Matrices,
    active: Float[Tensor, "batch C"],
    x: Float[Tensor, "batch features"],
) -> dict[str, Tensor]:
    """What the target's `forward` gives with the parameters `sum_c s_c(x) P_c`, of every input its own."""
    kappa = {name: (active @ p.flatten(1)).unflatten(1, p.shape[1:]) for name, p in P.items()}
    return torch.vmap(lambda own, row: target.forward(own, constants, row))(kappa, x)


def _n_entries(V: Matrices, U: Matrices) -> int:
    return sum(v.shape[-1] * U[name].shape[-1] for name, v in V.items())


# -- training --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class APD:
    """A trained APD: `V[name] [C m d_in]` and `U[name] [C m d_out]` of every matrix; `log` one dict per logged step."""

    model: TMS | ResidMLP
    config: APDConfig
    V: Matrices
    U: Matrices
    log: list[dict[str, Any]]

    def components(self, name: str) -> Float[Tensor, "C d_in d_out"]:
        """`P_c` at one matrix: `"W"`, `"W_in"` or `"W_out"`."""
        return self.V[name].mT @ self.U[name]

    @torch.no_grad()
    def attributions(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, "batch C"]:
        """`A_c(x)`, at the parameters at which it was trained."""
        target = target_of(self.model)
        P = components_between_features(self.V, self.U, target.constants)
        at = {name: p.sum(0) for name, p in P.items()}
        if self.config.attributions_from == "target":
            at = {name: between_features(name, W, target.constants) for name, W in target.matrices.items()}
        return attributions(target, at, P, target.constants, x)


def train_apd(
    models: Sequence[TMS] | Sequence[ResidMLP],
    configs: APDConfig | Sequence[APDConfig],
    *,
    out_dir: str | Path | None = None,
    checkpoint_every: int = 1_000,
    log_every: int = 100,
) -> list[APD]:
    """Decompose every model (same sizes) with its config, all in one batched run; none enters another's numbers.

    Configs may differ in seed, k and coefficients. With `out_dir` a checkpoint is written every so many steps and
    at the end; a run that finds its own there continues it to the same end.
    """
    members = _checked(models, configs)
    run = _Run(models, members)
    if out_dir is None:
        _train(run, None, checkpoint_every, log_every)
    else:
        directory = given_directory(out_dir, "out_dir")
        directory.mkdir(parents=True, exist_ok=True)
        with held(directory / "running.json", "training"):
            _train(run, directory, checkpoint_every, log_every)
    return run.results()


def _train(run: _Run, directory: Path | None, checkpoint_every: int, log_every: int) -> None:
    first = run.config
    step = 0 if directory is None else run.load(directory)
    for now in tqdm(range(step, first.steps), initial=step, total=first.steps, desc=f"APD x {len(run.members)}"):
        losses = run.step(now)
        last = now + 1 == first.steps
        if last or now % log_every == 0:
            run.log.append({"step": now, **{name: loss.tolist() for name, loss in losses.items()}})
        if directory is not None and (last or (now + 1) % checkpoint_every == 0):
            run.save(directory, now + 1)


class _Run:
    """What changes while training, stacked along a member axis, and one step of it."""

    def __init__(self, models: Sequence[TMS] | Sequence[ResidMLP], members: Sequence[APDConfig]) -> None:
        self.models, self.members, self.config = models, members, members[0]
        targets = [target_of(model) for model in models]
        self.target = targets[0]
        self.matrices = _stacked([t.matrices for t in targets])
        self.constants = _stacked([t.constants for t in targets])
        self.seen = {name: between_features(name, W, self.constants) for name, W in self.matrices.items()}
        starts = [_initial_factors(t.matrices, member) for t, member in zip(targets, members, strict=True)]
        self.V, self.U = _stacked([V for V, _ in starts]), _stacked([U for _, U in starts])
        self.parameters = {f"{side} {n}": t for side, own in (("V", self.V), ("U", self.U)) for n, t in own.items()}
        for p in self.parameters.values():
            p.requires_grad_()
        dtype = next(iter(self.matrices.values())).dtype
        self.coefficients = {n: torch.tensor([getattr(m, n) for m in members], dtype=dtype) for n in COEFFICIENTS}
        # Adam works entry by entry, so one over stacked members is one for each.
        self.adam = torch.optim.Adam(self.parameters.values(), lr=self.config.lr, fused=True)
        self.counts = torch.tensor([m.n_active for m in members])
        self.data = [self.target.features(self.target.n_features, m.batch_size, seed=m.seed) for m in members]
        self.log: list[dict[str, Any]] = []
        self._normalise()

    def step(self, step: int) -> dict[str, Tensor]:
        """One training step; the losses `[S]`, unweighted."""
        x = self._batch(step)
        losses = self.losses(x)
        total = sum(self.coefficients[name] * loss for name, loss in losses.items())
        torch.as_tensor(total).sum().backward()
        if self.config.unit_norm:
            for v in self.V.values():
                assert v.grad is not None
                v.grad -= (v.grad * v.detach()).sum(-1, keepdim=True) * v.detach()
        self.adam.param_groups[0]["lr"] = self.config.lr * self.config.lr_factor(step)
        self.adam.step()
        self.adam.zero_grad()
        self._normalise()
        return {name: loss.detach() for name, loss in losses.items()}

    def losses(self, x: Float[Tensor, "member batch features"]) -> dict[str, Tensor]:
        """All terms `[S]` on a batch without its zero inputs."""
        target, constants, config = self.target, self.constants, self.config
        P = torch.vmap(components_between_features)(self.V, self.U, constants)
        with torch.no_grad():
            clean = torch.vmap(target.forward)(self.seen, constants, x)
            fixed = {name: p.detach() for name, p in P.items()}
            at = self.seen if config.attributions_from == "target" else {n: p.sum(1) for n, p in fixed.items()}
            scores = torch.vmap(lambda a, p, c, x: attributions(target, a, p, c, x))(at, fixed, constants, x)
            # Inputs that only fill up a smaller batch are never active.
            real = (x != 0).any(2, keepdim=True)
            active = batch_top_k(scores.masked_fill(~real, -1), self.counts) * real
        found = torch.vmap(lambda p, c, s, x: sparse_forward(target, p, c, s, x))(P, constants, active, x)
        rates = active.sum(1) / config.batch_size
        losses = {
            "faithfulness": torch.vmap(faithfulness_loss)(self.V, self.U, self.matrices),
            "simplicity": torch.vmap(lambda v, u, r: simplicity_loss(v, u, r, config.p))(self.V, self.U, rates),
        }
        for name, wanted in clean.items():
            losses[name] = (found[name] - wanted).square().sum((1, 2)) / (config.batch_size * wanted.shape[-1])
        return losses

    def _batch(self, step: int) -> Float[Tensor, "member batch features"]:
        """The inputs with an active feature; members with fewer of them are filled up with zeros."""
        batches = [source.batch(step) for source in self.data]
        batches = [x[(x != 0).any(1)] for x in batches]
        return torch.nn.utils.rnn.pad_sequence(batches, batch_first=True).to(next(iter(self.matrices.values())))

    @torch.no_grad()
    def _normalise(self) -> None:
        if self.config.unit_norm:
            for v in self.V.values():
                v.div_(v.norm(dim=-1, keepdim=True))

    def results(self) -> list[APD]:
        """One `APD` per member."""
        found = []
        for i, (model, member) in enumerate(zip(self.models, self.members, strict=True)):
            V, U = ({n: t[i].detach().clone() for n, t in side.items()} for side in (self.V, self.U))
            log = [{n: v if n == "step" else v[i] for n, v in line.items()} for line in self.log]
            found.append(APD(model, member, V, U, log))
        return found

    def save(self, directory: Path, step: int) -> None:
        """Everything that the next step depends on, with the models and configs it belongs to."""
        content = {
            "step": step,
            "configs": [dataclasses.asdict(m) for m in self.members],
            "models": self._hashes(),
            "log": self.log,
        }

        def about(digest: str) -> str:
            return checked_text({**content, "sha256": digest}, format_name=FORMAT, version=FORMAT_VERSION)

        _files(directory).write({**self.parameters, **optimizer_tensors(self.adam, "adam")}, about)

    def _hashes(self) -> list[dict[str, str]]:
        """What every member's model is: a hash of each of its matrices."""
        each = range(len(self.members))
        everything = {**self.matrices, **{f"constant {name}": t for name, t in self.constants.items()}}
        return [{name: tensor_hash(t[i]) for name, t in everything.items()} for i in each]

    @torch.no_grad()
    def load(self, directory: Path) -> int:
        """Undo `save`; the step to go on from, 0 where nothing was saved. Raises ValueError for a run of others."""
        files = _files(directory)
        if not (directory / files.config).exists() and not (directory / files.tensors).exists():
            return 0
        saved, tensors = files.load()
        if saved.configs != plain([dataclasses.asdict(m) for m in self.members]):
            raise ValueError(f"{directory} holds an APD run of {len(saved.configs)} members with other configs")
        if saved.models != self._hashes():
            raise ValueError(f"{directory} holds an APD run on other models; choose another out_dir")
        if saved.step > self.config.steps or any(tensors[n].shape != p.shape for n, p in self.parameters.items()):
            raise ValueError(f"{directory / files.config} is damaged: its step or its sizes are not of this run")
        load_optimizer_tensors(self.adam, "adam", tensors)
        for name, p in self.parameters.items():
            p.copy_(tensors[name])
        self.log = numbers(saved.log)
        return saved.step


class _SavedRun(CheckedContent):
    """The fields of `run.json`."""

    step: int = Field(ge=1)
    sha256: str
    configs: list[dict[str, Any]]
    models: list[dict[str, str]]
    log: list[dict[str, Any]]


def _files(directory: Path) -> SavedPair[_SavedRun]:
    def read(path: Path) -> _SavedRun:
        return read_checked(path, _SavedRun, format_name=FORMAT, version=FORMAT_VERSION)

    return SavedPair(directory, "run.safetensors", "run.json", read, lambda saved: saved.sha256)


def _stacked(members: Sequence[Matrices]) -> Matrices:
    return {name: torch.stack([m[name] for m in members]) for name in members[0]}


def _initial_factors(matrices: Matrices, config: APDConfig) -> tuple[Matrices, Matrices]:
    generator = torch.Generator().manual_seed(config.seed)
    V, U = {}, {}
    for name, W in matrices.items():
        rank = min(W.shape) if config.rank is None else config.rank
        for side, d in ((V, W.shape[0]), (U, W.shape[1])):
            scale = config.init_scale * math.sqrt(2 / (config.n_components * rank * d))
            side[name] = scale * torch.randn(config.n_components, rank, d, generator=generator).to(W)
    return V, U


def _checked(
    models: Sequence[TMS] | Sequence[ResidMLP], configs: APDConfig | Sequence[APDConfig]
) -> tuple[APDConfig, ...]:
    members = (configs,) * len(models) if isinstance(configs, APDConfig) else tuple(configs)
    if not models or len(models) != len(members):
        raise ValueError(f"{len(models)} models and {len(members)} configs; expected one config for every model")
    for i, member in enumerate(members):
        if member.changed(**{name: getattr(members[0], name) for name in MAY_DIFFER}) != members[0]:
            raise ValueError(
                f"the config of member {i} differs from the first in more than {', '.join(MAY_DIFFER)}; train them "
                "in runs of their own"
            )
    shapes = {str([tuple(W.shape) for W in target_of(model).matrices.values()]) for model in models}
    if len(shapes) > 1:
        raise ValueError(f"the models do not have the same sizes: {', '.join(sorted(shapes))}")
    return members
