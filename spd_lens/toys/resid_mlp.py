"""Residual MLPs that compute more ReLUs than they have neurons (compressed computation).

    r_0 = x @ W_E,    r_{l+1} = r_l + relu(r_l @ W_in) @ W_out,    y = r_L @ W_U,    W_U = W_E.T

`W_E [features d_resid]` has random rows of unit norm and is never trained; there are no biases. The model is trained
to give `x + relu(x)` (`train_resid_mlp`). Sites are `"blocks.{l}.mlp.W_in"` and `"blocks.{l}.mlp.W_out"`; hook points
have the names that TransformerLens gives them in a transformer. Activations have no position axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

from spd_lens.hosts.declared import DeclaredSite
from spd_lens.support.given import given_seed, given_whole


@dataclass(frozen=True)
class ResidMLPConfig:
    """Sizes of a `ResidMLP`; `d_mlp` counts the neurons of each block."""

    n_features: int
    d_resid: int
    n_layers: int
    d_mlp: int


class MLP(nn.Module):
    """`relu(r @ W_in) @ W_out`."""

    def __init__(self, d_resid: int, d_mlp: int, generator: torch.Generator) -> None:
        super().__init__()
        self.W_in = nn.Parameter(_uniform(d_resid, d_mlp, generator))
        self.W_out = nn.Parameter(_uniform(d_mlp, d_resid, generator))
        self.hook_pre = HookPoint()
        self.hook_post = HookPoint()

    def forward(self, r: Float[Tensor, "*batch d_resid"]) -> Float[Tensor, "*batch d_resid"]:
        return self.hook_post(torch.relu(self.hook_pre(r @ self.W_in))) @ self.W_out


class Block(nn.Module):
    """One residual MLP block."""

    def __init__(self, d_resid: int, d_mlp: int, generator: torch.Generator) -> None:
        super().__init__()
        self.mlp = MLP(d_resid, d_mlp, generator)
        self.hook_resid_pre = HookPoint()
        self.hook_mlp_out = HookPoint()
        self.hook_resid_post = HookPoint()

    def forward(self, r: Float[Tensor, "*batch d_resid"]) -> Float[Tensor, "*batch d_resid"]:
        r = self.hook_resid_pre(r)
        return self.hook_resid_post(r + self.hook_mlp_out(self.mlp(r)))


class ResidMLP(HookedRootModule):
    """`n_layers` residual MLP blocks between a fixed random embedding and its transpose, untrained.

    `W_in` and `W_out` start uniform in `+-1/sqrt(d_in)`. Everything depends on the arguments alone.
    """

    W_E: Float[Tensor, "features d_resid"]

    def __init__(
        self, n_features: int = 100, d_resid: int = 1000, n_layers: int = 1, d_mlp: int = 50, seed: int = 0
    ) -> None:
        super().__init__()
        sizes = {"n_features": n_features, "d_resid": d_resid, "n_layers": n_layers, "d_mlp": d_mlp}
        for what, count in sizes.items():
            given_whole(what, count, least=1)
        self.cfg = ResidMLPConfig(n_features, d_resid, n_layers, d_mlp)
        self.name = f"resid_mlp_{n_features}-{d_mlp}x{n_layers}"
        generator = torch.Generator().manual_seed(given_seed(seed))
        embedding = torch.randn(n_features, d_resid, generator=generator)
        self.register_buffer("W_E", embedding / embedding.norm(dim=1, keepdim=True))
        self.hook_embed = HookPoint()
        self.blocks = nn.ModuleList(Block(d_resid, d_mlp, generator) for _ in range(n_layers))
        self.setup()

    @property
    def W_U(self) -> Float[Tensor, "d_resid features"]:
        """The unembedding, `W_E.T`."""
        return self.W_E.T

    def forward(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch features"]:
        """The outputs `y`, of the same shape as `x`."""
        r = self.hook_embed(x @ self.W_E)
        for block in self.blocks:
            r = block(r)
        return r @ self.W_U

    def mlps(self) -> list[MLP]:
        """The MLP of every block."""
        return [cast(Block, block).mlp for block in self.blocks]

    def labels(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch features"]:
        """What the model is trained to give: `x + relu(x)`."""
        return x + torch.relu(x)

    def spd_sites(self) -> list[DeclaredSite]:
        """`W_in` and `W_out` of every block."""
        sites = []
        for layer in range(self.cfg.n_layers):
            block, mlp = f"blocks.{layer}", f"blocks.{layer}.mlp"
            sites += [
                DeclaredSite(f"{mlp}.W_in", weight=f"{mlp}.W_in", input=f"{block}.hook_resid_pre",
                             output=f"{mlp}.hook_pre"),
                DeclaredSite(f"{mlp}.W_out", weight=f"{mlp}.W_out", input=f"{mlp}.hook_post",
                             output=f"{block}.hook_mlp_out"),
            ]  # fmt: skip
        return sites


def _uniform(d_in: int, d_out: int, generator: torch.Generator) -> Tensor:
    return (2 * torch.rand(d_in, d_out, generator=generator) - 1) / d_in**0.5
