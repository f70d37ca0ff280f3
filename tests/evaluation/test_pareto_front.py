"""Many runs in one picture (E4)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from spd_lens.evaluation import EvaluationReport, Pareto, pareto
from tests.evaluation.test_report import report


def _run(l0: float, stochastic: float, **changes: Any) -> EvaluationReport:
    sites = {"s": dataclasses.replace(report().sites["<b>"], l0={0.0: l0, 0.01: l0, 0.1: l0, 0.5: l0})}
    return report(sites=sites, divergence={"stochastic": stochastic, "all off": 1.0}, **changes)


def _pareto() -> Pareto:
    runs = [_run(4.0, 0.05), _run(1.0, 0.2, adversarial={20: 2.0})]
    return pareto({"SPD": runs, "singular vectors $x$": [_run(8.0, 0.3, adversarial={}, cross_entropy={})]})


def test_points_hold_what_the_reports_say() -> None:
    first, second = _pareto().points["SPD"]
    assert (first.l0, first.stochastic, first.adversarial, first.adversary_steps) == (4.0, 0.05, 0.12, 20)
    assert first.extra_ce == pytest.approx(0.2)
    assert (first.holds, second.holds) == (True, False)
    (other,) = _pareto().points["singular vectors $x$"]
    assert (other.adversarial, other.extra_ce, other.holds) == (None, None, None)
    assert json.loads(json.dumps(_pareto().to_json()))["points"]["SPD"][1]["adversarial"] == 2.0


def test_the_picture_shows_every_point_in_every_panel_it_was_measured_in(tmp_path: Path) -> None:
    figure = _pareto().figure()
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert titles == ["Random masks", "Adversary, 20 steps (ringed: verdict holds)", "Next-token loss, random masks"]
    lines = [{str(line.get_label()): len(line.get_xdata()) for line in axis.lines} for axis in figure.axes]  # pyright: ignore[reportArgumentType]
    assert lines[0]["SPD"] == lines[1]["SPD"] == lines[2]["SPD"] == 2
    assert lines[0][r"singular vectors \$x\$"] == 1
    assert r"singular vectors \$x\$" not in lines[1]
    assert _pareto().save(tmp_path / "new" / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert _pareto()._repr_png_()[:4] == b"\x89PNG"


def test_the_interactive_picture_has_the_same_points_and_escaped_names() -> None:
    figure = pareto({"<b>SPD</b>": [_run(4.0, 0.05), _run(1.0, 0.2)]}).plotly()
    assert list(figure.data[0].x) == [1.0, 4.0]
    assert list(figure.data[0].y) == [0.2, 0.05]
    assert figure.data[0].name == "&lt;b&gt;SPD&lt;/b&gt;"


def test_saved_reports_and_a_plain_list_are_taken(tmp_path: Path) -> None:
    (tmp_path / "run_a").mkdir()
    _run(4.0, 0.05).save(tmp_path / "run_a")
    found = pareto([tmp_path / "run_a", str(_run(1.0, 0.2).save(tmp_path / "b.json"))])
    assert [(p.label, p.l0) for p in found.points["SPD"]] == [("run_a", 4.0), ("b", 1.0)]
    assert "does not hold" in str(_pareto())
    assert repr(found) == "Pareto(SPD: 2 runs)"


@pytest.mark.usefixtures("without_type_checks")
def test_likely_mistakes_are_told() -> None:
    with pytest.raises(TypeError, match="expected a list of reports"):
        pareto(report())  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="a run is a int"):
        pareto([3])
    with pytest.raises(ValueError, match="no runs to draw"):
        pareto([])
    with pytest.raises(ValueError, match="different units"):
        pareto([report(), report(kind="mse")])
