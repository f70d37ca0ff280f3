"""Committed specialists, of the tiny model and of a block of SmolLM2, have every number they promise, at equal size."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from experiments import specialists

FOLDER = Path(__file__).parents[2] / "experiments" / "results" / "specialists"
# Other files of SmolLM2 hold a run that was cut off.
RESULTS = [*sorted(FOLDER.glob("tiny_lm_*.json")), FOLDER / "smollm2_block_28_speeches.json"]
NUMBERS = ("parameters", "milliseconds", "loss_in", "loss_out", "bytes", "flops")
RIVALS = {"magnitude", "Wanda", "truncated SVD", "whitened SVD", "random subcomponents"}


def test_there_are_results() -> None:
    assert len(RESULTS) > 0


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_method_stands_at_every_size_with_what_was_measured(path: Path) -> None:
    result = json.loads(path.read_text(encoding="utf-8"))
    rows = [row for row in result["rows"] if not row["distilled"]]
    for row in rows:
        assert all(math.isfinite(row[key]) for key in NUMBERS), row["method"]
        assert row["case"] == result["case"]
    shares = {row["share"] for row in rows} - {1.0}
    assert len(shares) >= 2
    whole = next(row["parameters"] for row in rows if row["method"] == "whole")
    for share in shares:
        sizes = {row["method"]: row["parameters"] for row in rows if row["share"] == share}
        assert {*RIVALS, "subcomponents"} <= set(sizes)
        saved = whole - max(sizes.values())
        assert saved > 0
        assert max(sizes.values()) - min(sizes.values()) < 0.05 * saved
    assert {"torch", "transformer_lens"} <= set(result["versions"])
    assert isinstance(result["seed"], int)


def test_the_command_prints_what_it_promises_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = "--rows 4 --held-out 2 --measured-on 2 --timed-rows 1 --repeats 1 --distil 0 --shares 0.5 --cases book"
    monkeypatch.setattr(sys, "argv", ["specialists.py", "--json", *few.split(), "--methods", "whitened SVD", "Wanda"])
    specialists.main()
    rows = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in rows] == ["whole", "whitened SVD", "Wanda"]
    for row in rows:
        assert all(math.isfinite(row[key]) for key in NUMBERS)


def test_the_table_of_smollm2_is_the_results() -> None:
    page = (Path(__file__).parents[2] / "docs" / "specialists.md").read_text(encoding="utf-8")
    table = page.split("| method | 1/2: in, out | 1/4: in, out |")[1].split("\n\n")[0]
    rows = json.loads((FOLDER / "smollm2_block_28_speeches.json").read_text(encoding="utf-8"))["rows"]
    losses = {(r["method"], r["share"]): (r["loss_in"], r["loss_out"]) for r in rows}
    seen = 0
    for line in table.strip().splitlines()[1:]:
        name, *cells = [cell.strip() for cell in line.replace("*", "").strip("|").split("|")]
        method = "whole" if name == "whole block" else name.removesuffix(" (zeros, not smaller)")
        for share, cell in zip((1.0,) if method == "whole" else (0.5, 0.25), cells, strict=False):
            found = tuple(float(number) for number in cell.split(", "))
            assert found == tuple(round(loss, 3) for loss in losses[method, share]), (name, share)
            seen += 1
    assert seen == len(losses)
