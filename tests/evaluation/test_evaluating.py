"""`evaluate`: every number against one computed by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spd_lens import Decomposition, EvaluationReport, TokenBatches, decompose, evaluate
from spd_lens.evaluation import SiteReport, failure_modes
from spd_lens.models import all_sums, load_modular_addition
from tests.conftest import needs_hooked
from tests.small_models import TiedAutoencoder, tiny_transformer, tokens

SITES: dict[str, int | None] = {"blocks.1.mlp.W_*": 20, "blocks.1.attn.W_V": 20}


def _decomposition(**settings: Any) -> Decomposition:
    return decompose(tiny_transformer(), SITES, gate="shared", gate_width=8, **settings)


def _kl(clean: Tensor, other: Tensor) -> float:
    p, q = clean.double().softmax(-1), other.double().softmax(-1)
    return float((p * (p / q).log()).sum(-1).mean())


@torch.no_grad()
def test_regimes_equal_hooked_passes_with_masks_made_by_hand() -> None:
    decomposition = _decomposition()
    model, rows = decomposition.model, tokens(6)
    report = evaluate(decomposition, TokenBatches(rows, 6), adversary_steps=())
    clean = model(rows)
    g = decomposition.importance(rows)
    by_hand = {
        "importance": g,
        "all on, no delta": {name: torch.ones_like(v) for name, v in g.items()},
        "rounded": {name: (v >= 0.5).float() for name, v in g.items()},
        "all off": {name: torch.zeros_like(v) for name, v in g.items()},
    }
    for regime, masks in by_hand.items():
        with model.hooks(fwd_hooks=decomposition.mask(masks, delta=0.0)):
            out = model(rows)
        assert report.divergence[regime] == pytest.approx(_kl(clean, out), rel=1e-3, abs=1e-6), regime
        ce = float(F.cross_entropy(out[:, :-1].flatten(0, 1), rows[:, 1:].flatten()))
        assert report.cross_entropy[regime] == pytest.approx(ce, rel=1e-4), regime
    ce = float(F.cross_entropy(clean[:, :-1].flatten(0, 1), rows[:, 1:].flatten()))
    assert report.cross_entropy["target"] == pytest.approx(ce, rel=1e-5)


@torch.no_grad()
def test_l0_alive_and_faithfulness_are_counts_and_ratios() -> None:
    decomposition = _decomposition()
    rows = tokens(8)
    report = evaluate(decomposition, TokenBatches(rows, 3), adversary_steps=())
    g = decomposition.importance(rows)
    for name, site in report.sites.items():
        for threshold, value in site.l0.items():
            assert value == pytest.approx(float((g[name] > threshold).sum(-1).float().mean()), rel=1e-5)
        assert site.alive == int((g[name].flatten(0, 1).amax(0) > 0.01).sum())
        w = decomposition[name]
        error = (w.target_weight - w.V @ w.U).norm() ** 2 / w.target_weight.norm() ** 2
        assert site.relative_faithfulness == pytest.approx(float(error), rel=1e-4)
    assert report.positions == rows.numel()


def test_numbers_do_not_depend_on_how_the_data_is_batched() -> None:
    decomposition = _decomposition()
    rows = tokens(6)
    a = evaluate(decomposition, TokenBatches(rows, 6), adversary_steps=())
    b = evaluate(decomposition, TokenBatches(rows, 4), adversary_steps=())
    for regime in ("importance", "all on, no delta", "rounded", "all off"):
        assert a.divergence[regime] == pytest.approx(b.divergence[regime], rel=1e-4)
        assert a.cross_entropy[regime] == pytest.approx(b.cross_entropy[regime], rel=1e-4)


def test_masked_positions_count_nowhere() -> None:
    decomposition = _decomposition()
    rows = tokens(4).clamp_min(1)
    rows[:, -4:] = 0
    other = rows.clone()
    kept = rows[:, :-4]
    rows_short = evaluate(decomposition, [kept], adversary_steps=())
    padded = evaluate(decomposition, TokenBatches(other, 4, exclude=[0]), adversary_steps=())
    assert padded.positions == kept.numel()
    assert padded.divergence["all off"] == pytest.approx(rows_short.divergence["all off"], rel=1e-4)
    assert padded.cross_entropy["target"] == pytest.approx(rows_short.cross_entropy["target"], rel=1e-4)


def test_the_adversary_finds_more_than_random_masks_and_more_with_a_larger_budget() -> None:
    decomposition = _decomposition()
    report = evaluate(decomposition, TokenBatches(tokens(6), 6), adversary_steps=(1, 20))
    assert report.adversarial[20] > report.adversarial[1]
    assert report.adversarial[20] > report.divergence["stochastic"]
    assert "PGD, 20 steps " in str(report)
    assert "first step 0.1" in str(report)
    assert "one source over 6 rows x 12 positions" in str(report)


def test_an_exact_decomposition_with_everything_important_is_perfect() -> None:
    decomposition = _decomposition(init="exact")
    with torch.no_grad():
        for weight in decomposition.values():
            weight.gate.b_out.fill_(100.0)
    report = evaluate(decomposition, TokenBatches(tokens(6), 6))
    for regime in ("importance", "all on, no delta", "stochastic", "rounded"):
        assert abs(report.divergence[regime]) < 1e-5
    assert report.adversarial[20] < 1e-4
    assert any("nothing is separated" in warning for warning in report.warnings)


def test_regressors_are_measured_by_mse() -> None:
    model = TiedAutoencoder()
    plain = copy.deepcopy(model)
    decomposition = decompose(model, {"*": 3})
    x = torch.rand(9, 5)
    report = evaluate(decomposition, [x], kind="mse")
    expected = (plain(x) - torch.relu(plain.b)).square().mean().detach()
    assert report.divergence["all off"] == pytest.approx(float(expected), rel=1e-5)
    assert report.cross_entropy == {}
    assert "MSE from the target" in str(report)


def test_empty_data_is_an_error() -> None:
    with pytest.raises(ValueError, match="not one batch to evaluate on"):
        evaluate(_decomposition(), [])


def _site(**changes: Any) -> SiteReport:
    values: dict[str, Any] = {
        "n_subcomponents": 20, "rank_bound": 16, "relative_faithfulness": 1e-4, "smallest_possible": 0.0,
        "l0": {0.0: 3.0, 0.01: 3.0, 0.1: 2.0, 0.5: 1.0}, "alive": 9,
    }  # fmt: skip
    return SiteReport(**(values | changes))


@pytest.mark.parametrize(
    ("site", "stochastic", "words"),
    [
        (_site(relative_faithfulness=0.4), 0.01, "the delta carries it"),
        (_site(l0={0.0: 0.0, 0.01: 0.0, 0.1: 0.0, 0.5: 0.0}), 0.01, "minimality coefficient is too high"),
        (_site(l0={0.0: 16.0, 0.01: 16.0, 0.1: 15.5, 0.5: 15.0}), 0.01, "nothing is separated"),
        (_site(), 0.9, "more than half of the effect"),
    ],
)
def test_failure_modes_are_named(site: SiteReport, stochastic: float, words: str) -> None:
    found = failure_modes({"s": site}, {"stochastic": stochastic, "all off": 1.0})
    assert len(found) == 1
    assert words in found[0]


def test_a_healthy_decomposition_gets_no_warning() -> None:
    assert failure_modes({"s": _site()}, {"stochastic": 0.01, "all off": 1.0}) == []


def test_the_report_is_plain_data() -> None:
    report = evaluate(_decomposition(), [tokens(3)], adversary_steps=())
    assert isinstance(report, EvaluationReport)
    assert report.to_json()["sites"]["blocks.1.mlp.W_in"]["n_subcomponents"] == 20


@needs_hooked
def test_a_model_whose_answers_are_not_tokens_of_its_input_has_no_cross_entropy() -> None:
    decomposition = decompose(load_modular_addition(), {"blocks.0.mlp.W_in": 4})
    report = evaluate(decomposition, [all_sums()[:8]], adversary_steps=())
    assert report.cross_entropy == {}
    assert report.divergence["all off"] > 0
