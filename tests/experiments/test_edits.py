"""The results of the edits that are in the repository have every number that they promise."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from experiments import edits

RESULTS = sorted((Path(__file__).parents[2] / "experiments" / "results" / "edits").glob("*_*.json"))
COUNTS = ("generation_count_before", "generation_count_after", "parameters_changed")
NUMBERS = ("effect", "kl_near", "kl_elsewhere", *COUNTS)


def test_there_are_results() -> None:
    assert len(RESULTS) > 0


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_result_says_what_was_measured_and_with_what(path: Path) -> None:
    result = json.loads(path.read_text(encoding="utf-8"))
    case, _, asked = path.stem.rpartition("_")
    assert case == result["case"]
    assert result["n_examples"] <= int(asked)
    assert {"components", "difference of means", "LEACE", "full fine-tuning", "random subcomponents"} <= set(
        result["methods"]
    )
    for name, numbers in result["methods"].items():
        assert all(isinstance(numbers[key], (int, float)) for key in NUMBERS), name
        assert numbers["kl_elsewhere"] >= 0
        assert ("neighbours_after" in numbers) == ("smollm2" in case and "fact" in case)
    assert {"torch", "transformer_lens", "peft", "concept-erasure"} <= set(result["versions"])
    assert result["command"].startswith("python experiments/edits.py")
    assert isinstance(result["seed"], int)


def test_the_command_prints_what_it_promises_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["edits.py", "--json", "--cases", "induction", "--examples", "4"])
    edits.main()
    (result,) = json.loads(capsys.readouterr().out)
    assert (result["case"], result["n_examples"]) == ("induction", 4)
    assert len(result["methods"]) == 10
    for name, numbers in result["methods"].items():
        assert all(isinstance(numbers[key], (int, float)) for key in NUMBERS), name
