"""Masks and routing: K1, K2, K5 and K6 by formula and, where they are random, by counts at a fixed seed."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spd_lens.core import MaskKind, Routing, SiteMask, mask_from_source, route, sample_masks, sample_routing
from tests.small_models import generator, rand

PROPERTY = settings(deadline=None, max_examples=50, derandomize=True, database=None)
RANDOM_KINDS: list[MaskKind] = ["stochastic", "bernoulli", "random"]
FIXED_KINDS: list[MaskKind] = ["importance", "rounded", "none", "off"]
ROUTINGS: list[Routing] = ["all", "layerwise", "subset", 0.3]
# 0.999 quantiles of chi-square by degrees of freedom.
CHI_SQUARE = {6: 22.46, 9: 27.88, 14: 36.12}


def mask_of(site_mask: SiteMask) -> Tensor:
    assert site_mask.mask is not None
    return site_mask.mask


def delta_of(site_mask: SiteMask) -> Tensor:
    assert site_mask.delta is not None
    return site_mask.delta


def sources_behind(importances: Mapping[str, Tensor], kind: MaskKind, seed: int) -> dict[str, Tensor]:
    """The r that a seed gives: with importance 0, K1 says m = r."""
    zeros = {name: torch.zeros_like(g) for name, g in importances.items()}
    return {name: mask_of(m) for name, m in sample_masks(zeros, kind=kind, generator=generator(seed)).items()}


def correlation(x: Tensor, y: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([x.reshape(-1), y.reshape(-1)]))[0, 1])


def chi_square(counts: list[int], expected: list[float]) -> float:
    return sum((count - mean) ** 2 / mean for count, mean in zip(counts, expected, strict=True))


def assert_same_masks(left: Mapping[str, SiteMask], right: Mapping[str, SiteMask]) -> None:
    assert list(left) == list(right)
    for name in left:
        for field in ("mask", "delta", "routed"):
            one, other = getattr(left[name], field), getattr(right[name], field)
            assert (one is None) == (other is None), (name, field)
            assert one is None or torch.equal(one, other), (name, field)


# -- K1 and K2 ----------------------------------------------------------------------------


def test_k1_mask_is_g_plus_one_minus_g_times_r() -> None:
    g, r = rand(2, 3, 4), rand(2, 3, 4, seed=1)
    mask = mask_from_source(g, r)
    for b, i, c in itertools.product(range(2), range(3), range(4)):
        expected = g[b, i, c].item() + (1 - g[b, i, c].item()) * r[b, i, c].item()
        assert mask[b, i, c].item() == pytest.approx(expected, abs=1e-15)


def test_k1_source_of_smaller_shape_is_shared() -> None:
    g, shared = rand(2, 3, 4), rand(1, 1, 4, seed=1)
    assert torch.equal(mask_from_source(g, shared), mask_from_source(g, shared.repeat(2, 3, 1)))


@pytest.mark.parametrize("kind", ["stochastic", "bernoulli"])
def test_k1_sampled_masks_follow_the_formula_and_pass_the_gradient_through_g(kind: MaskKind) -> None:
    importances = {"first": rand(2, 3, 4).requires_grad_(True), "second": rand(2, 3, 5, seed=1).requires_grad_(True)}
    r = sources_behind(importances, kind, seed=3)
    masks = sample_masks(importances, kind=kind, generator=generator(3))
    for name, g in importances.items():
        torch.testing.assert_close(mask_of(masks[name]), g + (1 - g) * r[name], rtol=0, atol=1e-15)
        assert mask_of(masks[name]).requires_grad
        assert not delta_of(masks[name]).requires_grad
        (gradient,) = torch.autograd.grad(mask_of(masks[name]).sum(), g)
        torch.testing.assert_close(gradient, 1 - r[name], rtol=0, atol=1e-15)


def test_k1_stochastic_sources_are_uniform() -> None:
    r = sources_behind({"site": torch.zeros(20, 50, 20, dtype=torch.float64)}, "stochastic", seed=0)["site"]
    counts = [int(((r >= k / 10) & (r < (k + 1) / 10)).sum()) for k in range(10)]
    assert sum(counts) == r.numel()
    assert chi_square(counts, [r.numel() / 10] * 10) < CHI_SQUARE[9]


def test_k1_bernoulli_sources_are_zero_or_one_with_probability_one_half() -> None:
    r = sources_behind({"site": torch.zeros(20, 50, 20, dtype=torch.float64)}, "bernoulli", seed=0)["site"]
    assert set(r.unique().tolist()) == {0.0, 1.0}
    # Four standard deviations of a fair coin.
    assert abs(r.mean().item() - 0.5) < 4 * 0.5 / math.sqrt(r.numel())


@pytest.mark.parametrize("kind", RANDOM_KINDS)
def test_k2_delta_mask_is_drawn_per_position_without_importance(kind: MaskKind) -> None:
    importances = {"site": torch.ones(40, 250, 2, dtype=torch.float64)}
    delta = delta_of(sample_masks(importances, kind=kind, generator=generator())["site"])
    assert delta.shape == (40, 250)
    assert bool(((delta >= 0) & (delta <= 1)).all())
    assert abs(delta.mean().item() - 0.5) < 4 * 0.5 / math.sqrt(delta.numel())
    assert delta.std().item() > 0.25
    # Drawn with the importance at 0 it is the same: it does not depend on it.
    without = sample_masks({"site": importances["site"] * 0}, kind=kind, generator=generator())["site"]
    assert torch.equal(delta, delta_of(without))


def test_k2_stochastic_delta_mask_is_uniform() -> None:
    delta = delta_of(sample_masks({"site": torch.zeros(100, 100, 1)}, generator=generator())["site"])
    counts = [int(((delta >= k / 10) & (delta < (k + 1) / 10)).sum()) for k in range(10)]
    assert chi_square(counts, [1000.0] * 10) < CHI_SQUARE[9]


@pytest.mark.parametrize("kind", RANDOM_KINDS)
def test_k1_draws_are_independent_over_sites_positions_and_channels(kind: MaskKind) -> None:
    zeros = torch.zeros(50, 100, 2, dtype=torch.float64)
    masks = sample_masks({"first": zeros, "second": zeros}, kind=kind, generator=generator())
    first, second = mask_of(masks["first"]), mask_of(masks["second"])
    delta, other_delta = delta_of(masks["first"]), delta_of(masks["second"])
    bound = 4.5 / math.sqrt(49 * 99)
    pairs = {
        "sites": (first, second),
        "channels": (first[..., 0], first[..., 1]),
        "positions": (first[:, 1:], first[:, :-1]),
        "examples": (first[1:], first[:-1]),
        "delta and mask": (delta, first[..., 0]),
        "deltas of two sites": (delta, other_delta),
        "delta positions": (delta[:, 1:], delta[:, :-1]),
        "delta examples": (delta[1:], delta[:-1]),
    }
    assert {what for what, (x, y) in pairs.items() if abs(correlation(x, y)) > bound} == set()


# -- the kinds ----------------------------------------------------------------------------


def test_fixed_kinds_by_their_definition() -> None:
    g = torch.tensor([[[0.0, 0.49, 0.5], [0.51, 1.0, 0.2]]], dtype=torch.float64)
    drawn: dict[str, SiteMask] = {
        kind: sample_masks({"site": g}, kind=kind, generator=generator())["site"] for kind in FIXED_KINDS
    }
    assert torch.equal(mask_of(drawn["importance"]), g)
    assert mask_of(drawn["rounded"]).tolist() == [[[0, 0, 1], [1, 1, 0]]]
    assert drawn["none"].mask is None
    assert mask_of(drawn["off"]).tolist() == [[[0, 0, 0], [0, 0, 0]]]
    for kind in FIXED_KINDS:
        assert delta_of(drawn[kind]).tolist() == [[0, 0]], kind


def test_random_kind_ignores_the_importance() -> None:
    masks = [
        sample_masks({"site": torch.full((30, 30, 4), g)}, kind="random", generator=generator())["site"]
        for g in (0.0, 1.0)
    ]
    assert torch.equal(mask_of(masks[0]), mask_of(masks[1]))
    assert abs(mask_of(masks[0]).mean().item() - 0.5) < 4 * 0.289 / math.sqrt(3600)


@pytest.mark.parametrize("kind", RANDOM_KINDS + FIXED_KINDS)
def test_without_delta_the_delta_mask_is_zero(kind: MaskKind) -> None:
    importances = {"first": rand(2, 3, 4), "second": rand(2, 3, 4, seed=1)}
    masks = sample_masks(importances, kind=kind, delta=False, generator=generator())
    assert all(delta_of(m).tolist() == [[0, 0, 0], [0, 0, 0]] for m in masks.values())


@pytest.mark.parametrize("kind", RANDOM_KINDS + FIXED_KINDS)
def test_k6_the_same_generator_state_gives_the_same_masks_and_the_next_draw_is_fresh(kind: MaskKind) -> None:
    importances = {"first": rand(2, 3, 4), "second": rand(2, 3, 1, seed=1)}
    global_state = torch.get_rng_state()
    source = generator(5)
    first = sample_masks(importances, kind=kind, generator=source)
    second = sample_masks(importances, kind=kind, generator=source)
    again = sample_masks(importances, kind=kind, generator=generator(5))
    assert_same_masks(first, again)
    assert torch.equal(torch.get_rng_state(), global_state)
    if kind in RANDOM_KINDS:
        assert not torch.equal(mask_of(first["first"]), mask_of(second["first"]))
        assert not torch.equal(delta_of(first["first"]), delta_of(second["first"]))


def test_masks_of_bfloat16_importances_are_drawn_in_float32() -> None:
    g = rand(4, 8, 16).to(torch.bfloat16)
    site = sample_masks({"site": g}, generator=generator())["site"]
    assert mask_of(site).dtype == delta_of(site).dtype == torch.float32


def test_an_unknown_mask_kind_is_an_error_that_lists_the_kinds(without_type_checks: None) -> None:
    expected = "mask kind 'soft'; expected stochastic, bernoulli, random, importance, rounded, none or off"
    with pytest.raises(ValueError, match=expected):
        sample_masks({"site": rand(1, 1, 1)}, kind="soft", generator=generator())  # pyright: ignore


@PROPERTY
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple),
    st.integers(1, 5),
    st.integers(0, 99),
    st.sampled_from(RANDOM_KINDS + FIXED_KINDS),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_masks_have_the_shape_of_the_importance_and_lie_between_it_and_one(
    positions: tuple[int, ...], C: int, seed: int, kind: MaskKind, delta: bool, dtype: torch.dtype
) -> None:
    importances = {name: rand(*positions, C + i, seed=seed + i).to(dtype) for i, name in enumerate(("a", "b"))}
    for name, site in sample_masks(importances, kind=kind, delta=delta, generator=generator(seed)).items():
        g = importances[name]
        assert delta_of(site).shape == positions
        assert site.routed is None
        if kind == "none":
            continue
        mask = mask_of(site)
        assert mask.shape == g.shape
        assert mask.dtype == dtype
        assert bool(((mask >= 0) & (mask <= 1)).all())
        if kind in ("stochastic", "bernoulli", "importance"):
            assert bool((mask >= g).all())


# -- K5: routing ----------------------------------------------------------------------------


def shapes_of(n_sites: int, *positions: int) -> dict[str, torch.Size]:
    return {f"site{i}": torch.Size(positions) for i in range(n_sites)}


def test_k5_all_is_one_pass_with_every_site_everywhere() -> None:
    assert sample_routing(shapes_of(3, 2, 4), "all", generator=generator()) == [
        {"site0": None, "site1": None, "site2": None}
    ]


def test_k5_layerwise_is_one_pass_per_site_with_that_site_alone() -> None:
    passes = sample_routing(shapes_of(3, 2, 4), "layerwise", generator=generator())
    assert passes == [{"site0": None}, {"site1": None}, {"site2": None}]


def subset_at_positions(passes: list[dict[str, Tensor | None]]) -> list[frozenset[int]]:
    assert len(passes) == 1
    columns = []
    for where in passes[0].values():
        assert where is not None
        columns.append(where.reshape(-1).tolist())
    return [frozenset(i for i, on in enumerate(row) if on) for row in zip(*columns, strict=True)]


@pytest.mark.parametrize("n_sites", [3, 4])
def test_k5_subset_has_uniform_k_and_given_k_every_subset_equally_likely(n_sites: int) -> None:
    n = 20_000
    passes = sample_routing(shapes_of(n_sites, 100, n // 100), "subset", generator=generator())
    counts = Counter(subset_at_positions(passes))
    subsets = [frozenset(subset) for k in range(1, n_sites + 1) for subset in itertools.combinations(range(n_sites), k)]
    assert set(counts) == set(subsets)
    expected = [n / n_sites / math.comb(n_sites, len(subset)) for subset in subsets]
    assert chi_square([counts[subset] for subset in subsets], expected) < CHI_SQUARE[len(subsets) - 1]


def test_k5_subset_is_drawn_anew_at_every_position() -> None:
    passes = sample_routing(shapes_of(3, 100, 100), "subset", generator=generator())
    for where in passes[0].values():
        assert where is not None
        on = where.double()
        bound = 4.5 / math.sqrt(99 * 100)
        assert abs(correlation(on[:, 1:], on[:, :-1])) < bound
        assert abs(correlation(on[1:], on[:-1])) < bound


def test_k5_subset_of_one_site_is_that_site() -> None:
    (routed,) = sample_routing(shapes_of(1, 4, 5), "subset", generator=generator())
    where = routed["site0"]
    assert where is not None
    assert bool(where.all())


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_k5_static_probability_routes_every_site_and_position_independently(p: float) -> None:
    (routed,) = sample_routing(shapes_of(2, 100, 100), p, generator=generator())
    first, second = routed["site0"], routed["site1"]
    assert first is not None
    assert second is not None
    for where in (first, second):
        assert where.dtype == torch.bool
        assert abs(where.double().mean().item() - p) <= 4 * math.sqrt(p * (1 - p) / 10_000)
    if 0 < p < 1:
        assert abs(correlation(first.double(), second.double())) < 0.045
        assert abs(correlation(first[:, 1:].double(), first[:, :-1].double())) < 0.045


def test_k5_subset_gives_all_heads_of_a_position_the_same_draw() -> None:
    shapes = {"heads": torch.Size([2, 50, 3]), "plain": torch.Size([2, 50])}
    (routed,) = sample_routing(shapes, "subset", generator=generator())
    heads, plain = routed["heads"], routed["plain"]
    assert heads is not None
    assert plain is not None
    assert heads.shape == (2, 50, 3)
    assert torch.equal(heads[..., 0], heads[..., 1])
    assert torch.equal(heads[..., 0], heads[..., 2])
    assert bool((heads[..., 0] | plain).all())
    assert 0 < heads[..., 0].double().mean() < 1


@pytest.mark.parametrize("p", [-0.1, 1.5, math.nan])
def test_a_probability_outside_zero_to_one_is_an_error(p: float) -> None:
    with pytest.raises(ValueError, match=rf"routing={p}; a static probability lies between 0 and 1"):
        sample_routing(shapes_of(1, 2), p, generator=generator())


def test_an_unknown_routing_is_an_error_that_lists_the_routings(without_type_checks: None) -> None:
    with pytest.raises(ValueError, match="routing='some'; expected 'all', 'layerwise', 'subset' or a probability"):
        sample_routing(shapes_of(1, 2), "some", generator=generator())  # pyright: ignore


def test_subset_routing_over_different_positions_is_an_error() -> None:
    shapes = {"short": torch.Size([2, 3]), "long": torch.Size([2, 4])}
    with pytest.raises(ValueError, match=r"same positions, got shapes \[\(2, 3\), \(2, 4\)\]"):
        sample_routing(shapes, "subset", generator=generator())


@pytest.mark.parametrize("routing", ["subset", 0.3])
def test_k6_the_same_generator_state_gives_the_same_routing(routing: Routing) -> None:
    def drawn(source: torch.Generator) -> list[frozenset[int]]:
        return subset_at_positions(sample_routing(shapes_of(3, 4, 5), routing, generator=source))

    source, global_state = generator(5), torch.get_rng_state()
    first = drawn(source)
    assert drawn(generator(5)) == first
    assert drawn(source) != first
    assert torch.equal(torch.get_rng_state(), global_state)


@PROPERTY
@given(
    st.integers(1, 5),
    st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple),
    st.sampled_from(ROUTINGS),
    st.integers(0, 99),
)
def test_routing_covers_known_sites_only_with_one_flag_per_position(
    n_sites: int, positions: tuple[int, ...], routing: Routing, seed: int
) -> None:
    shapes = shapes_of(n_sites, *positions)
    passes = sample_routing(shapes, routing, generator=generator(seed))
    assert len(passes) == (n_sites if routing == "layerwise" else 1)
    assert {name for routed in passes for name in routed} == set(shapes)
    for routed in passes:
        for where in routed.values():
            assert (where is None) == (routing in ("all", "layerwise"))
            assert where is None or (where.shape == positions and where.dtype == torch.bool)
    if routing == "subset":
        assert all(1 <= len(subset) <= n_sites for subset in subset_at_positions(passes))


def test_route_attaches_the_routing_and_leaves_out_what_is_not_named() -> None:
    importances = {name: rand(2, 3, 4, seed=i) for i, name in enumerate(("a", "b", "c"))}
    masks = sample_masks(importances, generator=generator())
    where = torch.tensor([[True, False, True], [False, False, True]])
    routed = route(masks, {"b": where, "a": None})
    assert set(routed) == {"a", "b"}
    assert routed["a"].routed is None
    assert routed["b"].routed is not None
    assert torch.equal(routed["b"].routed, where)
    for name in routed:
        assert routed[name].mask is masks[name].mask
        assert routed[name].delta is masks[name].delta
    assert masks["b"].routed is None


def test_route_keeps_masks_of_ones() -> None:
    where = torch.tensor([True, False])
    routed = route({"site": SiteMask(None, None)}, {"site": where})
    assert routed["site"].mask is None
    assert routed["site"].delta is None
    assert routed["site"].routed is where
