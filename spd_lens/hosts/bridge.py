"""Sites of a `TransformerBridge` (TransformerLens 3.9 and 4.x), which wraps a Hugging Face model in place.

Around every matrix stands a bridge component: `hook_in`, the Hugging Face module that multiplies, `hook_out`. The
swap is at `hook_out`, which receives the product itself, before anything normalises, rotates or splits it by head
(its `hook_conversion` shapes only what user hooks see). The input is read where the Hugging Face module is called,
which is after every TransformerLens hook, in whatever order those were added. The one exception is a gated MLP with
processed weights: TransformerLens multiplies there without calling the modules, and the input is what `mlp.hook_in`
(or `mlp.out.hook_in`) returns.

`residual_before` and `forward_from` let the Hugging Face model run its own loop and stop or skip blocks in it, so
masks, position embeddings, the final norm and logit soft-capping are its own.

Deliberately refused, because no HookPoint sees exactly `x @ W + b`, or none at all: mixture-of-experts MLPs, fused
projections that TransformerLens does not split, quantised and other special linear modules, position embeddings
that compute their rows inside the module, `W_Q`, `W_K`, `W_V` under split inputs, `W_O` under `use_attn_result`,
encoder-decoder models.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from spd_lens.hosts.host import Host, Provenance
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

# Methods of the bridge that would break a decomposition: the sites that each would break (None: all), and why.
_BY_HEAD = (("W_Q", "W_K", "W_V"), "no HookPoint sees the normalised input of a single head")


_FORBIDDEN: Mapping[str, tuple[tuple[str, ...] | None, str]] = {
    "enable_compatibility_mode": (None, "it rewrites the weights and rebuilds the hook registry"),
    "process_weights": (None, "it rewrites the weights"),
    "set_use_attn_result": (("W_O",), "heads are then multiplied one by one and attn.o.hook_out is never called"),
    "set_use_split_qkv_input": _BY_HEAD,
    "set_use_attn_in": _BY_HEAD,
}


@dataclass(frozen=True, eq=False)
class ScaledMatrix(StoredMatrix):
    """A stored matrix that the forward pass uses multiplied by the scalar `module.embed_scale`."""

    def _scale(self) -> Tensor:
        # As the module does it, so that `read` gives the very rows that the module returns.
        return self.module.embed_scale.to(self.stored())  # pyright: ignore

    def read(self) -> Float[Tensor, "d_in d_out"]:
        """`W * scale [d_in, d_out]`, a copy."""
        return super().read() * self._scale()

    def write(self, matrix: Float[Tensor, "d_in d_out"]) -> None:
        """Overwrite the stored parameter in place, so that `read` gives `matrix [d_in, d_out]`."""
        super().write(matrix / self._scale())


# One thread at a time puts stand-ins into the list of blocks; passes of others go on through them.
_surgery = threading.RLock()


class _Reached(Exception):
    """Ends a pass at a block; carries the residual stream that would have entered it."""

    def __init__(self, residual: Tensor) -> None:
        self.residual = residual


class _StopsHere(nn.Module):
    """Stands for a block at which one thread's pass ends; passes of other threads go on through it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__.update(block=block, thread=threading.get_ident())

    def __getattr__(self, name: str) -> Any:
        # The loop around the blocks may ask a block which kind of attention it has.
        return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != self.__dict__["thread"]:
            return self.__dict__["block"](*args, **kwargs)
        return self.stand_in(args, kwargs)

    def stand_in(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What the pass gets instead of the block's output."""
        raise _Reached(argument(args, kwargs, name="hidden_states", index=0))


class _SkippedBlock(_StopsHere):
    """Stands for a block that is left out of one thread's pass; what it returns never reaches the entered block."""

    def __init__(self, block: nn.Module, unused: Any) -> None:
        super().__init__(block)
        self.__dict__.update(unused=unused)

    def stand_in(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return self.__dict__["unused"]


def _enter(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, residual: Tensor, thread: int
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook on a block: let `residual` enter it instead."""
    if threading.get_ident() != thread:
        return None
    if "hidden_states" in kwargs:
        return args, {**kwargs, "hidden_states": residual}
    return (residual, *args[1:]), kwargs


def _refuse(*args: Any, method: str, **kwargs: Any) -> None:
    """Stands in for a method of the bridge while the model is decomposed; switching something off stays allowed."""
    if method.startswith("set_") and not any((*args, *kwargs.values())):
        return
    weights, reason = _FORBIDDEN[method]
    without = "" if weights is None else f" without {', '.join(weights)}"
    raise ValueError(
        f"{method}() cannot be called on a decomposed model: {reason}. Call decomposition.remove(), then "
        f"{method}(), then decompose again{without}"
    )


def _own_keys(bridge: Any) -> list[str]:
    """Names in the Hugging Face model of the parameters that decomposed HookPoints hold."""
    keys = []
    for name, module in bridge.original_model.named_modules():
        if isinstance(module, HookPoint):
            keys += [f"{name}.{key}" for key, _ in module.named_parameters()]
    # A module reached on two ways counts once.
    return list(dict.fromkeys(keys))


def _state_dict(*args: Any, bridge: Any, **kwargs: Any) -> dict[str, Tensor]:
    """Stands in for `bridge.state_dict`, which leaves out what is not Hugging Face's: V, U and gates are in it."""
    state = type(bridge).state_dict(bridge, *args, **kwargs)
    if args or kwargs.get("destination") is not None or kwargs.get("prefix"):
        return state  # the whole module tree, with ours in it
    whole = bridge.original_model.state_dict(keep_vars=kwargs.get("keep_vars", False))
    return {**state, **{key: whole[key] for key in _own_keys(bridge)}}


def _load_state_dict(
    state_dict: Mapping[str, Tensor], strict: bool = True, *args: Any, bridge: Any, **kwargs: Any
) -> Any:
    """Stands in for `bridge.load_state_dict`: V, U and gates that are missing are named."""
    missing = [key for key in _own_keys(bridge) if key not in state_dict]
    if strict and missing:
        raise RuntimeError(
            f"this state_dict has no {missing[0]!r} (and {len(missing) - 1} more): it comes from a model that is not "
            "decomposed like this one; decompose that one alike before saving, or load with strict=False"
        )
    return type(bridge).load_state_dict(bridge, state_dict, strict, *args, **kwargs)


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
        parts = name.split(".")
        if parts[0] == "blocks":
            return self._block_site(name, int(parts[1]), parts[2], parts[3])
        bridge = self.model._modules[parts[0]]
        if name != "unembed.W_U":
            return self._lookup_site(name, bridge)
        # With tied embeddings this is the parameter of W_E too: the model uses it both ways round, the two sites are
        # decomposed apart, and write() at one of them changes the other.
        matrix, bias = self._module_weights(name, bridge)
        return self._site(name, self.model, None, matrix, bridge.hook_out, self._called_with(bridge), bias)

    def _lookup_site(self, name: str, bridge: Any) -> Site:
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
        source = self._called_with(bridge)
        if name == "pos_embed.W_pos":
            source = ModuleInput(module, partial(_position_rows, bridge=bridge))
        return self._site(name, self.model, None, matrix, bridge.hook_out, source, is_lookup=True)

    def _block_site(self, name: str, layer: int, part: str, weight: str) -> Site:
        block = self._blocks()[layer]
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
            self._refuse_bypassed(name, component.config, weight)
        elif _multiplies_itself(component):
            return self._functional_mlp_site(name, layer, weight)
        matrix, bias = self._module_weights(name, bridge)
        return self._site(name, block, layer, matrix, bridge.hook_out, self._called_with(bridge), bias)

    def _functional_mlp_site(self, name: str, layer: int, weight: str) -> Site:
        """Site of a gated MLP with processed weights."""
        block = self._blocks()[layer]
        mlp = block.mlp
        kind = _PROJECTIONS[weight]
        bridge = mlp._modules[kind]
        matrix, bias = self._module_weights(name, bridge)
        # TransformerLens 3.9 multiplies with tensors of its own; a deep copy no longer shares them with the modules.
        if hasattr(mlp, f"_processed_{weight}"):
            matrix, bias = StoredMatrix(mlp, f"_processed_{weight}", _OUT_IN), (mlp, f"_processed_b_{kind}")
        source = PointOutput(bridge.hook_in if kind == "out" else mlp.hook_in)
        return self._site(name, block, layer, matrix, bridge.hook_out, source, bias)

    def _module_weights(self, name: str, bridge: Any) -> tuple[StoredMatrix, tuple[nn.Module, str] | None]:
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

    @staticmethod
    def _called_with(bridge: Any) -> ModuleInput:
        return ModuleInput(bridge.original_component, partial(argument, name="input", index=0))

    @staticmethod
    def _site(
        name: str,
        parent: nn.Module,
        layer: int | None,
        matrix: StoredMatrix,
        output: HookPoint,
        source: ModuleInput | PointOutput,
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
            source=source,
            bias=bias,
            is_lookup=is_lookup,
        )

    @staticmethod
    def _refuse_bypassed(name: str, config: Any, weight: str) -> None:
        for method, (weights, reason) in _FORBIDDEN.items():
            flag = method.removeprefix("set_")
            if weights is not None and weight in weights and getattr(config, flag, False):
                raise ValueError(
                    f"{name} cannot be decomposed while {flag} is on: {reason}; call model.{method}(False) first"
                )

    # -- HookPoints ----------------------------------------------------------------------------------------------

    def add_point(self, parent: nn.Module, name: str, point: HookPoint) -> None:
        setattr(parent, name.rsplit(".", 1)[-1], point)
        # Assigning it filed the point in the registry of its parent and named it from there.
        point.name = name
        self.model._hook_registry[name] = point
        self._forbid(self._added_points() | {name})

    def remove_point(self, parent: nn.Module, name: str) -> None:
        attribute = name.rsplit(".", 1)[-1]
        if attribute in parent._modules:
            delattr(parent, attribute)
        # A name left in the block's own registry would come back at the next scan, as a point that never fires.
        own: Any = parent._hook_registry
        own.pop(attribute, None)
        self.model._hook_registry.pop(name, None)
        self._forbid(self._added_points() - {name})

    def _added_points(self) -> frozenset[str]:
        return self.model.__dict__.get("spd_points", frozenset())

    def _forbid(self, points: frozenset[str]) -> None:
        """Remember the points that are in the model, and shadow the methods that would break their sites."""
        state = self.model.__dict__
        state.pop("spd_points", None)
        if points:
            state["spd_points"] = points
        for name, stands_in in (("state_dict", _state_dict), ("load_state_dict", _load_state_dict)):
            if points:
                state[name] = partial(stands_in, bridge=self.model)
            else:
                state.pop(name, None)
        attributes = {name.rsplit(".", 1)[-1] for name in points}
        for method, (weights, _) in _FORBIDDEN.items():
            if points and (weights is None or any(f"hook_{weight}_acts" in attributes for weight in weights)):
                # A function of this module, not a closure: a deep copy of the model refuses for itself.
                state[method] = partial(_refuse, method=method)
            else:
                state.pop(method, None)

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
        with _surgery:
            block = self._block(layer)
            blocks, index = self._blocks()._modules, list(self._blocks()._modules)[layer]
            try:
                blocks[index] = _StopsHere(block)
                self.model(tokens)
            except _Reached as reached:
                return reached.residual
            finally:
                blocks[index] = block
        raise RuntimeError(f"the pass ended without calling block {layer}")

    def forward_from(self, layer: int, residual: Float[Tensor, "batch pos d_model"]) -> Tensor:
        # Stands for embeddings that no block reads: it gives the model the shape, dtype and device to make masks and
        # position embeddings for, and keeps the embedding's own sites from firing.
        unread = residual.new_zeros(*residual.shape[:-1], self.model.embed.W_E.shape[-1])
        with _surgery, self._entering(layer, residual):
            return self.model(unread)

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
        enter = partial(_enter, residual=residual, thread=threading.get_ident())
        handle = block.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
        try:
            blocks.update({index: _SkippedBlock(other, unused) for index, other in skipped.items()})
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

    # -- provenance ----------------------------------------------------------------------------------------------

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
