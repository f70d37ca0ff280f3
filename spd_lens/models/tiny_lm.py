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
import importlib.metadata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

MODEL_NAME = "tiny_lm"
TINY_LM_DIRECTORY = Path(__file__).resolve().parent / "shipped" / "tiny_lm"


MOBY_DICK_PATH = Path(__file__).resolve().parent / "shipped" / "texts" / "moby_dick.txt.gz"


# The last tenth of the book: chapters 124 to 135 and the epilogue.
FIRST_HELD_OUT_HEADING = "CHAPTER 124. The Needle."


def load_tiny_lm(
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    host: Literal["hooked", "bridge"] | None = None,
) -> HookedTransformer | TransformerBridge:
    """Return the tiny language model in the model class of the installed TransformerLens, in eval mode.

    Both classes compute the same logits `[batch, pos, 2048]` from tokens `[batch, pos]`, `pos` <= 128.
    Nothing is folded or centred (`cfg.normalization_type` is "LN"), the tokenizer is set, and
    `cfg.model_name` is "tiny_lm".

    Args:
        device: where the weights go.
        dtype: floating point type of the weights; they are stored in float32.
        host: "hooked" for a `HookedTransformer` (transformer_lens 3.x only), "bridge" for a
            `TransformerBridge`. None takes "hooked" where it exists and "bridge" otherwise.

    Raises:
        TypeError: `dtype` is not a torch dtype.
        ValueError: `host` is unknown or absent from the installed transformer_lens, or `dtype` is not a
            floating point type.
    """
    _check_dtype(dtype)
    # Building a module draws its initial weights; loading a model should not shift the caller's seed.
    with torch.random.fork_rng(devices=[]), _no_deprecation_warnings():
        if _resolve_host(host) == "hooked":
            return _load_hooked(torch.device(device), dtype)
        return _load_bridge(torch.device(device), dtype)


def load_tiny_lm_hf(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> GPT2LMHeadModel:
    """Return the same weights as a plain HuggingFace `GPT2LMHeadModel` in eval mode.

    Its logits `[batch, pos, 2048]` are the reference for both TransformerLens model classes. It is built with
    eager attention, the implementation that TransformerLens hooks.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    _check_dtype(dtype)
    config = GPT2Config.from_pretrained(TINY_LM_DIRECTORY, attn_implementation="eager")
    with torch.random.fork_rng(devices=[]):
        model = GPT2LMHeadModel(config)
    model.load_state_dict(load_file(TINY_LM_DIRECTORY / "model.safetensors"), strict=True)
    # transformers wraps `to` in a decorator that hides its type.
    return model.to(device=torch.device(device), dtype=dtype).eval()  # pyright: ignore[reportCallIssue]


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


def pack_windows(token_ids: Int[Tensor, " n_tokens"], bos_token_id: int, n_ctx: int = 128) -> Int[Tensor, "window pos"]:
    """Cut a row of tokens into consecutive windows `[window, n_ctx]`, each a BOS and n_ctx - 1 tokens of text.

    These are the inputs the tiny language model was trained on. A remainder too short for a window is dropped.

    Raises:
        ValueError: `token_ids` is not one row, or `n_ctx` leaves no room for text after the BOS.
    """
    if token_ids.ndim != 1:
        raise ValueError(f"token_ids has shape {tuple(token_ids.shape)}; expected one row, [n_tokens].")
    if n_ctx < 2:
        raise ValueError(f"n_ctx is {n_ctx}; expected at least 2, a BOS and one token of text.")
    n_windows = len(token_ids) // (n_ctx - 1)
    body = token_ids[: n_windows * (n_ctx - 1)].reshape(n_windows, n_ctx - 1)
    bos = token_ids.new_full((n_windows, 1), bos_token_id)
    return torch.cat([bos, body], dim=1)


def _check_dtype(dtype: object) -> None:
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype is {dtype!r}; expected a torch dtype such as torch.float32.")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}; expected a floating point type such as torch.float32.")


def _resolve_host(host: str | None) -> Literal["hooked", "bridge"]:
    version = importlib.metadata.version("transformer_lens")
    has_hooked = int(version.split(".")[0]) < 4
    if host is None:
        return "hooked" if has_hooked else "bridge"
    if host == "bridge":
        return "bridge"
    if host != "hooked":
        raise ValueError(f"host is {host!r}; expected 'hooked', 'bridge' or None.")
    if not has_hooked:
        raise ValueError(
            f"host is 'hooked', but transformer_lens {version} no longer has HookedTransformer (removed in 4.0). "
            "Use host='bridge' or None, or install transformer_lens<4."
        )
    return "hooked"


@contextmanager
def _no_deprecation_warnings() -> Iterator[None]:
    # transformer_lens 3.9 announces the end of HookedTransformer on every construction; a caller of
    # load_tiny_lm did not choose the class and can do nothing about it.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _load_bridge(device: torch.device, dtype: torch.dtype) -> TransformerBridge:
    from transformer_lens.model_bridge import TransformerBridge

    # Given the model and the tokenizer, boot_transformers uses its name argument only as a label.
    bridge = TransformerBridge.boot_transformers(
        MODEL_NAME,
        hf_model=load_tiny_lm_hf(device, dtype),
        tokenizer=load_tiny_lm_tokenizer(),
        device=device,
        dtype=dtype,
    )
    return bridge.eval()


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
    # Not strict: the causal mask buffers are the model's own and are not stored.
    missing, unexpected = model.load_state_dict(
        _to_hooked_names(weights, config.n_layers, config.n_heads), strict=False
    )
    absent = [name for name in missing if not name.endswith((".mask", ".IGNORE"))]
    if absent or unexpected:
        raise RuntimeError(f"weights do not fit HookedTransformer: missing {absent}, unexpected {unexpected}.")
    return model.eval()


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
