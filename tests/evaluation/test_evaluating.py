"""`evaluate`: every number against one computed by hand."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spd_lens import Batch, Decomposition, EvaluationReport, TokenBatches, decompose, evaluate
from spd_lens.evaluation import SiteReport, failure_modes
from spd_lens.models import all_sums, load_modular_addition
from tests.conftest import needs_hooked
from tests.small_models import D_VOCAB, TiedAutoencoder, tiny_transformer, tokens

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


@torch.no_grad()
def test_top_changes_and_ce_recovered_equal_counts_by_hand() -> None:
    decomposition = _decomposition()
    model, rows = decomposition.model, tokens(6)
    report = evaluate(decomposition, [rows], adversary_steps=())
    off = {name: torch.zeros_like(v) for name, v in decomposition.importance(rows).items()}
    with model.hooks(fwd_hooks=decomposition.mask(off, delta=0.0)):
        out = model(rows)
    changed = (out.argmax(-1) != model(rows).argmax(-1)).float().mean()
    assert report.top_changes["all off"] == pytest.approx(float(changed))
    counts = [(rows[:, 1:] == token).sum().item() for token in range(D_VOCAB)]
    n = sum(counts)
    unigram = -sum(k * math.log((k + 1 / D_VOCAB) / (n + 1)) for k in counts) / n
    assert report.unigram_cross_entropy == pytest.approx(unigram)
    ce = report.cross_entropy
    for regime, value in report.ce_recovered.items():
        assert value == pytest.approx(1 - (ce[regime] - ce["target"]) / (unigram - ce["target"]))
    given = evaluate(decomposition, [rows], adversary_steps=(), token_counts=torch.ones(D_VOCAB))
    assert given.unigram_cross_entropy == pytest.approx(math.log(D_VOCAB))
    with pytest.raises(ValueError, match=f"expected {D_VOCAB} counts"):
        evaluate(decomposition, [rows], adversary_steps=(), token_counts=torch.ones(3))


def test_means_are_those_of_the_texts_and_intervals_surround_them() -> None:
    report = evaluate(_decomposition(), [tokens(5), tokens(3, seed=1)], adversary_steps=(2,))
    assert report.texts == 8
    for quantity, means in (
        ("divergence", {**report.divergence, "PGD 2": report.adversarial[2]}),
        ("cross entropy", report.cross_entropy),
        ("top changes", report.top_changes),
    ):
        for regime, value in means.items():
            sums, counts = report.per_text[quantity][regime]
            assert len(sums) == 8
            assert value == pytest.approx(sum(sums) / sum(counts)), (quantity, regime)
            low, high = report.intervals[quantity][regime]
            assert low <= value <= high, (quantity, regime)


def test_cross_entropy_is_weighted_by_its_own_pairs_and_means_of_nothing_are_left_out() -> None:
    decomposition, rows = _decomposition(), tokens(4)
    nothing = torch.zeros(4, 12, dtype=torch.bool)
    isolated = nothing.clone()
    isolated[:, ::2] = True
    good = Batch(rows, tokens=rows)
    alone = evaluate(decomposition, [good], adversary_steps=(1,))
    for mask in (nothing, isolated):
        batch = Batch(tokens(4, seed=1), tokens=tokens(4, seed=1), position_mask=mask)
        both = evaluate(decomposition, [good, batch], adversary_steps=(1,))
        assert both.cross_entropy["target"] == pytest.approx(alone.cross_entropy["target"])
        assert both.positions == alone.positions + int(mask.sum())
        with pytest.raises(ValueError, match="no position counts"):
            evaluate(decomposition, [Batch(rows, tokens=rows, position_mask=nothing)])


@needs_hooked
def test_vocabulary_entries_at_minus_infinity_leave_every_number_finite() -> None:
    model = tiny_transformer()
    with torch.no_grad():
        model.unembed.b_U[:3] = -torch.inf
    decomposition = decompose(model, SITES, gate="shared", gate_width=8)
    report = evaluate(decomposition, [tokens(4).clamp_min(3)], adversary_steps=(2,))
    numbers = [*report.divergence.values(), *report.cross_entropy.values(), *report.adversarial.values()]
    assert all(math.isfinite(number) for number in numbers)
    assert report.divergence["all off"] > 0


def test_integers_of_any_width_dicts_and_bare_tensors_are_tokens() -> None:
    decomposition, rows = _decomposition(), tokens(3)
    expected = evaluate(decomposition, [rows], adversary_steps=())
    for batches in ([rows.int()], [{"input_ids": rows}], [{"tokens": rows.short()}], rows):
        assert evaluate(decomposition, batches, adversary_steps=()).cross_entropy == expected.cross_entropy


@pytest.mark.parametrize("max_batches", [0, -1])
def test_max_batches_below_one_is_an_error(max_batches: int) -> None:
    with pytest.raises(ValueError, match="expected at least 1"):
        evaluate(_decomposition(), [tokens(2)], max_batches=max_batches)


def test_modes_are_set_for_the_evaluation_and_put_back() -> None:
    decomposition = _decomposition()
    expected = evaluate(decomposition, [tokens(2)], adversary_steps=(2,))
    decomposition.model.train()
    modules = {name: module.training for name, module in decomposition.model.named_modules()}
    with torch.inference_mode():
        found = evaluate(decomposition, [tokens(2)], adversary_steps=(2,))
    assert found == expected
    assert {name: module.training for name, module in decomposition.model.named_modules()} == modules
    torch.set_grad_enabled(False)
    try:
        assert evaluate(decomposition, [tokens(2)], adversary_steps=(2,)) == expected
        assert not torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)


def test_parameters_that_are_not_finite_are_named() -> None:
    decomposition = _decomposition()
    with torch.no_grad():
        decomposition["blocks.1.mlp.W_in"].V[0, 0] = torch.nan
    for steps in ((), (2,)):
        with pytest.raises(ValueError, match="NaN"):
            evaluate(decomposition, [tokens(2)], adversary_steps=steps)
    with pytest.raises(ValueError, match=r"not finite: blocks\.1\.mlp\.W_in\.V"):
        evaluate(decomposition, [tokens(2)], adversary_steps=())


def test_quick_leaves_out_what_is_slow() -> None:
    report = evaluate(_decomposition(), [tokens(2, seed=i) for i in range(5)], adversary_steps=(20,), quick=True)
    assert report.positions == 2 * tokens(2).numel()
    assert report.adversarial == {}
    assert report.deletion is None
    assert report.attack is None
    assert not report.verdict.judged
    assert {"kl_stochastic", "l0", "top_changes"} <= report.log_values().keys()


def test_a_report_of_a_real_evaluation_survives_json() -> None:
    report = evaluate(_decomposition(), [tokens(3)], adversary_steps=(1, 3))
    assert EvaluationReport.from_json(json.loads(json.dumps(report.to_json(), allow_nan=False))) == report


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
