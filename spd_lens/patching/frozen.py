"""The held pass (C2): copies of a batch in which one thing is changed and everything else keeps its clean value.

It is the intervention that a direct path predicts. Path patching sets a sender's activations to those of another run;
checks of attribution graphs take a sender away. Both are changes of a few activations, or of a delta, in passes whose
other subcomponents are held: with the delta frozen a site's output is

    y_clean + (a' - a) @ U - (the delta, where it is removed),

and with the delta live its activations are held, so that `x @ (W - V U)` follows its input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.interventions import HookList
from spd_lens.patching.hooks import add, hold, over_copies, put_per_copy, store
from spd_lens.support.given import given_flag, given_instance


@dataclass(frozen=True)
class Frozen:
    """What the direct path leaves out besides the other subcomponents."""

    attention: bool = True
    norms: bool = True
    delta: bool = True

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            given_flag(name, value)

    def __str__(self) -> str:
        def named(value: bool) -> str:
            return ", ".join(k for k, v in vars(self).items() if v is value) or "nothing"

        return f"frozen: {named(True)}; live: {named(False)}"


def frozen_given(frozen: Any) -> Frozen:
    """What a user gave as `frozen`; None stands for everything frozen."""
    if frozen is None:
        return Frozen()
    return given_instance("frozen", frozen, Frozen, "Frozen(attention=False), for example")


@dataclass(frozen=True)
class SiteChange:
    """What the copies of a pass change at one site.

    - `where` `[copy pos C]`: the activations that become `by`, which broadcasts to the site's `[batch pos C]`.
    - `no_delta` `[copy pos]`: where the site's delta is removed.

    The position axis may have length 1.
    """

    where: Bool[Tensor, "copy _pos C"]
    by: Tensor
    no_delta: Bool[Tensor, "copy _pos"] | None = None


def output_names(decomposition: Decomposition) -> dict[str, str]:
    """The hook name of every site's output: where its `DecomposedWeight` stands, by site name."""
    by_identity = {id(point): name for name, point in decomposition.model.hook_dict.items()}
    return {site: by_identity[id(weight)] for site, weight in decomposition.items()}


class HeldPass:
    """The clean values of one pass over a batch, and the hooks that hold them.

    `run` runs the pass that is recorded. `order`: the sites as they ran. `deltas[site]`: `x @ (W - V U)`, needed only
    where a delta is to be removed.
    """

    def __init__(
        self,
        decomposition: Decomposition,
        frozen: Frozen,
        run: Callable[[], Any],
        deltas: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.decomposition, self.frozen, self.deltas = decomposition, frozen, deltas or {}
        self.outputs = output_names(decomposition)
        self.acts = {site: weight.site.point_names()[0] for site, weight in decomposition.items()}
        points = decomposition.host.frozen_points(attention=frozen.attention, norms=frozen.norms)
        self.values: dict[str, Tensor] = {}
        names = (*self.outputs.values(), *self.acts.values(), *points)
        hooks = [(name, store(self.values, name)) for name in names]
        with torch.no_grad(), decomposition.model.hooks(fwd_hooks=hooks):
            run()
        by_point = {name: site for site, name in self.acts.items()}
        self.order = [by_point[name] for name in self.values if name in by_point]
        self.points = [name for name in points if name in self.values]

    def hooks(self, changes: Mapping[str, SiteChange]) -> HookList:
        """Hooks under which everything but the changes keeps its clean value."""
        hooks: HookList = []
        for site in self.decomposition:
            change = changes.get(site)
            if not self.frozen.delta:
                hooks.append((self.acts[site], hold(self.values[self.acts[site]])))
                hooks += [] if change is None else change_hooks(self.decomposition, {site: change})
                continue
            name = self.outputs[site]
            hooks.append((name, hold(self.values[name])))
            if change is not None:
                hooks.append((name, add(self._moved(site, change))))
        return hooks + [(name, hold(self.values[name])) for name in self.points]

    @torch.no_grad()
    def _moved(self, site: str, change: SiteChange) -> Tensor:
        """How far the site's output moves in every copy, in the output's own shape."""
        weight, a, y = self.decomposition[site], self.values[self.acts[site]], self.values[self.outputs[site]]
        copies = a.expand(len(change.where), *a.shape)
        # Differences in the precision of the factors: half-precision activations would lose most of theirs.
        differences = torch.where(over_copies(change.where, copies.ndim, 1), change.by.to(a) - copies, 0.0)
        rows = y.expand(len(change.where), *y.shape).flatten(0, 1)
        moved = weight.through_U(differences.flatten(0, 1).to(weight.U.dtype), rows)
        if change.no_delta is not None and bool(change.no_delta.any()):
            gone = over_copies(change.no_delta, 3, 0).unsqueeze(-1) * self.deltas[site]
            moved = moved - in_output_shape(gone.flatten(0, 1), rows)
        return moved


def change_hooks(decomposition: Decomposition, changes: Mapping[str, SiteChange]) -> HookList:
    """Hooks that make the changes and hold nothing: what comes after them follows."""
    hooks: HookList = []
    for site, change in changes.items():
        acts, _, _, delta = decomposition[site].site.point_names()
        hooks.append((acts, put_per_copy(change.where, change.by)))
        if change.no_delta is not None and bool(change.no_delta.any()):
            hooks.append((delta, put_per_copy(change.no_delta.unsqueeze(-1), torch.zeros(()))))
    return hooks


def in_output_shape(flat: Float[Tensor, "*batch d_out"], y: Tensor) -> Tensor:
    """A flat output in the shape of `y`, which may have a head axis and repeat grouped heads."""
    if flat.shape[-1] == y.shape[-1] and flat.ndim == y.ndim:
        return flat
    by_head = rearrange(flat, "... (head d_head) -> ... head d_head", d_head=y.shape[-1])
    repeats = y.shape[-2] // by_head.shape[-2]
    return by_head if repeats == 1 else by_head.repeat_interleave(repeats, dim=-2)
