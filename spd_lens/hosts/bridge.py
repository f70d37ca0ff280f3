"""`BridgeHost`: a `TransformerBridge` (TransformerLens 3.9 and 4.x), which wraps a Hugging Face model in place.

Its sites are found by `bridge_sites`. `residual_before` and `forward_from` let the Hugging Face model run its own loop
and stop or skip blocks in it (`bridge_blocks`), so masks, position embeddings, the final norm and logit soft-capping
are its own. Encoder-decoder models are refused.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from spd_lens.hosts.attention import AttentionGeometry, bridge_geometry
from spd_lens.hosts.bridge_blocks import Reached, SkippedBlock, StopsHere, ends_pass, enter_with, surgery
from spd_lens.hosts.bridge_guards import added_points, guard
from spd_lens.hosts.bridge_sites import bridge_site
from spd_lens.hosts.host import Host
from spd_lens.hosts.hugging_face import hugging_face_copy
from spd_lens.hosts.provenance import Provenance
from spd_lens.hosts.revisions import noted_revision
from spd_lens.hosts.site import Site


class BridgeHost(Host):
    """A TransformerBridge."""

    def _blocks(self) -> Any:
        blocks = self.model._modules.get("blocks")
        if blocks is None:
            raise ValueError(
                f"this {type(self.model).__name__} ({self.model.cfg.architecture}) has no single stack of blocks; "
                "encoder-decoder and other models with several stacks are not supported"
            )
        return blocks

    def records(self) -> bool:
        """No: transformers copies numbers from the host to the card in every pass, for its attention masks."""
        return False

    def n_layers(self) -> int:
        return len(self._blocks())

    def is_causal(self) -> bool:
        # The bridge's configuration says "causal" of encoders as well.
        causal = ("ForCausalLM", "LMHeadModel", "TransformerLensNative")
        return super().is_causal() and str(self.model.cfg.architecture).endswith(causal)

    def check_can_swap(self) -> None:
        self._blocks()

    # -- sites -------------------------------------------------------------------------------------------------

    def site_names(self) -> list[str]:
        tables = {"embed": "embed.W_E", "pos_embed": "pos_embed.W_pos"}
        names = [name for part, name in tables.items() if part in self.model._modules]
        for layer, block in enumerate(self._blocks()):
            parts = block._modules
            if "attn" in parts:
                names += [f"blocks.{layer}.attn.W_{kind}" for kind in "QKVO"]
            if "mlp" in parts:
                kinds = ("gate", "in", "out") if "gate" in parts["mlp"]._modules else ("in", "out")
                names += [f"blocks.{layer}.mlp.W_{kind}" for kind in kinds]
        return [*names, "unembed.W_U"] if "unembed" in self.model._modules else names

    def site(self, name: str) -> Site:
        return bridge_site(self.model, self._blocks(), name)

    # -- HookPoints ----------------------------------------------------------------------------------------------

    def add_point(self, parent: nn.Module, name: str, point: HookPoint) -> None:
        setattr(parent, name.rsplit(".", 1)[-1], point)
        # Assigning it filed the point in the registry of its parent and named it from there.
        point.name = name
        self.model._hook_registry[name] = point
        guard(self.model, added_points(self.model) | {name})

    def remove_point(self, parent: nn.Module, name: str) -> None:
        attribute = name.rsplit(".", 1)[-1]
        if attribute in parent._modules:
            delattr(parent, attribute)
        # A name left in the block's own registry would come back at the next scan, as a point that never fires.
        own: Any = parent._hook_registry
        own.pop(attribute, None)
        self.model._hook_registry.pop(name, None)
        guard(self.model, added_points(self.model) - {name})

    # -- running -------------------------------------------------------------------------------------------------

    def _forward_masked(self, batch: Tensor, attention_mask: Tensor) -> Tensor:
        parameters = inspect.signature(self.model.original_model.forward).parameters
        if "attention_mask" not in parameters:
            raise ValueError(
                f"a {type(self.model.original_model).__name__} takes no attention_mask; leave padded positions out, or "
                "give rows of equal length"
            )
        return self.model(batch, attention_mask=attention_mask)

    def residual_before(self, layer: int, tokens: Tensor) -> Float[Tensor, "batch pos d_model"]:
        with surgery:
            block = self._block(layer)
            blocks, index = self._blocks()._modules, list(self._blocks()._modules)[layer]
            try:
                blocks[index] = StopsHere(block)
                self.model(tokens)
            except Reached as reached:
                return reached.residual
            finally:
                blocks[index] = block
        raise RuntimeError(f"the pass ended without calling block {layer}")

    def forward_from(self, layer: int, residual: Float[Tensor, "batch pos d_model"]) -> Tensor:
        # Stands for embeddings that no block reads: it gives the model the shape, dtype and device to make masks and
        # position embeddings for, and keeps the embedding's own sites from firing.
        unread = residual.new_zeros(*residual.shape[:-1], self.model.embed.W_E.shape[-1])
        with surgery, self._entering(layer, residual):
            return self.model(unread)

    def forward_until(
        self, stop_at: int, batch: Tensor, *, start_at: int | None = None, attention_mask: Tensor | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        end = partial(ends_pass, thread=threading.get_ident())
        # The last of the block's hooks, so that the library's own and the user's have acted.
        handle = self._block(stop_at - 1).register_forward_hook(end)
        try:
            if start_at is None:
                self.forward(batch, attention_mask)
            else:
                self.forward_from(start_at, batch)
        except Reached as reached:
            return reached.residual
        finally:
            handle.remove()
        raise RuntimeError(f"the pass ended without calling block {stop_at - 1}")

    def can_start_at_blocks(self) -> bool:
        return True

    def can_be_mapped(self) -> bool:
        # Hugging Face's code writes in place.
        return False

    @contextmanager
    def _entering(self, layer: int, residual: Tensor) -> Iterator[None]:
        """While open, a pass leaves out the blocks before `layer`, and `residual` enters that one."""
        from transformers import PreTrainedModel

        block = self._block(layer)
        # The very list that the Hugging Face model loops over.
        blocks = self._blocks()._modules
        skipped = dict(list(blocks.items())[:layer])
        # What the loop can take apart: TransformerLens's native models unpack `(hidden_states,)`.
        unused = residual if isinstance(self.model.original_model, PreTrainedModel) else (residual,)
        enter = partial(enter_with, residual=residual, thread=threading.get_ident())
        handle = block.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
        try:
            blocks.update({index: SkippedBlock(other, unused) for index, other in skipped.items()})
            yield
        finally:
            blocks.update(skipped)
            handle.remove()

    def _block(self, layer: int) -> nn.Module:
        count = self.n_layers()
        if not 0 <= layer < count:
            raise ValueError(f"layer={layer}; this model has blocks 0..{count - 1}")
        return self._blocks()[layer]

    def cached_positions(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        for value in (*args, *kwargs.values()):
            if hasattr(value, "get_seq_length"):
                # The last layer's entry is the one that no block has lengthened yet in the running pass.
                return int(value.get_seq_length(self.n_layers() - 1))
        return 0

    @contextmanager
    def quiet_edits(self) -> Iterator[None]:
        # The bridge warns that an edited normalisation is computed by TransformerLens itself, equal up to rounding.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="A forward hook edited hook_scale")
            yield

    # -- other weights -------------------------------------------------------------------------------------------

    def with_matrices(self, new: Mapping[str, Float[Tensor, "_in _out"]]) -> nn.Module:
        from transformers import PreTrainedModel

        # TransformerLens's native models have no form of their own outside a bridge.
        if not isinstance(self.model.original_model, PreTrainedModel):
            return super().with_matrices(new)
        return hugging_face_copy(self, new)

    def _names_of(self, parameter: Tensor) -> set[str]:
        # A bridge reaches every parameter on several ways.
        return {"one name"}

    # -- provenance ----------------------------------------------------------------------------------------------

    def attention_geometry(self, layer: int) -> AttentionGeometry:
        return bridge_geometry(self.model, layer)

    def provenance(self) -> Provenance:
        cfg = self.model.cfg
        return Provenance(
            model_name=str(cfg.model_name),
            host="TransformerBridge",
            weight_processing=self._weight_processing(),
            details={
                "n_layers": cfg.n_layers,
                "d_model": cfg.d_model,
                "original_architecture": cfg.architecture,
                "dtype": str(cfg.dtype),
                **noted_revision(self.model),
            },
        )

    def _weight_processing(self) -> str:
        """What TransformerLens did to the weights, as far as it remembers: of the foldings only that of norms."""
        processed = bool(self.model._weights_processed)
        if not processed:
            return "compatibility mode (no processing)" if self.model.compatibility_mode else "raw"
        adapter = self.model.adapter
        folded = getattr(adapter, "_fold_ln_requested", False) and getattr(adapter, "supports_fold_ln", True)
        norms = "fold_ln" if folded else "no fold_ln"
        return f"compatibility mode ({norms})" if self.model.compatibility_mode else f"processed ({norms})"
