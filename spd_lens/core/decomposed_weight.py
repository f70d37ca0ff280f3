"""`DecomposedWeight`: the HookPoint that applies the subcomponents of one weight matrix, masked, in its place.

It is a HookPoint. It stands where the target's HookPoint stood, receives the clean output
`y0 = x @ W + b` that the model has computed anyway, and returns (method M2)

    y = y0 - (1 - d) * (y0 - b) + (m * a' - d * a) @ U,     a = x @ V,

where `a'`, `m` and `d` are what the hooks on `hook_*_acts`, `hook_*_mask` and `hook_*_delta_mask` make of `a` and
of ones. With no hook on any of a site's four points it returns `y0` itself.

Cost when watched: `2 C (d_in + d_out)` multiply-adds per position, against `d_in d_out` for the target's matmul.
"""

from __future__ import annotations

import html
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from spd_lens.core.factored_weight import FactoredWeight
from spd_lens.core.masked_change import masked_change, masked_sum
from spd_lens.core.masks import SiteMask
from spd_lens.core.points import MaskedAlready, has_hook
from spd_lens.core.squashings import importance_of
from spd_lens.hosts.site import POINT_SUFFIXES


def _over_heads(value: Tensor | None, a: Tensor, *, n_trailing: int) -> Tensor | None:
    """A value given per position, with a head axis where the activations `a [batch pos head C]` have one."""
    if value is not None and a.ndim == 4 and value.ndim == 2 + n_trailing:
        return value.unsqueeze(-1 - n_trailing)
    return value


class DecomposedWeight(FactoredWeight):
    """One site's weight as subcomponents, standing in for the HookPoint that the weight's output passes.

    Made by `decompose`, never directly. `V [d_in, C]` and `U [C, d_out]` are trained; `target_weight [d_in, d_out]`
    is the frozen matrix; `gate` predicts importance (None where the global gate does it).
    """

    def __repr__(self) -> str:
        (d_in, C), d_out = self.V.shape, self.U.shape[1]
        gate = "the global gate" if self.gate is None else f"{self.gate.kind} gate"
        return f"DecomposedWeight({self.site.name}: {d_in} x {d_out}, C={C}, {gate})"

    def _repr_html_(self) -> str:
        return f"<code>{html.escape(repr(self))}</code>"

    # -- the forward pass ------------------------------------------------------------------------------------

    def is_watched(self) -> bool:
        """Whether any of the site's four HookPoints has a hook of any kind."""
        return any(has_hook(point) for point in self.points.values())

    def is_needed(self) -> bool:
        """Whether the running pass does anything here but pass the output on."""
        state = self.swapped.state
        return state.recording is not None or self.swapped.site.name in state.given or self.is_watched()

    def receive_input(self, x: Tensor) -> None:
        """Keep the input that the matmul is about to read, if this pass needs it."""
        site, state = self.swapped.site, self.swapped.state
        if self.is_needed():
            state.keep(site.name, site.layer, self.with_positions(x))
        else:
            state.forget(site.name, site.layer)

    def forward(self, x: Tensor) -> Tensor:
        """`y` of M2 for the clean output `x` (called `y0` there)."""
        if not self.is_needed():
            return x
        y0 = self.with_positions(x)
        y = self._output(y0)
        if y is y0:
            return x
        return y if y0.ndim == x.ndim else self.hook_conversion.revert(y)  # pyright: ignore[reportOptionalMemberAccess]

    def with_positions(self, value: Tensor) -> Tensor:
        """What a model computes as `[batch * pos, d]` (the MLPs of OPT) as `[batch pos d]`, as HookPoints show it."""
        conversion = getattr(self, "hook_conversion", None)
        if conversion is None or value.ndim != 2 or self.swapped.site.is_lookup:
            return value
        return conversion.convert(value)

    def _output(self, y0: Tensor) -> Tensor:
        state, name = self.swapped.state, self.swapped.site.name
        recording, given = state.recording, state.given.get(name)
        x = self._take_input(y0)
        if isinstance(x, MaskedAlready):
            return y0 if x.rest is None else (y0 + x.rest).to(y0.dtype)
        if recording is not None:
            if name in recording:
                raise RuntimeError(
                    f"{name} was reached twice in one clean pass: a hook runs the model again inside it. Run the model "
                    "before, and let the hook use what came out"
                )
            recording[name] = x
            return y0
        if given is not None:
            return self.masked_output(y0, x, given)
        return self._hooked_output(y0, x)

    def _take_input(self, y0: Tensor) -> Any:
        site = self.site
        x = self.swapped.state.take(site.name, site.layer)
        if x is None:
            raise RuntimeError(
                f"{site.name}: its output HookPoint was called without its input having passed through "
                "the model; run the whole model (or from the block onwards), not the HookPoint alone, and add and "
                "remove hooks on a site's points between passes, not inside one"
            )
        if site.module_output is not None and site.module_output._forward_hooks:
            raise RuntimeError(
                f"{site.name}: a PyTorch forward hook on its {type(site.module_output).__name__} may change "
                "the output before the masks act on it; use a TransformerLens hook"
            )
        if site.flatten_input and isinstance(x, Tensor) and x.ndim > y0.ndim:
            x = rearrange(x, "... head_index d_head -> ... (head_index d_head)")
        return x

    def masked_heads(self, results: Float[Tensor, "batch pos head d_out"]) -> Tensor:
        """M2 for each head's share `z_h @ W_h` of the output; patched activations, which no head owns, come later."""
        state, site = self.swapped.state, self.site
        if state.recording is not None or not self.is_needed():
            return results
        z = state.take(site.name, site.layer)
        if z is None:
            return results  # the output's HookPoint will say so
        return self.whole(self._masked_heads, results, z, state.given.get(site.name))

    def _masked_heads(self, results: Tensor, z: Tensor, given: SiteMask | None) -> Tensor:
        state, site = self.swapped.state, self.site
        x = rearrange(z, "... head d_head -> ... (head d_head)")
        a = self._activations(x)
        patched, mask, delta = (a, *self._given_factors(given, a)) if given is not None else self._hooked_factors(x, a)
        rest = None
        if patched is not a:
            moved = patched - a if mask is None else mask * (patched - a)
            rest = moved @ self.U
        state.keep(site.name, site.layer, MaskedAlready(rest))
        if mask is None and delta is None:
            return results
        one = torch.ones((), dtype=a.dtype, device=a.device)
        factor = (one if mask is None else mask) - (one if delta is None else delta.unsqueeze(-1))
        V = rearrange(self.V, "(head d_head) C -> head d_head C", head=z.shape[-2])
        a_by_head = (z.to(V.dtype).unsqueeze(-2) @ V).squeeze(-2)
        change = (factor.unsqueeze(-2) * a_by_head) @ self.U
        if delta is not None:
            change = change - (1 - delta)[..., None, None] * results
        return (results + change).to(results.dtype)

    def masked_output(self, y0: Tensor, x: Tensor, given: SiteMask) -> Tensor:
        """M2 with masks handed over directly instead of by hooks; the result is the same."""
        y = self.whole(self._masked_output, y0, x, given.mask, given.delta, given.routed)
        return y if y.shape == y0.shape else y.reshape(y0.shape)

    def _masked_output(
        self, y0: Tensor, x: Tensor, mask: Tensor | None, delta: Tensor | None, routed: Tensor | None
    ) -> Tensor:
        given = SiteMask(mask, delta, routed)
        n_leading = x.ndim - (0 if self.site.is_lookup else 1)
        if routed is not None and routed.device.type == "cpu" and routed.ndim == n_leading <= 2:
            return self._routed_output(y0, x, given, routed)
        a = self._activations(x)
        return self._combine(y0, a, a, *self._given_factors(given, a))

    def _given_factors(self, given: SiteMask, a: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Mask and delta mask, 1 where the site stays with the target."""
        mask = _over_heads(self._as_factor(given.mask, a), a, n_trailing=1)
        delta, routed = (
            _over_heads(value, a, n_trailing=0) for value in (self._as_factor(given.delta, a), given.routed)
        )
        if routed is not None:
            routed = routed.to(a.device)
            mask = None if mask is None else torch.where(routed.unsqueeze(-1), mask, 1.0)
            delta = None if delta is None else torch.where(routed, delta, 1.0)
        return mask, delta

    def _routed_output(self, y0: Tensor, x: Tensor, given: SiteMask, routed: Bool[Tensor, "*batch"]) -> Tensor:
        """M2 at the routed rows alone; the others keep `y0`. One row below the other, as no view leaves `whole`."""
        rows = routed.flatten().nonzero().squeeze(1).to(x.device, non_blocking=True)

        def at_rows(value: Tensor, n_trailing: int) -> Tensor:
            trailing = value.shape[value.ndim - n_trailing :]
            return value.expand(*routed.shape, *trailing).reshape(-1, *trailing).index_select(0, rows)

        x_rows, y_rows = at_rows(x, x.ndim - routed.ndim), at_rows(y0, y0.ndim - routed.ndim)
        mask = None if given.mask is None else at_rows(given.mask, 1)
        delta = None if given.delta is None else at_rows(given.delta, 0)
        a = self._activations(x_rows)
        mask, delta = self._as_factor(mask, a), self._as_factor(delta, a)
        change = self._change(y_rows, a, a, mask, delta).to(y0.dtype)
        return y0.flatten(0, routed.ndim - 1).index_add(0, rows, change)

    def _hooked_output(self, y0: Tensor, x: Tensor) -> Tensor:
        a = self._activations(x)
        patched, mask, delta = self._hooked_factors(x, a)
        if patched is a and mask is None and delta is None:
            return y0
        return self._combine(y0, a, patched, mask, delta)

    def _hooked_factors(self, x: Tensor, a: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What the hooks on the site's points make of `a` and of ones, in the order in which the points fire."""
        acts_point, importance_point, mask_point, delta_point = (self.points[s] for s in POINT_SUFFIXES)
        patched, mask, delta = a, None, None
        # A hook may write in place: it gets a tensor of its own, never the `a` that the delta still needs.
        if has_hook(acts_point):
            patched = self._checked(acts_point(a.clone()), a.shape, "acts").to(a.dtype)
        if has_hook(importance_point) and self.gate is not None:
            importance_point(self.live_importance(x, a))
        if has_hook(mask_point):
            mask = self._as_factor(self._checked(mask_point(self._ones(mask_point, a)), a.shape, "mask"), a)
        if has_hook(delta_point):
            # With an axis after the positions, as everything that TransformerLens caches and slices has one.
            shape = (*a.shape[:-1], 1)
            delta = self._checked(delta_point(self._ones(delta_point, a[..., :1])), torch.Size(shape), "delta_mask")
            delta = self._as_factor(delta, a).expand(shape).squeeze(-1)
        return patched, mask, delta

    @staticmethod
    def _ones(point: HookPoint, like: Tensor) -> Tensor:
        ones = torch.ones_like(like, memory_format=torch.contiguous_format)
        # Only then can a backward hook on the mask see a gradient.
        if (point._backward_hooks or point._backward_pre_hooks) and torch.is_grad_enabled():
            ones.requires_grad_()
        return ones

    def _as_factor(self, value: Tensor | None, a: Tensor) -> Any:
        """A mask of any dtype (bool, integer, float64 from numpy) in one that multiplies into `a` and then `U`."""
        return value if value is None or value.dtype == a.dtype else value.to(self.V.dtype)

    def _checked(self, value: Any, shape: torch.Size, what: str) -> Tensor:
        try:
            fits = isinstance(value, Tensor) and torch.broadcast_shapes(value.shape, shape) == shape
        except RuntimeError:
            fits = False
        if not fits:
            given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            axis = "; add the last axis: value.unsqueeze(-1)" if given == tuple(shape[:-1]) else ""
            raise ValueError(
                f"a hook on {self.site.point_stem}_{what} returned {given}; expected a tensor that broadcasts "
                f"to {tuple(shape)} for this pass{axis}"
            )
        return value

    def live_importance(self, x: Tensor, a: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch C"]:
        """Importance from the pass that is running, `clamp(p, 0, 1)`; equal to the clean one if nothing is masked.

        Raises ValueError where this pass cannot know it: the attention gate needs every position, which a key-value
        cache hides.
        """
        assert self.gate is not None
        if self.gate.looks_across_positions and self._cached_positions() != 0:
            raise ValueError(
                f"the attention gate of {self.site.name} looks across positions, but this pass runs with a "
                "key-value cache and sees only the newest; use decomposition.importance(tokens), or "
                "generate(..., use_past_kv_cache=False)"
            )
        return importance_of(self.gate(x, a))

    def _cached_positions(self) -> int:
        """How many earlier positions a key-value cache hides from this pass; 0 where embeddings read."""
        site, state = self.site, self.swapped.state
        if site.is_lookup:
            return 0
        call = state.call_of(site.layer)
        return state.cached_positions if call is None else call.cached_positions

    def _combine(self, y0: Tensor, a: Tensor, patched: Tensor, mask: Tensor | None, delta: Tensor | None) -> Tensor:
        return masked_sum(y0, a, patched, mask, delta, self.U, None if delta is None else self.bias)

    def _change(self, y0: Tensor, a: Tensor, patched: Tensor, mask: Tensor | None, delta: Tensor | None) -> Tensor:
        return masked_change(y0, a, patched, mask, delta, U=self.U, bias=None if delta is None else self.bias)
