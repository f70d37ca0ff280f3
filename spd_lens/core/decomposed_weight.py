"""`DecomposedWeight`: the HookPoint that applies the subcomponents of one weight matrix, masked, in its place.

It is a HookPoint. It stands where the target's HookPoint stood, receives the clean output
`y0 = x @ W + b` that the model has computed anyway, and returns (method M2)

    y = y0 - (1 - d) * (y0 - b) + (m * a' - d * a) @ U,     a = x @ V,

where `a'`, `m` and `d` are what the hooks on `hook_*_acts`, `hook_*_mask` and `hook_*_delta_mask` make of `a` and
of ones. With no hook on any of a site's four points it returns `y0` itself.

Cost when watched: `2 C (d_in + d_out)` multiply-adds per position, against `d_in d_out` for the target's matmul.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from spd_lens.core.gates import Gate, matmul_or_lookup
from spd_lens.core.masks import SiteMask
from spd_lens.core.squashings import importance_of
from spd_lens.core.subcomponents import Subcomponents
from spd_lens.hosts.site import POINT_SUFFIXES, Site

if TYPE_CHECKING:
    from transformer_lens import FactoredMatrix


def _has_hook(point: HookPoint) -> bool:
    return bool(point._forward_hooks or point._backward_hooks or point._forward_pre_hooks or point._backward_pre_hooks)


def _over_heads(value: Tensor | None, a: Tensor, *, n_trailing: int) -> Tensor | None:
    """A value given per position, with a head axis where the activations `a [batch pos head C]` have one."""
    if value is not None and a.ndim == 4 and value.ndim == 2 + n_trailing:
        return value.unsqueeze(-1 - n_trailing)
    return value


class ReadPoint(HookPoint):
    """A HookPoint that hands what it returns, after all its hooks have run, to the sites that read it.

    Existing HookPoints become one by having their class changed, so every name, alias, hook and reference that
    the host or the user holds stays valid; `__call__` rather than a hook is used because hooks that a user adds
    later would run after ours.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = super().__call__(*args, **kwargs)
        for weight in self.__dict__.get("spd_readers", ()):
            weight.receive_input(out)
        return out


class DecomposedWeight(ReadPoint):
    """One site's weight as subcomponents, standing in for the HookPoint that the weight's output passes.

    Made by `decompose`, never directly. `V [d_in, C]` and `U [C, d_out]` are trained; `target_weight [d_in, d_out]`
    is the frozen matrix; `gate` predicts importance.
    """

    site: Site
    points: dict[str, HookPoint]
    gate: Gate | None
    subcomponents: Subcomponents
    tied_to: DecomposedWeight | None

    # -- parameters ------------------------------------------------------------------------------------------

    @property
    def V(self) -> Float[Tensor, "d_in C"]:
        """Input directions, one column per subcomponent."""
        return self.subcomponents.V if self.tied_to is None else self.tied_to.U.T

    @property
    def U(self) -> Float[Tensor, "C d_out"]:
        """Output directions, one row per subcomponent."""
        return self.subcomponents.U if self.tied_to is None else self.tied_to.V.T

    @property
    def weight(self) -> Float[Tensor, "d_in d_out"]:
        """`V @ U`: the sum of all subcomponents."""
        return self.V @ self.U

    @property
    def target_weight(self) -> Float[Tensor, "d_in d_out"]:
        """The target's matrix `W`, as the host holds it now."""
        return self.site.matrix.read()

    @property
    def bias(self) -> Tensor | None:
        """The target's bias at this place, in the host's own shape; biases are never decomposed (M3)."""
        return self.site.read_bias()

    @property
    def n_subcomponents(self) -> int:
        """`C`."""
        return self.V.shape[1]

    @property
    def rank_bound(self) -> int:
        """`min(d_in, d_out)`, the largest rank that the target's matrix can have."""
        return min(self.V.shape[0], self.U.shape[1])

    def subcomponent(self, c: int) -> FactoredMatrix:
        """The rank-one piece `V[:, c] U[c, :]` as TransformerLens's `FactoredMatrix [d_in, d_out]`."""
        from transformer_lens import FactoredMatrix

        if not 0 <= c < self.n_subcomponents:
            raise ValueError(f"subcomponent {c} of {self.site.name}: expected 0..{self.n_subcomponents - 1}")
        return FactoredMatrix(self.V[:, c : c + 1], self.U[c : c + 1, :])

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles take nothing of a pass: an input that a raising hook left behind cannot be copied."""
        return {**self.__dict__, "current_input": None, "recording": None, "given": None}

    # -- the forward pass ------------------------------------------------------------------------------------

    def is_watched(self) -> bool:
        """Whether any of the site's four HookPoints has a hook of any kind."""
        return any(_has_hook(point) for point in self.points.values())

    def receive_input(self, x: Tensor) -> None:
        """Keep the input that the matmul is about to read, if this pass needs it; drop an older one."""
        state = self.__dict__
        if state["recording"] is None and state["given"] is None and not self.is_watched():
            state["current_input"] = None
            return
        state["current_input"] = x

    def forward(self, x: Tensor) -> Tensor:
        """`y` of M2 for the clean output `x` (called `y0` there)."""
        y0, state = x, self.__dict__
        recording, given = state["recording"], state["given"]
        watched = recording is None and given is None and self.is_watched()
        if recording is None and given is None and not watched:
            return y0
        x = self._take_input(y0)
        if recording is not None:
            recording[self.site.name] = x
            return y0
        if given is not None:
            return self.masked_output(y0, x, given)
        return self._hooked_output(y0, x)

    def _take_input(self, y0: Tensor) -> Tensor:
        x = self.__dict__["current_input"]
        if x is None:
            raise RuntimeError(
                f"{self.site.name}: its output HookPoint was called without its input having passed through "
                "the model; run the whole model (or from the block onwards), not the HookPoint alone"
            )
        self.__dict__["current_input"] = None
        if self.site.module_output is not None and self.site.module_output._forward_hooks:
            raise RuntimeError(
                f"{self.site.name}: a PyTorch forward hook on its {type(self.site.module_output).__name__} may change "
                "the output before the masks act on it; use a TransformerLens hook"
            )
        if self.site.flatten_input and x.ndim > y0.ndim:
            x = rearrange(x, "... head_index d_head -> ... (head_index d_head)")
        return x

    def activations(self, x: Tensor) -> Float[Tensor, "*batch C"]:
        """`a = x @ V` (a row look-up at embedding sites, M4)."""
        return matmul_or_lookup(x, self.V)

    def masked_output(self, y0: Tensor, x: Tensor, given: SiteMask) -> Tensor:
        """M2 with masks handed over directly instead of by hooks; the result is the same."""
        n_leading = x.ndim - (0 if self.site.is_lookup else 1)
        routed = given.routed
        if routed is not None and routed.device.type == "cpu" and routed.ndim == n_leading <= 2:
            return self._routed_output(y0, x, given, routed)
        a = self.activations(x)
        mask = _over_heads(given.mask, a, n_trailing=1)
        delta, routed = (_over_heads(value, a, n_trailing=0) for value in (given.delta, routed))
        if routed is not None:
            routed = routed.to(a.device)
            mask = None if mask is None else torch.where(routed.unsqueeze(-1), mask, 1.0)
            delta = None if delta is None else torch.where(routed, delta, 1.0)
        return self._combine(y0, x, a, a, mask, delta)

    def _routed_output(self, y0: Tensor, x: Tensor, given: SiteMask, routed: Bool[Tensor, "*batch"]) -> Tensor:
        """M2 at the routed rows alone; the others keep `y0`."""
        rows = routed.flatten().nonzero().squeeze(1).to(x.device, non_blocking=True)

        def at_rows(value: Tensor) -> Tensor:
            lead = value.shape[routed.ndim :]
            return value.expand(*routed.shape, *lead).reshape(-1, *lead).index_select(0, rows)

        x_rows, y_rows = at_rows(x), at_rows(y0)
        mask, delta = (None if value is None else at_rows(value) for value in (given.mask, given.delta))
        a = self.activations(x_rows)
        change = self._change(y_rows, x_rows, a, a, mask, delta).to(y0.dtype)
        return y0.flatten(0, routed.ndim - 1).index_add(0, rows, change).reshape(y0.shape)

    def _hooked_output(self, y0: Tensor, x: Tensor) -> Tensor:
        acts_point, importance_point, mask_point, delta_point = (self.points[s] for s in POINT_SUFFIXES)
        a = self.activations(x)
        patched, mask, delta = a, None, None
        # A hook may write in place: it gets a tensor of its own, never the `a` that the delta still needs.
        if _has_hook(acts_point):
            patched = self._checked(acts_point(a.clone()), a.shape, "acts")
        if _has_hook(importance_point):
            importance_point(self.live_importance(x, a))
        if _has_hook(mask_point):
            mask = self._checked(mask_point(self._ones(mask_point, a)), a.shape, "mask")
        if _has_hook(delta_point):
            delta = self._checked(delta_point(self._ones(delta_point, a[..., 0])), a.shape[:-1], "delta_mask")
        if patched is a and mask is None and delta is None:
            return y0
        return self._combine(y0, x, a, patched, mask, delta)

    @staticmethod
    def _ones(point: HookPoint, like: Tensor) -> Tensor:
        ones = torch.ones_like(like, memory_format=torch.contiguous_format)
        # Only then can a backward hook on the mask see a gradient.
        wants_gradient = bool(point._backward_hooks or point._backward_pre_hooks) and torch.is_grad_enabled()
        return ones.requires_grad_(wants_gradient)

    def _checked(self, value: Any, shape: torch.Size, what: str) -> Tensor:
        try:
            fits = isinstance(value, Tensor) and torch.broadcast_shapes(value.shape, shape) == shape
        except RuntimeError:
            fits = False
        if not fits:
            given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"a hook on {self.site.point_stem}_{what} returned {given}; expected a tensor that broadcasts "
                f"to {tuple(shape)} for this pass"
            )
        return value

    def live_importance(self, x: Tensor, a: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch C"]:
        """Importance from the pass that is running, `clamp(p, 0, 1)`; equal to the clean one if nothing is masked.

        Raises ValueError where one pass cannot know it: the global gate needs all sites at once, and the
        attention gate needs every position, which a key-value cache hides.
        """
        if self.gate is None:
            raise ValueError(
                f"{self.site.name} is gated by the global gate, which needs the inputs of all sites before it can "
                "say anything; use decomposition.importance(tokens) instead of hooking the importance"
            )
        if self.gate.looks_across_positions and self.__dict__["cached_positions"] != 0:
            raise ValueError(
                f"the attention gate of {self.site.name} looks across positions, but this pass runs with a "
                "key-value cache and sees only the newest; use decomposition.importance(tokens), or "
                "generate(..., use_past_kv_cache=False)"
            )
        return importance_of(self.gate(x, a))

    def _combine(
        self, y0: Tensor, x: Tensor, a: Tensor, patched: Tensor, mask: Tensor | None, delta: Tensor | None
    ) -> Tensor:
        return (y0 + self._change(y0, x, a, patched, mask, delta)).to(y0.dtype)

    def _change(
        self, y0: Tensor, x: Tensor, a: Tensor, patched: Tensor, mask: Tensor | None, delta: Tensor | None
    ) -> Tensor:
        """`y - y0`: `(m * a' - d * a) @ U - (1 - d) * (y0 - b)`."""
        kept = None if delta is None else delta.unsqueeze(-1)
        if patched is a:
            one = torch.ones((), dtype=a.dtype, device=a.device)
            coefficients = ((one if mask is None else mask) - (one if kept is None else kept)) * a
        else:
            coefficients = (patched if mask is None else mask * patched) - (a if kept is None else kept * a)
        change = self.through_U(coefficients, y0)
        if delta is not None:
            dense = self._dense_part(y0, x)
            weight = (1 - delta).expand(a.shape[:-1])
            weight = weight.reshape(*weight.shape, *([1] * (dense.ndim - weight.ndim)))
            change = change - weight * dense
        return change

    def through_U(self, coefficients: Float[Tensor, "*batch C"], y0: Tensor) -> Tensor:
        """`coefficients @ U` in the shape of `y0`, which may have a head axis and repeat grouped heads."""
        U = self.U
        split_input = coefficients.ndim == y0.ndim
        # By the number of axes too: with one stored head, d_head is all of d_out.
        has_heads = y0.ndim > coefficients.ndim or y0.shape[-1] != U.shape[1]
        if not has_heads:
            return coefficients @ U
        d_head = y0.shape[-1]
        U_heads = rearrange(U, "C (head d_head) -> head C d_head", d_head=d_head)
        repeats = y0.shape[-2] // U_heads.shape[0]
        if split_input:  # every head has an input of its own and uses its own columns of U
            if repeats > 1:
                U_heads = U_heads.repeat_interleave(repeats, dim=0)
            return (coefficients.unsqueeze(-2) @ U_heads).squeeze(-2)
        out = rearrange(coefficients @ U, "... (head d_head) -> ... head d_head", d_head=d_head)
        return out if repeats == 1 else out.repeat_interleave(repeats, dim=-2)

    def _dense_part(self, y0: Tensor, x: Tensor) -> Tensor:
        """`x @ W` in the shape of `y0`; taken from `y0` itself unless hooks may have changed that in between."""
        flag = self.site.recompute_dense
        if flag is not None and getattr(*flag):
            dense = matmul_or_lookup(x, self.target_weight)
            return dense.reshape(y0.shape)
        bias = self.bias
        if bias is None:
            return y0
        if bias.ndim == 2 and bias.shape[0] != y0.shape[-2]:  # grouped keys, which the host has repeated
            bias = bias.repeat_interleave(y0.shape[-2] // bias.shape[0], dim=0)
        # Not in half precision: the rounding that y0 has already must cancel where delta is 0.
        return y0.to(torch.promote_types(y0.dtype, torch.float32)) - bias.to(y0.device)
