"""Transformers of our own that ship as two small files: `config.json` and `model.safetensors`.

They have parts that no Hugging Face architecture has (attention alone, no normalisation), so they exist as
`HookedTransformer` only, which TransformerLens 4 no longer has; loading says so there.
"""

from __future__ import annotations

import importlib.metadata
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

CONFIG, WEIGHTS, RECIPE = "config.json", "model.safetensors", "recipe.json"


# Buffers that the model makes itself.
NOT_STORED = (".mask", ".IGNORE")


def build_transformer(
    config: dict[str, Any], device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> HookedTransformer:
    """A `HookedTransformer` with the fields of `config`; its weights are drawn from `config["seed"]` if it has one.

    The caller's random state is left alone. Raises ValueError where transformer_lens has no HookedTransformer,
    TypeError or ValueError for a `dtype` that is no floating point type.
    """
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype is {dtype!r}; expected a torch dtype such as torch.float32.")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}; expected a floating point type such as torch.float32.")
    version = importlib.metadata.version("transformer_lens")
    if int(version.split(".")[0]) >= 4:
        raise ValueError(
            f"{config.get('model_name')} exists as a HookedTransformer only, which transformer_lens {version} no "
            "longer has (removed in 4.0); install transformer_lens<4"
        )
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    # transformer_lens 3.9 announces the end of HookedTransformer on every construction, and seeds the global
    # generators if the config has a seed.
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", DeprecationWarning)
        fields = {name: value for name, value in config.items() if name != "seed"}
        cfg = HookedTransformerConfig(**fields, device=str(torch.device(device)), dtype=dtype)
        torch.manual_seed(config.get("seed", 0))
        return HookedTransformer(cfg)


def load_transformer(
    directory: Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> HookedTransformer:
    """The model that `save_transformer` wrote to `directory`, in eval mode."""
    config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    model = build_transformer(config, device, dtype)
    weights = load_file(directory / WEIGHTS)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    absent = [name for name in missing if not name.endswith(NOT_STORED)]
    if absent or unexpected:
        raise RuntimeError(f"weights do not fit HookedTransformer: missing {absent}, unexpected {unexpected}.")
    return model.eval()


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
