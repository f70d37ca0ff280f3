"""Arguments in words: what is taken, what is refused, and that the answer names argument, value and expectation."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spd_lens.support import (
    CannotWrite,
    given_flag,
    given_function,
    given_instance,
    given_list,
    given_number,
    given_one_of,
    given_seed,
    given_whole,
    made_directory,
)


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), torch.tensor(3)])
def test_whole_numbers_of_any_library_are_taken(value: Any) -> None:
    taken = given_whole("n", value, least=1, most=3)
    assert taken == 3
    assert type(taken) is int


@pytest.mark.parametrize("value", [True, 3.0, "3", None, [3], torch.tensor([3]), np.float32(3)])
def test_what_is_no_whole_number_is_a_type_error(value: Any) -> None:
    with pytest.raises(TypeError, match=r"n=.*; expected a whole number of steps"):
        given_whole("n", value, of=" of steps")


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: given_whole("n", 0, least=1, of=" step", or_none=True), "n=0; expected at least 1 step, or None"),
        (lambda: given_whole("n", 9, most=5), "n=9; expected at most 5"),
        (lambda: given_number("x", float("nan")), "x=nan; expected a number, and a finite one"),
        (lambda: given_number("x", 10**400), "x=.*; expected a number"),
        (lambda: given_number("x", 0, above=0, most=1), "x=0; expected a number above 0 and at most 1"),
        (lambda: given_number("x", -1.5, least=0), r"x=-1\.5; expected a number at least 0"),
        (lambda: given_seed(2**70), "seed=.*; expected at most"),
        (lambda: given_one_of("kind", "c", ["a", "b"]), "kind='c'; expected 'a' or 'b'"),
    ],
)
def test_what_is_out_of_range_is_a_value_error(call: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: given_number("x", "1e-3"), "x='1e-3'; expected a number"),
        (lambda: given_flag("quick", 1), "quick=1; expected True or False"),
        (lambda: given_list("names", "one", "words"), "names='one'; expected a list of words"),
        (lambda: given_list("names", {"one": 1}, "words"), "expected a list of words"),
        (lambda: given_function("metric", 3, "of the logits"), "metric is 3, a int; expected a function of the logits"),
        (lambda: given_function("metric", lambda a, b: a, "of the logits"), r"the arguments \(a, b\); expected"),
        (lambda: given_instance("path", Path, Path, "Path('x')"), "the class Path, not an object of it"),
        (lambda: given_instance("path", None, Path, "Path('x')"), r"path is None; expected a Path: Path\('x'\)"),
    ],
)
def test_what_is_of_another_kind_is_a_type_error(call: Any, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        call()


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="only Linux has a place where nobody may write")
def test_a_place_that_cannot_be_written_to_is_named() -> None:
    with pytest.raises(CannotWrite, match=r"/proc/nowhere/run cannot be written .*Choose another place") as caught:
        made_directory("/proc/nowhere/run")
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, OSError)
    assert caught.value.errno is not None
