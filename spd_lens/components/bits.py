"""The description length of a grouping, and what a merge of two groups changes in it (pure functions).

Of `k` groups, group i has `r_i` members and is active in a share `s_i` of the events (active: any member fires). To
say which groups are active in an event takes `log2 k` bits for each of them; to say what each is, `alpha` bits per
member:

    DL = sum_i s_i (log2 k + alpha r_i)

One group for all makes the first part 0 and the second large; groups of one make the second small. `alpha` decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log2
from typing import Any

from spd_lens.support.given import given_number


def description_length(rates: Sequence[float], sizes: Sequence[int], alpha: float) -> float:
    """`sum_i s_i (log2 k + alpha r_i)` in bits per event, of all `k = len(rates)` groups.

    >>> description_length([0.5, 0.25], [1, 2], alpha=1.0)
    1.75
    """
    check_alpha(alpha)
    if not len(rates) or len(rates) != len(sizes):
        raise ValueError(f"{len(rates)} rates and {len(sizes)} sizes; expected one of each for every group")
    bits = log2(len(rates))
    return sum(s * (bits + alpha * r) for s, r in zip(rates, sizes, strict=True))


def merge_change(
    s_i: float, s_j: float, s_both: float, r_i: int, r_j: int, *, total: float, k: int, alpha: float
) -> float:
    """What merging i and j does to the description length of `k` groups whose rates sum to `total`.

        - total log2(k / (k - 1)) - s_both (log2(k - 1) + alpha (r_i + r_j)) + alpha (s_i r_j + s_j r_i)

    `s_both` is the rate of both at once, so that either has the rate `s_i + s_j - s_both`. Only the last two terms
    depend on the pair. Two groups that are never active together (`s_both = 0`) may still gain: each group fewer makes
    every other one cheaper to name. For features of equal rate `s` and one member, `total = k s` and that gain is
    about `1.44 s` against a cost of `2 alpha s`.

    >>> merge_change(0.5, 0.5, 0.5, 1, 1, total=1.0, k=2, alpha=1.0)  # two that are always together become one
    -1.0
    """
    pair = -s_both * (log2(k - 1) + alpha * (r_i + r_j)) + alpha * (s_i * r_j + s_j * r_i)
    return pair - total * log2(k / (k - 1))


def check_alpha(alpha: Any) -> float:
    """`alpha` as a number; TypeError or ValueError unless it is finite, zero or more."""
    return given_number("alpha", alpha, least=0.0)
