"""The results of the edits that are in the repository have every number that they promise."""

from __future__ import annotations

import json
import re
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


CASES = ("semicolon", "pronouns", "speeches", "fact")
SUBCOMPONENTS = {"subcomponents, scaled": "components", "subcomponents, trained writes": "components, trained writes"}


@pytest.mark.parametrize("n", [10, 100])
def test_the_tables_of_the_docs_are_the_results(n: int) -> None:
    page = (Path(__file__).parents[2] / "docs" / "editing.md").read_text(encoding="utf-8")
    table = page.split("| method | semicolon | pronouns | speeches | fact |")[1 if n == 10 else 2].split("\n\n")[0]
    results = {case: json.loads((RESULTS[0].parent / f"{case}_{n}.json").read_text())["methods"] for case in CASES}
    lines = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[1:]]
    assert {SUBCOMPONENTS.get(name, name) for name, *_ in lines} == set(results["fact"])
    for name, *cells in lines:
        for case, cell in zip(CASES, cells, strict=True):
            numbers = results[case][SUBCOMPONENTS.get(name, name)]
            reached = numbers["effect_where_set"] >= 0.8 or name == "random subcomponents"
            assert (cell != "none") == reached, (name, case)
            if not reached:
                continue
            effect, kl = cell.split(" %, ")
            assert int(effect) == round(100 * numbers["effect"]), (name, case)
            assert abs(float(kl) - numbers["kl_elsewhere"]) <= 0.51 * 10.0 ** -len(kl.partition(".")[2]), (name, case)


def test_the_table_of_smollm2_is_the_results() -> None:
    page = (Path(__file__).parents[2] / "docs" / "editing.md").read_text(encoding="utf-8")
    header = "| method | semicolon, 4: effect, KL | semicolon, 10 |"
    table = page.split(header)[1].split("\n\n")[0]
    runs = ("semicolon_4", "semicolon_10", "fact_4", "fact_10")
    results = [json.loads((RESULTS[0].parent / f"smollm2_28_{run}.json").read_text())["methods"] for run in runs]
    lines = [[cell.strip(" ") for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]
    assert {SUBCOMPONENTS.get(name, name) for name, *_ in lines} == set(results[0])
    for name, *cells in lines:
        for run, methods, cell in zip(runs, results, cells, strict=True):
            numbers = methods[SUBCOMPONENTS.get(name, name)]
            found = re.fullmatch(r"(-?\d+) %(?: \(set (-?\d+) %\))?, ([\d.]+)(?: \(([\d.]+)\))?", cell.replace("*", ""))
            assert found is not None, cell
            effect, reached, kl, neighbours = found.groups()
            assert int(effect) == round(100 * numbers["effect"]), (name, run)
            missed = numbers["effect_where_set"] < 0.8 and name != "random subcomponents"
            assert (reached is not None) == missed, (name, run)
            if reached is not None:
                assert int(reached) == round(100 * numbers["effect_where_set"]), (name, run)
            assert abs(float(kl) - numbers["kl_elsewhere"]) <= 0.51 * 10.0 ** -len(kl.partition(".")[2]), (name, run)
            assert (neighbours is not None) == run.startswith("fact")
            if neighbours is not None:
                assert abs(float(neighbours) - numbers["neighbours_after"]) < 5.1e-4, (name, run)
