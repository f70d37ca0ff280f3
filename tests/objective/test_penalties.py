"""Penalties and the losses that sum them, in python floats: S5, L1r, L3 with a reference count."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from spd_lens.objective import Power, SmoothL0, frequency_loss, minimality_loss, relative_faithfulness_loss
from spd_lens.training import TrainConfig
from tests.small_models import rand, randn


def smooth_l0(x: float, gamma: float) -> float:
    return x * x / (x * x + gamma * gamma)


@pytest.mark.parametrize("gamma", [1.0, 0.3, 0.01])
def test_s5_smooth_l0_is_a_soft_count_with_bounded_slope(gamma: float) -> None:
    g = torch.cat([torch.tensor([0.0, gamma, 1.0]), rand(40)]).double().requires_grad_()
    phi = SmoothL0(gamma)(g)
    assert phi.tolist() == pytest.approx([smooth_l0(x, gamma) for x in g.tolist()], rel=1e-12)
    (slope,) = torch.autograd.grad(phi.sum(), g)
    assert slope[0] == 0
    assert phi.tolist()[1] == pytest.approx(0.5)
    assert float(slope.max()) <= 0.65 / gamma
    by_hand = [2 * x * gamma**2 / (x * x + gamma * gamma) ** 2 for x in g.tolist()]
    assert slope.tolist() == pytest.approx(by_hand, rel=1e-12)


def test_s5_gamma_falls_linearly_over_its_share_of_the_run_and_is_then_held() -> None:
    config = TrainConfig(steps=101, penalty="smooth_l0", gamma_start=1.0, gamma_end=0.1, gamma_until=0.5)
    assert [config.gamma_at(step) for step in (0, 25, 50, 75, 100)] == pytest.approx([1.0, 0.55, 0.1, 0.1, 0.1])
    assert config.penalty_at(25) == SmoothL0(config.gamma_at(25))
    assert TrainConfig(p_start=2.0).penalty_at(7) == Power(2.0)


def test_l2_sums_whatever_penalty_it_is_given() -> None:
    upper = {"a": rand(2, 3, 4).double(), "b": rand(2, 3, 2, seed=1).double()}
    expected = sum(smooth_l0(x, 0.2) for g in upper.values() for x in g.flatten().tolist()) / 6
    assert float(minimality_loss(upper, penalty=SmoothL0(0.2))) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kept", [None, torch.tensor([[True, True, False], [False, True, True]])])
def test_l3_with_a_reference_count_does_not_depend_on_the_size_of_the_batch(kept: Tensor | None) -> None:
    g = rand(2, 3, 4).double()
    rows = g.flatten(0, 1)[torch.ones(6, dtype=torch.bool) if kept is None else kept.flatten()].tolist()
    expected = 0.0
    for column in zip(*rows, strict=True):
        mean = sum(smooth_l0(x, 0.2) for x in column) / len(rows)
        expected += mean * math.log2(1 + 1000 * mean)
    once = frequency_loss({"s": g}, penalty=SmoothL0(0.2), reference=1000, position_mask=kept)
    assert float(once) == pytest.approx(expected, rel=1e-12)
    twice_kept = None if kept is None else torch.cat([kept, kept])
    twice = {"s": torch.cat([g, g])}
    again = frequency_loss(twice, penalty=SmoothL0(0.2), reference=1000, position_mask=twice_kept)
    assert float(again) == pytest.approx(expected, rel=1e-12)
    without = frequency_loss(twice, penalty=SmoothL0(0.2), position_mask=twice_kept)
    assert float(without) > float(frequency_loss({"s": g}, penalty=SmoothL0(0.2), position_mask=kept))


def test_l1r_is_the_mean_of_relative_errors_and_finite_for_a_matrix_of_zeros() -> None:
    sites = [(randn(*shape, seed=i).double(), *(randn(*s, seed=9 + i).double() for s in ((shape[0], 3), (3, shape[1]))))
             for i, shape in enumerate([(4, 5), (2, 6)])]  # fmt: skip
    sites = [(100 * W, V, U) if i else (W, V, U) for i, (W, V, U) in enumerate(sites)]

    def error(W: Tensor, V: Tensor, U: Tensor) -> float:
        missing = [[w - sum(a * b for a, b in zip(v, u, strict=True)) for w, u in zip(row, U.T.tolist(), strict=True)]
                   for row, v in zip(W.tolist(), V.tolist(), strict=True)]  # fmt: skip
        return sum(x * x for row in missing for x in row)

    shares = [error(*site) / sum(x * x for x in site[0].flatten().tolist()) for site in sites]
    assert float(relative_faithfulness_loss(sites)) == pytest.approx(sum(shares) / 2, rel=1e-12)
    zero, V, U = torch.zeros(4, 5).double(), randn(4, 3).double(), randn(3, 5).double()
    found = relative_faithfulness_loss([(zero, V, U)])
    assert float(found) == pytest.approx(error(zero, V, U), rel=1e-12)  # no energy to divide by: as in reports
    with pytest.raises(ValueError, match="no site"):
        relative_faithfulness_loss([])
