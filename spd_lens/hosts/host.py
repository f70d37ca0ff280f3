"""A host: one kind of TransformerLens model, with all that others ask of it and do to it."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from spd_lens.hosts.model_description import ModelDescription
from spd_lens.hosts.site import Site
from spd_lens.support.given import shown


class Host(ModelDescription):
    """What the library needs from a model. One subclass per kind of TransformerLens model.

    A host holds nothing but the model, so it may be made again at any time and deep-copied with it.
    """

    # -- the direct path to the logits ---------------------------------------------------------------------------

    def direct_logits(self, site: str, directions: Float[Tensor, "n d_out"]) -> Float[Tensor, "n d_vocab"] | None:
        """What directions in a site's output add to the logits on the direct path; None where there is no such path.

        The final normalisation centres as it does and multiplies by its weights, its scale taken as 1; biases are left
        out. Values go through the output matrix of their own heads, at an attention of 1.
        """
        names = self.site_names()
        kind = site.rsplit(".", 1)[-1]
        if "unembed.W_U" not in names or kind not in ("W_E", "W_pos", "W_V", "W_O", "W_out", "W_U"):
            return None
        if kind == "W_U":
            return directions
        if kind == "W_V":
            W_O = self.site(f"{site.rsplit('.', 1)[0]}.W_O").matrix.read()
            d_head = len(W_O) // self.n_heads()
            by_head = directions.unflatten(1, (-1, d_head))
            # Grouped heads share their values.
            by_head = by_head.repeat_interleave(self.n_heads() // by_head.shape[1], dim=1)
            directions = by_head.flatten(1) @ W_O.to(directions)
        W_U = self.site("unembed.W_U").matrix.read()
        return self._through_final_norm(directions) @ W_U.to(directions)

    def _through_final_norm(self, directions: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
        """The final normalisation without its scale and bias, whatever kind it is: it is tried."""
        norm = getattr(self.model, "ln_final", None)
        if norm is None:
            return directions
        norm = getattr(norm, "original_component", None) or norm
        like = next(norm.parameters(), directions)
        probes = torch.stack([torch.zeros_like(directions[0]), torch.ones_like(directions[0])])
        with torch.no_grad():
            bias, ones = norm(probes[None].to(like))[0].to(directions)
            centres = bool((ones - bias).abs().max() < 1e-3 * (1 + bias.abs().max()))
            kept = directions - directions.mean(1, keepdim=True) if centres else directions
            scale = kept.square().mean(1, keepdim=True).sqrt()
            # Enlarged, so that the number that keeps a normalisation from dividing by 0 does not count.
            large = 1e3 * directions / scale.clamp_min(1e-30)
            return (norm(large[None].to(like))[0].to(directions) - bias) * scale

    # -- HookPoints -------------------------------------------------------------------------------------------

    def add_point(self, parent: nn.Module, name: str, point: HookPoint) -> None:
        """Register `point` under the full hook name `name`, whose last part becomes an attribute of `parent`."""
        setattr(parent, name.rsplit(".", 1)[-1], point)
        point.name = name
        self.model.mod_dict[name] = point
        self.model.hook_dict[name] = point

    def remove_point(self, parent: nn.Module, name: str) -> None:
        """Undo `add_point`; a name that is already gone is not an error."""
        attribute = name.rsplit(".", 1)[-1]
        if attribute in parent._modules:
            delattr(parent, attribute)
        self.model.mod_dict.pop(name, None)
        self.model.hook_dict.pop(name, None)

    def check_can_swap(self) -> None:
        """Raise ValueError if this model cannot be swapped at all in its present state."""

    # -- running ----------------------------------------------------------------------------------------------

    def forward(self, batch: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The model's output (logits for a language model) on a batch of tokens or inputs.

        `attention_mask [batch pos]` is 0 where tokens are padding; ValueError where a model cannot take one.
        """
        if attention_mask is None:
            return self.model(batch)
        if not isinstance(attention_mask, Tensor):
            raise TypeError(f"attention_mask is {shown(attention_mask)}; expected a tensor [batch pos] of 0 and 1")
        if attention_mask.shape != batch.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)} and tokens {tuple(batch.shape)}; expected the "
                "same, [batch pos]"
            )
        return self._forward_masked(batch, attention_mask.to(device=batch.device, dtype=torch.long))

    def _forward_masked(self, batch: Tensor, attention_mask: Tensor) -> Tensor:
        raise ValueError(f"a {type(self.model).__name__} takes no attention_mask; leave padded positions out instead")

    def residual_before(self, layer: int, tokens: Tensor) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream that enters block `layer`; only the blocks before it are run."""
        raise ValueError(f"a {type(self.model).__name__} has no residual stream to start from")

    def forward_from(self, layer: int, residual: Float[Tensor, "batch pos d_model"]) -> Tensor:
        """The model's output with `residual` entering block `layer`; no block before it is run."""
        raise ValueError(f"a {type(self.model).__name__} has no residual stream to start from")

    def forward_until(
        self, stop_at: int, batch: Tensor, *, start_at: int | None = None, attention_mask: Tensor | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream that enters block `stop_at`, or after the last block (`n_layers`) leaves it.

        Nothing from there on is run, and gradients flow. `batch` as for `forward`, or what enters block `start_at`.
        """
        raise ValueError(
            f"a pass of a {type(self.model).__name__} cannot stop behind a block: it has none; train on its output"
        )

    def can_start_at_blocks(self) -> bool:
        """Whether `forward_from` gives, bit for bit, what the whole pass gives that the residual stream is from."""
        return False

    @contextmanager
    def record_residuals(self, layers: Iterable[int]) -> Iterator[dict[int, Tensor]]:
        """While open, a pass of this thread stores the residual stream that enters each of these blocks in the dict."""
        found: dict[int, Tensor] = {}
        handles = []
        try:
            for layer in layers:
                note = partial(_note_residual, found=found, layer=layer, thread=threading.get_ident())
                block = self.block(layer)
                assert block is not None
                handles.append(block.register_forward_pre_hook(note, with_kwargs=True, prepend=True))
            yield found
        finally:
            for handle in handles:
                handle.remove()

    def cached_positions(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        """How many earlier positions a block's call finds in its key-value cache."""
        return 0

    # -- other weights -------------------------------------------------------------------------------------------

    def with_matrices(self, new: Mapping[str, Float[Tensor, "_in _out"]]) -> nn.Module:
        """A plain model with `new[site] [d_in, d_out]` in place of the sites' matrices; this model is used up.

        A model of its own class with other weights; a bridge becomes the Hugging Face model that it wraps. Raises
        ValueError, naming the site, where one parameter would have to hold two values.
        """
        sites = {name: self.site(name) for name in new}
        for name, site in sites.items():
            self._check_shared(name, site, sites, new)
        for name, site in sites.items():
            site.matrix.write(new[name])
        return self.model

    def _check_shared(self, name: str, site: Site, edited: Mapping[str, Site], new: Mapping[str, Tensor]) -> None:
        """ValueError if a site's parameter is used elsewhere, and not to be changed there in the same way."""
        own, parameter = site.matrix.as_stored(new[name]), site.matrix.stored()
        users = [other for other in self.site_names() if self._stores(other, parameter)]
        for other in users:
            if other not in edited:
                raise ValueError(
                    f"{name} and {other} are one stored matrix, and only {name} is to be changed; change {other} in "
                    "the same way, or untie the two in the model first"
                )
            if not torch.allclose(edited[other].matrix.as_stored(new[other]), own, rtol=1e-9, atol=1e-12):
                raise ValueError(
                    f"{name} and {other} are one stored matrix, and they are to be changed in different ways; change "
                    "both alike, or untie the two in the model first"
                )
        names = self._names_of(parameter)
        if len(names) > max(1, len(users)):
            raise ValueError(
                f"{name} is used in several places of the model ({', '.join(sorted(names))}); untie them first"
            )

    def _stores(self, name: str, parameter: Tensor) -> bool:
        try:
            return self.site(name).matrix.stored() is parameter
        except ValueError:  # no site of this model
            return False

    def _names_of(self, parameter: Tensor) -> set[str]:
        """The names under which a parameter is registered."""
        return {name for name, p in self.model.named_parameters(remove_duplicate=False) if p is parameter}

    def quiet_edits(self) -> AbstractContextManager[None]:
        """While open, hooks that return what is at `frozen_points` make the host give no warning."""
        return nullcontext()


def _note_residual(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    found: dict[int, Tensor],
    layer: int,
    thread: int,
) -> None:
    if threading.get_ident() != thread:
        return
    if layer in found:
        raise RuntimeError(
            f"block {layer} was called twice in one pass: a hook runs the model again inside it. Run the model before, "
            "and let the hook use what came out"
        )
    found[layer] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
