"""What patching functions are given: tokens, metrics and positions, checked once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.inputs import checked_decomposition, checked_tokens
from spd_lens.core.units import Unit
from spd_lens.support.given import given_function, given_list, given_whole

# logits -> a scalar, or one number per row of the batch.
Metric: TypeAlias = Callable[[Tensor], Tensor | float]


METRIC = "of the logits that returns a scalar, or one number per row"


Positions: TypeAlias = Literal["each"] | Sequence[int] | None


# -- checks ------------------------------------------------------------------------------------------------------


def checked_input(decomposition: Decomposition, tokens: Any, name: str = "tokens") -> Tensor:
    """`tokens` as a tensor on the decomposition's device; TypeError or ValueError if the model cannot run them."""
    checked_decomposition(decomposition, "this function")
    return checked_tokens(tokens, decomposition.host, name=name).to(decomposition.device)


def checked_positions(positions: Positions, tokens: Tensor) -> list[int] | None:
    """Positions as numbers from 0; None for everywhere."""
    if positions is None:
        return None
    if tokens.ndim < 2 or (tokens.ndim == 2 and tokens.is_floating_point()):
        raise ValueError(f"positions={positions!r}, but this model's input {tuple(tokens.shape)} has no positions")
    length = tokens.shape[1]
    if isinstance(positions, str):
        if positions != "each":
            raise ValueError(f"positions={positions!r}; expected None (everywhere), 'each', or a list of positions")
        return list(range(length))
    chosen = [given_whole("a position", p) for p in given_list("positions", positions, "positions, None or 'each'")]
    wrong = [p for p in chosen if not -length <= p < length]
    if wrong or not chosen:
        raise ValueError(f"positions {wrong or chosen}: expected some of 0..{length - 1} (or negative, from the end)")
    chosen = [p % length for p in chosen]
    if len(set(chosen)) != len(chosen):
        raise ValueError(f"positions {chosen} name a position twice")
    return chosen


def unit_positions(units: Sequence[Unit], positions: Positions, tokens: Tensor) -> list[int] | None:
    """`checked_positions`; units that have positions of their own are tested there, all at once.

    `"each"` then stands for None. Raises ValueError where both name positions.
    """
    own = [unit for unit in units if unit.positions is not None]
    for unit in own:
        checked_positions(unit.positions, tokens)
    if own and positions is not None and positions != "each":
        raise ValueError(f"{own[0]} has positions of its own, and positions={positions!r} is given; leave one out")
    if own and len(own) < len(units) and positions == "each":
        raise ValueError(f"{own[0]} has positions of its own and other units have none; give positions=None")
    return None if own else checked_positions(positions, tokens)


def metric_values(metric: Metric, output: Tensor, batch: int, *, may_be_nan: bool = False) -> Float[Tensor, " example"]:
    """`metric(output)` as `[example]` on the CPU: one number, or one per row.

    Raises TypeError or ValueError if it is neither, or NaN (an experiment may leave that: `may_be_nan`).
    """
    value = given_function("metric", metric, METRIC)(output)
    if isinstance(value, (int, float)):
        value = torch.tensor(float(value))
    if not isinstance(value, Tensor):
        raise TypeError(f"the metric returned a {type(value).__name__}; expected a scalar, or a tensor [batch]")
    if value.ndim > 1 or (value.ndim == 1 and len(value) != batch):
        raise ValueError(
            f"the metric returned a tensor of shape {tuple(value.shape)}; expected a scalar, or one number per row, "
            f"[{batch}]"
        )
    value = value.detach().reshape(-1).cpu()
    if not may_be_nan and bool(value.isnan().any()):
        raise ValueError("the metric returned NaN; expected numbers (what is compared with it would be NaN, too)")
    return value if value.is_floating_point() else value.float()
