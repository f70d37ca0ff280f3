"""Bootstrap intervals over texts (E10)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap

from spd_lens.evaluation import Tally, bootstrap_intervals, mean_per_position


def test_intervals_agree_with_scipys_percentile_bootstrap() -> None:
    values = np.random.default_rng(1).gamma(2.0, size=40)
    (found,) = bootstrap_intervals([(values.tolist(), [1.0] * 40)], resamples=4000)
    expected = bootstrap((values,), np.mean, method="percentile", n_resamples=4000, rng=2).confidence_interval
    assert found is not None
    width = expected.high - expected.low
    assert found == pytest.approx((expected.low, expected.high), abs=0.08 * width)


def test_long_texts_weigh_more() -> None:
    sums, counts = [10.0, 1.0], [10.0, 1.0]
    assert mean_per_position((sums, counts)) == 1.0
    assert mean_per_position(([10.0, 4.0], [10.0, 1.0])) == pytest.approx(14 / 11)


def test_the_same_texts_are_drawn_for_all_quantities() -> None:
    a = np.random.default_rng(0).random(12)
    first, shifted = bootstrap_intervals([(a.tolist(), [1.0] * 12), ((a + 5).tolist(), [1.0] * 12)])
    assert first is not None
    assert shifted == pytest.approx((first[0] + 5, first[1] + 5))


def test_one_text_has_no_interval_and_nothing_counted_has_no_mean() -> None:
    assert bootstrap_intervals([([1.0], [3.0]), ([1.0, 0.0], [3.0, 0.0])]) == [None, None]
    assert mean_per_position(([0.0, 0.0], [0.0, 0.0])) is None


def test_a_tally_keeps_sums_and_counts_of_every_text() -> None:
    tally = Tally()
    counted = torch.tensor([[True, True, False], [False, False, False]])
    tally.add("kl", "all off", torch.tensor([[1.0, 2.0, torch.nan], [torch.nan, 1.0, 1.0]]), counted)
    tally.add("kl", "all off", torch.tensor([4.0]), torch.tensor([True]))
    assert tally.texts() == {"kl": {"all off": ([3.0, 0.0, 4.0], [2, 0, 1])}}
