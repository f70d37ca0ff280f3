"""What users give as tokens and as a decomposition, checked once: every entry point calls these functions.

Looking at the values of a tensor on a GPU makes the program wait for it. `checked_tokens` does so, once per call of an
analysis; a training step looks only at what is still on the CPU (`values=False` leaves the looking out).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spd_lens.hosts.host import Host
from spd_lens.support.given import given_whole, shown


def checked_decomposition(decomposition: Any, caller: str) -> Any:
    """`decomposition`, if it is one and still in its model.

    Raises TypeError for anything else (also a model that is not decomposed), ValueError if it was removed.
    """
    if not (hasattr(decomposition, "host") and hasattr(decomposition, "require_present")):
        kind = type(decomposition).__name__
        way_out = (
            f"decompose(model, ...) or decompose_layer(model, layer) makes one of this {kind}"
            if hasattr(decomposition, "hook_dict")
            else "it comes from decompose(model, ...), decompose_layer(model, layer) or Decomposition.from_pretrained"
        )
        raise TypeError(f"{caller} was given a {kind}; expected a Decomposition: {way_out}")
    decomposition.require_present()
    return decomposition


def checked_tokens(tokens: Any, host: Host, *, name: str = "tokens", values: bool = True) -> Tensor:
    """`tokens` as int64 `[batch pos]`, or, for a model without a vocabulary, its inputs as they are.

    Integer tensors and arrays of any width and nested lists are taken. Raises TypeError for text, floats and booleans,
    ValueError for a wrong number of axes, empty rows, ids outside the vocabulary and rows longer than the context.
    """
    given = as_tensor(tokens, name)
    d_vocab = host.vocabulary_size()
    if given.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(given.shape)}: it is empty, there is nothing to run")
    if d_vocab is None:
        return given
    if given.is_floating_point() or given.is_complex():
        raise TypeError(
            f"{name} has dtype {given.dtype}; expected an integer tensor [batch pos]: token ids in 0..{d_vocab - 1}"
        )
    if given.ndim != 2:
        one = " (for one prompt: tokens[None], or model.to_tokens(text))" if given.ndim == 1 else ""
        raise ValueError(f"{name} has shape {tuple(given.shape)}; expected [batch pos]{one}")
    limit = host.context_length()
    if limit is not None and given.shape[1] > limit:
        raise ValueError(
            f"{name} has rows of {given.shape[1]} tokens, but this model's context is {limit}; cut them, for example "
            f"{name}[:, :{limit}], or pack texts with pack_tokens(texts, tokenizer, context={limit})"
        )
    given = given.long()
    if values and given.device.type != "meta" and not _is_mapped(given):
        low, high = int(given.min()), int(given.max())
        if low < 0 or high >= d_vocab:
            raise ValueError(f"{name}: token ids run from {low} to {high}, but the vocabulary is 0..{d_vocab - 1}")
    return given


def checked_entry(batch: Any, host: Host, start_at: int | None) -> Tensor:
    """What a pass is given: tokens or inputs, or the residual stream `[batch pos d_model]` for block `start_at`."""
    if start_at is None:
        return checked_tokens(batch, host, name="the batch", values=False)
    given_whole("start_at", start_at, least=0, most=host.n_layers() - 1)
    width = host.d_model()
    if not isinstance(batch, Tensor) or not batch.is_floating_point() or batch.shape[2:] != (width,):
        raise ValueError(
            f"start_at={start_at} with {shown(batch)}; expected the residual stream [batch pos {width}] that "
            "enters that block, in floating point"
        )
    return batch


def can_be_read(tensor: Tensor) -> bool:
    """Whether looking at the values makes nothing wait and is possible: on the CPU, outside `torch.func`, compilers."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not _is_mapped(tensor)


def _is_mapped(tensor: Tensor) -> bool:
    """Whether `torch.func` is mapping or differentiating over the tensor, which then has no values to look at."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # pyright: ignore[reportAttributeAccessIssue]


def as_tensor(value: Any, name: str) -> Tensor:
    """`value`, a tensor, numpy array or nested list of numbers, as a tensor; integers become int64.

    Raises TypeError for text, booleans and anything else, ValueError for rows of different lengths.
    """
    if isinstance(value, (str, bytes)) or _holds_text(value):
        raise TypeError(f"{name} is text; expected token ids [batch pos]: model.to_tokens(text) makes them")
    if isinstance(value, Mapping):
        raise TypeError(
            f"{name} is a {type(value).__name__} with keys {sorted(map(str, value))}; expected a tensor [batch pos], "
            f"for example {name}['input_ids']"
        )
    if isinstance(value, np.ndarray):
        # Not every width of numpy's has its operations in torch, and torch refuses arrays that cannot be written.
        value = value.astype(np.int64) if value.dtype.kind in "iu" else np.array(value)
        if value.dtype.kind not in "iufb":
            raise TypeError(f"{name} is an array of {value.dtype}; expected token ids or numbers")
        value = torch.from_numpy(value)
    elif isinstance(value, Sequence) and not isinstance(value, Tensor):
        value = _from_nested(value, name)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a tensor [batch pos] of token ids")
    if value.dtype == torch.bool:
        raise TypeError(f"{name} is boolean, which looks like a mask; expected token ids or numbers")
    if value.is_inference():
        # Made under torch.inference_mode(), where gradients could not pass through what is computed from it.
        with torch.inference_mode(False):
            value = value.clone()
    return value if value.is_floating_point() or value.is_complex() else value.long()


def _holds_text(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and isinstance(value[0], str)


def _from_nested(value: Sequence[Any], name: str) -> Tensor:
    """Nested lists of numbers, or a list of equally long tensors."""
    if not len(value):
        raise ValueError(f"{name} is empty; expected at least one row [batch pos]")
    if all(isinstance(row, (Sequence, Tensor, np.ndarray)) and not isinstance(row, str) for row in value):
        rows = [as_tensor(row, name) for row in value]
        lengths = sorted({len(row) if row.ndim else 1 for row in rows})
        if len({row.shape for row in rows}) > 1:
            raise ValueError(
                f"{name} holds rows of different lengths ({', '.join(map(str, lengths[:8]))}); pad them and give an "
                "attention_mask, or cut windows of equal length with pack_tokens"
            )
        return torch.stack(rows)
    odd = [x for x in value if isinstance(x, bool) or not isinstance(x, (int, float, np.integer, np.floating))]
    if odd:
        raise TypeError(f"{name} holds {odd[0]!r}, a {type(odd[0]).__name__}; expected token ids")
    return torch.tensor([x.item() if isinstance(x, np.generic) else x for x in value])


def as_mask(mask: Any, shape: Sequence[int], name: str) -> Tensor:
    """`mask` as bool of the given shape; 0 and 1 of any type are taken for False and True.

    Raises ValueError for other values and other shapes.
    """
    if not isinstance(mask, Tensor):
        array = np.asarray(mask)
        if array.dtype.kind not in "biuf":
            raise TypeError(f"{name} is {shown(mask)}; expected True (or 1) where a position counts, {tuple(shape)}")
        mask = torch.as_tensor(array)
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(mask.shape)}; expected {tuple(shape)}, one entry per position")
    if mask.is_inference():
        with torch.inference_mode(False):
            mask = mask.clone()
    if mask.dtype == torch.bool:
        return mask
    as_bool = mask != 0
    if not bool((mask == as_bool.to(mask.dtype)).all()):
        raise ValueError(
            f"{name} is {mask.dtype} and holds other numbers than 0 and 1; expected True (or 1) where a position counts"
        )
    return as_bool
