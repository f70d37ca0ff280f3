"""Adam over parameters that are stacked `[S ...]`, with a learning rate and a gradient norm for every member."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


class MemberAdam:
    """`torch.optim.Adam` (its defaults, no weight decay) for every member on its own; gradients are dropped after use.

    `rates [S]` are the members' learning rates.
    """

    def __init__(self, parameters: Mapping[str, Tensor], rates: Float[Tensor, " S"]) -> None:
        self.parameters = dict(parameters)
        device = next(iter(self.parameters.values())).device
        self.rates = rates.to(device)
        self.steps = 0
        # Of the step that is taken, as tensors: a recorded step reads them, and nothing is sent to the device.
        self._length = torch.zeros((), dtype=torch.float64, device=device)
        self._root = torch.zeros((), dtype=torch.float64, device=device)
        self.means = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.squares = {name: torch.zeros_like(p) for name, p in self.parameters.items()}

    @torch.no_grad()
    def step(self, factor: float, clip: float | None = None) -> None:
        """One step at `factor` times the learning rates, gradients clipped to norm `clip` per member."""
        self.begin(factor)
        self.descend(clip)

    def begin(self, factor: float) -> None:
        """The half of a step that the host computes."""
        self.steps += 1
        self._length.fill_(factor / (1 - BETA1**self.steps))
        self._root.fill_((1 - BETA2**self.steps) ** 0.5)

    @torch.no_grad()
    def descend(self, clip: float | None = None) -> None:
        """The half of a step that the device computes."""
        scales = None if clip is None else self._clipping(clip)
        for name, p in self.parameters.items():
            if p.grad is None:
                continue
            grad = p.grad if scales is None else p.grad * _per_member(scales, p)
            mean, square = self.means[name], self.squares[name]
            mean.lerp_(grad, 1 - BETA1)
            square.mul_(BETA2).addcmul_(grad, grad, value=1 - BETA2)
            rate = _per_member(self.rates.to(p) * self._length, p)
            p.sub_(rate * mean / (square.sqrt().div_(self._root).add_(EPSILON)))
            p.grad = None

    def _clipping(self, clip: float) -> Float[Tensor, " S"]:
        """As `torch.nn.utils.clip_grad_norm_`: what each member's gradients are multiplied with."""
        squares = [p.grad.flatten(1).square().sum(1) for p in self.parameters.values() if p.grad is not None]
        return (clip / (torch.stack(squares).sum(0).sqrt() + 1e-6)).clamp_max(1)

    def tensors(self) -> dict[str, Tensor]:
        """The state by name, for checkpoints."""
        moments = {f"mean|{n}": t for n, t in self.means.items()} | {f"square|{n}": t for n, t in self.squares.items()}
        return moments | {"steps": torch.tensor(self.steps)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Undo `tensors`."""
        self.steps = int(tensors["steps"])
        for name in self.parameters:
            self.means[name].copy_(tensors[f"mean|{name}"])
            self.squares[name].copy_(tensors[f"square|{name}"])


def _per_member(values: Float[Tensor, " S"], like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))
