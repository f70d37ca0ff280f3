"""TMS, the toy model of superposition: more sparse features than hidden dimensions.

    x_hat = relu(x @ W [@ W_id] @ W.T + b),    W [features hidden], b [features],

`W` is used twice, as encoder (site `"W_enc"`) and transposed as decoder (site `"W_dec"`, tied to the encoder). The
+ID variant has the identity `W_id [hidden hidden]` between the two, fixed (site `"W_id"`): one mechanism of full
rank, of which there is nothing to see in the outputs.

Activations are `[batch features]` and `[batch hidden]`, without a position axis. `b` is in the decoder's output.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

from spd_lens.hosts.declared import DeclaredSite
from spd_lens.support.given import given_seed, given_whole


class TMS(HookedRootModule):
    """`relu(x @ W @ W.T + b)` with `W [features hidden]` from Xavier's normal distribution and `b = 0`, untrained.

    `train_tms` trains it. Its weights depend on nothing but the arguments. The biases start at 0 because random ones
    make it give up features: trained from `b ~ U(-1/sqrt(hidden), 1/sqrt(hidden))`, 156 of 200 seeds of 5-2 lost at
    least one, from 0 none of 200.

    The forward pass is pure (no branch on data, nothing written in place), so it runs under
    `torch.func.functional_call` and `vmap` over stacked parameters.
    """

    W_id: Float[Tensor, "hidden hidden"] | None

    def __init__(self, n_features: int, n_hidden: int, *, identity: bool = False, seed: int = 0) -> None:
        super().__init__()
        for what, count in (("n_features", n_features), ("n_hidden", n_hidden)):
            given_whole(what, count, least=1)
        self.n_features, self.n_hidden, self.has_identity = n_features, n_hidden, identity
        self.name = f"tms_{n_features}-{n_hidden}" + ("+ID" if identity else "")
        generator = torch.Generator().manual_seed(given_seed(seed))
        scale = (2 / (n_features + n_hidden)) ** 0.5
        self.W = nn.Parameter(scale * torch.randn(n_features, n_hidden, generator=generator))
        self.b = nn.Parameter(torch.zeros(n_features))
        self.register_buffer("W_id", torch.eye(n_hidden) if identity else None)
        self.hook_input = HookPoint()
        self.hook_hidden = HookPoint()
        if identity:
            self.hook_identity = HookPoint()
        self.hook_pre = HookPoint()
        self.setup()

    def forward(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch features"]:
        """`x_hat` of the same shape as `x`."""
        hidden = self.hook_hidden(self.hook_input(x) @ self.W)
        if self.W_id is not None:
            hidden = self.hook_identity(hidden @ self.W_id)
        return torch.relu(self.hook_pre(hidden @ self.W.T + self.b))

    def spd_sites(self) -> list[DeclaredSite]:
        """`W_enc`, `W_id` where there is one, and `W_dec`, which shares its subcomponents with `W_enc`."""
        encoder = DeclaredSite("W_enc", weight="W", input="hook_input", output="hook_hidden")
        identity = DeclaredSite("W_id", weight="W_id", input="hook_hidden", output="hook_identity")
        decoder = DeclaredSite(
            "W_dec", weight="W", input="hook_identity" if self.has_identity else "hook_hidden", output="hook_pre",
            bias="b", transposed=True, tied_to="W_enc",
        )  # fmt: skip
        return [encoder, *([identity] if self.has_identity else []), decoder]
