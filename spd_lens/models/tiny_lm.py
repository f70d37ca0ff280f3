"""The project's own small language model, and the book it was trained on.

What it is: a GPT-2 with 2 blocks, d_model 128, 4 heads, d_mlp 512, 128 positions, 2048 tokens and untied
embeddings (0.94 million parameters), trained on Moby Dick and on State of the Union addresses by
`scripts/train_tiny_lm.py`. `recipe.json` in the data directory records the training, the licence of the text
and the held-out losses next to those of a unigram and a bigram model.

Cost: 3.8 MB of weights and 0.5 MB of text inside the package; loading takes well under a second once
transformer_lens is imported. No network and no model hub.

Limits: it continues a sentence in the style of its two sources and knows nothing else. It was trained with a
BOS token at position 0, which TransformerLens prepends by default, and it accepts at most 128 tokens.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal, overload

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.models.loading import (
    HostName,
    bridge_around,
    check_dtype,
    given_device,
    load_hooked_weights,
    no_deprecation_warnings,
    resolve_host,
)

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

MODEL_NAME = "tiny_lm"
TINY_LM_DIRECTORY = Path(__file__).resolve().parent / "shipped" / "tiny_lm"


MOBY_DICK_PATH = Path(__file__).resolve().parent / "shipped" / "texts" / "moby_dick.txt.gz"
SPEECHES_PATH = MOBY_DICK_PATH.with_name("speeches.json.gz")


# The last tenth of the book: chapters 124 to 135 and the epilogue.
FIRST_HELD_OUT_HEADING = "CHAPTER 124. The Needle."


@overload
def load_tiny_lm(
    device: str | torch.device = ...,
    dtype: torch.dtype = ...,
    host: HostName | None = ...,
    *,
    decomposed: Literal[False] = ...,
) -> HookedTransformer | TransformerBridge: ...


@overload
def load_tiny_lm(
    device: str | torch.device = ...,
    dtype: torch.dtype = ...,
    host: HostName | None = ...,
    *,
    decomposed: Literal[True],
) -> Decomposition: ...


def load_tiny_lm(
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    host: HostName | None = None,
    *,
    decomposed: bool = False,
) -> HookedTransformer | TransformerBridge | Decomposition:
    """Return the tiny language model in the model class of the installed TransformerLens, in eval mode.

    Both classes compute the same logits `[batch, pos, 2048]` from tokens `[batch, pos]`, `pos` <= 128.
    Nothing is folded or centred (`cfg.normalization_type` is "LN"), the tokenizer is set, and
    `cfg.model_name` is "tiny_lm".

    Args:
        device: where the weights go.
        dtype: floating point type of the weights; they are stored in float32.
        host: "hooked" for a `HookedTransformer` (transformer_lens 3.x only), "bridge" for a
            `TransformerBridge`. None takes "hooked" where it exists and "bridge" otherwise.
        decomposed: return the shipped `Decomposition` of all 12 matrices of its two blocks instead (its `model` is
            the model), trained by `experiments/language_model.py`; the folder `decomposition` beside the weights
            holds its log, its evaluation and its recipe.

    Raises:
        TypeError: `dtype` is not a torch dtype.
        ValueError: `host` is unknown or absent from the installed transformer_lens, or `dtype` is not a
            floating point type.
    """
    check_dtype(dtype)
    if decomposed:
        if dtype != torch.float32:
            raise ValueError(f"dtype is {dtype}; the shipped decomposition belongs to the float32 weights")
        return Decomposition.from_pretrained(TINY_LM_DIRECTORY / "decomposition", load_tiny_lm(device, host=host))
    # Building a module draws its initial weights; loading a model should not shift the caller's seed.
    with torch.random.fork_rng(devices=[]), no_deprecation_warnings():
        if resolve_host(host) == "hooked":
            return _load_hooked(given_device(device), dtype)
        device = given_device(device)
        return bridge_around(load_tiny_lm_hf(device, dtype), MODEL_NAME, load_tiny_lm_tokenizer(), device, dtype)


def load_tiny_lm_hf(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> GPT2LMHeadModel:
    """Return the same weights as a plain HuggingFace `GPT2LMHeadModel` in eval mode.

    Its logits `[batch, pos, 2048]` are the reference for both TransformerLens model classes. It is built with
    eager attention, the implementation that TransformerLens hooks.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    check_dtype(dtype)
    config = GPT2Config.from_pretrained(TINY_LM_DIRECTORY, attn_implementation="eager")
    with torch.random.fork_rng(devices=[]):
        model = GPT2LMHeadModel(config)
    model.load_state_dict(load_file(TINY_LM_DIRECTORY / "model.safetensors"), strict=True)
    # transformers wraps `to` in a decorator that hides its type.
    return model.to(device=given_device(device), dtype=dtype).eval()  # pyright: ignore[reportCallIssue]


def load_tiny_lm_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer: byte-level BPE of 2048 tokens with `<|endoftext|>` as BOS, EOS and PAD.

    Like GPT-2's own, it adds no special token when it encodes a text.
    """
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(TINY_LM_DIRECTORY)


def load_moby_dick(split: Literal["train", "held_out"]) -> str:
    """Return one part of Moby Dick as running text: UTF-8, in the book's order, with chapter headings.

    "train" is etymology, extracts and chapters 1 to 123 (1.09 million characters), "held_out" is chapters
    124 to 135 and the epilogue (0.12 million characters), which the tiny language model never saw.

    Raises:
        ValueError: `split` is neither of the two.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split is {split!r}; expected 'train' or 'held_out'.")
    text = gzip.decompress(MOBY_DICK_PATH.read_bytes()).decode("utf-8")
    boundary = text.index(f"\n{FIRST_HELD_OUT_HEADING}\n") + 1
    return text[:boundary] if split == "train" else text[boundary:]


def load_speeches(split: Literal["train", "held_out"]) -> dict[str, str]:
    """Return the beginnings of some State of the Union addresses, `{"1795_george_washington_n": text}`, oldest first.

    "train" has 10 of those that the tiny language model was trained on, "held_out" 8 of those that it never saw; at
    most 16,000 characters each. They are works of the United States Government and in the public domain.

    Raises:
        ValueError: `split` is neither of the two.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split is {split!r}; expected 'train' or 'held_out'.")
    return json.loads(gzip.decompress(SPEECHES_PATH.read_bytes()))[split]


def _load_hooked(device: torch.device, dtype: torch.dtype) -> HookedTransformer:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    weights = load_file(TINY_LM_DIRECTORY / "model.safetensors")
    d_vocab, d_model = weights["transformer.wte.weight"].shape
    config = HookedTransformerConfig(
        n_layers=2,
        d_model=d_model,
        n_ctx=len(weights["transformer.wpe.weight"]),
        d_head=32,
        n_heads=4,
        d_mlp=weights["transformer.h.0.mlp.c_fc.weight"].shape[1],
        d_vocab=d_vocab,
        act_fn="gelu_new",
        normalization_type="LN",
        model_name=MODEL_NAME,
        device=str(device),
        dtype=dtype,
        init_weights=False,
    )
    model = HookedTransformer(config, tokenizer=load_tiny_lm_tokenizer())
    return load_hooked_weights(model, _to_hooked_names(weights, config.n_layers, config.n_heads))


def _to_hooked_names(weights: dict[str, Tensor], n_layers: int, n_heads: int) -> dict[str, Tensor]:
    """Return the HuggingFace GPT-2 weights under TransformerLens' names and shapes."""
    unembed: Float[Tensor, "d_model d_vocab"] = weights["lm_head.weight"].T
    state = {
        "embed.W_E": weights["transformer.wte.weight"],
        "pos_embed.W_pos": weights["transformer.wpe.weight"],
        "ln_final.w": weights["transformer.ln_f.weight"],
        "ln_final.b": weights["transformer.ln_f.bias"],
        "unembed.W_U": unembed,
        "unembed.b_U": unembed.new_zeros(unembed.shape[1]),
    }
    for layer in range(n_layers):
        prefix = f"transformer.h.{layer}."
        block = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        state |= {f"blocks.{layer}.{name}": w for name, w in _block_to_hooked_names(block, n_heads).items()}
    return state


def _block_to_hooked_names(block: dict[str, Tensor], n_heads: int) -> dict[str, Tensor]:
    """Return one block's weights; q, k and v are stored side by side as `[d_model, 3 * n_heads * d_head]`."""
    state = {
        "ln1.w": block["ln_1.weight"],
        "ln1.b": block["ln_1.bias"],
        "ln2.w": block["ln_2.weight"],
        "ln2.b": block["ln_2.bias"],
        "attn.W_O": block["attn.c_proj.weight"].unflatten(0, (n_heads, -1)),
        "attn.b_O": block["attn.c_proj.bias"],
        "mlp.W_in": block["mlp.c_fc.weight"],
        "mlp.b_in": block["mlp.c_fc.bias"],
        "mlp.W_out": block["mlp.c_proj.weight"],
        "mlp.b_out": block["mlp.c_proj.bias"],
    }
    matrices = block["attn.c_attn.weight"].chunk(3, dim=1)
    biases = block["attn.c_attn.bias"].chunk(3)
    for letter, matrix, bias in zip("QKV", matrices, biases, strict=True):
        state[f"attn.W_{letter}"] = matrix.unflatten(1, (n_heads, -1)).transpose(0, 1)
        state[f"attn.b_{letter}"] = bias.unflatten(0, (n_heads, -1))
    return state
