"""Transformers of our own that ship as two small files: `config.json` and `model.safetensors`.

They have parts that no Hugging Face architecture has (attention alone, no normalisation). On TransformerLens 3.9 they
are `HookedTransformer`s, on 4.x its native models behind a `TransformerBridge`; both compute the same logits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor

from spd_lens.models.loading import (
    NOT_STORED,
    HostName,
    check_dtype,
    given_device,
    load_hooked_weights,
    no_deprecation_warnings,
    resolve_host,
)

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformer_lens.model_bridge import TransformerBridge

CONFIG, WEIGHTS, RECIPE = "config.json", "model.safetensors", "recipe.json"


def build_transformer(
    config: dict[str, Any],
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    host: HostName | None = None,
) -> HookedTransformer | TransformerBridge:
    """A model with the fields of `config`; its weights are drawn from `config["seed"]` if it has one.

    `host` as in `load_transformer`. The caller's random state is left alone. Raises ValueError for a host that the
    installed TransformerLens does not have, TypeError or ValueError for a `dtype` that is no floating point type.
    """
    check_dtype(dtype)
    chosen = resolve_host(host)
    fields = {name: value for name, value in config.items() if name != "seed"}
    # transformer_lens seeds the global generators if the config has a seed.
    with no_deprecation_warnings(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.get("seed", 0))
        if chosen == "bridge":
            return _native_bridge(fields, given_device(device), dtype)
        from transformer_lens import HookedTransformer, HookedTransformerConfig

        return HookedTransformer(HookedTransformerConfig(**fields, device=str(given_device(device)), dtype=dtype))


def _native_bridge(fields: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    cfg = TransformerBridgeConfig(**fields, architecture="TransformerLensNative")
    bridge = TransformerBridge.boot_native(cfg, device=device, dtype=dtype, model_name=str(fields.get("model_name")))
    return bridge.eval()


def load_transformer(
    directory: Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    host: HostName | None = None,
) -> HookedTransformer | TransformerBridge:
    """The model that `save_transformer` wrote to `directory`, in eval mode.

    `host="hooked"` gives a `HookedTransformer` (TransformerLens 3.9 only), `"bridge"` a `TransformerBridge`, None the
    first of the two that is installed.
    """
    config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    model: Any = build_transformer(config, device, dtype, host)
    weights = load_file(directory / WEIGHTS)
    if resolve_host(host) == "hooked":
        return load_hooked_weights(model, weights)
    model.load_state_dict(_to_native_names(weights), strict=True)
    return model.eval()


def _to_native_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """TransformerLens's weights under the names, and in the orientation, of its native models."""
    patterns = {
        "W_O": "head d_head d_model -> d_model (head d_head)",
        **dict.fromkeys(("W_Q", "W_K", "W_V"), "head d_model d_head -> (head d_head) d_model"),
        **dict.fromkeys(("b_Q", "b_K", "b_V"), "head d_head -> (head d_head)"),
        **dict.fromkeys(("W_in", "W_out", "W_U"), "d_in d_out -> d_out d_in"),
    }
    kept_names = {"embed.W_E": "embed.weight", "pos_embed.W_pos": "pos_embed.weight"}
    state = {}
    for name, value in weights.items():
        owner, _, short = name.rpartition(".")
        kind, part = short.split("_")
        native = kept_names.get(name)
        if native is None:
            inner = "" if owner == "unembed" else f".{part.lower()}"
            native = f"{owner}{inner}.{'weight' if kind == 'W' else 'bias'}"
        state[native] = rearrange(value, patterns[short]) if short in patterns else value
    return state


def save_transformer(model: HookedTransformer, config: dict[str, Any], recipe: dict[str, Any], directory: Path) -> None:
    """Write weights (float32), config and recipe to `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    state = {k: v.float().contiguous() for k, v in model.state_dict().items() if not k.endswith(NOT_STORED)}
    save_file(state, directory / WEIGHTS, metadata={"format": "pt"})
    # safetensors creates the file readable by its owner only; the package has to be readable by everybody.
    (directory / WEIGHTS).chmod(0o644)
    for name, values in ((CONFIG, config), (RECIPE, recipe)):
        (directory / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def load_recipe(directory: Path) -> dict[str, Any]:
    """How the model in `directory` was trained, and what it reached."""
    return json.loads((directory / RECIPE).read_text(encoding="utf-8"))
