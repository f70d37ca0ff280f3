"""How many directions every matrix keeps, within a number of parameters for all of them.

A matrix `[d_in, d_out]` that keeps k directions costs `k (d_in + d_out)` numbers, and never more than `d_in d_out`:
from there on it is kept whole.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# What a matrix that is kept whole has instead of a number of directions.
Kept = dict[str, "int | None"]


def uniform_allocation(shapes: Mapping[str, tuple[int, int]], budget: int) -> Kept:
    """The same share of every matrix."""
    share = budget / sum(a * b for a, b in shapes.values())
    return {s: None if share >= 1 else int(share * a * b / (a + b)) for s, (a, b) in shapes.items()}


def effect_allocation(values: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], budget: int) -> Kept:
    """The numbers with the largest sum of `values[site] [n]`, each in falling order, that fit the budget.

    At a price per parameter every matrix by itself takes the number that pays most, or stays whole; the price is
    bisected until all together fit. What then is left is spent on the best single steps.
    """
    low, high = 0.0, max(float(v.max()) for v in values.values() if len(v)) + 1e-12
    for _ in range(60):
        price = (low + high) / 2
        chosen = {site: _best(values[site], shapes[site], price) for site in shapes}
        low, high = (low, price) if _cost(chosen, shapes) <= budget else (price, high)
    chosen = {site: _best(values[site], shapes[site], high) for site in shapes}
    return _filled_up(chosen, values, shapes, budget)


def cost_of(kept: int | None, shape: tuple[int, int]) -> int:
    """Numbers that a matrix with so many directions costs."""
    whole = shape[0] * shape[1]
    return whole if kept is None else min(whole, kept * sum(shape))


def _cost(chosen: Kept, shapes: Mapping[str, tuple[int, int]]) -> int:
    return sum(cost_of(chosen[site], shapes[site]) for site in shapes)


def _best(values: Tensor, shape: tuple[int, int], price: float) -> int | None:
    most = min(len(values), (shape[0] * shape[1] - 1) // sum(shape))
    prefix = torch.cat([values.new_zeros(1), values.cumsum(0)])
    worth = prefix[: most + 1] - price * sum(shape) * torch.arange(most + 1).to(values)
    best = int(worth.argmax())
    return None if float(prefix[-1]) - price * shape[0] * shape[1] > float(worth[best]) else best


def _filled_up(chosen: Kept, values: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], budget: int) -> Kept:
    room = budget - _cost(chosen, shapes)
    # Of equal worth the earlier direction comes first: the next one is only reached through it.
    steps = sorted((-float(v[k]) / sum(shapes[site]), site, k) for site, v in values.items() for k in range(len(v)))
    for _, site, k in steps:
        now = chosen[site]
        if now is not None and k == now:
            cost = cost_of(now + 1, shapes[site]) - cost_of(now, shapes[site])
            if cost <= room:
                room -= cost
                chosen[site] = None if cost_of(now + 1, shapes[site]) == shapes[site][0] * shapes[site][1] else now + 1
    return chosen
