"""The settings study on a few steps: what its rules mean, that it continues, and its table and picture."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from experiments import settings_study
from experiments.runs import RESULTS
from experiments.settings_figure import save_basins
from experiments.settings_study import (
    KEPT,
    START,
    How,
    Variant,
    by_start,
    choice,
    one_per_run,
    read,
    rows_of,
    run_toy,
    sparsest,
    table,
)
from spd_lens.toys import TMS


def test_a_rule_says_what_the_number_means() -> None:
    def of(rule: str, penalty: str, adversary: bool = False) -> Any:
        return Variant(rule, penalty, adversary).configuration("tms_5-2", 0.05, 7, steps=100)

    plain, share, tolerance = of("absolute", "power"), of("share", "smooth"), of("tolerance", "falling", True)
    assert (plain.minimality, plain.relative_reconstruction, plain.tolerance) == (0.05, False, None)
    assert (share.minimality, share.relative_reconstruction, share.penalty) == (0.05, True, "smooth_l0")
    assert (tolerance.minimality, tolerance.tolerance, tolerance.relative_reconstruction) == (START, 0.05, True)
    assert [term.name for term in share.reconstructions] == ["stochastic_all", "stochastic_layerwise"]
    assert [term.name for term in tolerance.reconstructions] == ["pgd_all", "stochastic_layerwise"]
    assert (tolerance.p_start, tolerance.p_end) == (2.0, 0.5)
    assert {c.steps for c in (plain, share, tolerance)} == {100}
    assert Variant("share", "smooth", False).configuration("tms_5-2", 0.05, 7, steps=10**6).steps == 4000


def test_what_was_run_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = SimpleNamespace(models=[TMS(5, 2, seed=i) for i in range(2)])
    monkeypatch.setattr(settings_study, "accepted_targets", lambda *args: targets)
    path, variant = tmp_path / "runs.jsonl", Variant("tolerance", "smooth", True)

    def run(values: list[float], seeds: int) -> list[dict[str, Any]]:
        run_toy("tms_5-2", variant, values, seeds, path=path, work=tmp_path / "work", how=How("cpu", 3))
        return read(path)

    first = run([0.01], 1)
    assert run([0.01], 1) == first
    more = run([0.01, 0.1], 2)
    assert more[0] == first[0]
    assert [(r["value"], r["run"]) for r in more] == [(0.01, 0), (0.01, 1), (0.1, 0), (0.1, 1)]
    assert all(r["steps"] == 3 and r["adversary"] and r["coefficient"] > 0 and not r["success"] for r in more)
    run_toy("tms_5-2", variant, [0.01], 1, path=path, work=tmp_path / "work", how=How("cpu", 3), starts=(START, 0.03))
    assert [(r["value"], r["run"], r["start"]) for r in read(path)[4:]] == [(0.01, 0, 0.03)]
    assert read(path)[4]["coefficient"] == pytest.approx(0.1 * first[0]["coefficient"], rel=0.2)


RECORDS = [
    {
        "rule": "share", "penalty": "smooth", "adversary": False, "start": START,
        "toy": toy, "value": value, "run": run, "success": success,
    }
    for toy, value, run, success in (
        ("tms_40-10", 0.0316, 0, True), ("tms_5-2", 0.0316, 0, True), ("tms_5-2", 0.032, 1, False),
        ("tms_5-2", 0.1, 0, True),
    )
]  # fmt: skip


def test_a_table_counts_half_decades_however_they_were_written() -> None:
    rows = rows_of(RECORDS)
    assert list(rows) == [("share", "smooth", False, "tms_5-2"), ("share", "smooth", False, "tms_40-10")]
    assert rows["share", "smooth", False, "tms_5-2"] == {0.032: [True, False], 0.1: [True]}
    lines = table(RECORDS).splitlines()
    assert lines[0].split() == ["share", "toy", "0.032", "0.1"]
    assert lines[2].split()[-2:] == ["1/2", "1/1"]
    assert lines[3].split()[-2:] == ["1/1", "-"]


def test_of_several_starts_the_sparsest_counts_that_kept_to_the_tolerance() -> None:
    def line(start: float, l0: float, spent: float, *, success: bool) -> dict[str, Any]:
        return {**RECORDS[1], "start": start, "l0": l0, "spent": spent, "success": success}

    dense, sparse = line(0.3, 2.0, 0.03, success=False), line(0.03, 1.5, 0.04, success=True)
    beyond = line(0.1, 1.0, 1.01 * KEPT * 0.0316, success=False)
    assert sparsest([dense, sparse, beyond]) == sparse
    assert sparsest([beyond, {**beyond, "spent": 1.0, "l0": 0.5}]) == beyond
    others = [RECORDS[0], *RECORDS[2:]]
    assert one_per_run([*others, dense, sparse]) == [*others, sparse]
    lines = table([RECORDS[0], RECORDS[2], dense, sparse]).splitlines()
    assert [row.split()[-1] for row in lines[2:]] == ["1/2", "1/1", "1/1", "0/2"]
    assert lines[4].startswith("smooth from 0.03")
    agreed = [{**dense, "run": 5, "success": True}, {**sparse, "run": 5}]
    wrong = [{**dense, "run": 6, "success": True}, {**sparse, "run": 6, "success": False}]
    none = [{**dense, "run": 7}, {**sparse, "run": 7, "success": False}]
    assert choice([RECORDS[0], dense, sparse, *agreed, *wrong, *none]) == (
        "runs with several starts: 4; some start succeeds in 3, the sparsest in 2 of these; starts disagree in 2, the "
        "sparsest is right in 1 of these"
    )


PAGE = Path(__file__).parents[2] / "docs" / "settings.md"
NAMES = {
    "TMS 5-2": "tms_5-2", "TMS 5-2+ID": "tms_5-2_id", "TMS 40-10": "tms_40-10", "residual MLP, 1 block": "resid_mlp_1",
}  # fmt: skip
RULES = {
    "share": ("share", "smooth", False), "share, adversary": ("share", "smooth", True),
    "tolerance": ("tolerance", "smooth", False), "tolerance, adversary": ("tolerance", "smooth", True),
    "sparsest of two starts": ("tolerance", "wide", False), "from .3": ("tolerance", "wide from 0.3", False),
    "from .03": ("tolerance", "wide from 0.03", False),
}  # fmt: skip


def test_the_page_says_what_the_runs_say() -> None:
    records = read(RESULTS / "settings" / "runs.jsonl")
    rows = rows_of([*one_per_run(records), *by_start(records)])
    values: list[float] = []
    rule, shown = "", 0
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| rule"):
            values = [float(cell) for cell in cells[2:]]
        elif line.startswith("|") and len(cells) > 2 and cells[1] in NAMES and values:
            rule = cells[0] or rule
            toy = NAMES[cells[1]]
            # A model that was trained from one start has no row by start.
            counts = rows.get((*RULES[rule], toy)) or rows["tolerance", "wide", False, toy]
            expected = [str(sum(counts[v])) if v in counts else "-" for v in values]
            assert [cell.strip("*") for cell in cells[2:]] == expected, line
            assert all(len(counts[v]) == 3 for v in values if v in counts), line
            shown += 1
        elif not line.startswith("|"):
            values = []
    assert shown == len(
        re.findall(r"^\|[^|\n]*\| (?:TMS|residual)[^|\n]* \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    )
    # All kept to their tolerance, so that L0 alone decided.
    assert all(r["spent"] <= KEPT * r["value"] for r in records if r["penalty"] == "wide")


def test_lines_from_before_there_was_an_adversary_had_none(tmp_path: Path) -> None:
    old = {key: value for key, value in RECORDS[0].items() if key not in ("adversary", "start")}
    (tmp_path / "runs.jsonl").write_text(json.dumps(old) + "\n", encoding="utf-8")
    assert read(tmp_path / "runs.jsonl") == [RECORDS[0]]
    assert save_basins(tmp_path / "basins.png", rows_of(RECORDS)).stat().st_size > 10_000
