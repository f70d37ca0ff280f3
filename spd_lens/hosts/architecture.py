"""What a model is besides its matrices, where it is a plain causal transformer: norms, positions, heads, activation.

Models with parts that such a transformer does not have (parallel blocks, local attention, capped logits, mixtures of
experts, position biases) are refused by name. Configurations do not tell everything: who builds a model of this runs
both on the same tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spd_lens.hosts.host import Host
from spd_lens.support.given import given_one_of

_NORMS = {"LN": "layer", "LNPre": "layer", "RMS": "rms", "RMSPre": "rms", None: "none"}
_POSITIONS = {"standard": "learned", "rotary": "rotary"}
_ABSENT: Mapping[str, tuple[Any, ...]] = {
    "parallel_attn_mlp": (False, None),
    "use_local_attn": (False, None),
    "window_size": (None, 0),
    "attn_scores_soft_cap": (-1.0, None, 0),
    "output_logits_soft_cap": (-1.0, None, 0),
    "use_qk_norm": (False, None),
    "use_attention_sinks": (False, None),
    "num_experts": (None, 0),
    "use_normalization_before_and_after": (False, None),
    "post_embedding_ln": (False, None),
    "scale_attn_by_inverse_layer_idx": (False, None),
}


@dataclass(frozen=True)
class Architecture:
    """A plain causal transformer but for its matrices.

    - `norm`: "layer", "rms" or "none"; `norms`: weight and bias (zeros for "rms") by `"blocks.0.ln1"`, `"ln_final"`.
    - `neuron_biases`: by block, what is added to its neurons' values before W_out.
    - `positions`: "learned" or "rotary", then with a base; `n_kv_heads`: heads that keys and values are stored for.
    """

    n_layers: int
    d_model: int
    d_vocab: int
    n_ctx: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    attention_scale: float
    norm: str
    eps: float
    norms: Mapping[str, tuple[Tensor, Tensor]]
    positions: str
    rotary_base: float | None
    activation: str
    gated: bool
    attention_only: bool
    neuron_biases: Mapping[int, Tensor]


def architecture_of(host: Host) -> Architecture:
    """The architecture of a host's model. Raises ValueError, naming the part, for what no plain transformer has."""
    cfg: Any = getattr(host.model, "cfg", None)
    if cfg is None or host.n_layers() == 0:
        raise ValueError(f"a {type(host.model).__name__} is no transformer with blocks, so none can be written of it")
    for name, allowed in _ABSENT.items():
        if (value := getattr(cfg, name, allowed[0])) not in allowed:
            raise ValueError(f"this model has {name}={value!r}; a plain transformer has no place for that")
    if getattr(cfg, "attention_dir", "causal") != "causal":
        raise ValueError(f"this model's attention is {cfg.attention_dir}; expected causal")
    kind, positions = cfg.normalization_type, cfg.positional_embedding_type
    if kind not in _NORMS or positions not in _POSITIONS:
        raise ValueError(
            f"this model has normalization_type={kind!r} and positional_embedding_type={positions!r}; expected one of "
            f"{list(_NORMS)} and of {list(_POSITIONS)}"
        )
    norm, only = _NORMS[kind], bool(getattr(cfg, "attn_only", False))
    scale = float(getattr(cfg, "attn_scale", None) or -1)
    return Architecture(
        n_layers=host.n_layers(),
        d_model=cfg.d_model,
        d_vocab=cfg.d_vocab,
        n_ctx=cfg.n_ctx,
        n_heads=cfg.n_heads,
        n_kv_heads=getattr(cfg, "n_key_value_heads", None) or cfg.n_heads,
        d_head=cfg.d_head,
        attention_scale=scale if scale > 0 else float(cfg.d_head) ** 0.5,
        norm=norm,
        eps=float(cfg.eps),
        norms={} if norm == "none" else _norms(host, cfg.d_model, only),
        positions=_POSITIONS[positions],
        rotary_base=_rotary_base(host, cfg) if positions == "rotary" else None,
        activation=str(cfg.act_fn) if only else given_one_of("act_fn", cfg.act_fn, ACTIVATIONS),
        gated=bool(cfg.gated_mlp),
        attention_only=only,
        neuron_biases=_neuron_biases(host),
    )


# Names of both TransformerLens and Hugging Face.
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu")


def _norms(host: Host, d_model: int, attention_only: bool) -> dict[str, tuple[Tensor, Tensor]]:
    found = {"ln_final": _affine(host.model.ln_final, d_model)}
    for layer in range(host.n_layers()):
        block: Any = host.block(layer)
        found[f"blocks.{layer}.ln1"] = _affine(block.ln1, d_model)
        if not attention_only:
            found[f"blocks.{layer}.ln2"] = _affine(block.ln2, d_model)
    return found


def _neuron_biases(host: Host) -> dict[int, Tensor]:
    """A gated MLP of a HookedTransformer adds the bias of W_in after the product with the gate's output."""
    found = {}
    for layer in range(host.n_layers()):
        bias = getattr(getattr(host.block(layer), "mlp", None), "b_in", None)
        name = f"blocks.{layer}.mlp.W_in"
        if isinstance(bias, nn.Parameter) and name in host.site_names() and host.site(name).bias is None:
            found[layer] = bias.detach()
    return found


def _affine(module: nn.Module, d_model: int) -> tuple[Tensor, Tensor]:
    """Weight and bias of a norm; ones and zeros where it has none."""
    inner: Any = getattr(module, "original_component", None) or module
    weight = next((getattr(inner, n) for n in ("w", "weight") if getattr(inner, n, None) is not None), None)
    bias = next((getattr(inner, n) for n in ("b", "bias") if getattr(inner, n, None) is not None), None)
    weight = torch.ones(d_model) if weight is None else weight.detach()
    return weight, torch.zeros_like(weight) if bias is None else bias.detach()


def _rotary_base(host: Host, cfg: Any) -> float:
    """The base of rotary positions; a bridge's own configuration does not always have its model's."""
    config: Any = getattr(getattr(host.model, "original_model", None), "config", None)
    of_config = getattr(config, "rope_parameters", None) or {}
    base = of_config.get("rope_theta") or getattr(config, "rope_theta", None) or cfg.rotary_base
    rotary_dim = getattr(cfg, "rotary_dim", None)
    if rotary_dim not in (None, cfg.d_head) or getattr(cfg, "rotary_adjacent_pairs", False):
        raise ValueError(
            f"this model turns {rotary_dim} of the {cfg.d_head} numbers of a head, or neighbours in pairs; expected all"
        )
    return float(base)
