"""What each term of the loss weighs at a step, where the run itself finds a part of it.

A coefficient of minimality weighs counts against a divergence, whose size differs by a factor of hundred between
models. Two ways out, which may be combined:

- `relative_reconstruction`: reconstruction terms are divided by `D_off`, the divergence with everything switched off,
  which is a property of target and data. A coefficient `lambda` then says: a subcomponent has to be worth the share
  `lambda` of the behaviour wherever it is on.
- `tolerance`: the largest divergence that may be spent. The coefficient is `minimality * exp(l)`, and `l` follows
  `l += rate * clamp(1 - D / tolerance, -1, 1)` from step to step (dual ascent), D the mean of the reconstruction terms:
  it rises while less is spent than may be, and falls otherwise.

Cost: one forward pass in each of the first `MEASURED_STEPS` steps, and a few operations on numbers. Nothing waits for
the device. Left out on purpose: tolerances for single sites or terms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens.training.config import TrainConfig
from spd_lens.training.terms import IMPORTANCE_TERMS, coefficient

MEASURED_STEPS = 32
# `l` stays within these bounds: a coefficient that ran away while nothing could be done has to come back.
LARGEST_LOG = 9.0


class Weights:
    """The weights of all terms: numbers for one configuration, vectors `[S]` for those of S members."""

    def __init__(self, configs: Sequence[TrainConfig], shape: tuple[int, ...], *, like: Tensor) -> None:
        self.configs = configs
        self.config = configs[0]
        dtype = torch.promote_types(like.dtype, torch.float32)
        self._off_sum = torch.zeros(shape, dtype=dtype, device=like.device)
        self._off_count = torch.zeros((), dtype=dtype, device=like.device)
        self._log = torch.zeros(shape, dtype=dtype, device=like.device)
        self._spent: Tensor | None = None
        self._rate = 0.0
        self._sent: dict[tuple[float, ...], Tensor] = {}

    def of(self, name: str) -> float | Float[Tensor, "*S"]:
        """The weight of a term in the total loss."""
        own = self._coefficient(name)
        if self.config.relative_reconstruction and self._is_reconstruction(name):
            return own / self.everything_off
        if self.config.tolerance is not None and name in IMPORTANCE_TERMS:
            return own * self._log.exp()
        return own

    def measures(self, step: int) -> bool:
        """Whether a pass with everything off belongs to this step."""
        return self.config.relative_reconstruction and step < MEASURED_STEPS

    def measure(self, divergence: Float[Tensor, "*S"]) -> None:
        """Take in the divergence of one batch with everything off."""
        self._off_sum.add_(divergence.detach())
        self._off_count.add_(1)

    @property
    def everything_off(self) -> Float[Tensor, "*S"]:
        """`D_off`: the mean of what was measured."""
        return self._off_sum / self._off_count

    def spend(self, divergence: Float[Tensor, "*S"], step: int) -> None:
        """Note what the reconstruction terms of a step cost on average, which `adapt` then reads."""
        relative = self.config.relative_reconstruction
        self._spent = divergence / self.everything_off if relative else divergence
        self._rate = self.config.tolerance_rate / self.config.steps * self.config.lr_factor(step)

    @torch.no_grad()
    def adapt(self) -> None:
        """Move the coefficient of minimality by what was spent, if there is a tolerance."""
        if self.config.tolerance is None or self._spent is None:
            return
        tolerance = self._each([float(c.tolerance or 0.0) for c in self.configs])
        self._log.add_((1 - self._spent / tolerance).clamp_(-1, 1), alpha=self._rate)
        self._log.clamp_(-LARGEST_LOG, LARGEST_LOG)
        self._spent = None

    def mean_reconstruction(self, losses: Mapping[str, Tensor]) -> Float[Tensor, "*S"]:
        """The reconstruction terms of a step, averaged with their coefficients as weights."""
        names = [name for name in losses if self._is_reconstruction(name)]
        total = sum(self._coefficient(name) for name in names)
        return torch.stack([self._coefficient(name) * losses[name] for name in names]).sum(0) / total

    def shown(self) -> dict[str, Tensor]:
        """What belongs into the log."""
        found = {}
        if self.config.relative_reconstruction:
            found["everything_off"] = self.everything_off
        if self.config.tolerance is not None:
            found["minimality_coefficient"] = self._log.exp() * self._coefficient("minimality")
        return found

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint has to hold; nothing where coefficients are all there is."""
        found = {}
        if self.config.relative_reconstruction:
            found |= {"off_sum": self._off_sum, "off_count": self._off_count}
        if self.config.tolerance is not None:
            found["log"] = self._log
        return {name: value.clone() for name, value in found.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Undo `tensors`."""
        own = {"off_sum": self._off_sum, "off_count": self._off_count, "log": self._log}
        for name in self.tensors():
            own[name].copy_(tensors[name])

    def _is_reconstruction(self, name: str) -> bool:
        return any(term.name == name for term in self.config.reconstructions)

    def _coefficient(self, name: str) -> float | Tensor:
        return self._each([coefficient(config, name) for config in self.configs])

    def _each(self, values: Sequence[float]) -> float | Tensor:
        """A value of every member, sent to the device once; one number where there is one configuration."""
        if not self._log.ndim:
            return values[0]
        key = tuple(values)
        if key not in self._sent:
            self._sent[key] = self._log.new_tensor(values)
        return self._sent[key]
