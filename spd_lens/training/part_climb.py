"""What adversaries climb on where a batch is gone through in parts: the sum over the parts, none of which is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens.objective.mask_sources import Climb, Masks, masks_from_sources, of_part

# Of one part: its detached importances, and the loss of masks for it as a summand of the batch's.
PartObjective = tuple[Mapping[str, Tensor], Callable[[Masks], Tensor]]


@dataclass(frozen=True)
class ClimbOverParts(Climb):
    """A `Climb` on the sum of the parts' objectives.

    `parts(rows)` makes the parts' objectives one after the other (over that many of their first rows). `importances`
    are those of the whole batch in shape and dtype alone.
    """

    parts: Callable[[int | None], Iterator[PartObjective]] = lambda rows: iter(())
    count: int = 1

    def of(self, sources: Mapping[str, Tensor]) -> Float[Tensor, ""]:
        return _SumOfParts.apply(self, list(sources), *sources.values())  # pyright: ignore[reportReturnType]

    def in_first(self, rows: int) -> Climb:
        if rows % self.count:
            raise ValueError(
                f"an adversary on the first {rows} rows of a batch in {self.count} parts; expected as many in every "
                "part: another batch size, share of the rows, or accumulate"
            )
        return replace(self, importances={name: g[:rows] for name, g in self.importances.items()}, rows=rows)

    def value_and_gradients(self, sources: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The objective, and its gradient for every source."""
        gradients = {name: torch.zeros_like(source) for name, source in sources.items()}
        total: Tensor | None = None
        rows = None if self.rows is None else self.rows // self.count
        for k, (importances, objective) in enumerate(self.parts(rows)):
            own = of_part(sources, (k, self.count))
            leaves = {name: source.detach().requires_grad_() for name, source in own.items()}
            with torch.enable_grad():
                first = {name: g[:rows] for name, g in importances.items()}
                value = objective(masks_from_sources(first, leaves, delta=self.delta))
                found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
            for into, gradient in zip(of_part(gradients, (k, self.count)).values(), found, strict=True):
                if gradient is not None:
                    into += gradient
            total = value.detach() if total is None else total + value.detach()
        assert total is not None
        return total, list(gradients.values())


class _SumOfParts(torch.autograd.Function):
    """The gradient is there with the value: a part's graph is dropped before the next part's is made."""

    @staticmethod
    def forward(ctx: Any, climb: ClimbOverParts, names: list[str], *sources: Tensor) -> Tensor:
        value, gradients = climb.value_and_gradients(dict(zip(names, sources, strict=True)))
        ctx.save_for_backward(*gradients)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, None, *(grads[0] * gradient for gradient in ctx.saved_tensors)
