"""The terms of the loss that need no pass under masks: one table, walked by `train`, `train_many` and their checks.

Terms over passes (reconstruction, hidden) are in `spd_lens.training.step`, because each is differentiated before the
next is computed. A term of one's own is an object with a name, a coefficient and a call, in `TrainConfig.extra_terms`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from jaxtyping import Bool
from torch import Tensor

from spd_lens.core.decomposed_weight import DecomposedWeight
from spd_lens.core.decomposition import Decomposition
from spd_lens.core.masks import Importances
from spd_lens.core.subcomponents import squared_error
from spd_lens.objective.losses import (
    Error,
    error_per_entry,
    frequency_loss,
    mean_relative_error,
    minimality_loss,
)
from spd_lens.support.shown import short_repr
from spd_lens.training.config import TrainConfig


@dataclass(frozen=True)
class StepView:
    """What a term may read at one step: upper importances (S2), which positions count, and where the run is."""

    config: TrainConfig
    step: int
    upper: Importances
    position_mask: Bool[Tensor, ...] | None = None
    minimality_factors: Mapping[str, float] = field(default_factory=dict)
    sum_over_processes: Callable[[Tensor], Tensor] | None = None

    __repr__ = short_repr


@runtime_checkable
class LossTerm(Protocol):
    """A term of one's own: `coefficient * term(view, decomposition)` is added to the total loss under `name`.

    Under `TrainConfig.shard` V and U are whole while it is computed. Of gates there is this process's share: a norm or
    another sum of it is that of the whole, but it does not mix with whole tensors.
    """

    name: str
    coefficient: float

    def __call__(self, view: StepView, decomposition: Decomposition) -> Tensor: ...


def _minimality(view: StepView) -> Tensor:
    return minimality_loss(
        view.upper,
        penalty=view.config.penalty_at(view.step),
        position_mask=view.position_mask,
        factors=view.minimality_factors,
    )


def _frequency(view: StepView) -> Tensor:
    return frequency_loss(
        view.upper,
        penalty=view.config.penalty_at(view.step),
        reference=view.config.frequency_reference,
        position_mask=view.position_mask,
        sum_over_processes=view.sum_over_processes,
    )


# By the name of their coefficient in TrainConfig.
IMPORTANCE_TERMS: dict[str, Callable[[StepView], Tensor]] = {"minimality": _minimality, "frequency": _frequency}


def faithfulness(config: TrainConfig, sites: Iterable[tuple[DecomposedWeight, Tensor]]) -> Tensor:
    """L1 of sites and their targets `W`, or L1r with `relative_faithfulness`; tied matrices count once."""

    def errors() -> Iterator[Error]:
        for weight, W in sites:
            if weight.tied_to is None:
                yield weight.whole(lambda weight=weight, W=W: squared_error(W, weight.V, weight.U)), W

    return mean_relative_error(errors()) if config.relative_faithfulness else error_per_entry(errors())


def coefficient(config: TrainConfig, name: str) -> float:
    """The weight of a term in the total loss."""
    for term in (*config.reconstructions, *config.extra_terms):
        if term.name == name:
            return term.coefficient
    return getattr(config, name)
