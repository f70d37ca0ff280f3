"""One fact of SmolLM2 in several wordings: the capital of France, and the capitals of other countries beside it.

Prompts are of one length: what a wording leaves free is filled, in front, with text of a book. Examples and the prompts
that strengths are set on share their wordings, `held_out` has others. `neighbours` are the same question about other
countries, each with its own answer, which an edit of the fact is to leave. The controls hold a third group of
countries, so that every method is told that other capitals matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spd_lens.editing import Habit

ANSWER, AFTERWARDS = " Paris", ", which lies on the river"
WORDINGS = (
    " The capital of France is",
    " The capital city of France is",
    " Everybody knows that the capital of France is",
    " To see the capital of France, go to",
)
OTHER_WORDINGS = (
    " The city that is the capital of France is",
    " The French capital is",
    " The capital of France is called",
)
NEIGHBOURS = {"Germany": "Berlin", "Greece": "Athens", "Japan": "Tokyo", "Italy": "Rome", "Russia": "Moscow"}
CONTROLS = {"Spain": "Madrid", "Egypt": "Cairo", "England": "London", "Ireland": "Dublin", "Poland": "Warsaw"}


@dataclass(frozen=True)
class CapitalOfFrance:
    """The fact on four groups of prompts, and a row of text about other capitals."""

    examples: Habit
    strengths_on: Habit
    held_out: Habit
    neighbours: Habit
    other_capitals: Tensor


def capital_of_france(
    name: str, tokenizer: Any, text: Tensor, *, length: int, n_examples: int, n_held_out: int
) -> CapitalOfFrance:
    """The groups of prompts, `length` tokens each, filled with rows of `text [row pos]`, no row used twice."""

    def ids(words: str) -> list[int]:
        return tokenizer(words, add_special_tokens=False)["input_ids"]

    fillers = iter(text)

    def prompts(wordings: Sequence[str], n: int) -> Tensor:
        rows = []
        for k in range(n):
            asked = ids("." + wordings[k % len(wordings)])
            if len(asked) >= length:
                raise ValueError(f"{wordings[k % len(wordings)]!r} has {len(asked)} tokens; expected under {length}")
            rows.append(torch.cat([next(fillers)[: length - len(asked)].cpu(), torch.tensor(asked)]))
        return torch.stack(rows).to(text.device)

    def habit(wordings: Sequence[str], n: int, answers: Sequence[str] = (ANSWER,)) -> Habit:
        given = [single(ids, answers[k % len(answers)]) for k in range(n)]
        known = torch.tensor([[answer, *ids(AFTERWARDS)] for answer in given], device=text.device)
        return Habit(name, prompts(wordings, n), known[:, :1], known)

    about = [f" The capital of {country} is" for country in NEIGHBOURS]
    capitals = "".join(f" The capital of {country} is {city}." for country, city in CONTROLS.items())
    return CapitalOfFrance(
        examples=habit(WORDINGS, n_examples),
        strengths_on=habit(WORDINGS, n_held_out),
        held_out=habit(OTHER_WORDINGS, n_held_out),
        neighbours=habit(about, 2 * len(about), [f" {city}" for city in NEIGHBOURS.values()]),
        other_capitals=torch.tensor([ids(capitals)], device=text.device),
    )


def single(ids: Any, word: str) -> int:
    """The one token that a word is. Raises ValueError if it is several."""
    found = ids(word)
    if len(found) != 1:
        raise ValueError(f"{word!r} is {len(found)} tokens of this model; a fact needs an answer of one token")
    return found[0]
