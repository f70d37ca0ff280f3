"""`APDLearner`: one training step of APD, for many members at once, and its checkpoint."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from spd_lens.baselines.apd import APD
from spd_lens.baselines.apd_config import COEFFICIENTS, APDConfig
from spd_lens.baselines.apd_losses import attributions, batch_top_k, faithfulness_loss, simplicity_loss, sparse_forward
from spd_lens.baselines.apd_targets import Matrices, between_features, components_between_features, target_of
from spd_lens.support.checked_json import CheckedContent, checked_text, read_checked
from spd_lens.support.files import numbers, plain, tensor_hash
from spd_lens.support.saved_pair import SavedPair
from spd_lens.toys.resid_mlp import ResidMLP
from spd_lens.toys.tms import TMS
from spd_lens.training.checkpoint import load_optimizer_tensors, optimizer_tensors

FORMAT = "spd_lens APD run"
FORMAT_VERSION = 2


class APDLearner:
    """Everything that changes while training, stacked along a member axis; `step(batch(step), step)` takes a step."""

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

    def step(self, x: Float[Tensor, "member batch features"], step: int) -> dict[str, Tensor]:
        """One training step; the losses `[S]`, unweighted."""
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

    def batch(self, step: int) -> Float[Tensor, "member batch features"]:
        """The inputs with an active feature; members with fewer of them are filled up with zeros."""
        batches = [features.batch(step) for features in self.data]
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
