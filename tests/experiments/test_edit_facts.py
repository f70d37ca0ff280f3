"""The fact of SmolLM2: prompts of one length that end in the question, other wordings held out, answers that belong."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from experiments.edit_facts import CONTROLS, NEIGHBOURS, OTHER_WORDINGS, WORDINGS, capital_of_france, single

LENGTH = 14


class Words:
    """A tokenizer with one token a word, and for "Warsaw" two."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, Any]:
        assert not add_special_tokens
        found = re.findall(r" ?\w+|[.,]", text.replace("Warsaw", "War saw"))
        self.words += [word for word in dict.fromkeys(found) if word not in self.words]
        return {"input_ids": [self.words.index(word) for word in found]}

    def decode(self, ids: list[int]) -> str:
        return "".join(self.words[i] if i < 900 else " <text>" for i in ids)


def test_prompts_ask_for_one_fact_and_neighbours_for_their_own() -> None:
    words = Words()
    text = 900 + torch.arange(40 * LENGTH).view(40, LENGTH)
    fact = capital_of_france("fact", words, text, length=LENGTH, n_examples=9, n_held_out=5)
    groups = (fact.examples, fact.strengths_on, fact.held_out, fact.neighbours)
    assert [len(g) for g in groups] == [9, 5, 5, 10]
    for group, wordings in zip(groups[:3], (WORDINGS, WORDINGS, OTHER_WORDINGS), strict=True):
        for k, prompt in enumerate(group.prompts.tolist()):
            assert words.decode(prompt).endswith("." + wordings[k % len(wordings)])
        assert {words.decode(row) for row in group.answers.tolist()} == {" Paris"}
    assert not set(WORDINGS) & set(OTHER_WORDINGS)
    for prompt, answer in zip(fact.neighbours.prompts.tolist(), fact.neighbours.answers.tolist(), strict=True):
        asked = words.decode(prompt)
        (country,) = [c for c in NEIGHBOURS if c in asked]
        assert asked.endswith(f" The capital of {country} is")
        assert words.decode(answer) == f" {NEIGHBOURS[country]}"
    assert not {"France", *NEIGHBOURS} & set(CONTROLS)
    filled = [prompt[0] for group in groups for prompt in group.prompts.tolist()]
    assert len(set(filled)) == len(filled)  # no text stands before two prompts


def test_an_answer_of_two_tokens_and_a_wording_that_is_too_long_are_refused() -> None:
    words = Words()
    with pytest.raises(ValueError, match="' Warsaw' is 2 tokens"):
        single(lambda text: words(text, False)["input_ids"], " Warsaw")
    with pytest.raises(ValueError, match="tokens; expected under 6"):
        capital_of_france("fact", words, torch.zeros(9, 6, dtype=torch.long), length=6, n_examples=1, n_held_out=1)
