"""Configurations that are checked whole when they are made: pydantic dataclasses with errors in our own words.

Strict: a boolean is no number, a string is no number, a count has no fraction, NaN and infinity are nowhere allowed.
numpy's numbers are accepted and become Python's; lists become tuples where a tuple is meant.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import numbers
from typing import Annotated, Any, TypeVar

from annotated_types import Ge, Gt, Le
from pydantic import BeforeValidator, ConfigDict, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from typing_extensions import dataclass_transform

from spd_lens.support.given import LARGEST_SEED

T = TypeVar("T")


def _plain(value: Any) -> Any:
    """numpy's scalars as Python's own."""
    return value.item() if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0 else value


def _number(value: Any) -> float:
    value = _plain(value)
    if isinstance(value, str):
        hint = " (YAML reads 1e-3 as text: write 1.0e-3)" if _reads_as_number(value) else ""
        raise ValueError(f"expected a number, not text{hint}")
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"expected a number, not a {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError("expected a finite number")
    return number


def _reads_as_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _count(value: Any) -> int:
    value = _plain(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"expected a whole number, not {'text' if isinstance(value, str) else type(value).__name__}")
    return int(value)


def _flag(value: Any) -> bool:
    value = _plain(value)
    if not isinstance(value, bool):
        raise ValueError("expected True or False")
    return value


def _tuple(value: Any) -> Any:
    if isinstance(value, str) or not isinstance(value, (list, tuple)):
        raise ValueError(f"expected a tuple or a list, not a {type(value).__name__}")
    return tuple(value)


Number = Annotated[float, BeforeValidator(_number)]
Positive = Annotated[float, BeforeValidator(_number), Gt(0)]
NonNegative = Annotated[float, BeforeValidator(_number), Ge(0)]
Share = Annotated[float, BeforeValidator(_number), Ge(0), Le(1)]
Count = Annotated[int, BeforeValidator(_count), Ge(1)]
CountOrZero = Annotated[int, BeforeValidator(_count), Ge(0)]
Integer = Annotated[int, BeforeValidator(_count)]
Seed = Annotated[int, BeforeValidator(_count), Ge(-LARGEST_SEED), Le(LARGEST_SEED)]
Flag = Annotated[bool, BeforeValidator(_flag)]
as_tuple = BeforeValidator(_tuple)


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def validated(cls: type[T]) -> type[T]:
    """A frozen dataclass whose fields are checked when it is made.

    Raises ValueError that names every wrong field, what was given and what was expected; TypeError for an unknown
    field, with near names. `changed(**changes)` gives a copy with some fields changed, checked again.
    """
    made: Any = pydantic_dataclass(frozen=True, config=ConfigDict(arbitrary_types_allowed=True, extra="forbid"))(cls)
    original = made.__init__

    @functools.wraps(original)
    def checked_init(self: Any, *args: Any, **kwargs: Any) -> None:
        unknown = [name for name in kwargs if name not in {f.name for f in dataclasses.fields(made)}]
        if unknown:
            raise unknown_field(made, unknown[0])
        try:
            original(self, *args, **kwargs)
        except ValidationError as error:
            raise ValueError(_in_words(cls.__name__, error)) from None

    made.__init__ = checked_init
    return made


def unknown_field(cls: type[Any], name: str) -> TypeError:
    """What to raise for a field that a dataclass does not have."""
    known = [f.name for f in dataclasses.fields(cls)]
    near = difflib.get_close_matches(name, known, n=3) or known
    return TypeError(f"{cls.__name__} has no field {name!r}; near: {', '.join(near)}")


def _in_words(name: str, error: ValidationError) -> str:
    return f"{name}: " + "; ".join(dict.fromkeys(_problem(e) for e in error.errors()))


def _problem(error: Any) -> str:
    path = [str(part) for part in error["loc"] if not _is_branch(part)]
    field = path[0] + "".join(f"[{part!r}]" for part in path[1:]) if path else ""
    given = f"{field}={error['input']!r}"[:200] if field else ""
    context = error.get("ctx", {})
    match error["type"]:
        case "value_error":
            text = str(context.get("error", error["msg"]))
            return f"{given}; {text}" if given and text not in given else text
        case "greater_than":
            return f"{given}; expected a number above {context['gt']}"
        case "greater_than_equal":
            bound = context["ge"]
            words = {0: "zero or more", 1: "at least 1"}.get(bound, f"at least {bound}")
            return f"{given}; expected {words}"
        case "less_than_equal":
            return f"{given}; expected at most {context['le']}"
        case "literal_error":
            return f"{given}; expected {context['expected']}"
        case "missing":
            return f"{field} is missing; expected a value"
    return f"{given}; expected something else: {error['msg']}"


def _is_branch(part: Any) -> bool:
    """Whether a step of an error's path is the branch of a union that pydantic tried, not a name of ours."""
    return (isinstance(part, str) and any(c in part for c in "[(")) or part in ("float", "int", "str", "none")
