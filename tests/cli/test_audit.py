"""`spd-lens audit` from the shell: status 0 for an honest report, 1 for every other kind, no traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from spd_lens.audit import AuditReport
from spd_lens.cli import app
from spd_lens.components import Components
from spd_lens.core import Unit
from spd_lens.models import CREDIT_ATTRIBUTES, load_credit
from tests.audit.conftest import forged


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report and the page of the first declined applicant, as the command writes them."""
    out = tmp_path_factory.mktemp("audit")
    result = CliRunner().invoke(app, ["audit", "--out", str(out), "--json"])
    told = json.loads(result.output)
    assert (result.exit_code, told["verified"], told["decision"]) == (0, True, "declined")
    assert told["held"] == told["claims"] > 0
    Path(told["report"]).rename(out / "report.json")
    Path(told["page"]).rename(out / "report.html")
    (out / "applicant").write_text(Path(told["report"]).stem.split("-")[1])
    return out


def verified(path: Path, *arguments: Any, status: int = 1) -> str:
    """What `--verify` says; its exit status is as expected and no traceback is shown."""
    result = CliRunner().invoke(app, ["audit", "--verify", str(path), *map(str, arguments)])
    told = result.output + result.stderr
    assert result.exit_code == status, told
    assert "Traceback" not in told
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return told


def test_an_honest_report_its_page_and_its_applicant_end_with_status_0(folder: Path) -> None:
    command = [sys.executable, "-m", "spd_lens", "audit", "--verify", str(folder / "report.json"), "--page",
               str(folder / "report.html"), "--applicant", (folder / "applicant").read_text()]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.startswith("Verified: ")
    assert len(ended.stdout.splitlines()) == 1


def test_a_number_that_was_edited_and_signed_anew_ends_with_status_1(folder: Path, tmp_path: Path) -> None:
    def edit(values: dict[str, Any]) -> None:
        values["decision"]["worst_margin"] -= 0.5

    path = forged(AuditReport.load(folder / "report.json"), edit, tmp_path)
    told = verified(path, "--page", folder / "report.html")
    assert "decision.worst_margin: the report says" in told
    assert "the page is not the one that this report gives" in told


def other_model(values: dict[str, Any]) -> None:
    values["digests"]["sites"]["unembed.W_U"] = "0" * 64


def other_decomposition(values: dict[str, Any]) -> None:
    values["digests"]["decomposition"] = "0" * 64


def named_otherwise(values: dict[str, Any]) -> None:
    values["model_name"] = "gpt2\x1b[2J"


def fewer_draws(values: dict[str, Any]) -> None:
    (values["reasons_for"] or values["reasons_against"])[0]["controls"]["draws"] = 1


def no_controls(values: dict[str, Any]) -> None:
    values["settings"]["control_cases"] = []


def weak(values: dict[str, Any]) -> None:
    values["adversary"]["steps"] = 1


def deleted(values: dict[str, Any]) -> None:
    del (values["reasons_for"] or values["reasons_against"])[0]["controls"]


def greedy(values: dict[str, Any]) -> None:
    values["settings"]["n_draws"] = 10**9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_model, "another model: unembed.W_U is not the matrix"),
        (other_decomposition, "another decomposition of the model than the report's"),
        (named_otherwise, r"the report is about the model 'gpt2\x1b[2J'; this command has the credit model alone"),
        (fewer_draws, "1 control draws of 64"),
        (no_controls, "fewer than two control cases"),
        (weak, "its adversary has 1 steps of 0.1 from 2 starts; the standard asks for 20"),
        (deleted, "controls: Field required"),
        (greedy, "settings.n_draws: Input should be less than or equal to 4096"),
    ],
)
def test_every_other_report_ends_with_status_1(
    folder: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    told = verified(forged(AuditReport.load(folder / "report.json"), change, tmp_path))
    assert message in told
    assert "\x1b" not in told


def by_hand(text: str) -> str:
    return text.replace('"margin":', '"margin" :').replace("declined", "denied")


def newer(text: str) -> str:
    return text.replace('"format_version": 3', '"format_version": 4')


def older(text: str) -> str:
    return text.replace('"format_version": 3', '"format_version": 2')


def cut(text: str) -> str:
    return text[: len(text) // 2]


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (by_hand, "is damaged or was changed by hand"),
        (newer, "format version 4; this spd_lens reads up to 3. Upgrade spd_lens"),
        (older, "format version 2, of an spd_lens before its first release"),
        (cut, "is damaged"),
        (lambda text: "[" * 200_000, "is damaged: it is nested too deeply"),
        (lambda text: '{"a": ' * 200_000, "is damaged"),
        (lambda text: text.replace("{", '{"title": "Approved", ', 1), "it holds the key 'title' twice"),
        (lambda text: text + " " * 2_000_000, "a report has at most 2,000,000, so this is none"),
        (lambda text: "", "is damaged"),
    ],
)  # fmt: skip
def test_damaged_huge_and_malicious_files_end_with_status_1(
    folder: Path, tmp_path: Path, write: Callable[[str], str], message: str
) -> None:
    text = (folder / "report.json").read_text()
    assert '"format_version": 3' in text
    path = tmp_path / "report.json"
    path.write_text(write(text))
    assert message in verified(path)


def test_what_is_no_file_no_applicant_or_another_one_ends_with_status_1(folder: Path, tmp_path: Path) -> None:
    report, own = folder / "report.json", int((folder / "applicant").read_text())
    assert "does not exist" in verified(tmp_path / "nothing.json")
    assert "is no file" in verified(tmp_path)
    assert "another input than the report's" in verified(report, "--applicant", own + 1)
    none = verified(report, "--applicant", 5_000, status=2)
    assert "applicant 5000; there are 300 held-out applicants, 0..299" in none
    result = CliRunner().invoke(app, ["audit", "--page", str(folder / "report.html"), "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "--page and --seed are for --verify" in result.output + result.stderr


def test_another_applicants_title_ends_with_status_1(folder: Path, tmp_path: Path) -> None:
    path = forged(
        AuditReport.load(folder / "report.json"), lambda v: v.update(title="Applicant 3: why declined?"), tmp_path
    )
    assert "whom its title does not name" in verified(path)


def test_components_of_a_file_are_the_reasons_and_are_needed_to_verify(folder: Path, tmp_path: Path) -> None:
    decomposition = load_credit(decomposed=True)
    everything = tuple((name, c) for name, w in decomposition.items() for c in range(w.n_subcomponents))
    at = CREDIT_ATTRIBUTES.index
    units = [
        Unit(everything, (at("checking account"), at("savings")), "money at hand"),
        Unit(everything, (at("residence"), at("property"), at("housing")), "home"),
    ]
    file = Components.of(decomposition, units).save(tmp_path / "components.json")
    result = CliRunner().invoke(app, ["audit", "--components", str(file), "--out", str(tmp_path), "--json"])
    told = json.loads(result.output)
    assert (result.exit_code, told["verified"]) == (0, True)
    report = AuditReport.load(told["report"])
    assert {own.component for own in [*report.reasons, *report.withheld]} <= {"money at hand", "home"}
    assert "Verified: " in verified(told["report"], "--components", file, "--page", told["page"], status=0)
    assert "its reasons are components: give the ones that it was made with" in verified(told["report"])
    others = Components.load(file, decomposition).rename({"home": "being young"}).save(tmp_path / "others.json")
    assert "other components, or other names of them" in verified(told["report"], "--components", others)
    file.write_text(file.read_text().replace('"positions": [', '"positions": [ 1,', 1))
    assert "is damaged or was changed by hand" in verified(told["report"], "--components", file)
