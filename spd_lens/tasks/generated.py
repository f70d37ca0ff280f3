"""Tasks: pairs of clean and corrupted prompts that differ in what the answer is, and the metric that tells them apart.

Every task is generated from a tokenizer and a seed. Words that stand for a variable (names, nouns, years) have to
be single tokens: of the library's own lists those that are not are left out, of yours they are an error that names
the word. All prompts of a task have the same number of tokens, and an answer is the one token that continues the
prompt, as the tokenizer writes it there. No padding, so position p means the same in every row.

| function | clean prompt | answers | wrong | corrupted |
|---|---|---|---|---|
| `indirect_object_task` | When A and B went to the shop, B gave a ring to | A | B | A gave a ring to |
| `greater_than_task` | The war lasted from the year 1732 to the year 17 | later years | earlier years | from 1701 |
| `docstring_task` | def f(self, a, b, c): ... :param a ... :param b ... :param | c | d | d for c in the signature |
| `agreement_task` | The keys near the cabinet | are, were, have | is, was, has | The key |
| `induction_task` | r s t u ... r s | t | x | x for t at its first place |
| `pair_task` | your own texts | | | |

Whether a model can do a task at all has to be looked at (`task.correct(logits)`); no task here promises it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from spd_lens.support.given import given_list, given_seed, given_whole, shown
from spd_lens.tasks.task import NormalizedMetric, Task, continuation, encode, pair_task, spelled, usable_words
from spd_lens.tasks.words import ARGUMENTS, FILLERS, NAMES, NOUNS, OBJECTS, PLACES, SPANS, VERBS

__all__ = [
    "NormalizedMetric",
    "Task",
    "agreement_task",
    "docstring_task",
    "greater_than_task",
    "indirect_object_task",
    "induction_task",
    "pair_task",
]


NOUN_PAIRS = "pairs (singular, plural)"


class _Draw:
    """Reproducible choices."""

    def __init__(self, n: int, seed: int) -> None:
        given_whole("n", n, least=1, of=" prompt")
        self.generator = torch.Generator().manual_seed(given_seed(seed))

    def some(self, options: Sequence[Any], k: int) -> list[Any]:
        """`k` different options in random order."""
        return [options[i] for i in torch.randperm(len(options), generator=self.generator)[:k].tolist()]

    def one(self, options: Sequence[Any]) -> Any:
        return self.some(options, 1)[0]


def indirect_object_task(
    tokenizer: Any,
    n: int = 16,
    *,
    seed: int = 0,
    names: Sequence[str] | None = None,
    places: Sequence[str] | None = None,
    objects: Sequence[str] | None = None,
    prepend_bos: bool = False,
) -> Task:
    """Indirect object identification: "When Mary and John went to the shop, John gave a ring to" -> " Mary".

    Corrupted: the giver is the other one, so the answer is too. Wrong: the giver's name. Names come in random order.
    """
    draw = _Draw(n, seed)
    pool = usable_words(tokenizer, "names", names, NAMES, 2)
    where = usable_words(tokenizer, "places", places, PLACES, 1)
    what = usable_words(tokenizer, "objects", objects, OBJECTS, 1)
    clean, corrupted, answers, wrong = [], [], [], []
    for _ in range(n):
        receiver, giver = draw.some(pool, 2)
        first, second = draw.some((receiver, giver), 2)
        begin, end = f"When {first} and {second} went to the {draw.one(where)},", f"gave a {draw.one(what)} to"
        clean.append(f"{begin} {giver} {end}")
        corrupted.append(f"{begin} {receiver} {end}")
        answers.append(f" {receiver}")
        wrong.append(f" {giver}")
    return pair_task(tokenizer, clean, corrupted, answers, wrong, prepend_bos=prepend_bos, name="indirect object")


def greater_than_task(
    tokenizer: Any,
    n: int = 16,
    *,
    seed: int = 0,
    nouns: Sequence[str] | None = None,
    century: int = 17,
    prepend_bos: bool = False,
) -> Task:
    """Greater-than: "The war lasted from the year 1732 to the year 17" -> a later year.

    Corrupted: the first year ends in 01, after which every year is later. Where the tokenizer writes the last two
    digits as one token, answers are the two-digit tokens above, wrong ones those below; where it writes single digits,
    the same with the tens digit (equal tens digits are neither).
    """
    draw = _Draw(n, seed)
    century = given_whole("century", century, least=1, most=99)
    things = usable_words(tokenizer, "nouns", nouns, SPANS, 1)

    def prompt(thing: str, year: str) -> str:
        return f"The {thing} lasted from the year {century}{year} to the year {century}"

    example = prompt(things[0], "32")
    width = next((w for w in (2, 1) if continuation(tokenizer, example, "45"[:w]) is not None), None)
    if width is None:
        pieces = spelled(tokenizer, encode(tokenizer, f"{century}45"))
        raise ValueError(
            f"this tokenizer writes {century}45 as {pieces}: the digits after {century} are neither one token nor two; "
            "try another century"
        )
    low_length = len(encode(tokenizer, prompt(things[0], "01")))
    endings = [f"{i:0{width}d}" for i in range(10**width)]
    ends = [e for e in endings if continuation(tokenizer, example, e) is not None]
    years = [f"{y:02d}" for y in range(12, 89)]
    # A year that the tokenizer writes in its own way (as one token, say) would make a prompt of another length.
    years = [y for y in years if len(encode(tokenizer, prompt(things[0], y))) == low_length]
    years = [y for y in years if ends[0] < y[:width] < ends[-1]]
    if not years:
        raise ValueError(f"no year of the century {century} is written with as many tokens as {century}01; try another")
    chosen = [(draw.one(things), draw.one(years)) for _ in range(n)]
    return pair_task(
        tokenizer,
        [prompt(thing, year) for thing, year in chosen],
        [prompt(thing, "01") for thing, _ in chosen],
        [[e for e in ends if e > year[:width]] for _, year in chosen],
        [[e for e in ends if e < year[:width]] for _, year in chosen],
        prepend_bos=prepend_bos,
        name="greater than",
    )


def docstring_task(
    tokenizer: Any,
    n: int = 16,
    *,
    seed: int = 0,
    arguments: Sequence[str] | None = None,
    fillers: Sequence[str] | None = None,
    prepend_bos: bool = False,
) -> Task:
    """Docstring completion: after `:param a: ...`, `:param b: ...`, the third `:param` names the third argument.

    Corrupted: another name in its place in the signature, which is the wrong answer. The other words mean nothing.
    """
    draw = _Draw(n, seed)
    pool = usable_words(tokenizer, "arguments", arguments, ARGUMENTS, 5)
    words = usable_words(tokenizer, "fillers", fillers, FILLERS, 8)
    clean, corrupted, answers, wrong = [], [], [], []
    for _ in range(n):
        first, second, third, last, other = draw.some(pool, 5)
        w = draw.some(words, 8)
        listed = f"    :param {first}: {w[4]} {w[5]}\n    :param {second}: {w[6]} {w[7]}\n    :param"
        body = f'    """The {w[1]} {w[2]} {w[3]}\n\n{listed}'
        for texts, name in ((clean, third), (corrupted, other)):
            texts.append(f"def {w[0]}(self, {first}, {second}, {name}, {last}):\n{body}")
        answers.append(f" {third}")
        wrong.append(f" {other}")
    return pair_task(tokenizer, clean, corrupted, answers, wrong, prepend_bos=prepend_bos, name="docstring")


def agreement_task(
    tokenizer: Any,
    n: int = 16,
    *,
    seed: int = 0,
    nouns: Sequence[tuple[str, str]] | None = None,
    prepend_bos: bool = False,
) -> Task:
    """Subject-verb agreement: "The keys near the cabinet" -> are, were, have.

    Corrupted: the subject in the other number, wrong: the verbs of that number. The noun in between has a number of its
    own. Clean subjects are singular and plural in turn. `nouns` are pairs (singular, plural).
    """
    draw = _Draw(n, seed)
    flat = None if nouns is None else [word for pair in given_list("nouns", nouns, NOUN_PAIRS) for word in pair]
    if nouns is not None and any(isinstance(pair, str) or len(pair) != 2 for pair in nouns):
        raise TypeError(f"nouns={shown(nouns)}; expected a list of {NOUN_PAIRS}")
    words = set(usable_words(tokenizer, "nouns", flat, [word for pair in NOUNS for word in pair], 4))
    pairs = list(dict.fromkeys(tuple(pair) for pair in nouns or NOUNS if words.issuperset(pair)))
    alike = [pair for pair in pairs if pair[0] == pair[1]]
    if alike:
        raise ValueError(f"nouns: {alike[0]} is the same in both numbers, so no prompt says which; choose another noun")
    forms = set(usable_words(tokenizer, "verbs", None, [word for pair in VERBS for word in pair], 2))
    verbs = [pair for pair in VERBS if forms.issuperset(pair)]
    if len(pairs) < 2 or not verbs:
        raise ValueError(
            f"the task needs two nouns whose singular and plural are both single tokens, here {len(pairs)}; give "
            "nouns=[(singular, plural), ...]"
        )
    clean, corrupted, answers, wrong = [], [], [], []
    for i in range(n):
        subject, other = draw.some(pairs, 2)
        middle, number = draw.one(other), i % 2
        clean.append(f"The {subject[number]} near the {middle}")
        corrupted.append(f"The {subject[1 - number]} near the {middle}")
        answers.append([f" {verb[number]}" for verb in verbs])
        wrong.append([f" {verb[1 - number]}" for verb in verbs])
    return pair_task(tokenizer, clean, corrupted, answers, wrong, prepend_bos=prepend_bos, name="agreement")


def induction_task(
    vocabulary: int | Sequence[int] | Callable[..., Any],
    n: int = 16,
    *,
    length: int = 12,
    seed: int = 0,
    bos: int | None = None,
) -> Task:
    """Induction on random tokens: `[bos] r1 ... rL r1 ... rk` -> `r(k+1)`, with `k = L // 2` and all r different.

    Corrupted: another token stands in the place of `r(k+1)`; it is the wrong answer. `vocabulary` is a number of
    tokens, the token ids to draw from, or a tokenizer (all its ids but the special ones).

    >>> task = induction_task(range(10, 90), 1, length=6, bos=0)
    >>> row = task.clean[0].tolist()
    >>> row[1:4] == row[7:10], row[4] == int(task.answers), task.corrupted[0, 4] == task.wrong[0, 0]
    (True, True, tensor(True))
    """
    draw = _Draw(n, seed)
    length = given_whole("length", length, least=2)
    bos = None if bos is None else given_whole("bos", bos, least=0)
    if isinstance(vocabulary, int):
        allowed: list[int] = list(range(vocabulary))
    elif isinstance(vocabulary, Sequence) and not isinstance(vocabulary, str):
        allowed = [given_whole("a token of vocabulary", token, least=0) for token in vocabulary]
    elif not callable(vocabulary):
        raise TypeError(f"vocabulary={shown(vocabulary)}; expected a number of tokens, token ids, or a tokenizer")
    else:
        special = set(getattr(vocabulary, "all_special_ids", ()))
        allowed = [token for token in range(len(vocabulary)) if token not in special]  # pyright: ignore
    allowed = [token for token in dict.fromkeys(allowed) if token != bos]
    if len(allowed) <= length:
        raise ValueError(f"length={length}, and {len(allowed)} tokens to draw from; expected more tokens")
    lead, k = [] if bos is None else [bos], length // 2
    clean, corrupted = [], []
    for _ in range(n):
        *sequence, other = draw.some(allowed, length + 1)
        changed = [*sequence[:k], other, *sequence[k + 1 :]]
        clean.append([*lead, *sequence, *sequence[:k]])
        corrupted.append([*lead, *changed, *sequence[:k]])
    rows, others = torch.tensor(clean), torch.tensor(corrupted)
    place = len(lead) + k
    at = torch.full((n,), rows.shape[1] - 1)
    return Task("induction", rows, others, rows[:, place : place + 1], others[:, place : place + 1], at)
