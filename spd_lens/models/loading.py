"""Opening models on whichever TransformerLens is installed: 3.9 has `HookedTransformer`, 4.x the bridge alone.

`open_model` takes a name or a local folder; the loaders of the models that ship with the package share the rest.
"""

from __future__ import annotations

import importlib.metadata
import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from spd_lens.hosts import note_revision
from spd_lens.models.revisions import downloaded_revision
from spd_lens.support.names import near_names

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformer_lens.model_bridge import TransformerBridge

HostName = Literal["hooked", "bridge"]

# Buffers that a HookedTransformer makes itself.
NOT_STORED = (".mask", ".IGNORE")


def open_model(
    name_or_folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    host: HostName | None = None,
    revision: str | None = None,
) -> HookedTransformer | TransformerBridge:
    """A language model by its TransformerLens or Hugging Face name, or from a local Hugging Face folder, in eval mode.

    On TransformerLens 3.9 a `HookedTransformer`, on 4.x a `TransformerBridge`; `host` chooses where both exist. Weights
    are not folded or centred, so both compute the same logits. A folder has `config.json`, the weights and a
    tokenizer (which a `HookedTransformer` can do without). Names are looked up on the Hugging Face Hub.

    `revision`: a branch, tag or (the only thing that cannot change) commit there. The model is then opened from the
    downloaded folder, and the commit goes into the provenance of every decomposition of it. Offline
    (`HF_HUB_OFFLINE=1`) what was downloaded before is used.

    Raises ValueError for a name that nobody knows (near names), a path that is no such folder, an architecture that
    TransformerLens does not know, and a host that is not installed; TypeError or ValueError for a `dtype` that is none.
    """
    check_dtype(dtype)
    chosen = resolve_host(host)
    if not isinstance(name_or_folder, (str, Path)):
        raise TypeError(
            f"given a {type(name_or_folder).__name__}; expected a model's name ('gpt2') or a folder. A Hugging Face "
            "model that is loaded already: TransformerBridge.boot_transformers(name, hf_model=model)"
        )
    given = str(name_or_folder)
    folder = Path(given).expanduser()
    if isinstance(name_or_folder, Path) or folder.exists() or given.startswith(("/", ".", "~")):
        if revision is not None:
            raise ValueError(f"revision={revision!r} is for the Hub, but {given} is a folder here; leave it away")
        return _open_folder(folder, chosen, dtype, given_device(device))
    if revision is not None:
        downloaded = downloaded_revision(_official(given), revision)
        model = _open_folder(downloaded, chosen, dtype, given_device(device))
        model.cfg.model_name = _official(given)
        # The Hub keeps every commit's files in a folder of its name.
        note_revision(model, hub_id=_official(given), revision=revision, commit=downloaded.name)
        return model
    return _open_name(given, chosen, dtype, given_device(device))


def _open_folder(folder: Path, host: HostName, dtype: torch.dtype, device: torch.device) -> Any:
    if not (folder / "config.json").is_file():
        if not folder.exists():
            found = "there is no such folder"
        elif folder.is_file():
            found = "that is a file; give the folder that it is in"
        else:
            names = sorted(path.name for path in folder.iterdir())
            found = f"there is no config.json in it, but {', '.join(names[:6]) or 'nothing'}"
        raise ValueError(f"{folder}: {found}; expected a folder that save_pretrained() of a Hugging Face model wrote")
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        try:
            # Attention patterns can be hooked with eager attention only.
            hf_model: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, attn_implementation="eager", local_files_only=True
            )
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise ValueError(f"{folder} holds no language model that transformers can open: {first}") from error
        hf_model = hf_model.eval().to(device)
        tokenizer = _tokenizer_of(folder)
        with no_deprecation_warnings():
            if host == "bridge":
                if tokenizer is None:
                    raise ValueError(
                        f"{folder} has no tokenizer, and a TransformerBridge would look for one on the Hub; write one "
                        "there with tokenizer.save_pretrained(folder)"
                    )
                return bridge_around(hf_model, folder.name, tokenizer, device, dtype)
            return _hooked_around(folder, hf_model, tokenizer, device, dtype)


def _tokenizer_of(folder: Path) -> Any:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _hooked_around(folder: Path, hf_model: Any, tokenizer: Any, device: torch.device, dtype: torch.dtype) -> Any:
    from transformer_lens import HookedTransformer, loading_from_pretrained

    try:
        with tempfile.TemporaryDirectory() as scratch:
            # TransformerLens 3.9 reads the context of a GPT-2 from a field that transformers no longer writes.
            fields = hf_model.config.to_dict()
            fields.setdefault("n_ctx", fields.get("max_position_embeddings", fields.get("n_positions")))
            (Path(scratch) / "config.json").write_text(json.dumps(fields, default=str), encoding="utf-8")
            cfg = loading_from_pretrained.get_pretrained_model_config(scratch, device=device, dtype=dtype)
    except (NotImplementedError, AttributeError) as error:
        raise ValueError(
            f"{folder}: HookedTransformer does not know the architecture {type(hf_model).__name__} ({error}); "
            "host='bridge' knows more"
        ) from error
    cfg.tokenizer_name = None
    # Nor does it read the width of a GPT-2's MLP where that is not four times the model's.
    cfg.d_mlp = getattr(hf_model.config, "n_inner", None) or cfg.d_mlp
    weights = loading_from_pretrained.get_pretrained_state_dict(str(folder), cfg, hf_model, dtype=dtype)
    model = HookedTransformer(cfg, tokenizer=tokenizer)
    model.load_and_process_state_dict(weights, fold_ln=False, center_writing_weights=False, center_unembed=False)
    model.cfg.model_name = folder.name
    return model.eval()


def _open_name(name: str, host: HostName, dtype: torch.dtype, device: torch.device) -> Any:
    if host == "hooked":
        from transformer_lens import HookedTransformer, loading_from_pretrained

        with no_deprecation_warnings():
            try:
                loading_from_pretrained.get_official_model_name(name)
            except ValueError:
                raise ValueError(_unknown(name, "HookedTransformer has no model")) from None
            return HookedTransformer.from_pretrained_no_processing(name, device=str(device), dtype=dtype).eval()
    from transformer_lens.model_bridge import TransformerBridge

    try:
        return TransformerBridge.boot_transformers(name, device=device, dtype=dtype).eval()
    except OSError as error:
        raise ValueError(_unknown(name, "neither this machine nor the Hugging Face Hub gave a model")) from error


def _official(name: str) -> str:
    """The Hub's name of a model that TransformerLens knows by a shorter one."""
    from transformer_lens.supported_models import MODEL_ALIASES

    return next((official for official, aliases in MODEL_ALIASES.items() if name in aliases), name)


def _unknown(name: str, what: str) -> str:
    from transformer_lens.supported_models import MODEL_ALIASES, OFFICIAL_MODEL_NAMES

    known = [*(alias for aliases in MODEL_ALIASES.values() for alias in aliases), *OFFICIAL_MODEL_NAMES]
    return f"{what} {name!r}; near: {near_names(name, known)}. For a folder give its path, for example './{name}'"


# -- shared by the loaders of shipped models -------------------------------------------------------------------------


def resolve_host(host: str | None) -> HostName:
    """The host to build: the one that was asked for, or "hooked" where it exists and "bridge" otherwise."""
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


def check_dtype(dtype: object) -> None:
    """TypeError or ValueError unless `dtype` is a floating point type."""
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype is {dtype!r}; expected a torch dtype such as torch.float32.")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}; expected a floating point type such as torch.float32.")


def given_device(device: Any) -> torch.device:
    """A device; ValueError for names that PyTorch does not know."""
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r}; expected 'cpu', 'cuda', 'cuda:1' or a torch.device") from error


@contextmanager
def no_deprecation_warnings() -> Iterator[None]:
    """While open, TransformerLens 3.9 does not announce the end of HookedTransformer on every construction.

    A caller of these loaders did not choose the class and can do nothing about it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def bridge_around(hf_model: Any, name: str, tokenizer: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A `TransformerBridge` around a Hugging Face model, in eval mode."""
    from transformer_lens.model_bridge import TransformerBridge

    # Given the model, boot_transformers uses its name argument only as a label.
    return TransformerBridge.boot_transformers(
        name, hf_model=hf_model, tokenizer=tokenizer, device=device, dtype=dtype
    ).eval()


def load_hooked_weights(model: HookedTransformer, weights: Mapping[str, Tensor]) -> HookedTransformer:
    """`weights` under TransformerLens's names, put into `model`; the causal masks are the model's own. In eval mode."""
    missing, unexpected = model.load_state_dict(dict(weights), strict=False)
    absent = [name for name in missing if not name.endswith(NOT_STORED)]
    if absent or unexpected:
        raise RuntimeError(f"weights do not fit HookedTransformer: missing {absent}, unexpected {unexpected}.")
    return model.eval()
