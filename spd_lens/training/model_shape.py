"""`ModelShape`: the sizes of a transformer, which is all that a plan needs of it. No weights are read."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spd_lens.support.names import near_names


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder: blocks of attention and an MLP, gated (three matrices) or not (two)."""

    n_layers: int
    d_model: int
    n_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_key_value_heads: int | None = None
    gated: bool = False
    tied: bool = False

    @staticmethod
    def of_config(config: Mapping[str, Any]) -> ModelShape:
        """From the fields of a Hugging Face `config.json`, whatever its architecture calls them.

        Raises ValueError, naming the field, where one is missing.
        """

        def first(*names: str, default: Any = None) -> Any:
            found = next((config[n] for n in names if config.get(n) is not None), default)
            if found is None:
                raise ValueError(f"the model's configuration has none of {', '.join(names)}; expected one of them")
            return found

        d_model = first("hidden_size", "n_embd", "d_model")
        n_heads = first("num_attention_heads", "n_head", "n_heads")
        kind = str(config.get("model_type", ""))
        return ModelShape(
            n_layers=first("num_hidden_layers", "n_layer", "n_layers"),
            d_model=d_model,
            n_heads=n_heads,
            d_head=config.get("head_dim") or config.get("d_head") or d_model // n_heads,
            d_mlp=first("intermediate_size", "n_inner", "ffn_dim", "d_mlp", default=4 * d_model),
            d_vocab=first("vocab_size", "d_vocab"),
            n_key_value_heads=config.get("num_key_value_heads") or config.get("n_key_value_heads"),
            gated=bool(config.get("gated_mlp", any(kind.startswith(k) for k in GATED))),
            tied=bool(config.get("tie_word_embeddings", False)),
        )

    @staticmethod
    def of(name_or_folder: str | Path) -> ModelShape:
        """A shape by name (`SHAPES`), or from a local folder with a `config.json`.

        Raises ValueError for a name that is not known, with near names.
        """
        name = str(name_or_folder)
        if name in SHAPES:
            return SHAPES[name]
        path = Path(name)
        path = path / "config.json" if path.is_dir() else path
        if path.is_file():
            return ModelShape.of_config(json.loads(path.read_text(encoding="utf-8")))
        raise ValueError(f"no shape {name!r}; near: {near_names(name, SHAPES)}; or a folder with a config.json")

    @property
    def key_value_width(self) -> int:
        """Outputs of the key (and of the value) matrix, as stored."""
        return (self.n_key_value_heads or self.n_heads) * self.d_head

    def block_matrices(self) -> dict[str, tuple[int, int]]:
        """`(d_in, d_out)` of every matrix of a block, in the order in which they act."""
        width = self.n_heads * self.d_head
        matrices = {
            "attn.W_Q": (self.d_model, width),
            "attn.W_K": (self.d_model, self.key_value_width),
            "attn.W_V": (self.d_model, self.key_value_width),
            "attn.W_O": (width, self.d_model),
        }
        if self.gated:
            matrices["mlp.W_gate"] = (self.d_model, self.d_mlp)
        return matrices | {"mlp.W_in": (self.d_model, self.d_mlp), "mlp.W_out": (self.d_mlp, self.d_model)}

    def n_parameters(self) -> int:
        """All weights of the target, without biases and norms."""
        block = sum(a * b for a, b in self.block_matrices().values())
        return self.n_layers * block + self.d_model * self.d_vocab * (1 if self.tied else 2)

    def sites(self, patterns: Mapping[str, int | None]) -> dict[str, int]:
        """C of every site that the patterns name, as `decompose` reads them; None is 1.5 times the rank bound.

        Raises ValueError for a pattern that names nothing, with near names.
        """
        block = self.block_matrices()
        shapes = {f"blocks.{i}.{name}": shape for i in range(self.n_layers) for name, shape in block.items()}
        found: dict[str, int] = {}
        for pattern, count in patterns.items():
            names = fnmatch.filter(shapes, pattern)
            if not names:
                raise ValueError(f"{pattern!r} names no matrix of a block; near: {near_names(pattern, shapes)}")
            found |= {name: int(1.5 * min(shapes[name])) if count is None else count for name in names}
        return {name: found[name] for name in shapes if name in found}


# Model types of transformers whose MLP has a gate.
GATED = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "phi3", "olmo", "smollm")

SHAPES = {
    "tiny_lm": ModelShape(2, 128, 4, 32, 512, 2048),
    "gpt2": ModelShape(12, 768, 12, 64, 3072, 50257, tied=True),
    "smollm2": ModelShape(30, 576, 9, 64, 1536, 49152, 3, gated=True, tied=True),
    "pythia-1b": ModelShape(16, 2048, 8, 256, 8192, 50304),
    "llama-3.2-1b": ModelShape(16, 2048, 32, 64, 8192, 128256, 8, gated=True, tied=True),
    "llama-3-8b": ModelShape(32, 4096, 32, 128, 14336, 128256, 8, gated=True),
    "llama-3-70b": ModelShape(80, 8192, 64, 128, 28672, 128256, 8, gated=True),
}
