"""The credit model and its data: what ships is what was reported, and applicants are read as they were given."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from spd_lens.evaluation import worst_case
from spd_lens.models import (
    CREDIT_ATTRIBUTES,
    CREDIT_DIRECTORY,
    CREDIT_PROTECTED,
    CREDIT_WORDS,
    credit_tokens,
    credit_vocabulary,
    decline_margin,
    load_credit,
    load_credit_applicants,
    load_recipe,
)

RESULTS = Path(__file__).parents[2] / "experiments" / "results" / "credit"
SPLITS = ("train", "validation", "held_out")


def test_the_parts_are_disjoint_cover_the_table_and_have_the_same_share_of_bad_risks() -> None:
    parts = [load_credit_applicants(split) for split in SPLITS]
    assert sorted(n for part in parts for n in part.numbers) == list(range(1_000))
    assert [len(part) for part in parts] == [600, 100, 300]
    assert [round(float(part.labels.float().mean()), 6) for part in parts] == [0.3, 0.3, 0.3]


def test_tokens_say_what_the_table_says() -> None:
    # Read anew, without the code under test.
    text = gzip.decompress((CREDIT_DIRECTORY / "german_credit.csv.gz").read_bytes()).decode()
    table = list(csv.reader(io.StringIO(text)))[1:]
    part = load_credit_applicants("held_out")
    vocabulary = credit_vocabulary()
    for i in range(0, 300, 37):
        row = table[part.numbers[i]]
        says = [vocabulary[t] for t in part.tokens[i].tolist()]
        assert says[-1] == "decision?"
        assert int(part.labels[i]) == (row[-1] == "bad")
        months = int(row[1])
        for name, value, said in zip(CREDIT_ATTRIBUTES, row, says, strict=False):
            if name not in ("duration", "amount", "age"):
                assert said == f"{name}: {' '.join(value.split())}"
        assert says[1] == "duration: " + next(
            words
            for end, words in [
                (6, "up to 6 months"), (12, "7 to 12 months"), (18, "13 to 18 months"), (24, "19 to 24 months"),
                (36, "25 to 36 months"), (999, "over 36 months"),
            ]
            if months <= end
        )  # fmt: skip


def test_rows_are_the_ucis_and_no_column_is_sorted() -> None:
    """In the table of one package the column of personal status and sex is sorted, so it says nothing about anybody."""
    text = gzip.decompress((CREDIT_DIRECTORY / "german_credit.csv.gz").read_bytes()).decode()
    table = list(csv.DictReader(io.StringIO(text)))
    first = [(row["personal_status_and_sex"], row["age_in_years"], row["credit_amount"]) for row in table[:4]]
    # german.data of the UCI repository begins with A93 67 1169, A92 22 5951, A93 49 2096, A93 45 7882.
    assert first == [
        ("male : single", "67", "1169"), ("female : divorced/separated/married", "22", "5951"),
        ("male : single", "49", "2096"), ("male : single", "45", "7882"),
    ]  # fmt: skip
    for name in table[0]:
        values = [row[name] for row in table]
        assert 1 + sum(a != b for a, b in itertools.pairwise(values)) > 50, name


def test_every_token_belongs_to_one_attribute_and_every_attribute_has_words() -> None:
    names = [text.split(": ")[0] for text in credit_vocabulary()[:-1]]
    assert list(dict.fromkeys(names)) == list(CREDIT_ATTRIBUTES)
    assert set(CREDIT_WORDS) == set(CREDIT_ATTRIBUTES)
    assert set(CREDIT_PROTECTED.values()) <= set(CREDIT_ATTRIBUTES)


def applicant() -> dict[str, Any]:
    return dict(load_credit_applicants("held_out").rows[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"duration": "ages"}, "duration is 'ages', a value outside the vocabulary; near: "),
        ({"duration": -3}, "duration is -3; expected a whole number of months, at least 1"),
        ({"housing": "owns"}, "housing is 'owns', a value outside the vocabulary; near: "),
        ({"salary": 10}, "no attribute 'salary'; near: "),
        ({"housing": "<script>alert(1)</script>"}, "outside the vocabulary"),
        ({"purpose": "x" * 10_000}, "outside the vocabulary"),
    ],
)
def test_an_applicant_outside_the_vocabulary_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", "\\(").replace(")", "\\)")) as caught:
        credit_tokens({**applicant(), **change})
    assert len(str(caught.value)) < 1_000


def test_a_missing_attribute_and_what_is_no_applicant_are_refused() -> None:
    lacking = applicant()
    del lacking["age"]
    with pytest.raises(ValueError, match="an applicant without age; expected all 20 attributes"):
        credit_tokens(lacking)
    with pytest.raises(TypeError, match="an applicant is a str; expected a dict"):
        credit_tokens(["nobody"])
    with pytest.raises(ValueError, match="split is 'test'; expected 'train', 'validation' or 'held_out'"):
        load_credit_applicants("test")


def test_the_shipped_model_reaches_what_its_recipe_says() -> None:
    model: Any = load_credit()
    part = load_credit_applicants("held_out")
    margin = decline_margin(model, part.tokens)
    reported = load_recipe(CREDIT_DIRECTORY)["held_out"]
    right = ((margin > 0).long() == part.labels).float().mean()
    assert float(right) == pytest.approx(reported["credit model"]["accuracy"], abs=0.004)
    bad, good = margin[part.labels == 1], margin[part.labels == 0]
    assert float((bad[:, None] > good).float().mean()) == pytest.approx(reported["credit model"]["auc"], abs=1e-3)
    # It is as good as the models that people use for this, within the noise of 300 applicants.
    assert reported["credit model"]["auc"] > reported["logistic regression"]["auc"] - 0.03


@pytest.mark.parametrize("seed", [0, 1])
def test_the_shipped_decompositions_are_those_that_were_reported(seed: int) -> None:
    decomposition = load_credit(decomposed=True, seed=seed)
    assert len(decomposition) == 9
    report = json.loads((RESULTS / f"decomposition-{seed}.json").read_text())["report"]
    tokens = load_credit_applicants("held_out").tokens
    reached = worst_case(decomposition, [tokens], steps=(20,), starts=1).divergence[20]
    assert reached < 1.5 * float(report["adversarial"]["20"]) < 0.25 * report["divergence"]["all off"]


def test_a_seed_that_does_not_ship_is_refused() -> None:
    with pytest.raises(ValueError, match="seed=7; expected 0 or 1, the seeds whose decompositions ship"):
        load_credit(decomposed=True, seed=7)


def test_only_the_decision_has_an_output() -> None:
    model: Any = load_credit()
    logits = model(load_credit_applicants("held_out").tokens[:3])
    assert logits.shape == (3, 21, 2)
    assert not bool(logits[:, :-1].any())
    assert bool(logits[:, -1].any())
