"""What a run returns is short to look at, in a terminal and in a notebook."""

from __future__ import annotations

from pathlib import Path

from spd_lens import TrainConfig, TrainResult


def a_long_run() -> TrainResult:
    log = [{"step": i, "loss": 1 / (i + 1), "L0": 3.0, "L0/<b>W</b>": 3.0} for i in range(500)]
    return TrainResult(5_000, TrainConfig(), log, Path("runs") / "<b>", interrupted=True)


def test_a_result_prints_in_a_few_lines() -> None:
    shown = repr(a_long_run())
    assert len(shown) < 300
    assert "5,000 of 5,000 steps, interrupted" in shown
    assert "loss 0.002" in shown


def test_a_result_in_a_notebook_escapes_names_and_leaves_sites_out() -> None:
    page = a_long_run()._repr_html_()
    assert "<b>" not in page
    assert "<td>loss</td><td>0.002</td>" in page


def test_a_run_without_a_log_prints_too() -> None:
    assert "0 log lines" in repr(TrainResult(1, TrainConfig(), [], Path("runs")))
