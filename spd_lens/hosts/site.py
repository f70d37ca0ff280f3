"""A site: one weight matrix of a host model, with the places where its input and output can be reached.

This file holds the vocabulary that the host modules (`hooked`, `bridge_sites`, `declared`) fill in and that the rest of
the library works with. Nothing here imports TransformerLens apart from its `HookPoint`.

Every object here may be deep-copied together with the model it points into: places refer to modules of the
model, never to closures over them.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import einops
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from spd_lens.support.names import near_names

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

    def as_stored(self, matrix: Float[Tensor, "d_in d_out"]) -> Tensor:
        """`matrix [d_in, d_out]` in the host's own layout, in the matrix's dtype."""
        left, right = (side.strip() for side in self.pattern.split("->"))
        sizes = dict(zip(left.split(), self.stored().shape, strict=True))
        return einops.rearrange(matrix, f"{right} -> {left}", **sizes)

    def write(self, matrix: Float[Tensor, "d_in d_out"]) -> None:
        """Overwrite the stored parameter in place with `matrix [d_in, d_out]`."""
        with torch.no_grad():
            self.stored().copy_(self.as_stored(matrix).to(self.stored().dtype))


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


def is_from_transformer_lens(hook: Any) -> bool:
    """Whether a hook is one of TransformerLens's own, such as those that fill its caches."""
    function = getattr(hook, "func", hook)
    return str(getattr(function, "__module__", "")).split(".")[0] == "transformer_lens"


@dataclass(frozen=True, eq=False)
class Site:
    """One weight matrix `W [d_in, d_out]` of the host and everything the swap has to know about it.

    - `name`: TransformerLens's parameter name, `"blocks.0.mlp.W_in"`.
    - `point_stem`: the new HookPoints are `f"{point_stem}_acts"` and so on, `"blocks.0.hook_W_in"`.
    - `parent`: the module that gets the new HookPoints (the block; the model for sites outside blocks).
    - `layer`: the block's index, or None outside blocks.
    - `output`: the HookPoint that `y0 = x @ W + b` passes, shaped `[... d_out]` or `[... heads d_head]`.
    - `read_from`: where the input `x` is read.
    - `bias`: the stored bias as `(module, attribute)`, broadcastable to the output, or None.
    - `is_lookup`: `x` is one-hot and given as integer indices; an index of -1 stands for the zero vector (M4).
    - `flatten_input`: `x` arrives as `[... heads d_head]` and is seen as `[... (heads d_head)]`.
    - `tied_to`: the site whose matrix is the transpose of this one; both share their subcomponents.
    - `by_head`: a HookPoint that sees what each head adds to the output, `[... heads d_out]`, in passes where the host
      computes that; hooks on it come before the output is summed.
    - `module_output`: the module whose return value is `y0`; its own PyTorch forward hooks would act in between.
    """

    name: str
    point_stem: str
    parent: nn.Module
    layer: int | None
    matrix: StoredMatrix
    output: HookPoint
    read_from: ModuleInput | PointOutput
    bias: tuple[nn.Module, str] | None = None
    is_lookup: bool = False
    flatten_input: bool = False
    tied_to: str | None = None
    by_head: HookPoint | None = None
    module_output: nn.Module | None = None

    def point_names(self) -> tuple[str, ...]:
        """Full names of the four HookPoints, in `POINT_SUFFIXES` order."""
        return tuple(f"{self.point_stem}_{suffix}" for suffix in POINT_SUFFIXES)

    def read_bias(self) -> Tensor | None:
        """The bias as stored, or None."""
        return None if self.bias is None else getattr(*self.bias)


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
