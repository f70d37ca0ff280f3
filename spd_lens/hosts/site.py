"""A site: one weight matrix of a host model, with the places where its input and output can be reached.

This file holds the vocabulary that the host modules (`hooked`, `bridge`, `root`) fill in and that the rest of
the library works with. Nothing here imports TransformerLens apart from its `HookPoint`.

Every object here may be deep-copied together with the model it points into: places refer to modules of the
model, never to closures over them.
"""

from __future__ import annotations

import difflib
import fnmatch
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import einops
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

T = TypeVar("T")

# The four HookPoints that every decomposed site adds, in the order in which they fire.
POINT_SUFFIXES = ("acts", "importance", "mask", "delta_mask")


@dataclass(frozen=True, eq=False)
class StoredMatrix:
    """A weight matrix as the host stores it, read and written as `W [d_in, d_out]`.

    `pattern` is the einops pattern from the stored axes to `[d_in, d_out]`, for example
    `"head_index d_model d_head -> d_model (head_index d_head)"`.
    """

    module: nn.Module
    attribute: str
    pattern: str

    def stored(self) -> Tensor:
        """The parameter itself, in the host's own layout."""
        return getattr(self.module, self.attribute)

    def read(self) -> Float[Tensor, "d_in d_out"]:
        """`W [d_in, d_out]`, a view where the layout allows one, otherwise a copy."""
        return einops.rearrange(self.stored(), self.pattern)

    def write(self, matrix: Float[Tensor, "d_in d_out"]) -> None:
        """Overwrite the stored parameter in place with `matrix [d_in, d_out]`."""
        stored = self.stored()
        left, right = (side.strip() for side in self.pattern.split("->"))
        sizes = dict(zip(left.split(), stored.shape, strict=True))
        with torch.no_grad():
            stored.copy_(einops.rearrange(matrix, f"{right} -> {left}", **sizes).to(stored.dtype))


@dataclass(frozen=True, eq=False)
class ModuleInput:
    """The input is what enters `module`; `read` picks it out of the call's arguments.

    `read` is a module-level function or a `functools.partial` of one, so that it survives `copy.deepcopy`.
    """

    module: nn.Module
    read: Callable[[tuple[Any, ...], Mapping[str, Any]], Tensor]


@dataclass(frozen=True, eq=False)
class PointOutput:
    """The input is what the HookPoint `point` returns, after every hook on it has run."""

    point: HookPoint


def argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], *, name: str, index: int) -> Tensor:
    """The argument called `name`, or the positional one at `index`."""
    return kwargs[name] if name in kwargs else args[index]


@dataclass(frozen=True, eq=False)
class Site:
    """One weight matrix `W [d_in, d_out]` of the host and everything the swap has to know about it.

    - `name`: TransformerLens's parameter name, `"blocks.0.mlp.W_in"`.
    - `point_stem`: the new HookPoints are `f"{point_stem}_acts"` and so on, `"blocks.0.hook_W_in"`.
    - `parent`: the module that gets the new HookPoints (the block; the model for sites outside blocks).
    - `layer`: the block's index, or None outside blocks.
    - `output`: the HookPoint that `y0 = x @ W + b` passes, shaped `[... d_out]` or `[... heads d_head]`.
    - `source`: where the input `x` is read.
    - `bias`: the stored bias as `(module, attribute)`, broadcastable to the output, or None.
    - `is_lookup`: `x` is one-hot and given as integer indices; an index of -1 stands for the zero vector (M4).
    - `flatten_input`: `x` arrives as `[... heads d_head]` and is seen as `[... (heads d_head)]`.
    - `tied_to`: the site whose matrix is the transpose of this one; both share their subcomponents.
    - `recompute_dense`: `(object, flag)`; while the flag is true other hooks may change the output between the
      matmul and the HookPoint, so `x @ W` is computed rather than taken as `y0 - b`.
    - `module_output`: the module whose return value is `y0`; its own PyTorch forward hooks would act in between.
    """

    name: str
    point_stem: str
    parent: nn.Module
    layer: int | None
    matrix: StoredMatrix
    output: HookPoint
    source: ModuleInput | PointOutput
    bias: tuple[nn.Module, str] | None = None
    is_lookup: bool = False
    flatten_input: bool = False
    tied_to: str | None = None
    recompute_dense: tuple[Any, str] | None = None
    module_output: nn.Module | None = None

    @property
    def short_name(self) -> str:
        """The last part of the name: `"W_in"`."""
        return self.name.rsplit(".", 1)[-1]

    def point_names(self) -> tuple[str, ...]:
        """Full names of the four HookPoints, in `POINT_SUFFIXES` order."""
        return tuple(f"{self.point_stem}_{suffix}" for suffix in POINT_SUFFIXES)

    def read_bias(self) -> Tensor | None:
        """The bias as stored, or None."""
        return None if self.bias is None else getattr(*self.bias)


@dataclass(frozen=True)
class Provenance:
    """What identifies the target: written into saved decompositions and checked on loading."""

    model_name: str
    host: str
    weight_processing: str
    details: Mapping[str, Any] = field(default_factory=dict)


class Host(ABC):
    """What the library needs from a model. One subclass per kind of TransformerLens model.

    A host holds nothing but the model, so it may be made again at any time and deep-copied with it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model

    @abstractmethod
    def site_names(self) -> list[str]:
        """Names of every weight matrix that this model has, whether it can be decomposed or not."""

    @abstractmethod
    def site(self, name: str) -> Site:
        """The site called `name`, which is one of `site_names()`.

        Raises ValueError, naming the weight and the way out, where the swap cannot be exact.
        """

    @abstractmethod
    def provenance(self) -> Provenance:
        """Name, host kind and weight-processing state of the model."""

    def n_layers(self) -> int:
        """Number of blocks; 0 for models without blocks."""
        cfg = getattr(self.model, "cfg", None)
        return int(getattr(cfg, "n_layers", 0) or 0)

    def default_sites(self, layer: int) -> tuple[str, ...]:
        """Sites of block `layer` that `decompose_layer` takes unless told otherwise: the MLP's matrices."""
        wanted = ("mlp.W_gate", "mlp.W_in", "mlp.W_out")
        names = set(self.site_names())
        return tuple(site for site in wanted if f"blocks.{layer}.{site}" in names)

    def block(self, layer: int) -> nn.Module | None:
        """The module of block `layer`, or None for models without blocks."""
        blocks = getattr(self.model, "blocks", None)
        return None if blocks is None else blocks[layer]

    # -- HookPoints -------------------------------------------------------------------------------------------

    def add_point(self, parent: nn.Module, name: str, point: HookPoint) -> None:
        """Register `point` under the full hook name `name`, whose last part becomes an attribute of `parent`."""
        setattr(parent, name.rsplit(".", 1)[-1], point)
        point.name = name
        self.model.mod_dict[name] = point
        self.model.hook_dict[name] = point

    def remove_point(self, parent: nn.Module, name: str) -> None:
        """Undo `add_point`; a name that is already gone is not an error."""
        attribute = name.rsplit(".", 1)[-1]
        if attribute in parent._modules:
            delattr(parent, attribute)
        self.model.mod_dict.pop(name, None)
        self.model.hook_dict.pop(name, None)

    def check_can_swap(self) -> None:  # noqa: B027 (most hosts have nothing to check)
        """Raise ValueError if this model cannot be swapped at all in its present state."""

    # -- running ----------------------------------------------------------------------------------------------

    def forward(self, batch: Tensor) -> Tensor:
        """The model's output (logits for a language model) on a batch of tokens or inputs."""
        return self.model(batch)

    def residual_before(self, layer: int, tokens: Tensor) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream that enters block `layer`; only the blocks before it are run."""
        raise ValueError(f"a {type(self.model).__name__} has no residual stream to start from")

    def forward_from(self, layer: int, residual: Float[Tensor, "batch pos d_model"]) -> Tensor:
        """The model's output with `residual` entering block `layer`; no block before it is run."""
        raise ValueError(f"a {type(self.model).__name__} has no residual stream to start from")

    def can_start_at_blocks(self) -> bool:
        """Whether `forward_from` gives, bit for bit, what the whole pass gives that the residual stream is from."""
        return False

    @contextmanager
    def record_residuals(self, layers: Iterable[int]) -> Iterator[dict[int, Tensor]]:
        """While open, a pass stores the residual stream that enters each of these blocks in the dict."""
        found: dict[int, Tensor] = {}
        handles = []
        try:
            for layer in layers:
                block, note = self.block(layer), partial(_note_residual, found=found, layer=layer)
                assert block is not None
                handles.append(block.register_forward_pre_hook(note, with_kwargs=True, prepend=True))
            yield found
        finally:
            for handle in handles:
                handle.remove()

    def cached_positions(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        """How many earlier positions a block's call finds in its key-value cache."""
        return 0

    # -- places that analysis holds still -----------------------------------------------------------------------

    def frozen_points(self, *, attention: bool, norms: bool) -> list[str]:
        """Names of the HookPoints of what attention (patterns) and normalisation (scales) multiply by."""
        ends = ("hook_pattern",) * attention + ("hook_scale",) * norms
        return [name for name in self.model.hook_dict if name.endswith(ends)]

    def embedding_points(self) -> dict[str, str]:
        """Names of the HookPoints through which embeddings enter: `{"embed": ..., "pos_embed": ...}`, where present."""
        points = {"embed": "hook_embed", "pos_embed": "hook_pos_embed"}
        return {what: name for what, name in points.items() if name in self.model.hook_dict}

    def quiet_edits(self) -> AbstractContextManager[None]:
        """While open, hooks that return what is at `frozen_points` make the host give no warning."""
        return nullcontext()


def _note_residual(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, found: dict[int, Tensor], layer: int
) -> None:
    found[layer] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


def match_sites(patterns: Mapping[str, T], names: Iterable[str]) -> dict[str, T]:
    """`{site: value}` of `{pattern: value}`, in the order of `names`; where two patterns match, the later one counts.

    Patterns are shell-style; a name outside any block is also found by its last part. Raises ValueError for a pattern
    that matches nothing, with near names.
    """
    names = list(names)
    found: dict[str, T] = {}
    for pattern, value in patterns.items():
        matched = [n for n in names if fnmatch.fnmatchcase(n, pattern)] or [
            n for n in names if n.rsplit(".", 1)[-1] == pattern and "blocks" not in n
        ]
        if not matched:
            raise ValueError(f"no site matches {pattern!r}; near names: {near_names(pattern, names)}")
        found.update(dict.fromkeys(matched, value))
    return {name: found[name] for name in names if name in found}


def near_names(given: str, known: Iterable[str]) -> str:
    """Names close to `given` in single quotes, or the first few where none is close."""
    known = list(known)
    close = difflib.get_close_matches(given, known, n=4, cutoff=0.5)
    chosen = close or known[:8]
    return ", ".join(repr(name) for name in chosen) + ("" if close or len(known) <= 8 else ", ...")


def token_arguments_error(batch: Tensor, d_vocab: int) -> str | None:
    """Why `batch` is not usable as tokens, or None. Costs a host-device sync: not for the training step."""
    if batch.dtype not in (torch.int32, torch.int64):
        return f"tokens have dtype {batch.dtype}; expected an integer tensor [batch pos]"
    if batch.numel() == 0:
        return f"tokens have shape {tuple(batch.shape)}: there is nothing to run"
    low, high = int(batch.min()), int(batch.max())
    if low < 0 or high >= d_vocab:
        return f"token ids run from {low} to {high}, but the vocabulary is 0..{d_vocab - 1}"
    return None
