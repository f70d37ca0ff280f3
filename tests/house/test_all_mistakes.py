"""Hundreds of likely mistakes at all public entry points: none passes in silence, none is answered in Python's words.

The tables are in `tests/house/mistakes`. An answer is ours if it is a TypeError or ValueError that a `raise` of the
package made, and its text says what to do. `python -m tests.house.test_all_mistakes` prints the counts.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch

import tests.house.mistakes as tables
from spd_lens import Decomposition, TokenBatches, decompose, evaluate, harvest, train
from spd_lens.circuits import find_circuit
from spd_lens.evaluation import worst_case
from spd_lens.graphs import attribution_graph, dataset_graph
from spd_lens.patching import ablation_effects
from tests.house.mistakes.table import SITE, Mistake, T, Table, last, plain_model
from tests.small_models import tiny_transformer, tokens

MISTAKES: dict[str, Table] = {
    info.name: importlib.import_module(f"{tables.__name__}.{info.name}").TABLE
    for info in pkgutil.iter_modules(tables.__path__)
    if info.name != "table"
}

# What people have in their hands where tokens or batches are expected; some of it fits some of the functions below.
INPUTS: dict[str, Callable[[], Any]] = {
    "text": lambda: "a text", "nothing": lambda: None, "a number": lambda: 3, "other keys": lambda: {"labels": T},
    "splits": lambda: {"train": [T]}, "no batch": list, "no row": lambda: T[:0], "floats": T.float,
    "a mask": lambda: T > 3, "ids above": lambda: T + 40, "ids below": lambda: T - 50, "three axes": lambda: T[None],
    "a row": lambda: T[0], "a scalar": lambda: torch.tensor(3), "floats of numpy": lambda: T.numpy().astype(float),
    "texts of numpy": lambda: np.array([["a", "b"]]), "objects": lambda: np.array([[1, None]], dtype=object),
    "texts": lambda: ["a", "b"], "fractions": lambda: [[1.5, 2.0]], "ragged": lambda: [[1, 2], [3]],
    "a list of None": lambda: [None], "too long": lambda: tokens(2, length=13),
    "complex": lambda: T.to(torch.complex64), "a model": plain_model, "a set": lambda: {1, 2},
    "a function": lambda: last,
    "bytes": lambda: b"ab", "a path": lambda: Path("x"), "nested": lambda: [[[[1]]]], "used up": lambda: iter([]),
    "dicts of other keys": lambda: [{"labels": T}], "pairs of tensors": lambda: [(T, T)],
    "a None behind": lambda: [T, None],
    "NaN": lambda: torch.full((2, 12), float("nan")), "infinite": lambda: [[float("inf")]],
}  # fmt: skip
READERS: dict[str, Callable[[Decomposition, Any], Any]] = {
    "train": lambda d, x: train(d, x, steps=2, out_dir="run"),
    "evaluate": lambda d, x: evaluate(d, x, quick=True),
    "harvest": harvest,
    "dataset_graph": dataset_graph,
    "worst_case": lambda d, x: worst_case(d, x, steps=(1,)),
    "importance": lambda d, x: d.importance(x),
    "clean_pass": lambda d, x: d.clean_pass(x),
    "ablation_effects": lambda d, x: ablation_effects(d, x, last),
    "attribution_graph": attribution_graph,
    "find_circuit": lambda d, x: find_circuit(d, x, steps=1),
    "TokenBatches": lambda d, x: TokenBatches(x, 1),
}
# It has no model yet that could say so; whoever is given the batches does.
FITS = {("TokenBatches", name) for name in ("ids above", "ids below", "too long")}


def answer(mistake: Mistake, directory: Path) -> str:
    """`"ours"`, or what is wrong with the answer to a mistake."""
    decomposition = decompose(tiny_transformer(), {SITE: 4})
    before = os.getcwd()
    os.chdir(directory)
    try:
        mistake(decomposition, decomposition.model, directory)
    except (KeyError, OSError, TypeError, ValueError) as error:
        return judged(error)
    except Exception as error:  # whatever comes out is judged
        return f"unclear: {type(error).__name__}: {error}"
    finally:
        os.chdir(before)
    return "silent"


def judged(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = str(error)
    made_here = f"{os.sep}spd_lens{os.sep}" in where.filename and (where.line or "").startswith("raise")
    says_what = re.search(r"(?i)expected|give |choose|use |near|call |load |run |resume|\bit is\b|; ", text)
    if made_here and says_what and not isinstance(error, jaxtyping.TypeCheckError):
        return "ours"
    return f"unclear: {type(error).__name__}: {text} ({where.filename}:{where.lineno})"


def _all() -> dict[str, Mistake]:
    found = {f"{room}: {name}": mistake for room, table in MISTAKES.items() for name, mistake in table.items()}
    for reader, read in READERS.items():
        for name, make in INPUTS.items():
            if (reader, name) not in FITS:
                found[f"{reader} of {name}"] = lambda d, m, p, read=read, make=make: read(d, make())
    return found


@pytest.mark.parametrize("room", MISTAKES)
@pytest.mark.filterwarnings("ignore:Casting complex values to real:UserWarning")
def test_mistakes_are_named_in_words(room: str, without_type_checks: None, tmp_path: Path) -> None:
    wrong = {}
    for i, (name, mistake) in enumerate(MISTAKES[room].items()):
        (directory := tmp_path / str(i)).mkdir()
        if (said := answer(mistake, directory)) != "ours":
            wrong[name] = said
    assert not wrong, "\n".join(f"{name}: {said}" for name, said in wrong.items())


@pytest.mark.parametrize("reader", READERS)
def test_wrong_data_is_named_in_words(reader: str, without_type_checks: None, tmp_path: Path) -> None:
    wrong = {}
    for i, (name, make) in enumerate(INPUTS.items()):
        (directory := tmp_path / str(i)).mkdir()
        said = answer(lambda d, m, p, make=make: READERS[reader](d, make()), directory)
        if said != ("silent" if (reader, name) in FITS else "ours"):
            wrong[name] = said
    assert not wrong, "\n".join(f"{name}: {said}" for name, said in wrong.items())


def test_there_are_hundreds() -> None:
    assert len(_all()) > 700


if __name__ == "__main__":
    torch.set_num_threads(1)
    jaxtyping.config.update("jaxtyping_disable", True)
    counts: Counter[str] = Counter()
    for title, one in _all().items():
        with tempfile.TemporaryDirectory() as folder:
            verdict = answer(one, Path(folder))
        counts[verdict.partition(":")[0]] += 1
        if verdict != "ours":
            print(f"{title}: {verdict}")
    print(f"{counts.total()} mistakes: {dict(counts)}")
