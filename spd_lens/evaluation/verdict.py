"""A verdict in words: does the decomposition hold, and against what (E1, E6, E8)?

The rule is stated, so that it can be argued with. A decomposition holds on the evaluated data when

1. random masks within the importances cost at most a quarter of switching everything off,
2. so does the adversary of the smallest budget tried, or at most 3 times what random masks cost,
3. not everything is on: L0 is at most half of what the matrices' ranks add up to,
4. removing what is never needed costs no more than random masks do, or less than 1 % of everything off.

Without an adversary nothing is judged: masks that an algorithm did not choose to hurt show little (E3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from spd_lens.core.units import ALIVE_ABOVE
from spd_lens.support.shown import short_repr, text_html

# Ours: a quarter of everything off still stands between "damaged" and "gone".
SHARE_OF_OFF = 0.25
# Published decompositions of a 67M model reach 2.7 to 3.9 (20 steps, one source over 128 x 512 positions).
TIMES_STOCHASTIC = 3.0
# E1: L0 must be far under the trivial baseline, which is rank (everything on).
SHARE_OF_RANK = 0.5
# Below this share of everything off a cost is as good as none.
NEGLIGIBLE = 0.01


@dataclass(frozen=True)
class Verdict:
    """Whether a decomposition holds. `judged` is False where no adversary was tried or nothing is at stake.

    `sentences` say why, the finding first; `str(verdict)` joins them.
    """

    holds: bool
    judged: bool
    sentences: tuple[str, ...]

    __repr__ = short_repr
    _repr_html_ = text_html

    def __bool__(self) -> bool:
        return self.holds

    def __str__(self) -> str:
        return " ".join(self.sentences)


def judge(
    *,
    kind: str,
    divergence: Mapping[str, float],
    adversarial: Mapping[int, float],
    l0: float,
    n_subcomponents: int,
    rank: int,
    deletion: float | None,
) -> Verdict:
    """Apply the rule of this module to the numbers of a report.

    `divergence` by mask regime, `adversarial` by steps, `deletion` what removing the never needed costs; `rank` is the
    sum of the sites' rank bounds.
    """
    off, stochastic = divergence.get("all off"), divergence.get("stochastic")
    if off is None or stochastic is None or off <= 0:
        nothing = "Not judged: switching all decomposed sites off changes nothing on this data."
        return Verdict(holds=False, judged=False, sentences=(nothing,))
    name = kind.upper()
    # Sources that no step has moved are a draw at random, and no adversary.
    adversarial = {steps: value for steps, value in adversarial.items() if steps > 0}
    checks = [_stochastic(stochastic, off, name)]
    if adversarial:
        checks.append(_adversary(adversarial, stochastic, off, name))
    checks.append(_sparse(l0, n_subcomponents, rank))
    if deletion is not None:
        checks.append(_deletion(deletion, stochastic, off))
    failed = [text for good, text in checks if not good]
    passed = [text for good, text in checks if good]
    if not adversarial:
        first = "Not judged: no adversary was tried (adversary_steps)."
        return Verdict(holds=False, judged=False, sentences=(first, *failed, *passed))
    first = "DOES NOT HOLD." if failed else "Holds on this data."
    return Verdict(
        holds=not failed, judged=True, sentences=(first, *failed, *passed, *_larger_budgets(adversarial, off))
    )


def _stochastic(stochastic: float, off: float, name: str) -> tuple[bool, str]:
    good = stochastic <= SHARE_OF_OFF * off
    word = "only " if good else ""
    limit = "" if good else f" (at most {SHARE_OF_OFF:.0%} would do)"
    return good, (
        f"Random masks within the importances cost {stochastic:.3g} of {name}, {word}{_share(stochastic, off)} of what "
        f"switching everything off costs ({off:.3g}){limit}."
    )


def _adversary(adversarial: Mapping[int, float], stochastic: float, off: float, name: str) -> tuple[bool, str]:
    steps, value = min(adversarial.items())
    good = value <= max(SHARE_OF_OFF * off, TIMES_STOCHASTIC * stochastic)
    compared = f"{_share(value, off)} of everything off, {_times(value, stochastic)} random masks"
    if good:
        text = f"An adversary of {steps} steps reaches {value:.3g}: {compared}."
    elif value >= off:
        text = (
            f"An adversary of {steps} steps does more damage ({value:.3g} of {name}) than removing the sites "
            f"altogether ({off:.3g}): some masks that the importances allow break the model."
        )
    else:
        text = (
            f"An adversary of {steps} steps reaches {value:.3g}: {compared}; a quarter of everything off or "
            f"{TIMES_STOCHASTIC:g} times random masks would do. The importances miss something that is needed."
        )
    return good, text


def _sparse(l0: float, total: int, rank: int) -> tuple[bool, str]:
    good = l0 <= SHARE_OF_RANK * rank
    text = f"{l0:.1f} of {total:,} subcomponents are on at a position (importance above {ALIVE_ABOVE:g})"
    if good:
        return True, text + f", where the ranks add up to {rank:,}."
    return False, text + (
        f", more than half of the ranks' sum ({rank:,}): nothing is separated yet, so that masks do little harm shows "
        "nothing."
    )


def _deletion(value: float, stochastic: float, off: float) -> tuple[bool, str]:
    good = value <= max(stochastic, NEGLIGIBLE * off)
    text = f"Removing for good what no position needs, and delta, costs {value:.3g}"
    if good:
        return True, text + "."
    return False, text + f", more than random masks ({stochastic:.3g}): some of it is needed after all."


def _larger_budgets(adversarial: Mapping[int, float], off: float) -> tuple[str, ...]:
    """What the verdict, which looks at the smallest budget, does not cover."""
    (steps, value), *larger = sorted(adversarial.items())
    if not larger:
        return (f"Budgets above {steps} steps were not tried.",)
    most, worst = larger[-1]
    broken = [n for n, v in larger if v >= off > value]
    if broken:
        return (f"From {broken[0]} steps on the adversary does more damage than removing the sites.",)
    return (f"With {most} steps it reaches {worst:.3g}, {_share(worst, off)} of everything off.",)


def _share(value: float, whole: float) -> str:
    share = value / whole
    return f"{share:.0%}" if share >= 0.095 else f"{share:.1%}"


def _times(value: float, other: float) -> str:
    return f"{value / other:.1f} times" if other > 0 else "beside 0 of"
