"""A toy whose mechanisms each span two sites, with a decomposition that is known and gates that do not agree.

    hidden = relu(x @ W_read - threshold),    y = hidden @ W_write

Feature f is active with a rate of its own (from frequent to rare) and a value U[0, 1]. Mechanism f is two
subcomponents: its *reader*, row f of `W_read`, and its *writer*, row f of `W_write`. The gates are what one finds in
trained models: a reader's importance is 1 whenever its feature is there, a writer's only where the feature passes the
threshold, a share `1 - threshold` of the time. With `n_outputs < n_features` the writers' directions overlap.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

from spd_lens import DeclaredSite, Decomposition, decompose
from spd_lens.core import Gate

READ, WRITE = "W_read", "W_write"


class Relay(HookedRootModule):
    """See above; the largest output of every mechanism has length 1, its direction is random where they overlap."""

    def __init__(self, n_features: int, n_outputs: int, threshold: float, seed: int = 0) -> None:
        super().__init__()
        self.threshold = threshold
        self.W_read = nn.Parameter(torch.eye(n_features))
        if n_outputs == n_features:
            writes = torch.eye(n_features)
        else:
            writes = torch.randn(n_features, n_outputs, generator=torch.Generator().manual_seed(seed))
        self.W_write = nn.Parameter(writes / writes.norm(dim=1, keepdim=True) / (1 - threshold))
        self.hook_input, self.hook_pre, self.hook_hidden, self.hook_out = (HookPoint() for _ in range(4))
        self.setup()

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.hook_pre(self.hook_input(x) @ self.W_read) - self.threshold)
        return self.hook_out(self.hook_hidden(hidden) @ self.W_write)

    def spd_sites(self) -> list[DeclaredSite]:
        return [
            DeclaredSite(READ, weight="W_read", input="hook_input", output="hook_pre"),
            DeclaredSite(WRITE, weight="W_write", input="hook_hidden", output="hook_out"),
        ]


class OwnInput(Gate):
    """Importance 1 where a subcomponent's own input is above 0."""

    def __init__(self, *, d_in: int, n_subcomponents: int, generator: torch.Generator) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(n_subcomponents))

    def forward(self, x: Tensor, a: Tensor | None = None) -> Tensor:
        return self.scale * (x > 0).to(x.dtype)


def _exact(W: Tensor, n_subcomponents: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.eye(n_subcomponents), W.clone()


def known_decomposition(model: Relay) -> Decomposition:
    """One reader and one writer per feature, with the gates above; the sum is the target's weights exactly."""
    n = len(model.W_read)
    return decompose(model, {READ: n, WRITE: n}, gate=OwnInput, init=_exact)


@dataclass(frozen=True)
class RelayFeatures:
    """Batches `[batch features]`; feature f is active at `rate / (f + 1) ** falling`, with a value U[0, 1]."""

    n_features: int
    rate: float = 0.2
    falling: float = 0.7
    batch_size: int = 2048
    seed: int = 0

    def batches(self, count: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        rates = self.rate / torch.arange(1, self.n_features + 1) ** self.falling
        for _ in range(count):
            values = torch.rand(self.batch_size, self.n_features, generator=generator)
            active = torch.rand(self.batch_size, self.n_features, generator=generator) < rates
            yield values * active


def mechanism_of(site: str, c: int) -> int:
    """The mechanism of every subcomponent of `known_decomposition`."""
    assert site in (READ, WRITE)
    return c
