"""Sites of a `HookedTransformer` (TransformerLens 3.x), which keeps raw parameters and uses them inline.

The swap sits on the HookPoint that each weight's output passes. Inputs are read where the matmul reads them: what
enters `attn`, `mlp` and `embed`, and what `hook_post`, `hook_z` and `unembed.hook_in` return. They are never
taken from `ln*.hook_normalized`, which fires before an unfolded LayerNorm's `* w + b`.

Deliberately refused, because no HookPoint sees exactly `x @ W + b`: mixture-of-experts MLPs, quantised weights,
`W_O` and `W_out` where a normalisation stands between the matrix and its HookPoint, `W_E` under an embedding
LayerNorm.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spd_lens.hosts.attention import AttentionGeometry, hooked_geometry
from spd_lens.hosts.host import Host
from spd_lens.hosts.provenance import Provenance
from spd_lens.hosts.revisions import noted_revision
from spd_lens.hosts.site import ModuleInput, PointOutput, Site, StoredMatrix, argument

_IN_OUT = "d_in d_out -> d_in d_out"
_HEADS_OUT = "head_index d_model d_head -> d_model (head_index d_head)"


_HEADS_IN = "head_index d_head d_model -> (head_index d_head) d_model"


def _position_ids(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Row of `W_pos` that each position gets, -1 where padding gets the zero vector instead."""
    tokens = argument(args, kwargs, name="tokens", index=0)
    offset = kwargs.get("past_kv_pos_offset", args[1] if len(args) > 1 else 0)
    attention_mask = kwargs.get("attention_mask", args[2] if len(args) > 2 else None)
    length = tokens.size(-1)
    if attention_mask is None:
        ids = torch.arange(offset, offset + length, device=tokens.device)
        return ids.expand(tokens.size(0), length)
    shifted = (attention_mask.cumsum(-1) - 1).clamp_min(0)
    ids = shifted.masked_fill(~attention_mask.bool(), -1)
    return ids[:, offset : offset + length]


class HookedHost(Host):
    """A HookedTransformer."""

    def site_names(self) -> list[str]:
        cfg = self.model.cfg
        names = ["embed.W_E"] if hasattr(self.model, "hook_embed") else []
        if cfg.positional_embedding_type in ("standard", "shortformer"):
            names.append("pos_embed.W_pos")
        for layer in range(cfg.n_layers):
            names += [f"blocks.{layer}.attn.W_{kind}" for kind in "QKVO"]
            if not cfg.attn_only:
                names += [f"blocks.{layer}.mlp.W_{kind}" for kind in self._mlp_kinds()]
        return [*names, "unembed.W_U"]

    def _mlp_kinds(self) -> tuple[str, ...]:
        return ("gate", "in", "out") if self.model.cfg.gated_mlp else ("in", "out")

    def check_can_swap(self) -> None:
        if getattr(self.model.cfg, "load_in_4bit", False):
            raise ValueError(
                "this model's weights are 4-bit quantised, so there is no float matrix to decompose; "
                "load it without load_in_4bit"
            )

    def site(self, name: str) -> Site:
        parts = name.split(".")
        if parts[0] != "blocks":
            return self._root_site(name)
        layer = int(parts[1])
        if parts[2] == "attn":
            return self._attention_site(name, layer, parts[3])
        return self._mlp_site(name, layer, parts[3])

    def _root_site(self, name: str) -> Site:
        model = self.model
        if name == "embed.W_E":
            if model.cfg.post_embedding_ln:
                raise ValueError(
                    f"{name} cannot be decomposed exactly: this model normalises the embedding before "
                    "hook_embed; leave W_E out"
                )
            module, output, read = model.embed, model.hook_embed, partial(argument, name="tokens", index=0)
        elif name == "pos_embed.W_pos":
            module, output, read = model.pos_embed, model.hook_pos_embed, _position_ids
        else:
            unembed = model.unembed
            return Site(
                name=name,
                point_stem="hook_W_U",
                parent=model,
                layer=None,
                matrix=StoredMatrix(unembed, "W_U", _IN_OUT),
                output=unembed.hook_out,
                read_from=PointOutput(unembed.hook_in),
                bias=(unembed, "b_U"),
            )
        short = name.rsplit(".", 1)[-1]
        return Site(
            name=name,
            point_stem=f"hook_{short}",
            parent=model,
            layer=None,
            matrix=StoredMatrix(module, short, _IN_OUT),
            output=output,
            read_from=ModuleInput(module, read),
            is_lookup=True,
        )

    def _attention_site(self, name: str, layer: int, weight: str) -> Site:
        block = self.model.blocks[layer]
        attn = block.attn
        stem = f"blocks.{layer}.hook_{weight}"
        if weight == "W_O":
            self._refuse_norm_after(name, "hook_attn_out")
            return Site(
                name=name,
                point_stem=stem,
                parent=block,
                layer=layer,
                matrix=StoredMatrix(attn, "W_O", _HEADS_IN),
                output=block.hook_attn_out,
                read_from=PointOutput(attn.hook_z),
                bias=(attn, "b_O"),
                flatten_input=True,
                by_head=attn.hook_result,
                module_output=attn,
            )
        kind = weight[-1]
        grouped = kind in "KV" and hasattr(attn, f"_W_{kind}")
        prefix = "_" if grouped else ""
        which, index = {"Q": ("query_input", 0), "K": ("key_input", 1), "V": ("value_input", 2)}[kind]
        return Site(
            name=name,
            point_stem=stem,
            parent=block,
            layer=layer,
            matrix=StoredMatrix(attn, f"{prefix}W_{kind}", _HEADS_OUT),
            output=getattr(attn, f"hook_{kind.lower()}"),
            read_from=ModuleInput(attn, partial(argument, name=which, index=index)),
            bias=(attn, f"{prefix}b_{kind}"),
        )

    def _mlp_site(self, name: str, layer: int, weight: str) -> Site:
        block = self.model.blocks[layer]
        mlp = block.mlp
        if not isinstance(getattr(mlp, weight, None), nn.Parameter):
            raise ValueError(
                f"{name} cannot be decomposed: the MLP of block {layer} is a {type(mlp).__name__}, "
                "which has no single matrix of that name (mixture-of-experts weights are not supported)"
            )
        gated = hasattr(mlp, "W_gate")
        if gated and weight == "W_in" and self.model.cfg.is_layer_norm_activation():
            raise ValueError(f"{name} is never used: with act_fn={self.model.cfg.act_fn!r} a gated MLP leaves it out")
        common: dict[str, Any] = {
            "name": name,
            "point_stem": f"blocks.{layer}.hook_{weight}",
            "parent": block,
            "layer": layer,
            "matrix": StoredMatrix(mlp, weight, _IN_OUT),
        }
        if weight == "W_out":
            self._refuse_norm_after(name, "hook_mlp_out")
            return Site(
                **common,
                output=block.hook_mlp_out,
                read_from=PointOutput(mlp.hook_post),
                bias=(mlp, "b_out"),
                module_output=mlp,
            )
        # A gated MLP adds b_in after the product, so hook_pre_linear sees x @ W_in alone.
        output = mlp.hook_pre_linear if gated and weight == "W_in" else mlp.hook_pre
        bias = None if gated else (mlp, "b_in")
        return Site(
            **common, output=output, read_from=ModuleInput(mlp, partial(argument, name="x", index=0)), bias=bias
        )

    def _refuse_norm_after(self, name: str, point: str) -> None:
        from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES

        cfg = self.model.cfg
        if cfg.use_normalization_before_and_after or cfg.original_architecture in POST_NORM_ARCHITECTURES:
            raise ValueError(
                f"{name} cannot be decomposed exactly: this architecture normalises its output before {point}, "
                "so no HookPoint sees x @ W; leave it out, or decompose the matrices that read the residual stream"
            )

    def _forward_masked(self, batch: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(batch, attention_mask=attention_mask)

    def residual_before(self, layer: int, tokens: Tensor) -> Float[Tensor, "batch pos d_model"]:
        return self.model(tokens, stop_at_layer=layer)

    def forward_from(self, layer: int, residual: Float[Tensor, "batch pos d_model"]) -> Tensor:
        return self.model(residual, start_at_layer=layer)

    def forward_until(
        self, stop_at: int, batch: Tensor, *, start_at: int | None = None, attention_mask: Tensor | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        # Without a start the model embeds what it is given.
        start = {} if start_at is None else {"start_at_layer": start_at}
        return self.model(batch, stop_at_layer=stop_at, attention_mask=attention_mask, **start)

    def can_start_at_blocks(self) -> bool:
        # Both carry something besides the residual stream: position embeddings, and the mask of padded positions.
        tokenizer = self.model.tokenizer
        pads_left = tokenizer is not None and tokenizer.padding_side == "left"
        return self.model.cfg.positional_embedding_type != "shortformer" and not pads_left

    def cached_positions(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        entry = kwargs.get("past_kv_cache_entry")
        return 0 if entry is None else int(entry.past_keys.size(1))

    def attention_geometry(self, layer: int) -> AttentionGeometry:
        return hooked_geometry(self.model, layer)

    def provenance(self) -> Provenance:
        cfg = self.model.cfg
        folded = str(cfg.normalization_type or "none")
        return Provenance(
            model_name=str(cfg.model_name),
            host="HookedTransformer",
            weight_processing=f"normalization_type={folded}",
            details={
                "n_layers": cfg.n_layers,
                "d_model": cfg.d_model,
                "original_architecture": cfg.original_architecture,
                "dtype": str(cfg.dtype),
                **noted_revision(self.model),
            },
        )
