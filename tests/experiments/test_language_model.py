"""The language model's experiment: what its commands print, from few rows, and its recorded sweep."""

from __future__ import annotations

import pytest
import torch

from experiments.language_model import CONTEXT, measured, shipped_object, text_windows, training_windows
from experiments.language_model_results import aims_met, reports, table
from spd_lens.models import load_tiny_lm


def test_the_shipped_object_has_the_promised_numbers() -> None:
    report = measured(load_tiny_lm(decomposed=True), rows=4, ladder=(1, 2), starts=1, sample_rows=16)
    values = shipped_object(report)
    names = "l0 c_total alive kl_stochastic kl_all_off kl_pgd1 kl_pgd2 pgd_span kl_no_delta ce_recovered kl_deletion"
    assert set(names.split()) <= values.keys()
    assert values["c_total"] == 4736
    assert values["pgd_span"] == {"rows": 4, "positions": CONTEXT, "starts": 1}
    assert values["kl_no_delta"] < 0.01 < values["kl_stochastic"] < values["kl_all_off"] / 4
    assert values["l0"] < 0.05 * values["c_total"]


def test_the_recorded_sweep_has_six_coefficients_of_two_seeds_and_three_widths() -> None:
    found = reports()
    for seed in (0, 1):
        runs = [report for name, report in found.items() if name.endswith(f"-s{seed}")]
        assert len(runs) == 6
        by_l0 = sorted(runs, key=lambda report: report.l0)
        costs = [report.divergence["stochastic"] for report in by_l0]
        assert costs == sorted(costs, reverse=True), "a sparser run of one seed costs more"
    assert {found[f"c4e-4-s0{width}"].n_subcomponents for width in ("", "-C0.5", "-C2")} == {2368, 4736, 9472}
    assert "c4e-4-s0-C2" in table(found)
    # Too many are on in the second, the adversary does too much in the last two.
    assert [aims_met(found[name]) for name in ("c7e-4-s1", "c1e-4-s0", "c4e-4-s1", "c1e-4-s1")] == [5, 4, 4, 3]


def test_training_windows_hold_the_book_at_four_offsets_and_as_much_of_the_models_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = torch.zeros(0, CONTEXT, dtype=torch.long)
    asked: list[int] = []

    def no_text(n: int, device: str, seed: int) -> torch.Tensor:
        asked.append(n)
        return written

    monkeypatch.setattr("experiments.language_model.written_windows", no_text)
    windows, book = training_windows("cpu", 0), text_windows("train")
    assert asked == [len(windows)]
    assert (windows[:, 0] == book[0, 0]).all()
    text = book[:, 1:].flatten()
    assert torch.equal(windows[: len(book), 1:].flatten(), text)
    # The second cut begins a quarter of a window later.
    assert torch.equal(windows[len(book), 1:], text[CONTEXT // 4 :][: CONTEXT - 1])
    few = training_windows("cpu", 3, most=5)
    assert asked[-1] == len(few) == 5
    at = [int((windows == row).all(1).nonzero()[0]) for row in few]
    assert len(set(at)) == 5
    assert max(at) > len(book), "drawn from all cuts"
    assert not torch.equal(few, training_windows("cpu", 4, most=5))
