"""The sites of a `TransformerBridge`: where each weight's input is read and where its output passes.

Around every matrix stands a bridge component: `hook_in`, the Hugging Face module that multiplies, `hook_out`. The
swap is at `hook_out`, which receives the product itself, before anything normalises, rotates or splits it by head
(its `hook_conversion` shapes only what user hooks see). The input is read where the Hugging Face module is called,
which is after every TransformerLens hook, in whatever order those were added. The one exception is a gated MLP with
processed weights: TransformerLens multiplies there without calling the modules, and the input is what `mlp.hook_in`
(or `mlp.out.hook_in`) returns.

Deliberately refused, because no HookPoint sees exactly `x @ W + b`, or none at all: mixture-of-experts MLPs, fused
projections that TransformerLens does not split, quantised and other special linear modules, position embeddings
that compute their rows inside the module, `W_Q`, `W_K`, `W_V` under split inputs, `W_O` under `use_attn_result`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from spd_lens.hosts.bridge_guards import FORBIDDEN
from spd_lens.hosts.site import ModuleInput, PointOutput, Site, StoredMatrix, argument

_OUT_IN = "d_out d_in -> d_in d_out"
_IN_OUT = "d_in d_out -> d_in d_out"

# Part of the block, and of that part, that holds each matrix.
_PROJECTIONS = {"W_Q": "q", "W_K": "k", "W_V": "v", "W_O": "o", "W_gate": "gate", "W_in": "in", "W_out": "out"}

# Embeddings that return `W[token] * embed_scale` and nothing else.
_SCALED_EMBEDDINGS = (
    "GemmaTextScaledWordEmbedding",
    "Gemma2TextScaledWordEmbedding",
    "Gemma3TextScaledWordEmbedding",
)


@dataclass(frozen=True, eq=False)
class ScaledMatrix(StoredMatrix):
    """A stored matrix that the forward pass uses multiplied by the scalar `module.embed_scale`."""

    def _scale(self) -> Tensor:
        # As the module does it, so that `read` gives the very rows that the module returns.
        return self.module.embed_scale.to(self.stored())  # pyright: ignore

    def read(self) -> Float[Tensor, "d_in d_out"]:
        """`W * scale [d_in, d_out]`, a copy."""
        return super().read() * self._scale()

    def as_stored(self, matrix: Float[Tensor, "d_in d_out"]) -> Tensor:
        """`matrix [d_in, d_out]` without the scale."""
        return super().as_stored(matrix / self._scale().to(matrix.dtype))


def _multiplies_itself(mlp: nn.Module) -> bool:
    """Whether the MLP bridge calls `F.linear` itself instead of the modules that it wraps."""
    # Inside functions here and below: these modules take a second to import, and only bridges need them.
    from transformer_lens.model_bridge.generalized_components.gated_mlp import GatedMLPBridge
    from transformer_lens.model_bridge.generalized_components.joint_gate_up_mlp import JointGateUpMLPBridge

    functional = (GatedMLPBridge.forward, JointGateUpMLPBridge.forward)
    return bool(getattr(mlp, "_use_processed_weights", False)) and type(mlp).forward in functional


def _position_rows(args: tuple[Any, ...], kwargs: Mapping[str, Any], *, bridge: Any) -> Tensor:
    """Rows of `W_pos` that are looked up, `[batch pos]`."""
    rows = argument(args, kwargs, name="input", index=0)
    # The model looks up one row per position; the bridge repeats the result over the batch before hook_out.
    batch_size = getattr(bridge, "_current_batch_size", None)
    return rows.expand(batch_size, -1) if batch_size and rows.ndim == 2 and rows.shape[0] == 1 else rows


def bridge_site(model: Any, blocks: Any, name: str) -> Site:
    """The site of this name; ValueError, with the reason, for a weight whose product no HookPoint sees."""
    parts = name.split(".")
    if parts[0] == "blocks":
        return _block_site(name, blocks[int(parts[1])], int(parts[1]), parts[2], parts[3])
    bridge = model._modules[parts[0]]
    if name != "unembed.W_U":
        return _lookup_site(name, model, bridge)
    # With tied embeddings this is the parameter of W_E too: the model uses it both ways round, the two sites are
    # decomposed apart, and write() at one of them changes the other.
    matrix, bias = _module_weights(name, bridge)
    return _site(name, model, None, matrix, bridge.hook_out, _called_with(bridge), bias)


def _lookup_site(name: str, model: Any, bridge: Any) -> Site:
    module = bridge.original_component
    plain = type(module).forward is nn.Embedding.forward
    if not plain and type(module).__name__ not in _SCALED_EMBEDDINGS:
        raise ValueError(
            f"{name} cannot be decomposed exactly: a {type(module).__name__} does more than look up rows of its "
            "weight; leave it out"
        )
    if getattr(bridge, "_output_contribution_scale", 1.0) != 1.0:
        raise ValueError(
            f"{name} cannot be decomposed exactly: this TransformerLens rescales the embedding around hook_embed; "
            "leave it out"
        )
    matrix = (StoredMatrix if plain else ScaledMatrix)(module, "weight", _IN_OUT)
    read_from = _called_with(bridge)
    if name == "pos_embed.W_pos":
        read_from = ModuleInput(module, partial(_position_rows, bridge=bridge))
    return _site(name, model, None, matrix, bridge.hook_out, read_from, is_lookup=True)


def _block_site(name: str, block: Any, layer: int, part: str, weight: str) -> Site:
    component: Any = block._modules[part]
    bridge: Any = component._modules.get(_PROJECTIONS[weight])
    # In a mixture of experts, `gate` is the router.
    is_router = part == "mlp" and "out" not in component._modules
    if bridge is None or bridge.original_component is None or is_router:
        raise ValueError(
            f"{name} cannot be decomposed: the {part} of block {layer} is a {type(component).__name__}, in which "
            "TransformerLens shows no single matrix of that name (mixture-of-experts, fused and latent projections "
            "are not supported); leave it out"
        )
    if part == "attn":
        _refuse_bypassed(name, component.config, weight)
    elif _multiplies_itself(component):
        return _functional_mlp_site(name, block, layer, weight)
    matrix, bias = _module_weights(name, bridge)
    return _site(name, block, layer, matrix, bridge.hook_out, _called_with(bridge), bias)


def _functional_mlp_site(name: str, block: Any, layer: int, weight: str) -> Site:
    """Site of a gated MLP with processed weights."""
    mlp = block.mlp
    kind = _PROJECTIONS[weight]
    bridge = mlp._modules[kind]
    matrix, bias = _module_weights(name, bridge)
    # TransformerLens 3.9 multiplies with tensors of its own; a deep copy no longer shares them with the modules.
    if hasattr(mlp, f"_processed_{weight}"):
        matrix, bias = StoredMatrix(mlp, f"_processed_{weight}", _OUT_IN), (mlp, f"_processed_b_{kind}")
    read_from = PointOutput(bridge.hook_in if kind == "out" else mlp.hook_in)
    return _site(name, block, layer, matrix, bridge.hook_out, read_from, bias)


def _module_weights(name: str, bridge: Any) -> tuple[StoredMatrix, tuple[nn.Module, str] | None]:
    from transformers.pytorch_utils import Conv1D

    module = bridge.original_component
    forward = type(module).forward
    # FalconLinear spells the same product out.
    if forward not in (nn.Linear.forward, Conv1D.forward) and type(module).__name__ != "FalconLinear":
        raise ValueError(
            f"{name} cannot be decomposed: it is stored in a {type(module).__name__} (quantised, adapted or "
            "special linear module), which does not multiply by one float matrix; load the model without "
            "quantisation or adapters"
        )
    matrix = StoredMatrix(module, "weight", _IN_OUT if forward is Conv1D.forward else _OUT_IN)
    return matrix, (module, "bias")


def _called_with(bridge: Any) -> ModuleInput:
    return ModuleInput(bridge.original_component, partial(argument, name="input", index=0))


def _site(
    name: str,
    parent: nn.Module,
    layer: int | None,
    matrix: StoredMatrix,
    output: HookPoint,
    read_from: ModuleInput | PointOutput,
    bias: tuple[nn.Module, str] | None = None,
    is_lookup: bool = False,
) -> Site:
    stem = f"hook_{name.rsplit('.', 1)[-1]}"
    return Site(
        name=name,
        point_stem=stem if layer is None else f"blocks.{layer}.{stem}",
        parent=parent,
        layer=layer,
        matrix=matrix,
        output=output,
        read_from=read_from,
        bias=bias,
        is_lookup=is_lookup,
    )


def _refuse_bypassed(name: str, config: Any, weight: str) -> None:
    for method, (weights, reason) in FORBIDDEN.items():
        flag = method.removeprefix("set_")
        if weights is not None and weight in weights and getattr(config, flag, False):
            raise ValueError(
                f"{name} cannot be decomposed while {flag} is on: {reason}; call model.{method}(False) first"
            )
