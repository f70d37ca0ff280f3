"""One forward pass through which gradients take direct paths only.

An *origin* is what an attribution can come from:

- `("subcomponent", site)`: the activations `a [pos C]` of a site's subcomponents;
- `("delta", site)`: the site's delta output `x @ (W - V U)`, one vector per position (where the delta is frozen);
- `("embedding", name)`: what enters from below, one vector per position. Where block 0 or an embedding is decomposed:
  "embed" and "pos_embed", as far as they are not decomposed themselves. Where the first decomposed block is a later
  one: "blocks.L input", the residual stream that enters it; no block before it is run, so that what is not decomposed
  there bends no path.

A *sender* is one entry of an origin, a `Unit` at a position: a subcomponent, a site's `DELTA`, or a `WHOLE` embedding.

`direct_pass` runs the target with every origin made a constant plus a leaf that collects gradients (C1): the gradient
of an activation stops at the first subcomponents that it meets.

What the direct path contains is as in `spd_lens.patching.path`: the residual stream, non-linearities inside an MLP,
attention between positions, and all matrices that are not decomposed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.interventions import HookList
from spd_lens.core.units import DELTA, WHOLE, Unit
from spd_lens.patching.frozen import Frozen, in_output_shape, output_names
from spd_lens.patching.hooks import detach, probe

Origin: TypeAlias = tuple[str, str]


def origin_of(sender: Unit) -> Origin:
    """The origin that a sender is an entry of."""
    return ({DELTA: "delta", WHOLE: "embedding"}.get(sender.id, "subcomponent"), sender.site)


def sender_of(origin: Origin, subcomponent: int, position: int | None) -> Unit:
    """The sender at a position (None: whatever the position); `subcomponent` counts for subcomponents alone."""
    kind, site = origin
    number = {"delta": DELTA, "embedding": WHOLE}.get(kind, subcomponent)
    return Unit(((site, number),), None if position is None else (position,))


@dataclass
class DirectPass:
    """A forward pass over `n_copies` copies of a batch, ready for gradients.

    - `activations[site]` `[(copy batch) pos C]`, in the order in which sites ran, and `output`
      `[(copy batch) pos d_vocab]`; both with gradients by the leaves.
    - `clean[site]` `[batch pos C]`: the activations of one copy, as constants.
    """

    n_copies: int
    activations: dict[str, Tensor] = field(default_factory=dict)
    clean: dict[str, Tensor] = field(default_factory=dict)
    leaves: dict[Origin, Tensor] = field(default_factory=dict)
    output: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def eps(self) -> float:
        """The rounding of the coarsest numbers in the pass: a model in half precision rounds what it writes."""
        return max(torch.finfo(value.dtype).eps for value in (self.output, *self.activations.values()))

    def copies(self, value: Tensor) -> Tensor:
        """`[(copy batch) ...]` as `[copy batch ...]`."""
        return value.unflatten(0, (self.n_copies, -1))

    def attributions(self, values: Sequence[Tensor]) -> dict[Origin, Tensor]:
        """`(d values[i] / d s) * s` for every origin s, from one backward pass.

        `values[i]` is a scalar that was computed from copy i alone. Result: `[copy batch pos C]` for subcomponents,
        `[copy batch pos]` for deltas and embeddings; origins that reach none of the values are left out.
        """
        total = torch.stack([value.sum() for value in values]).sum()
        if not total.requires_grad:
            return {}
        gradients = torch.autograd.grad(total, list(self.leaves.values()), retain_graph=True, allow_unused=True)
        found = {}
        for origin, gradient in zip(self.leaves, gradients, strict=True):
            if gradient is not None:
                kind, site = origin
                product = self.copies(gradient)
                found[origin] = product * self.clean[site] if kind == "subcomponent" else product
        return found


def direct_pass(
    decomposition: Decomposition, tokens: Tensor, n_copies: int, frozen: Frozen, *, total: bool = False
) -> DirectPass:
    """Run `n_copies` copies of `tokens [batch pos]`; the values of the pass are the target's.

    With `total=True` gradients go on through all other subcomponents and deltas: the linearised total effect (attention
    patterns and normalisation scales stay as `frozen` says).

    Raises ValueError if a site has an input per head (`use_split_qkv_input`, `use_attn_in`).
    """
    host, found, start = decomposition.host, DirectPass(n_copies), start_of(decomposition, tokens)
    deltas = {} if total or not frozen.delta else delta_outputs(decomposition, tokens)
    outputs = output_names(decomposition)
    hooks: HookList = []
    for site, weight in decomposition.items():
        acts = weight.site.point_names()[0]
        hooks.append((acts, partial(_read_acts, site=site, found=found)))
        if site in deltas:
            writes = partial(_write_output, site=site, found=found, U=weight.U.detach(), delta=deltas[site])
            hooks.append((outputs[site], writes))
            continue
        # With the activation cut alone, M2 lets the gradient by x pass through W - V U: the delta is live.
        hooks += [] if total else [(acts, detach())]
        hooks.append((acts, probe(found.leaves, ("subcomponent", site))))
    for what, name in start.points.items():
        hooks.append((name, partial(_scale_leaf, origin=("embedding", what), found=found)))
    hooks += [(name, detach()) for name in host.frozen_points(attention=frozen.attention, norms=frozen.norms)]
    with torch.enable_grad(), host.quiet_edits(), decomposition.model.hooks(fwd_hooks=hooks):
        rows = start.rows(n_copies)
        if start.block is not None:
            rows = _scale_leaf(rows, None, origin=("embedding", start.name), found=found)
        found.output = start.run(decomposition, rows)
    return found


@dataclass(frozen=True)
class Start:
    """Where passes begin: at the tokens, or with the residual stream that enters the first decomposed block.

    - `block`: that block; None for a pass from the tokens. `batch`: the tokens or the residual stream.
    - `points`: hook names of the embeddings that are not decomposed, by what they are; empty if `block` is a number.
    """

    block: int | None
    batch: Tensor
    points: dict[str, str]

    @property
    def name(self) -> str:
        """What the residual stream is called as an origin."""
        return f"blocks.{self.block} input"

    def rows(self, n_copies: int) -> Tensor:
        """`n_copies` copies of the batch."""
        return self.batch.repeat(n_copies, *[1] * (self.batch.ndim - 1))

    def run(self, decomposition: Decomposition, rows: Tensor) -> Tensor:
        """The model's output on such rows."""
        host = decomposition.host
        return host.forward(rows) if self.block is None else host.forward_from(self.block, rows)


@torch.no_grad()
def start_of(decomposition: Decomposition, tokens: Tensor) -> Start:
    """Where passes over these tokens begin."""
    host, model = decomposition.host, decomposition.model
    first = decomposition.starts.first_block(decomposition)
    residual = decomposition.starts.residual_before(first, tokens) if first else None
    if residual is not None:
        return Start(first, residual, {})
    own = {id(weight) for weight in decomposition.values()}
    points = host.embedding_points()
    return Start(None, tokens, {what: name for what, name in points.items() if id(model.hook_dict[name]) not in own})


@torch.no_grad()
def delta_outputs(decomposition: Decomposition, tokens: Tensor) -> dict[str, Float[Tensor, "batch pos d_out"]]:
    """`x @ (W - V U)` of every site on the target's own inputs."""
    found = {}
    for site, x in decomposition.clean_pass(tokens).inputs.items():
        check_whole_input(site, x)
        weight = decomposition[site]
        unexplained = weight.target_weight - weight.weight
        found[site] = (
            unexplained[x.clamp_min(0)] * (x >= 0).unsqueeze(-1)
            if weight.site.is_lookup
            else x.to(unexplained.dtype) @ unexplained
        )
    return found


def check_whole_input(site: str, x: Tensor) -> None:
    """Raise ValueError for an input `[batch pos head d_in]` (or activations of one)."""
    if x.ndim == 4:
        raise ValueError(
            f"under use_split_qkv_input (or use_attn_in) {site} has one input per head, and an attribution graph needs "
            "one per position; switch that off"
        )


# -- hooks of the direct pass -----------------------------------------------------------------------------------------


def _read_acts(acts: Tensor, hook: Any, *, site: str, found: DirectPass) -> None:
    check_whole_input(site, acts)
    found.activations[site] = acts
    found.clean[site] = found.copies(acts.detach())[0]


def _write_output(y: Tensor, hook: Any, *, site: str, found: DirectPass, U: Tensor, delta: Tensor) -> Tensor:
    acts = found.activations[site]
    leaf = torch.zeros_like(acts, requires_grad=True)
    share = acts.new_zeros(acts.shape[:2], requires_grad=True)
    found.leaves["subcomponent", site], found.leaves["delta", site] = leaf, share
    own = share.unsqueeze(-1) * delta.repeat(found.n_copies, 1, 1)
    return y.detach() + in_output_shape(leaf @ U + own, y).to(y.dtype)


def _scale_leaf(value: Tensor, hook: Any, *, origin: Origin, found: DirectPass) -> Tensor:
    share = value.new_zeros(value.shape[:2], requires_grad=True)
    found.leaves[origin] = share
    return value.detach() * (1 + share.unsqueeze(-1))
