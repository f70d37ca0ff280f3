"""Arguments that users give, checked in words: each function returns the value as it is used from there on.

TypeError for a value of the wrong kind, ValueError for one that is out of range; both name the argument, what was given
and what was expected. Booleans and texts are no numbers, numpy's numbers and tensors without axes are.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")
# Seeds are multiplied by up to a million to give every purpose a generator of its own, and must then fit 64 bits.
LARGEST_SEED = 2**40


def shown(value: Any) -> str:
    """`value` for an error message: short, and tensors by their shape."""
    if isinstance(value, Tensor) or (type(value).__module__ == "numpy" and getattr(value, "ndim", 0)):
        return f"<{type(value).__name__} of shape {tuple(value.shape)}>"
    text = repr(value)
    return text if len(text) <= 80 else f"<{type(value).__name__} {text[:60]}...>"


def _single(value: Any) -> Any:
    """A number of numpy's or of a tensor without axes as Python's."""
    if isinstance(value, Tensor) and value.ndim == 0 and not value.is_meta:
        return value.item()
    return value.item() if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0 else value


def given_whole(
    name: str, value: Any, *, least: int | None = None, most: int | None = None, of: str = "", or_none: bool = False
) -> int:
    """A whole number within bounds; `of` says what it counts."""
    number = _single(value)
    instead = ", or None" if or_none else ""
    if isinstance(number, bool) or not isinstance(number, Integral):
        raise TypeError(f"{name}={shown(value)}; expected a whole number{of}{instead}")
    number = int(number)
    if least is not None and number < least:
        raise ValueError(f"{name}={number}; expected at least {least}{of}{instead}")
    if most is not None and number > most:
        raise ValueError(f"{name}={number}; expected at most {most}{of}{instead}")
    return number


def given_number(
    name: str,
    value: Any,
    *,
    least: float | int | None = None,
    above: float | int | None = None,
    most: float | int | None = None,
) -> float:
    """A finite number within bounds."""
    number = _single(value)
    bounds = [f"above {above:g}"] if above is not None else [f"at least {least:g}"] if least is not None else []
    wanted = "a number " + " and ".join([*bounds, *([] if most is None else [f"at most {most:g}"])])
    if isinstance(number, bool) or not isinstance(number, Real):
        raise TypeError(f"{name}={shown(value)}; expected {wanted.strip()}")
    try:
        number = float(number)
    except OverflowError:
        number = math.inf
    low = (least is not None and number < least) or (above is not None and number <= above)
    if not math.isfinite(number) or low or (most is not None and number > most):
        finite = "" if bounds or most is not None else ", and a finite one"
        raise ValueError(f"{name}={number:g}; expected {wanted.strip()}{finite}")
    return number


def given_flag(name: str, value: Any) -> bool:
    """True or False; numpy's, too."""
    flag = _single(value)
    if not isinstance(flag, bool):
        raise TypeError(f"{name}={shown(value)}; expected True or False")
    return flag


def given_seed(value: Any, name: str = "seed") -> int:
    """The seed of a random generator."""
    return given_whole(name, value, least=-LARGEST_SEED, most=LARGEST_SEED)


def given_list(name: str, value: Any, of: str) -> list[Any]:
    """The items of a list; a text, a mapping and a single value are none. `of` says of what, with an example."""
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise TypeError(f"{name}={shown(value)}; expected a list of {of}")
    if getattr(value, "ndim", None) == 0:
        raise TypeError(f"{name}={shown(value)}; expected a list of {of}")
    return list(value)


def given_wholes(name: str, value: Any, *, least: int, of: str) -> tuple[int, ...]:
    """Whole numbers of at least `least` each, from a list; a single number is none."""
    return tuple(given_whole(f"{name}[{i}]", n, least=least) for i, n in enumerate(given_list(name, value, of)))


def given_one_of(name: str, value: Any, choices: Iterable[str]) -> Any:
    """One of some texts."""
    known = list(choices)
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name}={shown(value)}; expected {', '.join(map(repr, known[:-1]))} or {known[-1]!r}")
    return value


def given_instance(name: str, value: Any, kind: type[T], way_out: str) -> T:
    """An object of a class; `way_out` says where one comes from."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} is {_a(value)}; expected a {kind.__name__}: {way_out}")
    return value


def given_function(name: str, value: Any, takes: str, n_arguments: int = 1) -> Any:
    """Something that can be called with `n_arguments`; `takes` says what they are and what comes back."""
    if not callable(value):
        raise TypeError(f"{name} is {_a(value)}; expected a function {takes}")
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):  # some of C's tell nothing
        return value
    try:
        signature.bind(*[None] * n_arguments)
    except TypeError:
        raise TypeError(f"{name} has the arguments {signature}; expected a function {takes}") from None
    return value


def _a(value: Any) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}, not an object of it"
    return "None" if value is None else f"{shown(value)}, a {type(value).__name__}"
