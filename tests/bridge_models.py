"""Tiny TransformerBridges of six families, and an oracle for their masked weights that shares no code with the swap.

Without weight processing the masked weight is written into the Hugging Face model, by this file's own knowledge of
each architecture; in compatibility mode it is written into an unswapped bridge. Nothing is downloaded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from spd_lens import Decomposition, decompose
from spd_lens.hosts import open_host

TL_MAJOR = int(version("transformer_lens").split(".")[0])
VOCAB, LAYERS, WIDTH, HEADS, HEAD = 33, 2, 16, 4, 6
N = 5  # subcomponents per site: below every rank, so the delta is never small
TOLERANCE = 1e-4

SIZES = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "intermediate_size": 24, "max_position_embeddings": 32, "pad_token_id": None, "bos_token_id": 30,
    "eos_token_id": 30,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2, "head_dim": HEAD}
CONFIGS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "gpt2": lambda sizes: transformers.GPT2Config(**{**sizes, "intermediate_size": None}, n_inner=24),
    "pythia": lambda sizes: transformers.GPTNeoXConfig(**sizes, rotary_pct=0.5),
    "llama": lambda sizes: transformers.LlamaConfig(**sizes, **GROUPED),
    "mistral": lambda sizes: transformers.MistralConfig(**sizes, **GROUPED, sliding_window=4),
    "qwen2": lambda sizes: transformers.Qwen2Config(**sizes, num_key_value_heads=2),
    "gemma2": lambda sizes: transformers.Gemma2Config(**sizes, **GROUPED, sliding_window=4, query_pre_attn_scalar=4),
}
# Names that TransformerLens's adapters recognise; nothing is downloaded.
NAMES = {
    "gpt2": "gpt2", "pythia": "EleutherAI/pythia-70m", "llama": "meta-llama/Llama-2-7b-hf",
    "mistral": "mistralai/Mistral-7B-v0.1", "qwen2": "Qwen/Qwen2-0.5B", "gemma2": "google/gemma-2-2b",
}  # fmt: skip
MODES = ("raw", "compatibility", "no_processing")


@dataclass(frozen=True)
class Masks:
    """Factors, mask `[C]` and delta of one site."""

    V: Tensor
    U: Tensor
    mask: Tensor
    delta: float

    def applied_to(self, W: Tensor) -> Tensor:
        """`V diag(m) U + d (W - V U)`."""
        return (self.V * self.mask) @ self.U + self.delta * (W - self.V @ self.U)


# -- models ------------------------------------------------------------------------------------------------------


@lru_cache
def pristine(family: str, n_layers: int = LAYERS) -> nn.Module:
    """A Hugging Face model with random weights, biases and norm weights; to be copied, never changed."""
    config = CONFIGS[family]({**SIZES, "num_hidden_layers": n_layers})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            is_matrix = parameter.ndim == 2
            parameter.copy_(1.3 * noise / parameter.shape[-1] ** 0.5 if is_matrix else parameter + 0.2 * noise)
    return model


def tokenizer() -> Any:
    vocabulary = {"a": 0, "<e>": 30, "<u>": 31, **{f"t{i}": i for i in range(1, 30)}}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<u>")),
        bos_token="<e>", eos_token="<e>", pad_token="<e>", unk_token="<u>", add_bos_token=True, name_or_path="tiny",
    )  # fmt: skip


def boot(family: str, mode: str = "raw", hf_model: nn.Module | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """A bridge around a copy of the pristine model, or around `hf_model`."""
    hf_model = copy.deepcopy(pristine(family)) if hf_model is None else hf_model
    model = TransformerBridge.boot_transformers(
        NAMES[family], hf_model=hf_model, tokenizer=tokenizer(), device="cpu", dtype=dtype
    )
    if mode != "raw":
        model.enable_compatibility_mode(disable_warnings=True, no_processing=mode == "no_processing")
    return model


def swapped(family: str, mode: str = "raw", sites: Iterable[str] | None = None, **kwargs: Any) -> Decomposition:
    model = boot(family, mode)
    names = open_host(model).site_names() if sites is None else sites
    return decompose(model, dict.fromkeys(names, N), **kwargs)


def random_tokens(batch: int = 2, pos: int = 7, seed: int = 1) -> Tensor:
    return torch.randint(0, 30, (batch, pos), generator=torch.Generator().manual_seed(seed))


every_family = pytest.mark.parametrize("family", CONFIGS)
every_case = pytest.mark.parametrize(("family", "mode"), [(f, m) for f in CONFIGS for m in MODES])


# -- the oracle: where each weight lies, and writing there -----------------------------------------------------------


def all_sites(family: str) -> list[str]:
    """Names of every weight, in the order in which the forward pass uses them."""
    mlp = ("in", "out") if family in ("gpt2", "pythia") else ("gate", "in", "out")
    blocks = [
        f"blocks.{layer}.{name}"
        for layer in range(LAYERS)
        for name in [f"attn.W_{kind}" for kind in "QKVO"] + [f"mlp.W_{kind}" for kind in mlp]
    ]
    return ["embed.W_E", *(["pos_embed.W_pos"] if family == "gpt2" else []), *blocks, "unembed.W_U"]


def hf_weight(model: Any, site: str) -> Tensor:
    """A view of a Hugging Face model's parameter as `[d_in, d_out]` (`[d_in, heads, d_head]` for fused NeoX)."""
    kind, short = type(model).__name__, site.rsplit(".", 1)[-1]
    layer = int(site.split(".")[1]) if site.startswith("blocks") else -1
    if kind.startswith("GPT2"):
        block = model.transformer.h[layer]
        if short == "W_U":
            return model.lm_head.weight.T
        if short in ("W_Q", "W_K", "W_V"):
            return block.attn.c_attn.weight.split(WIDTH, dim=1)["QKV".index(short[-1])]
        in_out = {
            "W_E": model.transformer.wte, "W_pos": model.transformer.wpe, "W_O": block.attn.c_proj,
            "W_in": block.mlp.c_fc, "W_out": block.mlp.c_proj,
        }  # fmt: skip
        return in_out[short].weight
    if kind.startswith("GPTNeoX"):
        block = model.gpt_neox.layers[layer]
        if short in ("W_Q", "W_K", "W_V"):
            fused = block.attention.query_key_value.weight.view(HEADS, 3, WIDTH // HEADS, WIDTH)
            return fused[:, "QKV".index(short[-1])].permute(2, 0, 1)
        if short == "W_E":
            return model.gpt_neox.embed_in.weight
        out_in = {
            "W_O": block.attention.dense, "W_in": block.mlp.dense_h_to_4h, "W_out": block.mlp.dense_4h_to_h,
            "W_U": model.get_output_embeddings(),
        }  # fmt: skip
        return out_in[short].weight.T
    block, attention = model.model.layers[layer], model.model.layers[layer].self_attn
    if short == "W_E":
        return model.model.embed_tokens.weight
    out_in = {
        "W_Q": attention.q_proj, "W_K": attention.k_proj, "W_V": attention.v_proj, "W_O": attention.o_proj,
        "W_gate": block.mlp.gate_proj, "W_in": block.mlp.up_proj, "W_out": block.mlp.down_proj, "W_U": model.lm_head,
    }  # fmt: skip
    return out_in[short].weight.T


def bridge_weight(model: Any, site: str) -> Tensor:
    """A view of the tensor that a bridge multiplies with, as `[d_in, d_out]`."""
    parts = site.split(".")
    if parts[0] != "blocks":
        weight = getattr(model, parts[0]).original_component.weight
        return weight.T if parts[0] == "unembed" else weight
    component, short = getattr(model.blocks[int(parts[1])], parts[2]), parts[3]
    if TL_MAJOR == 3 and model.cfg.gated_mlp and parts[2] == "mlp" and model._weights_processed:
        return getattr(component, f"_processed_{short}").T
    name = {"W_Q": "q", "W_K": "k", "W_V": "v", "W_O": "o", "W_gate": "gate", "W_in": "in", "W_out": "out"}[short]
    module = getattr(component, name).original_component
    return module.weight if type(module).__name__ == "Conv1D" else module.weight.T


def untie(model: Any) -> None:
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())


def scale_of(family: str, site: str) -> float:
    """Gemma multiplies its embedding by this, and so do its subcomponents."""
    return WIDTH**0.5 if family == "gemma2" and site == "embed.W_E" else 1.0


class Written:
    """An unswapped model into whose weights masked ones are written, and taken out again.

    Without weight processing they are written into the Hugging Face model; in compatibility mode into the tensors
    that the bridge multiplies with.
    """

    def __init__(self, family: str, mode: str) -> None:
        self.family = family
        hf_model = copy.deepcopy(pristine(family))
        untie(hf_model)
        sites = all_sites(family)
        self.views = {} if mode == "compatibility" else {site: hf_weight(hf_model, site) for site in sites}
        self.bridge = boot(family, mode, hf_model)
        for site in sites:
            # TransformerLens copies the parts of NeoX's fused matrix: what is written there later has no effect.
            if mode == "compatibility" or (family == "pythia" and site[-3:] in ("W_Q", "W_K", "W_V")):
                self.views[site] = bridge_weight(self.bridge, site)

    @contextmanager
    def masked(self, masks: Mapping[str, Masks]) -> Iterator[Any]:
        """While open, the bridge has the masked weights."""
        before = {site: self.views[site].detach().clone() for site in masks}
        with torch.no_grad():
            for site, these in masks.items():
                view, scale = self.views[site], scale_of(self.family, site)
                W = before[site].reshape(view.shape[0], -1) * scale
                view.copy_((these.applied_to(W) / scale).reshape(view.shape))
        yield self.bridge
        with torch.no_grad():
            for site, old in before.items():
                self.views[site].copy_(old)


def random_masks(decomposition: Decomposition, seed: int = 5) -> dict[str, Masks]:
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for site, weight in decomposition.items():
        mask = torch.rand(N, generator=generator) * 2 - 0.5
        delta = float(torch.rand((), generator=generator)) * 2 - 0.5
        masks[site] = Masks(weight.V.detach(), weight.U.detach(), mask, delta)
    return masks


def mask_hooks(decomposition: Decomposition, masks: Mapping[str, Masks]) -> list[tuple[str, Any]]:
    return [hook for site, these in masks.items() for hook in decomposition.mask({site: these.mask}, these.delta)]


def run(model: Any, tokens: Tensor, hooks: Iterable[tuple[str, Any]] = ()) -> Tensor:
    with torch.no_grad(), model.hooks(fwd_hooks=list(hooks)):
        return model(tokens)


def assert_close(got: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """`|got - expected| <= tolerance * scale`, scale the largest entry of `expected`; NaN fails."""
    assert got.shape == expected.shape, what
    got, expected = got.detach(), expected.detach()
    error, scale = float((got - expected).abs().max()), float(expected.abs().max())
    assert error <= tolerance * scale, f"{what}: off by {error:.3g} at scale {scale:.3g}"


def assert_differs(got: Tensor, other: Tensor, at_least: float, what: str = "") -> None:
    """The largest difference is at least `at_least` times the scale of `other`: the comparison could fail."""
    difference, scale = float((got - other).abs().max()), float(other.abs().max())
    assert difference >= at_least * scale, f"{what}: differs by only {difference:.3g} at scale {scale:.3g}"
