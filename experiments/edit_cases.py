"""Cases of `edits.py`: a model with a decomposition, a habit to remove, and text that is to stay as it is.

The tiny language model: semicolons and archaic pronouns of its whaling book, words of the speeches that it writes
itself, and one fact, "Ahab" after "Captain". The induction model: the token that comes again. SmolLM2-135M with some of
its blocks decomposed: semicolons and pronouns of the same book, and one fact, the capital of France. A pass of SmolLM2
costs some 150 times one of the tiny model, so its cases are smaller (`SMALL`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.edit_facts import capital_of_france
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


@dataclass(frozen=True)
class Size:
    """How much of everything a case has.

    - `context`: tokens of a prompt; `held_out`: prompts; `controls`, `control_tokens`: rows of other text.
    - `generated`: tokens after each prompt. `n_measured`: subcomponents and cells that are tried one by one.
    - `layers`: blocks behind which directions are looked for; None: all.
    """

    context: int = 24
    held_out: int = 24
    controls: int = 6
    control_tokens: int = 63
    generated: int = 6
    n_measured: int = 24
    layers: tuple[int, ...] | None = None


FULL = Size()
SMALL = Size(context=12, held_out=8, controls=3, control_tokens=32, generated=4, n_measured=16, layers=(4, 12, 20, 28))
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
# "Ahab" is several tokens of SmolLM2: its fact is another.
CASES = (
    *("semicolon", "pronouns", "speeches", "fact", "induction"),
    *(SMOLLM2 + "semicolon", SMOLLM2 + "pronouns", SMOLLM2 + "fact"),
)


@dataclass
class Case:
    """A model, a habit to find (`examples`), to set strengths on and to measure, and text that is to stay as it is.

    `neighbours`: where it is a fact, other facts of its kind.
    """

    name: str
    decomposition: Decomposition
    examples: Habit
    strengths_on: Habit
    held_out: Habit
    controls: Tensor
    unrelated: Tensor
    plain: Any
    size: Size = FULL
    neighbours: Habit | None = None

    @cached_property
    def count_before(self) -> int:
        """The habit's tokens in what the unedited model writes after the held-out prompts."""
        return self.counted(self.decomposition.host.forward)

    def counted(self, forward: Callable[[Tensor], Tensor]) -> int:
        """How many of the tokens that are generated after the held-out prompts are the habit."""
        generated = generate(forward, self.held_out.prompts, self.size.generated, seed=0)
        return int(self.held_out.is_answer(generated).sum())

    @cached_property
    def clean(self) -> Callable[[Tensor], Tensor]:
        """The unedited model, which runs the same tokens once."""
        known: dict[tuple[Any, ...], Tensor] = {}

        def forward(tokens: Tensor) -> Tensor:
            key = (*tokens.shape, *tokens.flatten().tolist())
            if key not in known:
                known[key] = self.decomposition.host.forward(tokens)
            return known[key]

        return forward


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
        found = [
            Habit.in_text("speeches", rows, ids, context=FULL.context, first=bos) for rows in (text[:100], text[100:])
        ]
        few = min(FULL.held_out, len(found[0]) // 3)
        examples, strengths_on = found[0][few:][:100], found[0][:few]
        held_out = found[1][: FULL.held_out]
        yield Case("speeches", decomposition, examples, strengths_on, held_out, controls, unrelated, plain)


def smollm2_cases(names: Sequence[str], saved: Path, device: str, host: Any) -> Iterator[Case]:
    """The book's cases on SmolLM2-135M, by a saved decomposition of some of its blocks: `smollm2_28_semicolon`."""
    model: Any = load_smollm2(device, host=host)
    decomposition = Decomposition.from_pretrained(saved, model)
    wanted = [name.removeprefix(SMOLLM2) for name in names if name.startswith(SMOLLM2)]
    blocks = sorted({int(site.split(".")[1]) for site in decomposition})
    prefix, plain = f"{SMOLLM2}{'-'.join(map(str, blocks))}_", plain_copy(decomposition, cut_below=None)
    in_book = [name for name in wanted if name != "fact"]
    yield from book_cases(decomposition, plain, in_book, first=None, prefix=prefix, size=SMALL)
    if "fact" in wanted:
        yield _capital_case(decomposition, plain, prefix + "fact")


def _capital_case(decomposition: Decomposition, plain: Any, name: str) -> Case:
    """The capital of France: held out are other wordings; other capitals are among the controls."""
    controls, unrelated = other_text(decomposition, first=None, size=SMALL)
    fact = capital_of_france(
        name, decomposition.host.tokenizer(), _book(decomposition, "train"),
        length=SMALL.context, n_examples=100, n_held_out=SMALL.held_out,
    )  # fmt: skip
    controls = torch.cat([controls, fact.other_capitals[:, : controls.shape[1]]])
    return Case(
        name, decomposition, fact.examples, fact.strengths_on, fact.held_out, controls, unrelated, plain, SMALL,
        fact.neighbours,
    )  # fmt: skip


def other_text(decomposition: Decomposition, *, first: int | None, size: Size = FULL) -> tuple[Tensor, Tensor]:
    """Text of one kind for finding, of another part of the book for what it costs."""
    train, held = _book(decomposition, "train"), _book(decomposition, "held_out")
    start, n, length = _n_searched(train), size.controls, size.control_tokens
    return _begun(train[start : start + n, :length], first), _begun(held[100 : 100 + n, :length], first)


def _n_searched(train: Tensor) -> int:
    """Rows of the book that examples are taken from."""
    return min(2000, len(train) - FULL.controls)


def book_cases(
    decomposition: Decomposition,
    plain: Any,
    names: Sequence[str],
    *,
    first: int | None,
    prefix: str = "",
    size: Size = FULL,
) -> Iterator[Case]:
    """Habits of the whaling book; `first` is put before every prompt."""
    tokenizer = decomposition.host.tokenizer()
    train, held = _book(decomposition, "train"), _book(decomposition, "held_out")
    controls, unrelated = other_text(decomposition, first=first, size=size)
    for name in names:
        ids, found = single_tokens(tokenizer, IN_BOOK[name]), []
        for rows in (train[: _n_searched(train)], held):
            habit = Habit.in_text(prefix + name, rows, ids, context=size.context, first=first)
            if name == "fact":
                captain = torch.tensor(single_tokens(tokenizer, ["Captain"])).to(rows)
                habit = habit[torch.isin(habit.prompts[:, -1], captain).nonzero().flatten()]
            found.append(habit)
        # A tenth of the book has few of some words: strengths are set on what the examples leave of the other part.
        few = min(size.held_out, len(found[0]) // 3)
        others, examples = found[0][:few], found[0][few:][:100]
        held_out = found[1][: size.held_out]
        yield Case(prefix + name, decomposition, examples, others, held_out, controls, unrelated, plain, size)


def induction_case() -> Case:
    """The token that comes again in a repeated sequence."""
    decomposition = load_induction_decomposition()
    found = []
    for seed in (11, 12):
        tokens = RepeatedSequences(400, seed=seed).batch(0)
        at, length = predictable(tokens), FULL.context - 4
        rows = at[:, length - 1].nonzero().flatten()
        answers = tokens[rows, length][:, None]
        found.append(Habit("induction", tokens[rows, :length], answers, tokens[rows, length : length + 6]))
    # What is to stay: sequences before anything repeats. Little can be known there; KL is to the model's own guesses.
    other = RepeatedSequences(FULL.controls * 2, seed=13, min_period=15, max_period=15).batch(0)[:, :15]
    return Case(
        "induction",
        decomposition,
        found[0][:100],
        found[0][100 : 100 + FULL.held_out],
        found[1][: FULL.held_out],
        other[: FULL.controls],
        other[FULL.controls :],
        plain_copy(decomposition, cut_below=None),
    )
