"""Losses L1 to L7 and position masks (M5) against python loops in float64, over a toy model written out by M1."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spd_lens.core import MaskKind, Routing, SiteMask, relative_faithfulness
from spd_lens.objective import (
    EPSILON,
    Divergence,
    Power,
    Scope,
    divergence,
    divergence_per_position,
    faithfulness_loss,
    frequency_loss,
    hidden_reconstruction_loss,
    masks_from_sources,
    minimality_loss,
    random_sources,
    reconstruction_loss,
    relative_faithfulness_loss,
)
from tests.small_models import generator, rand, randn

PROPERTY = settings(deadline=None, max_examples=40, derandomize=True, database=None)
KINDS: list[MaskKind] = ["stochastic", "bernoulli", "random", "importance", "rounded", "none", "off"]
ROUTINGS: list[Routing] = ["all", "layerwise", "subset", 0.5]
DIVERGENCES: list[Divergence] = ["kl", "mse"]
KEPT = torch.tensor([[True, True, False], [False, True, True]])


def value(loss: Tensor) -> float:
    assert loss.shape == ()
    return loss.detach().double().item()


def flat_rows(x: Tensor) -> list[list[float]]:
    return x.detach().double().reshape(-1, x.shape[-1]).tolist()


def close(expected: float, rel: float = 1e-12) -> Any:
    return pytest.approx(expected, rel=rel, abs=1e-14)


# -- L1 ----------------------------------------------------------------------------


def factors(d_in: int, C: int, d_out: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    return randn(d_in, d_out, seed=seed), randn(d_in, C, seed=seed + 1), randn(C, d_out, seed=seed + 2)


def squared_error(W: Tensor, V: Tensor, U: Tensor) -> float:
    total = 0.0
    for i, o in itertools.product(range(W.shape[0]), range(W.shape[1])):
        explained = sum(V[i, c].item() * U[c, o].item() for c in range(V.shape[1]))
        total += (W[i, o].item() - explained) ** 2
    return total


def test_l1_is_the_squared_error_of_all_sites_over_the_number_of_all_entries() -> None:
    sites = [factors(3, 2, 4), factors(2, 6, 5, seed=10)]
    expected = sum(squared_error(*site) for site in sites) / (3 * 4 + 2 * 5)
    assert value(faithfulness_loss(site for site in sites)) == close(expected)


def test_l1_gradient_is_minus_two_over_n_times_the_error_through_the_other_factor() -> None:
    W, V, U = factors(3, 2, 4)
    V.requires_grad_(True)
    U.requires_grad_(True)
    faithfulness_loss([(W, V, U)]).backward()
    error = (W - V @ U).detach()
    torch.testing.assert_close(V.grad, -2 / 12 * error @ U.detach().T)
    torch.testing.assert_close(U.grad, -2 / 12 * V.detach().T @ error)


def test_l1_is_zero_for_exact_factors_and_the_mean_square_of_the_target_for_zero_factors() -> None:
    W = randn(3, 4)
    assert value(faithfulness_loss([(W, torch.eye(3, dtype=torch.float64), W)])) == 0
    zeros = (torch.zeros(3, 2, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.float64))
    assert value(faithfulness_loss([(W, *zeros)])) == close(sum(x * x for x in W.reshape(-1).tolist()) / 12)


def test_l1_a_bfloat16_target_is_compared_in_the_precision_of_the_factors() -> None:
    W, V, U = factors(3, 2, 4)
    W = W.bfloat16()
    for loss, scale in ((faithfulness_loss([(W, V, U)]), 12), (relative_faithfulness(W, V, U), None)):
        assert loss.dtype == torch.float64
        assert value(loss) == close(squared_error(W, V, U) / (scale or sum(x * x for [x] in flat_rows(W[..., None]))))


def test_l1_relative_faithfulness_is_the_unexplained_share_of_the_energy() -> None:
    W, V, U = factors(3, 2, 4)
    energy = sum(x * x for x in W.reshape(-1).tolist())
    assert value(relative_faithfulness(W, V, U)) == close(squared_error(W, V, U) / energy)
    assert value(relative_faithfulness(W, V, U * 0)) == close(1.0)
    assert value(relative_faithfulness(10 * W, V, 10 * U)) == close(value(relative_faithfulness(W, V, U)))
    # One formula in reports and in the loss, of matrices of zeros, too.
    zeros = (torch.zeros_like(W), V, U)
    expected = (squared_error(W, V, U) / energy + squared_error(*zeros)) / 2
    assert value(relative_faithfulness_loss([(W, V, U), zeros])) == close(expected)


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (lambda: faithfulness_loss([]), "faithfulness_loss"),
        (lambda: minimality_loss({}, penalty=Power(1.0)), "minimality_loss"),
        (lambda: frequency_loss({}, penalty=Power(1.0)), "frequency_loss"),
    ],
)
def test_a_loss_of_no_site_is_an_error(loss: Callable[[], Tensor], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} was given no site"):
        loss()


def test_l1_accepts_a_list_of_sites_of_different_shapes_under_shape_checks() -> None:
    sites = [factors(3, 2, 4), factors(2, 6, 5, seed=10)]
    for _ in range(40):  # the checker looks at one random item
        faithfulness_loss(sites)


def test_l1_is_computed_in_float32_under_autocast() -> None:
    W, V, U = (x.float() for x in factors(8, 5, 9))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = [faithfulness_loss([(W, V, U)]), relative_faithfulness(W, V, U)]
    energy = W.double().square().sum().item()
    for loss, scale in zip(losses, (72, energy), strict=True):
        assert value(loss) == pytest.approx(squared_error(W, V, U) / scale, rel=1e-5)


# -- L2 ----------------------------------------------------------------------------


def minimality_by_hand(upper: Mapping[str, Tensor], p: float, kept: Tensor | None = None) -> float:
    total = 0.0
    for g in upper.values():
        rows = flat_rows(g)
        keep = [True] * len(rows) if kept is None else kept.reshape(-1).tolist()
        per_position = [sum((x + 1e-12) ** p for x in row) for row, on in zip(rows, keep, strict=True) if on]
        total += sum(per_position) / len(per_position)
    return total


def upper_importances(*lead: int, seed: int = 0) -> dict[str, Tensor]:
    """Values in [0, 1.05] with exact zeros among them, as the upper squashing gives."""
    drawn = {"first": rand(*lead, 4, seed=seed), "second": rand(*lead, 3, seed=seed + 1)}
    return {name: (1.2 * g - 0.15).clamp_min(0) for name, g in drawn.items()}


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("lead", [(5,), (2, 3)])
def test_l2_is_the_mean_over_positions_of_the_sum_over_sites_and_subcomponents(p: float, lead: tuple[int, ...]) -> None:
    upper = upper_importances(*lead)
    assert value(minimality_loss(upper, penalty=Power(p))) == close(minimality_by_hand(upper, p))


def test_factors_multiply_the_parts_of_single_sites() -> None:
    upper = upper_importances(5)
    first, second = (minimality_by_hand({name: g}, 0.5) for name, g in upper.items())
    assert value(minimality_loss(upper, penalty=Power(0.5), factors={"second": 40.0})) == close(first + 40 * second)
    assert value(minimality_loss(upper, penalty=Power(0.5), factors={"first": 0.0})) == close(second)


def test_l2_is_never_divided_by_the_number_of_sites() -> None:
    g = rand(2, 3, 4)
    once = value(minimality_loss({"a": g}, penalty=Power(1.0)))
    assert value(minimality_loss({"a": g, "b": g, "c": g}, penalty=Power(1.0))) == close(3 * once)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_l2_gradient_is_finite_where_the_importance_is_zero(p: float, dtype: torch.dtype) -> None:
    values = [0.0, 0.25, 1.0, 1.01]
    g = torch.tensor([values], dtype=dtype, requires_grad=True)
    minimality_loss({"site": g}, penalty=Power(p)).backward()
    assert g.grad is not None
    expected = [p * (x + 1e-12) ** (p - 1) for x in values]
    assert g.grad[0].tolist() == pytest.approx(expected, rel=1e-5)
    assert EPSILON == 1e-12


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0])
def test_l2_m5_counts_only_positions_that_are_kept(p: float) -> None:
    upper = upper_importances(2, 3)
    expected = minimality_by_hand(upper, p, KEPT)
    assert value(minimality_loss(upper, penalty=Power(p), position_mask=KEPT)) == close(expected)


def test_l2_m5_under_split_heads_a_position_mask_covers_all_heads() -> None:
    upper = {"heads": rand(2, 3, 2, 4), "plain": rand(2, 3, 5)}
    expected = minimality_by_hand({"heads": upper["heads"]}, 1.0, KEPT.repeat_interleave(2))
    expected += minimality_by_hand({"plain": upper["plain"]}, 1.0, KEPT)
    assert value(minimality_loss(upper, penalty=Power(1.0), position_mask=KEPT)) == close(expected)


# -- L3 ----------------------------------------------------------------------------


def frequency_by_hand(upper: Mapping[str, Tensor], p: float, kept: Tensor | None = None) -> float:
    loss = 0.0
    for g in upper.values():
        rows = flat_rows(g)
        if kept is not None:
            rows = [row for row, on in zip(rows, kept.reshape(-1).tolist(), strict=True) if on]
        for column in zip(*rows, strict=True):
            total = sum((x + 1e-12) ** p for x in column)
            loss += total / len(rows) * math.log2(1 + total)
    return loss


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("kept", [None, KEPT], ids=["all-positions", "masked"])
def test_l3_is_mean_times_log_of_one_plus_total_per_subcomponent(p: float, kept: Tensor | None) -> None:
    upper = upper_importances(2, 3)
    assert value(frequency_loss(upper, penalty=Power(p), position_mask=kept)) == close(
        frequency_by_hand(upper, p, kept)
    )


def test_l3_m5_under_split_heads_a_position_mask_covers_all_heads() -> None:
    g = rand(2, 3, 2, 4)
    expected = frequency_by_hand({"heads": g}, 1.0, KEPT.repeat_interleave(2))
    assert value(frequency_loss({"heads": g}, penalty=Power(1.0), position_mask=KEPT)) == close(expected)


@pytest.mark.parametrize("masked", [False, True])
def test_l3_two_processes_that_add_up_get_the_value_and_gradient_of_the_global_batch(masked: bool) -> None:
    upper = upper_importances(5, 3)
    kept = torch.rand(5, 3, generator=generator()) < 0.6 if masked else None
    parts = [slice(0, 2), slice(2, 5)]

    def loss_of(part: slice, add: Callable[[Tensor], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        own = {name: g[part].clone().requires_grad_(True) for name, g in upper.items()}
        mask = None if kept is None else kept[part]
        return frequency_loss(own, penalty=Power(0.5), position_mask=mask, sum_over_processes=add), own

    sent: list[list[Tensor]] = [[], []]
    for part, record in zip(parts, sent, strict=True):
        loss_of(part, lambda x, record=record: (record.append(x.detach()), x)[1])
    whole = {name: g.clone().requires_grad_(True) for name, g in upper.items()}
    expected = frequency_loss(whole, penalty=Power(0.5), position_mask=kept)
    expected.backward()
    for me, part in enumerate(parts):
        received = iter(sent[1 - me])
        loss, own = loss_of(part, lambda x, received=received: x + next(received))
        assert value(loss) == close(frequency_by_hand(upper, 0.5, kept))
        loss.backward()
        for name in upper:
            torch.testing.assert_close(own[name].grad, whole[name].grad[part], rtol=1e-12, atol=0)


def test_l3_makes_one_subcomponent_that_is_always_on_dearer_than_several_that_take_turns() -> None:
    always, turns = torch.zeros(4, 4), torch.eye(4)
    always[:, 0] = 1
    once = Power(1.0)
    minimality = [value(minimality_loss({"s": g}, penalty=once)) for g in (always, turns)]
    frequency = [value(frequency_loss({"s": g}, penalty=once)) for g in (always, turns)]
    assert minimality[0] == close(minimality[1], rel=1e-6)
    assert frequency[0] > 2 * frequency[1]


# -- precision ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "by_hand"), [(minimality_loss, minimality_by_hand), (frequency_loss, frequency_by_hand)]
)
def test_l2_l3_of_bfloat16_importances_are_computed_in_float32(
    loss: Callable[..., Tensor], by_hand: Callable[[Mapping[str, Tensor], float], float]
) -> None:
    upper = {name: g.bfloat16() for name, g in upper_importances(7, 43).items()}
    for p in (0.5, 1.0, 2.0):
        result = loss(upper, penalty=Power(p))
        assert result.dtype == torch.float32
        assert value(result) == pytest.approx(by_hand(upper, p), rel=1e-5)


def test_l1_of_bfloat16_factors_is_computed_in_float32() -> None:
    W, V, U = (x.bfloat16() for x in factors(8, 5, 9))
    for loss, scale in ((faithfulness_loss([(W, V, U)]), 72), (relative_faithfulness(W, V, U), None)):
        assert loss.dtype == torch.float32
        expected = squared_error(W, V, U) / (scale or W.double().square().sum().item())
        assert value(loss) == pytest.approx(expected, rel=1e-5)


# -- D of L4 ----------------------------------------------------------------------------


def kl_by_hand(clean: list[float], masked: list[float]) -> float:
    def log_probabilities(logits: list[float]) -> list[float]:
        top = max(logits)
        log_sum = top + math.log(sum(math.exp(x - top) for x in logits))
        return [x - log_sum for x in logits]

    log_p, log_q = log_probabilities(clean), log_probabilities(masked)
    return sum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True))


def mse_by_hand(clean: list[float], masked: list[float]) -> float:
    return sum((x - y) ** 2 for x, y in zip(clean, masked, strict=True)) / len(clean)


BY_HAND = {"kl": kl_by_hand, "mse": mse_by_hand}


def divergence_by_hand(clean: Tensor, masked: Tensor, kind: Divergence, kept: Tensor | None = None) -> float:
    rows = list(zip(flat_rows(clean), flat_rows(masked), strict=True))
    keep = [True] * len(rows) if kept is None else kept.reshape(-1).tolist()
    per_position = [BY_HAND[kind](*row) for row, on in zip(rows, keep, strict=True) if on]
    return sum(per_position) / len(per_position)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("kept", [None, KEPT], ids=["all-positions", "masked"])
def test_l4_divergence_equals_the_loop(kind: Divergence, kept: Tensor | None) -> None:
    clean, masked = 2 * randn(2, 3, 5), 2 * randn(2, 3, 5, seed=1)
    expected = divergence_by_hand(clean, masked, kind, kept)
    assert value(divergence(clean, masked, kind=kind, position_mask=kept)) == close(expected)


def test_l4_kl_on_two_outcomes() -> None:
    clean = torch.tensor([[0.0, math.log(3.0)]], dtype=torch.float64)
    masked = torch.zeros(1, 2, dtype=torch.float64)
    expected = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert value(divergence(clean, masked)) == close(expected)


def test_l4_vocabulary_entries_at_minus_infinity_in_both_outputs_count_nothing() -> None:
    clean, masked = randn(4, 7), randn(4, 7, seed=1).requires_grad_(True)
    excluded = torch.cat([torch.ones(4, 2, dtype=torch.bool), torch.zeros(4, 5, dtype=torch.bool)], dim=1)
    per_position = divergence_per_position(
        clean.masked_fill(excluded, -torch.inf), masked.masked_fill(excluded, -torch.inf)
    )
    kept = divergence_per_position(clean[:, 2:], masked[:, 2:])
    assert torch.allclose(per_position, kept, atol=1e-12)
    (gradient,) = torch.autograd.grad(per_position.sum(), masked)
    assert torch.allclose(gradient[:, 2:], masked[:, 2:].softmax(-1) - clean[:, 2:].softmax(-1), atol=1e-12)
    only_masked = divergence(clean, masked.masked_fill(excluded, -torch.inf))
    assert float(only_masked.detach()) > 1e30


@pytest.mark.parametrize(("offset", "scale"), [(0.0, 10.0), (3e4, 3.0), (-3e4, 3.0), (0.0, 1e4)])
def test_l4_kl_in_float32_is_accurate_for_large_logits(offset: float, scale: float) -> None:
    clean = (offset + scale * randn(6, 50)).float()
    masked = (offset + scale * randn(6, 50, seed=1)).float()
    loss = divergence(clean, masked)
    assert loss.dtype == torch.float32
    assert value(loss) == pytest.approx(divergence_by_hand(clean, masked, "kl"), rel=2e-6)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_l4_half_precision_outputs_are_compared_in_float32(kind: Divergence, dtype: torch.dtype) -> None:
    clean, masked = (10 * randn(6, 50)).to(dtype), (10 * randn(6, 50, seed=1)).to(dtype)
    loss = divergence(clean, masked, kind=kind)
    assert loss.dtype == torch.float32
    assert value(loss) == pytest.approx(divergence_by_hand(clean, masked, kind), rel=2e-6)


def test_an_unknown_divergence_is_an_error(without_type_checks: None) -> None:
    with pytest.raises(ValueError, match="divergence='js'; expected 'kl', 'mse' or 'relative_mse'"):
        divergence(randn(1, 2), randn(1, 2), kind="js")  # pyright: ignore[reportArgumentType]


@PROPERTY
@given(st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple), st.integers(1, 6), st.integers(0, 99))
def test_l4_divergences_are_zero_only_for_equal_outputs_and_kl_ignores_a_shift(
    lead: tuple[int, ...], vocab: int, seed: int
) -> None:
    clean, masked = randn(*lead, vocab, seed=seed), randn(*lead, vocab, seed=seed + 1)
    for kind in DIVERGENCES:
        assert value(divergence(clean, clean, kind=kind)) == 0
        assert value(divergence(clean, masked, kind=kind)) >= (0 if vocab > 1 or kind == "mse" else -1e-15)
    shifted = value(divergence(clean, masked + 5.0))
    assert shifted == pytest.approx(value(divergence(clean, masked)), rel=1e-9, abs=1e-12)


# -- M5: masked positions have no influence ----------------------------------------------------------------------------

Masked = Callable[[Tensor, Tensor | None], Tensor]
MASKED_LOSSES: dict[str, Masked] = {
    "minimality p=0.5": lambda x, kept: minimality_loss({"s": x.abs()}, penalty=Power(0.5), position_mask=kept),
    "frequency p=0.5": lambda x, kept: frequency_loss({"s": x.abs()}, penalty=Power(0.5), position_mask=kept),
    "kl": lambda x, kept: divergence(randn(*x.shape, seed=9), x, position_mask=kept),
    "mse": lambda x, kept: divergence(randn(*x.shape, seed=9), x, kind="mse", position_mask=kept),
    "hidden": lambda x, kept: hidden_reconstruction_loss({"h": randn(*x.shape, seed=9)}, {"h": x}, position_mask=kept),
}


@pytest.mark.parametrize("name", MASKED_LOSSES)
@PROPERTY
@given(st.lists(st.booleans(), min_size=6, max_size=6), st.integers(0, 99), st.sampled_from([1.0, -40.0, 1e12]))
def test_m5_masked_positions_have_no_influence_on_value_or_gradient(
    name: str, flags: list[bool], seed: int, noise: float
) -> None:
    kept = torch.tensor(flags).reshape(2, 3)
    x = randn(2, 3, 4, seed=seed).requires_grad_(True)
    loss = MASKED_LOSSES[name](x, kept)
    loss.backward()
    assert x.grad is not None
    assert not x.grad[~kept].any()
    if any(flags):
        assert bool((x.grad[kept] != 0).all())
    else:
        assert value(loss) == 0
    changed = torch.where(kept.unsqueeze(-1), x.detach(), x.detach() + noise).requires_grad_(True)
    loss_changed = MASKED_LOSSES[name](changed, kept)
    loss_changed.backward()
    assert value(loss_changed) == value(loss)
    assert torch.equal(changed.grad, x.grad)


def test_m5_infinity_at_a_masked_position_has_no_influence(without_type_checks: None) -> None:
    """An output that excludes what the target may say there."""
    clean, masked, kept = torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), torch.tensor([[False, True]])
    masked[0, 0, 0], masked[0, 1, 0] = float("nan"), 1.0
    expected = value(divergence(clean[:, 1:], masked[:, 1:]))
    assert value(divergence(clean, masked, position_mask=kept)) == expected > 0
    with pytest.raises(ValueError, match=r"a position mask of shape \(1, 2\) for values at \(1, 3\)"):
        divergence(torch.zeros(1, 3, 3), torch.zeros(1, 3, 3), position_mask=kept)


@pytest.mark.parametrize("name", MASKED_LOSSES)
def test_m5_a_mask_that_keeps_everything_changes_nothing(name: str) -> None:
    x = randn(2, 3, 4)
    with_mask = MASKED_LOSSES[name](x, torch.ones(2, 3, dtype=torch.bool))
    assert value(with_mask) == close(value(MASKED_LOSSES[name](x, None)))


# -- L4 to L6 on a toy model ----------------------------------------------------------------------------

BATCH, POS, D = 2, 3, 3
COUNTS = {"first": 4, "second": 2, "third": 3}


class Toy:
    """Three sites in a row with tanh between them, each by M1 written out; keeps the masks of every pass."""

    def __init__(self) -> None:
        self.x = randn(BATCH, POS, D, seed=20)
        self.weights = {name: randn(D, D, seed=21 + i) for i, name in enumerate(COUNTS)}
        self.factors = {
            name: (randn(D, C, seed=31 + i), randn(C, D, seed=41 + i)) for i, (name, C) in enumerate(COUNTS.items())
        }
        self.passes: list[Mapping[str, SiteMask]] = []

    def output(self, masks: Mapping[str, SiteMask]) -> Tensor:
        x = self.x
        for name, W in self.weights.items():
            y = clean = x @ W
            if name in masks:
                (V, U), site = self.factors[name], masks[name]
                m = torch.ones(BATCH, POS, V.shape[1], dtype=x.dtype) if site.mask is None else site.mask
                d = torch.ones(BATCH, POS, dtype=x.dtype) if site.delta is None else site.delta
                y = (m * (x @ V)) @ U + d.unsqueeze(-1) * (x @ (W - V @ U))
                if site.routed is not None:
                    y = torch.where(site.routed.unsqueeze(-1), y, clean)
            x = torch.tanh(y)
        return x

    def __call__(self, masks: Mapping[str, SiteMask]) -> Tensor:
        self.passes.append(masks)
        return self.output(masks)


@pytest.fixture
def toy() -> Toy:
    return Toy()


def toy_importances(seed: int = 50) -> dict[str, Tensor]:
    return {name: rand(BATCH, POS, C, seed=seed + i) for i, (name, C) in enumerate(COUNTS.items())}


CLEAN = randn(BATCH, POS, D, seed=60)
FIXED_MASKS: dict[MaskKind, Callable[[Tensor], Tensor | None]] = {
    "importance": lambda g: g,
    "rounded": lambda g: (g >= 0.5).double(),
    "none": lambda g: None,
    "off": torch.zeros_like,
}


def assert_mask_fits_kind(site: SiteMask, g: Tensor, kind: MaskKind) -> None:
    assert site.delta is not None
    assert site.delta.shape == g.shape[:-1]
    if kind in FIXED_MASKS:
        expected = FIXED_MASKS[kind](g)
        assert (site.mask is None) == (expected is None)
        assert expected is None or (site.mask is not None and torch.equal(site.mask, expected))
        assert not site.delta.any()
        return
    assert site.mask is not None
    lower = torch.zeros_like(g) if kind == "random" else g
    assert bool(((site.mask >= lower) & (site.mask <= 1)).all())
    if kind == "bernoulli":
        # Its few delta coins may all have fallen on 0, so nothing is asked of them here.
        assert bool((((site.mask - g).abs() < 1e-12) | ((site.mask - 1).abs() < 1e-12)).all())
    else:
        assert bool(((site.delta > 0) & (site.delta < 1)).all())


@pytest.mark.parametrize("divergence_kind", DIVERGENCES)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_l5_any_mask_kind_times_any_routing_is_the_mean_divergence_of_the_passes_made(
    toy: Toy, kind: MaskKind, routing: Routing, divergence_kind: Divergence
) -> None:
    g = toy_importances()
    loss = reconstruction_loss(
        toy, CLEAN, g, masks=kind, routing=routing, kind=divergence_kind, draws=2, generator=generator()
    )
    assert len(toy.passes) == 2 * (3 if routing == "layerwise" else 1)
    for i, masks in enumerate(toy.passes):
        assert list(masks) == ([list(COUNTS)[i % 3]] if routing == "layerwise" else list(COUNTS))
        for name, site in masks.items():
            assert_mask_fits_kind(site, g[name], kind)
            assert (site.routed is None) == (routing in ("all", "layerwise"))
        if routing == "subset":
            assert bool(torch.stack([site.routed for site in masks.values()]).any(0).all())
    by_hand = [divergence_by_hand(CLEAN, toy.output(masks), divergence_kind) for masks in toy.passes]
    assert value(loss) == close(sum(by_hand) / len(by_hand))


@pytest.mark.parametrize("kind", FIXED_MASKS)
def test_l6_layerwise_is_the_mean_over_sites_with_only_that_site_masked(toy: Toy, kind: MaskKind) -> None:
    g = toy_importances()
    delta = torch.zeros(BATCH, POS, dtype=torch.float64)
    alone = [toy.output({name: SiteMask(FIXED_MASKS[kind](g[name]), delta)}) for name in COUNTS]
    loss = reconstruction_loss(toy, CLEAN, g, masks=kind, routing="layerwise", generator=generator())
    assert value(loss) == close(sum(divergence_by_hand(CLEAN, y, "kl") for y in alone) / 3)


def test_l4_is_zero_when_the_masked_model_is_the_target(toy: Toy) -> None:
    # Importance 1 everywhere and exact factors: nothing is left to ablate.
    for i, (name, C) in enumerate(COUNTS.items()):
        V, U = randn(D, C, seed=70 + i), randn(C, D, seed=80 + i)
        toy.factors[name], toy.weights[name] = (V, U), V @ U
    ones = {name: torch.ones_like(g) for name, g in toy_importances().items()}
    for kind in ("stochastic", "bernoulli", "importance", "rounded", "none"):
        loss = reconstruction_loss(toy, toy.output({}), ones, masks=kind, generator=generator())
        assert value(loss) == pytest.approx(0, abs=1e-12), kind
    assert value(reconstruction_loss(toy, toy.output({}), ones, masks="off", generator=generator())) > 1e-3


def test_l4_uses_the_clean_output_as_given_and_makes_no_pass_of_its_own(toy: Toy) -> None:
    g = toy_importances()
    for i, clean in enumerate((CLEAN, toy.output({}), 3 * CLEAN)):
        loss = reconstruction_loss(toy, clean, g, masks="importance", generator=generator())
        assert len(toy.passes) == i + 1
        assert value(loss) == close(divergence_by_hand(clean, toy.output(toy.passes[-1]), "kl"))


def test_l4_draws_average_independent_draws(toy: Toy) -> None:
    g, source = toy_importances(), generator(4)
    together = reconstruction_loss(toy, CLEAN, g, draws=3, generator=generator(4))
    one_by_one = [value(reconstruction_loss(toy, CLEAN, g, generator=source)) for _ in range(3)]
    assert len(set(one_by_one)) == 3
    assert value(together) == close(sum(one_by_one) / 3)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_k1_masks_are_fresh_for_every_pass_and_draw(toy: Toy, routing: Routing) -> None:
    # The same importances at all sites, so that nothing but the draw can differ.
    g = {name: torch.full((BATCH, POS, 2), 0.5, dtype=torch.float64) for name in COUNTS}
    toy.factors = {name: (randn(D, 2), randn(2, D)) for name in COUNTS}
    reconstruction_loss(toy, CLEAN, g, routing=routing, draws=3, generator=generator())
    masks = [site.mask for seen in toy.passes for site in seen.values()]
    deltas = [site.delta for seen in toy.passes for site in seen.values()]
    assert len(masks) == 3 * len(COUNTS)
    for drawn in (masks, deltas):
        assert all(not bool((x == y).any()) for x, y in itertools.combinations(drawn, 2))
    if routing in ("subset", 0.5):
        flags = [torch.stack([site.routed for site in seen.values()]) for seen in toy.passes]
        assert not torch.equal(flags[0], flags[1])
        assert not torch.equal(flags[1], flags[2])


@pytest.mark.parametrize("routing", ["subset", 0.5])
def test_k6_a_routing_generator_of_its_own_leaves_the_mask_draws_alone(toy: Toy, routing: Routing) -> None:
    g = toy_importances()
    reconstruction_loss(toy, CLEAN, g, generator=generator(1))
    for routing_seed in (2, 2, 3):
        reconstruction_loss(
            toy, CLEAN, g, routing=routing, generator=generator(1), routing_generator=generator(routing_seed)
        )
    for seen in toy.passes[1:]:
        assert all(torch.equal(seen[name].mask, toy.passes[0][name].mask) for name in COUNTS)
    flags = [torch.stack([site.routed for site in seen.values()]) for seen in toy.passes[1:]]
    assert torch.equal(flags[0], flags[1])
    assert not torch.equal(flags[0], flags[2])


def test_l5_passes_drawn_before_are_used_as_they_are_in_every_draw(toy: Toy) -> None:
    where = torch.tensor([[True, False, True], [False, False, True]])
    passes: list[dict[str, Tensor | None]] = [{"second": where}, {"first": None, "third": ~where}]
    g = toy_importances()
    loss = reconstruction_loss(toy, CLEAN, g, routing=passes, draws=2, generator=generator())
    assert [list(seen) for seen in toy.passes] == [["second"], ["first", "third"]] * 2
    for seen in toy.passes[::2]:
        assert torch.equal(seen["second"].routed, where)
    for seen in toy.passes[1::2]:
        assert seen["first"].routed is None
        assert torch.equal(seen["third"].routed, ~where)
    by_hand = [divergence_by_hand(CLEAN, toy.output(seen), "kl") for seen in toy.passes]
    assert value(loss) == close(sum(by_hand) / 4)


@pytest.mark.parametrize("delta", [True, False])
def test_k2_delta_false_leaves_out_what_the_subcomponents_do_not_explain(toy: Toy, delta: bool) -> None:
    reconstruction_loss(toy, CLEAN, toy_importances(), delta=delta, generator=generator())
    assert all(bool((site.delta != 0).all()) == delta for site in toy.passes[0].values())


# -- adversarial sources (K3) as masks ----------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(BATCH, POS), (BATCH, 1), (1, 1)], ids=["position", "example", "batch"])
def test_k3_masks_from_sources_by_hand_with_the_last_channel_for_delta(lead: tuple[int, int]) -> None:
    g = toy_importances()
    sources = {name: rand(*lead, C + 1, seed=90 + i) for i, (name, C) in enumerate(COUNTS.items())}
    for name, site in masks_from_sources(g, sources).items():
        assert site.mask is not None
        assert site.delta is not None
        assert site.mask.shape == g[name].shape
        assert site.delta.shape == (BATCH, POS)
        for b, i in itertools.product(range(BATCH), range(POS)):
            s = sources[name][b % lead[0], i % lead[1]].tolist()
            for c, x in enumerate(g[name][b, i].tolist()):
                assert site.mask[b, i, c].item() == pytest.approx(x + (1 - x) * s[c], abs=1e-15)
            assert site.delta[b, i].item() == s[-1]


@pytest.mark.parametrize("scope", ["position", "example", "batch"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_l5_adversarial_sources_are_a_mask_source_under_any_routing(toy: Toy, scope: Scope, routing: Routing) -> None:
    g = toy_importances()
    sources = {name: s.requires_grad_(True) for name, s in random_sources(g, scope, generator(2)).items()}
    loss = reconstruction_loss(toy, CLEAN, g, masks=sources, routing=routing, draws=2, generator=generator())
    expected = masks_from_sources(g, sources)
    for seen in toy.passes:
        for name, site in seen.items():
            assert torch.equal(site.mask, expected[name].mask)
            assert torch.equal(site.delta, expected[name].delta)
    by_hand = [divergence_by_hand(CLEAN, toy.output(seen), "kl") for seen in toy.passes]
    assert value(loss) == close(sum(by_hand) / len(by_hand))
    if routing == "all":
        loss.backward()
        assert all(bool((s.grad != 0).all()) for s in sources.values())


def test_k2_delta_false_takes_the_delta_mask_from_the_adversary_too(toy: Toy) -> None:
    g = toy_importances()
    sources = random_sources(g, "batch", generator(2))
    reconstruction_loss(toy, CLEAN, g, masks=sources, delta=False, generator=generator())
    with_delta = masks_from_sources(g, sources)
    for name, site in toy.passes[0].items():
        assert torch.equal(site.mask, with_delta[name].mask)
        assert site.delta is not None
        assert site.delta.shape == (BATCH, POS)
        assert not site.delta.any()


# -- gradients and masks of reconstruction ----------------------------------------------------------------------------


@pytest.mark.parametrize("routing", ["all", "layerwise", "subset"])
@pytest.mark.parametrize("kind", ["stochastic", "bernoulli", "importance"])
def test_k1_gradient_with_respect_to_the_importance_is_the_difference_quotient_at_fixed_draws(
    toy: Toy, kind: MaskKind, routing: Routing
) -> None:
    g = {name: x.requires_grad_(True) for name, x in toy_importances().items()}

    def loss_at(importances: Mapping[str, Tensor]) -> Tensor:
        return reconstruction_loss(toy, CLEAN, importances, masks=kind, routing=routing, generator=generator(3))

    loss_at(g).backward()
    step = 1e-5
    for name, where in (("first", (0, 0, 1)), ("second", (1, 2, 0)), ("third", (0, 1, 2))):
        values = []
        for sign in (1, -1):
            moved = {other: x.detach().clone() for other, x in g.items()}
            moved[name][where] += sign * step
            values.append(value(loss_at(moved)))
        assert g[name].grad[where].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_m5_reconstruction_at_masked_positions_has_no_influence_on_value_or_gradient(
    toy: Toy, kind: Divergence
) -> None:
    g = {name: x.requires_grad_(True) for name, x in toy_importances().items()}
    loss = reconstruction_loss(toy, CLEAN, g, kind=kind, position_mask=KEPT, generator=generator())
    by_hand = divergence_by_hand(CLEAN, toy.output(toy.passes[0]), kind, KEPT)
    assert value(loss) == close(by_hand)
    loss.backward()
    for x in g.values():
        assert not x.grad[~KEPT].any()
        assert bool((x.grad[KEPT] != 0).all())
    elsewhere = torch.where(KEPT.unsqueeze(-1), CLEAN, CLEAN + 100)
    again = reconstruction_loss(toy, elsewhere, g, kind=kind, position_mask=KEPT, generator=generator())
    assert value(again) == value(loss)


@pytest.mark.parametrize("draws", [0, -1])
def test_fewer_than_one_draw_is_an_error(toy: Toy, draws: int) -> None:
    with pytest.raises(ValueError, match=rf"draws={draws}; expected at least 1"):
        reconstruction_loss(toy, CLEAN, toy_importances(), draws=draws, generator=generator())


def test_l5_accepts_sites_with_a_head_axis_under_shape_checks() -> None:
    g = {"heads": rand(BATCH, POS, 2, 4), "plain": rand(BATCH, POS, 5)}
    seen: list[Mapping[str, SiteMask]] = []
    reconstruction_loss(
        lambda masks: (seen.append(masks), CLEAN)[1], CLEAN, g, position_mask=KEPT, generator=generator()
    )
    assert seen[0]["heads"].delta.shape == (BATCH, POS, 2)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_reconstruction_of_no_site_is_an_error(toy: Toy, routing: Routing) -> None:
    with pytest.raises(ValueError, match="reconstruction_loss was given no site"):
        reconstruction_loss(toy, CLEAN, {}, routing=routing, generator=generator())


# -- L7 ----------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [None, KEPT], ids=["all-positions", "masked"])
def test_l7_is_the_mean_over_hook_points_of_their_mse(kept: Tensor | None) -> None:
    clean = {"resid": randn(2, 3, 4), "mlp": randn(2, 3, 7, seed=1)}
    masked = {name: x + randn(*x.shape, seed=2) for name, x in clean.items()}
    expected = sum(divergence_by_hand(clean[name], masked[name], "mse", kept) for name in clean) / 2
    assert value(hidden_reconstruction_loss(clean, masked, position_mask=kept)) == close(expected)


def test_l7_heads_count_as_one_activation_per_position() -> None:
    clean, masked = randn(2, 3, 2, 4), randn(2, 3, 2, 4, seed=1)
    expected = divergence_by_hand(clean.reshape(2, 3, 8), masked.reshape(2, 3, 8), "mse")
    assert value(hidden_reconstruction_loss({"z": clean}, {"z": masked})) == close(expected)


def test_l7_accepts_heads_with_a_position_mask_under_shape_checks() -> None:
    clean, masked = randn(2, 3, 2, 4), randn(2, 3, 2, 4, seed=1)
    expected = divergence_by_hand(clean.reshape(2, 3, 8), masked.reshape(2, 3, 8), "mse", KEPT)
    assert value(hidden_reconstruction_loss({"z": clean}, {"z": masked}, position_mask=KEPT)) == close(expected)


def test_l7_of_no_hook_point_is_an_error() -> None:
    with pytest.raises(ValueError, match="hidden_reconstruction_loss was given no hook point"):
        hidden_reconstruction_loss({}, {})
