"""The hooks that experiments are made of, one set: store, hold, zero, add, put, probe, detach.

Every function returns an ordinary TransformerLens hook `(value, hook) -> value`. Hooks at one point run in the order of
their list, so `store` before `hold` keeps what was there before it was held. Where several experiments run as copies of
one batch, values are `[(copy batch) ...]`, and `cells` and `where` lead with the copy.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, MutableMapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool
from torch import Tensor

Hook: TypeAlias = Callable[[Tensor, Any], Tensor | None]


def store(found: MutableMapping[Any, Tensor], key: Hashable) -> Hook:
    """Keep a copy of the value in `found[key]`."""
    return partial(_store, found=found, key=key)


def _store(value: Tensor, hook: Any, *, found: MutableMapping[Any, Tensor], key: Hashable) -> None:
    found[key] = value.detach().clone()


def hold(to: Tensor) -> Hook:
    """`to`, once for every copy of the batch, in place of the value."""
    return partial(_hold, to=to)


def _hold(value: Tensor, hook: Any, *, to: Tensor) -> Tensor:
    return to.repeat(len(value) // len(to), *[1] * (to.ndim - 1)).to(value)


def zero(cells: Sequence[tuple[Any, ...]] | None = None) -> Hook:
    """0 at each cell `(row, position, ...)`; None: everywhere."""
    return partial(_zero, cells=cells)


def _zero(value: Tensor, hook: Any, *, cells: Sequence[tuple[Any, ...]] | None) -> Tensor:
    if cells is None:
        return torch.zeros_like(value)
    value = value.clone()
    for cell in cells:
        value[cell] = 0
    return value


def add(change: Tensor, *, at: int | None = None) -> Hook:
    """The value plus `change`; with `at`, entry `at` of its last axis plus `change`."""
    return partial(_add, change=change, at=at)


def _add(value: Tensor, hook: Any, *, change: Tensor, at: int | None) -> Tensor:
    if at is None:
        return value + change.to(value)
    value = value.clone()
    value[..., at] += change.to(value)
    return value


def put(where: Tensor, by: Tensor) -> Hook:
    """`by` where `where` (both broadcast to the value), else the value."""
    return partial(_put, where=where, by=by)


def _put(value: Tensor, hook: Any, *, where: Tensor, by: Tensor) -> Tensor:
    return torch.where(where.to(value.device), by.to(value), value)


def put_per_copy(where: Tensor, by: Tensor, *, trailing: int = 1, times: bool = False) -> Hook:
    """`by` (with `times`: `by * value`) where the copy says so: `where [copy pos *trailing axes]`.

    `by` broadcasts to `[batch pos ...]`; axes of the value between the position and the last `trailing` ones (heads)
    are treated alike.
    """
    return partial(_put_per_copy, where=where, by=by, trailing=trailing, times=times)


def _put_per_copy(value: Tensor, hook: Any, *, where: Tensor, by: Tensor, trailing: int, times: bool) -> Tensor:
    copies = value.unflatten(0, (len(where), -1))
    new = by.to(value) * copies if times else by.to(value)
    return torch.where(over_copies(where, copies.ndim, trailing), new, copies).flatten(0, 1)


def over_copies(where: Bool[Tensor, "copy ..."], n_axes: int, trailing: int) -> Tensor:
    """`[copy pos *trailing]` as `[copy 1 pos 1.. *trailing]`, for values `[copy batch pos head.. *trailing]` with
    `n_axes` axes."""
    if n_axes == 2 + trailing:  # a model without positions: [copy batch *trailing]
        return where
    where = where.unsqueeze(1)
    for _ in range(n_axes - 3 - trailing):
        where = where.unsqueeze(3)
    return where


def probe(
    leaves: MutableMapping[Any, Tensor], key: Hashable, values: MutableMapping[Any, Tensor] | None = None
) -> Hook:
    """The value plus 0, the 0 a leaf `leaves[key]` that collects the gradient; gradients to the value go on.

    With `values`, the value itself is kept in `values[key]`, without gradients.
    """
    return partial(_probe, leaves=leaves, key=key, values=values)


def _probe(
    value: Tensor,
    hook: Any,
    *,
    leaves: MutableMapping[Any, Tensor],
    key: Hashable,
    values: MutableMapping[Any, Tensor] | None,
) -> Tensor:
    if values is not None:
        values[key] = value.detach()
    leaves[key] = torch.zeros_like(value, requires_grad=True)
    return value + leaves[key]


def detach() -> Hook:
    """The value, through which no gradient goes."""
    return _detach


def _detach(value: Tensor, hook: Any) -> Tensor:
    return value.detach()
