"""What no command understands is told in the form that was asked for: text, or with `--json` one object."""

from __future__ import annotations

import inspect
import json
import re
import sys
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

import spd_lens
from spd_lens.cli import app, run

COMMANDS: dict[str, Any] = {str(command.name): command.callback for command in app.registered_commands}


def _ended(*words: str) -> tuple[str, str]:
    """Standard output and error of a line that ends with status 2."""
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 2, (words, result.output, result.exception)
    return result.stdout, result.stderr


def _told(*words: str) -> str:
    """The error of a line with `--json`: one object on stderr, of the same form as all errors."""
    output, errors = _ended(*words, "--json")
    found = json.loads(errors)
    assert output == ""
    assert set(found) == {"error", "kind", "status"}
    assert found["status"] == 2
    return found["error"]


def _parameters(name: str) -> list[tuple[Any, Any]]:
    """Every parameter of a command as it stands on a line, and its type in Python."""
    program: Any = get_command(app)
    types = inspect.signature(COMMANDS[name]).parameters
    return [(p, types[p.name].annotation) for p in program.commands[name].params if p.name in types]


@pytest.mark.parametrize("name", COMMANDS)
def test_options_that_no_command_has_and_values_of_a_wrong_kind_are_told_as_json(name: str) -> None:
    assert _told(name, "--sted").startswith("No such option: --sted")
    parameters = _parameters(name)
    assert parameters
    for parameter, annotation in parameters:
        if parameter.required and parameter.param_type_name == "argument":
            assert _told(name).startswith("Missing argument")
        if "int" in str(annotation) or "float" in str(annotation):
            flag = parameter.opts[0]
            assert f"'{flag}'" in _told(name, flag, "many"), flag
            output, errors = _ended(name, flag, "many")
            assert output == ""
            assert f"Error: Invalid value for '{flag}'" in errors


def test_lines_without_a_command_are_told_as_json_and_a_command_by_its_near_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "'evaluate'" in _told("evalate")
    assert _told() != ""
    assert "Error: No such command 'evalate'" in _ended("evalate")[1]
    # As the installed program is called.
    monkeypatch.setattr(sys, "argv", ["spd-lens", "train", "--json"])
    with pytest.raises(SystemExit, match=r"^2$"):
        run()
    assert json.loads(capsys.readouterr().err)["kind"] == "MissingParameter"


def test_statuses_of_commands_are_kept_with_json() -> None:
    done = CliRunner().invoke(app, ["demo", "--config", "--json"])
    assert (done.exit_code, set(json.loads(done.stdout))) == (0, {"config"})
    failed = CliRunner().invoke(app, ["browse", "none", "--json"])
    assert failed.exit_code == 1
    assert json.loads(failed.stderr)["status"] == 1


def test_the_version_is_printed_without_a_command() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"{spd_lens.__version__}\n")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("plan config.yaml --batch-size 8", "--batch-size is for --model .* --set data.batch_size="),
        ("plan config.yaml --C 4", "--C is for --model .* --set decompose.sites="),
        ("plan config.yaml --streams", "--streams is for jobs by block"),
        ("plan config.yaml --out jobs", "--out is for jobs by block"),
        ("plan config.yaml --utilisation 0.3", "--utilisation is for --device"),
        ("plan --model gpt2 --sites blocks.0.* --set train.steps=3", "--set changes a field of CONFIG"),
        ("plan config.yaml --split blocks --out jobs --gpus 2", "--gpus is not for --split"),
        ("plan config.yaml --split blocks --out jobs --job a=1", "--job is for --submit"),
        ("sweep config.yaml --over train.lr=1 --out s --job a=1", "--job is for --submit"),
        ("sweep config.yaml --over train.lr=1 --out s --submit local --processes 1", "--processes is for runs here"),
        ("demo --config --steps 300", "--steps is for a run"),
        ("compare a b --all --data data.yaml", "--data says what is alive"),
        ("export a --out b --private", "--private is for --hub"),
        ("audit --verify a.json --out b", "--out is for a new report"),
    ],
)
def test_an_option_that_nothing_would_come_of_is_refused_also_with_its_default(line: str, expected: str) -> None:
    found = _told(*line.split())
    assert re.search(expected, found), found
