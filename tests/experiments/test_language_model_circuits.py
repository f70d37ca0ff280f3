"""Prompts of the tiny language model's circuits: clean and corrupted differ where they should, fresh ones are fresh."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from experiments.language_model_circuits import TASKS, WINDOW, accuracy
from spd_lens.models import load_tiny_lm
from tests.conftest import needs_hooked


@pytest.fixture(scope="module")
def model() -> Any:
    return load_tiny_lm()


@pytest.mark.parametrize("name", list(TASKS))
def test_prompts_differ_at_one_token_and_fresh_ones_are_others(model: Any, name: str) -> None:
    task, fresh = (TASKS[name](model.tokenizer, f) for f in (False, True))
    for one in (task, fresh):
        assert ((one.clean != one.corrupted).sum(1) == 1).all()
        assert (one.at == one.clean.shape[1] - 1).all()
    assert not {tuple(row) for row in task.clean.tolist()} & {tuple(row) for row in fresh.clean.tolist()}


def test_a_quotation_is_open_at_the_end_of_a_window(model: Any) -> None:
    tokenizer, task = model.tokenizer, TASKS["quotes"](model.tokenizer, False)
    for clean, corrupted in zip(task.clean[:20], task.corrupted[:20], strict=True):
        assert len(clean) == WINDOW + 1
        assert tokenizer.decode(clean[1:]).count('"') == 1
        assert '"' not in tokenizer.decode(corrupted[1:])


@needs_hooked
def test_the_model_agrees_in_number_and_knows_that_a_quotation_is_open(model: Any) -> None:
    for name, least in (("agreement", 0.8), ("quotes", 0.1)):
        found = accuracy(model, TASKS[name](model.tokenizer, True))
        assert found["right"] > least > found["right_when_corrupted"]
        assert found["clean_above_corrupted"] == 1.0
    assert torch.is_grad_enabled()
