"""Cases of `edits.py`: a model with a decomposition, a habit to take away, and text that is to stay as it is.

The tiny language model: semicolons and archaic pronouns of its whaling book, words of the speeches that it writes
itself, and one fact, "Ahab" after "Captain". The induction model: the token that comes again. SmolLM2-135M with some of
its blocks decomposed: semicolons and pronouns, on the same book.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spd_lens import Decomposition
from spd_lens.editing import Habit, generate
from spd_lens.models import (
    RepeatedSequences,
    load_induction_decomposition,
    load_moby_dick,
    load_smollm2,
    load_tiny_lm,
    load_tiny_lm_hf,
    predictable,
)
from spd_lens.specialists import plain_copy

CONTEXT, HELD_OUT, CONTROLS, GENERATED = 24, 24, 6, 6
# Openings of addresses to the Congress; the text is what the model itself goes on with.
SPEECHES = (
    " To the Congress of the United States : The report of the Secretary of the Treasury",
    " Fellow - citizens of the Senate and House of Representatives : I congratulate the country",
    " I recommend to the Congress that the appropriation for the Navy",
    " The relations of the United States with foreign governments continue to be",
)
SPEECH_WORDS = (
    *(
        "Congress",
        "government",
        "Government",
        "States",
        "Senate",
        "public",
        "Treasury",
        "Secretary",
        "nation",
        "country",
    ),
    *(
        "citizens",
        "people",
        "law",
        "laws",
        "peace",
        "war",
        "Department",
        "report",
        "United",
        "year",
        "foreign",
        "trade",
    ),
)
IN_BOOK = {
    "semicolon": (";",),
    "pronouns": ("thou", "thee", "thy", "ye", "Thou", "thine"),
    "fact": ("Ahab",),
}
SMOLLM2 = "smollm2_"
# "Ahab" is several tokens of SmolLM2.
CASES = ("semicolon", "pronouns", "speeches", "fact", "induction", SMOLLM2 + "semicolon", SMOLLM2 + "pronouns")


@dataclass
class Case:
    """A model, a habit to find (`examples`), to set strengths on and to measure, and text that is to stay as it is."""

    name: str
    decomposition: Decomposition
    examples: Habit
    strengths_on: Habit
    held_out: Habit
    controls: Tensor
    unrelated: Tensor
    plain: Any

    @cached_property
    def count_before(self) -> int:
        """The habit's tokens in what the unedited model writes after the held-out prompts."""
        return counted(self.decomposition.host.forward, self.held_out)


def counted(forward: Callable[[Tensor], Tensor], habit: Habit) -> int:
    """How many of the tokens that are generated after the prompts are the habit."""
    return int(habit.is_answer(generate(forward, habit.prompts, GENERATED, seed=0)).sum())


# -- cases -------------------------------------------------------------------------------------------------------------


def _book(decomposition: Decomposition, split: Any) -> Tensor:
    tokenizer = decomposition.host.tokenizer()
    ids = tokenizer(load_moby_dick(split), add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: len(ids) // 127 * 127], device=decomposition.device).view(-1, 127)


def _begun(rows: Tensor, first: int | None) -> Tensor:
    return rows if first is None else torch.cat([torch.full((len(rows), 1), first).to(rows), rows], 1)


def single_tokens(tokenizer: Any, words: Sequence[str]) -> list[int]:
    """The tokens that are one of these words, with or without a space before it."""
    wanted = set(words)
    return [i for i in range(len(tokenizer)) if tokenizer.decode([i]).strip() in wanted]


def tiny_lm_cases(names: Sequence[str]) -> Iterator[Case]:
    """The whaling book's semicolons and archaic pronouns, the speeches, and one fact: the captain's name."""
    decomposition = load_tiny_lm(decomposed=True)
    tokenizer = decomposition.host.tokenizer()
    bos, plain = int(tokenizer.bos_token_id), load_tiny_lm_hf()
    yield from book_cases(decomposition, plain, [name for name in names if name in IN_BOOK], first=bos)
    if "speeches" in names:
        controls, unrelated = other_text(decomposition, first=bos)
        start = torch.tensor([[bos, *tokenizer(s, add_special_tokens=False)["input_ids"]][:13] for s in SPEECHES])
        text = generate(decomposition.host.forward, start.repeat(36, 1), 40, seed=0)
        ids = single_tokens(tokenizer, SPEECH_WORDS)
        found = [Habit.in_text("speeches", rows, ids, context=CONTEXT, first=bos) for rows in (text[:100], text[100:])]
        few = min(HELD_OUT, len(found[0]) // 3)
        examples, strengths_on = found[0][few:][:100], found[0][:few]
        yield Case("speeches", decomposition, examples, strengths_on, found[1][:HELD_OUT], controls, unrelated, plain)


def smollm2_cases(names: Sequence[str], saved: Path, device: str, host: Any) -> Iterator[Case]:
    """The book's cases on SmolLM2-135M, by a saved decomposition of some of its blocks: `smollm2_28_semicolon`."""
    model: Any = load_smollm2(device, host=host)
    decomposition = Decomposition.from_pretrained(saved, model)
    wanted = [name.removeprefix(SMOLLM2) for name in names if name.startswith(SMOLLM2)]
    blocks = sorted({int(site.split(".")[1]) for site in decomposition})
    prefix = f"{SMOLLM2}{'-'.join(map(str, blocks))}_"
    yield from book_cases(decomposition, plain_copy(decomposition, cut_below=None), wanted, first=None, prefix=prefix)


def other_text(decomposition: Decomposition, *, first: int | None) -> tuple[Tensor, Tensor]:
    """Text of one kind for finding, of another part of the book for what it costs."""
    train, held = _book(decomposition, "train"), _book(decomposition, "held_out")
    start = _n_searched(train)
    return _begun(train[start : start + CONTROLS, :63], first), _begun(held[100 : 100 + CONTROLS, :63], first)


def _n_searched(train: Tensor) -> int:
    """Rows of the book that examples are taken from."""
    return min(2000, len(train) - CONTROLS)


def book_cases(
    decomposition: Decomposition, plain: Any, names: Sequence[str], *, first: int | None, prefix: str = ""
) -> Iterator[Case]:
    """Habits of the whaling book; `first` is put before every prompt."""
    tokenizer = decomposition.host.tokenizer()
    train, held = _book(decomposition, "train"), _book(decomposition, "held_out")
    controls, unrelated = other_text(decomposition, first=first)
    for name in names:
        ids, found = single_tokens(tokenizer, IN_BOOK[name]), []
        for rows in (train[: _n_searched(train)], held):
            habit = Habit.in_text(prefix + name, rows, ids, context=CONTEXT, first=first)
            if name == "fact":
                captain = torch.tensor(single_tokens(tokenizer, ["Captain"])).to(rows)
                habit = habit[torch.isin(habit.prompts[:, -1], captain).nonzero().flatten()]
            found.append(habit)
        # A tenth of the book has few of some words: strengths are set on what the examples leave of the other part.
        few = min(HELD_OUT, len(found[0]) // 3)
        others, examples = found[0][:few], found[0][few:][:100]
        held_out = found[1][:HELD_OUT]
        yield Case(prefix + name, decomposition, examples, others, held_out, controls, unrelated, plain)


def induction_case() -> Case:
    """The token that comes again in a repeated sequence."""
    decomposition = load_induction_decomposition()
    found = []
    for seed in (11, 12):
        tokens = RepeatedSequences(400, seed=seed).batch(0)
        at, length = predictable(tokens), CONTEXT - 4
        rows = at[:, length - 1].nonzero().flatten()
        answers = tokens[rows, length][:, None]
        found.append(Habit("induction", tokens[rows, :length], answers, tokens[rows, length : length + 6]))
    # What is to stay: sequences before anything repeats. Little can be known there; KL is to the model's own guesses.
    other = RepeatedSequences(CONTROLS * 2, seed=13, min_period=15, max_period=15).batch(0)[:, :15]
    return Case(
        "induction",
        decomposition,
        found[0][:100],
        found[0][100 : 100 + HELD_OUT],
        found[1][:HELD_OUT],
        other[:CONTROLS],
        other[CONTROLS:],
        plain_copy(decomposition, cut_below=None),
    )
