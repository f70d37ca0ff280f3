"""Adversarial sources: K3 against sign steps and corner searches by hand, K4 against a hand-written Adam."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from spd_lens.core import SiteMask
from spd_lens.objective import (
    PGD,
    Persistent,
    PersistentSources,
    Scope,
    Sources,
    ascend,
    random_sources,
    reconstruction_loss,
)
from tests.small_models import generator, rand, randn

PROPERTY = settings(deadline=None, max_examples=40, derandomize=True, database=None)
SCOPES: list[Scope] = ["position", "example", "batch"]


def two_sites(batch: int = 2, pos: int = 3) -> dict[str, Tensor]:
    return {"first": rand(batch, pos, 2), "second": rand(batch, pos, 4, seed=1)}


# -- where the sources start ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scope", "lead", "head_lead", "flat_lead"),
    [
        ("position", (2, 3), (2, 3, 5), (2,)),
        ("example", (2, 1), (2, 1, 1), (2,)),
        ("batch", (1, 1), (1, 1, 1), (1,)),
    ],
)
def test_k3_sources_have_c_plus_one_channels_in_the_shape_of_the_scope(
    scope: Scope, lead: tuple[int, ...], head_lead: tuple[int, ...], flat_lead: tuple[int, ...]
) -> None:
    sources = random_sources(two_sites(), scope, generator())
    assert {name: tuple(s.shape) for name, s in sources.items()} == {"first": (*lead, 3), "second": (*lead, 5)}
    heads = random_sources({"site": rand(2, 3, 5, 4)}, scope, generator())
    assert heads["site"].shape == (*head_lead, 5)
    flat = random_sources({"site": rand(2, 4)}, scope, generator())
    assert flat["site"].shape == (*flat_lead, 5)


def test_k3_sources_start_uniform_and_independent_of_the_importance() -> None:
    importances = {"zeros": torch.zeros(20, 50, 9), "ones": torch.ones(20, 50, 9)}
    sources = random_sources(importances, "position", generator())
    for s in sources.values():
        counts = [int(((s >= k / 10) & (s < (k + 1) / 10)).sum()) for k in range(10)]
        # 0.999 quantile of chi-square with 9 degrees of freedom.
        assert sum((count - 1000) ** 2 / 1000 for count in counts) < 27.88
    pair = torch.stack([s.reshape(-1) for s in sources.values()])
    assert abs(float(torch.corrcoef(pair)[0, 1])) < 0.045


@PROPERTY
@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple),
    st.integers(1, 4),
    st.sampled_from(SCOPES),
    st.integers(0, 99),
)
def test_k6_sources_come_from_the_generator_alone_and_broadcast_over_the_importance(
    positions: tuple[int, ...], C: int, scope: Scope, seed: int
) -> None:
    importances, global_state = {"site": rand(*positions, C)}, torch.get_rng_state()
    s = random_sources(importances, scope, generator(seed))["site"]
    assert torch.equal(s, random_sources(importances, scope, generator(seed))["site"])
    assert torch.equal(torch.get_rng_state(), global_state)
    assert torch.broadcast_shapes(s.shape, (*positions, C + 1)) == (*positions, C + 1)
    assert s.dtype == torch.float64
    assert not s.requires_grad
    assert bool(((s >= 0) & (s < 1)).all())


def test_k3_sources_of_bfloat16_importances_are_kept_in_float32() -> None:
    s = random_sources({"site": torch.zeros(20, 50, 9, dtype=torch.bfloat16)}, "position", generator())["site"]
    assert s.dtype == torch.float32
    assert bool((s < 1).all())


# -- K3: sign steps ----------------------------------------------------------------------------


def quadratic(n: int, seed: int = 0) -> tuple[Callable[[Mapping[str, Tensor]], Tensor], list[list[float]], list[float]]:
    """`f(s) = s A s / 2 + b s` over the concatenated sources, with A symmetric; A and b as lists for the hand."""
    A, b = randn(n, n, seed=seed), randn(n, seed=seed + 1)
    A = (A + A.T) / 2

    def objective(sources: Mapping[str, Tensor]) -> Tensor:
        s = torch.cat([sources[name].reshape(-1) for name in sorted(sources)])
        return s @ A @ s / 2 + b @ s

    return objective, A.tolist(), b.tolist()


def gradient_by_hand(A: list[list[float]], b: list[float], s: list[float]) -> list[float]:
    return [sum(A[i][j] * s[j] for j in range(len(s))) + b[i] for i in range(len(s))]


def flat(sources: Mapping[str, Tensor]) -> list[float]:
    return torch.cat([sources[name].detach().reshape(-1) for name in sorted(sources)]).tolist()


@PROPERTY
@given(st.integers(0, 12), st.sampled_from([0.03, 0.1, 0.7]), st.integers(0, 99))
def test_k3_every_step_adds_the_step_size_times_the_sign_and_clamps(steps: int, size: float, seed: int) -> None:
    objective, A, b = quadratic(8, seed)
    sources = random_sources({"first": rand(1, 1, 2), "second": rand(1, 1, 4)}, "batch", generator(seed))
    by_hand = flat(sources)
    for _ in range(steps):
        gradient = gradient_by_hand(A, b, by_hand)
        moved = [s + size * math.copysign(1, d) for s, d in zip(by_hand, gradient, strict=True)]
        by_hand = [min(max(s, 0.0), 1.0) for s in moved]
    found = ascend(objective, sources, PGD(steps=steps, step_size=size))
    assert flat(found) == pytest.approx(by_hand, abs=1e-12)
    assert {name: s.shape for name, s in found.items()} == {name: s.shape for name, s in sources.items()}
    assert not any(s.requires_grad for s in found.values())


@PROPERTY
@given(st.integers(0, 999), st.booleans())
def test_k3_finds_the_best_corner_of_a_monotone_objective(seed: int, curved: bool) -> None:
    slope, bend = randn(6, seed=seed), rand(6, seed=seed + 1) if curved else torch.zeros(6, dtype=torch.float64)

    def objective(sources: Mapping[str, Tensor]) -> Tensor:
        s = sources["site"].reshape(-1)
        # Between 0 and 1 the slope keeps its sign: the maximum is a corner, and which one is found by trying all.
        return (slope * (s + bend * s.square() / 2)).sum()

    def at(corner: tuple[float, ...]) -> float:
        return objective({"site": torch.tensor(corner, dtype=torch.float64)}).item()

    best = max(itertools.product([0.0, 1.0], repeat=6), key=at)
    start = random_sources({"site": rand(1, 1, 5)}, "batch", generator(seed))
    found = ascend(objective, start, PGD(steps=10, step_size=0.1))
    assert flat(found) == list(best)


def test_k3_sources_without_gradient_stay_where_they_are() -> None:
    start = random_sources(two_sites(), "batch", generator())
    found = ascend(lambda s: (s["first"] * torch.tensor([1.0, 0.0, -1.0])).sum(), start, PGD(steps=3, step_size=0.5))
    assert torch.equal(found["second"], start["second"])
    assert found["first"][0, 0].tolist() == [1.0, start["first"][0, 0, 1].item(), 0.0]


def test_k3_zero_steps_return_the_sources_without_an_evaluation() -> None:
    def objective(sources: Mapping[str, Tensor]) -> Tensor:
        raise AssertionError("evaluated")

    start = random_sources(two_sites(), "example", generator())
    found = ascend(objective, start, PGD(steps=0))
    assert all(torch.equal(found[name], start[name]) for name in start)


def test_k3_the_sources_passed_in_are_not_changed() -> None:
    objective, _, _ = quadratic(8)
    start = random_sources({"first": rand(1, 1, 2), "second": rand(1, 1, 4)}, "batch", generator())
    before = flat(start)
    ascend(objective, start, PGD(steps=5))
    assert flat(start) == before
    assert not any(s.requires_grad for s in start.values())


@pytest.mark.parametrize("steps", [1, 4])
def test_e1_the_budget_is_one_evaluation_per_step(steps: int) -> None:
    calls: list[Sources] = []

    def objective(sources: Mapping[str, Tensor]) -> Tensor:
        calls.append({name: s.detach().clone() for name, s in sources.items()})
        return sum((s.sum() for s in sources.values()), torch.zeros(()))

    ascend(objective, random_sources(two_sites(), "batch", generator()), PGD(steps=steps))
    assert len(calls) == steps


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"steps": -1}, "steps=-1; expected at least 0"),
        ({"step_size": 0.0}, "step_size=0; expected a number above 0"),
        ({"step_size": -0.1}, r"step_size=-0\.1; expected a number above 0"),
        ({"scope": "token"}, r"scope='token'; expected 'position', 'example' or 'batch'"),
    ],
)
def test_an_impossible_budget_is_an_error(without_type_checks: None, arguments: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        PGD(**arguments)


# -- K3 on a model: one linear site by M1 ----------------------------------------------------------------------------

BATCH, POS, D_IN, C, D_OUT = 2, 2, 3, 2, 4


class LinearSite:
    """`y = (m * (x V)) U + d * x (W - V U)` with parameters that ask for gradients, as in training."""

    def __init__(self, seed: int = 0) -> None:
        self.x, self.W = randn(BATCH, POS, D_IN, seed=seed), randn(D_IN, D_OUT, seed=seed + 1)
        self.V = randn(D_IN, C, seed=seed + 2).requires_grad_(True)
        self.U = randn(C, D_OUT, seed=seed + 3).requires_grad_(True)
        self.g = rand(BATCH, POS, C, seed=seed + 4).requires_grad_(True)
        self.clean = self.x @ self.W

    def output(self, mask: Tensor, delta: Tensor) -> Tensor:
        return (mask * (self.x @ self.V)) @ self.U + delta.unsqueeze(-1) * (self.x @ (self.W - self.V @ self.U))

    def forward(self, masks: Mapping[str, SiteMask]) -> Tensor:
        site = masks["site"]
        assert site.mask is not None
        assert site.delta is not None
        return self.output(site.mask, site.delta)

    def objective(self, sources: Mapping[str, Tensor]) -> Tensor:
        return reconstruction_loss(
            self.forward, self.clean, {"site": self.g}, masks=sources, kind="mse", generator=generator()
        )

    def loss_by_hand(self, corner: tuple[float, ...]) -> float:
        s = torch.tensor(corner, dtype=torch.float64).expand(BATCH, POS, C + 1)
        with torch.no_grad():
            y = self.output(self.g + (1 - self.g) * s[..., :-1], s[..., -1])
        return float((y - self.clean).square().mean())


@pytest.mark.parametrize("seed", [0, 10, 20])
def test_k3_e1_the_worst_shared_masks_of_a_linear_site_are_found(seed: int) -> None:
    # The error is convex in the sources, so its maximum over the cube is at one of the 2^(C + 1) corners.
    site = LinearSite(seed)
    worst = max(site.loss_by_hand(corner) for corner in itertools.product([0.0, 1.0], repeat=C + 1))
    found = []
    for start_seed in range(4):
        start = random_sources({"site": site.g.detach()}, "batch", generator(start_seed))
        sources = ascend(site.objective, start, PGD(steps=20, step_size=0.1))
        assert site.objective(sources).item() > site.objective(start).item()
        found.append(site.objective(sources).item())
    assert max(found) == pytest.approx(worst, rel=1e-12)


@pytest.mark.parametrize("seed", [0, 10, 20])
def test_k3_finer_scopes_are_at_least_as_bad_for_the_model(seed: int) -> None:
    site, loss = LinearSite(seed), {}
    for scope in SCOPES:
        found = []
        for start_seed in range(4):
            start = random_sources({"site": site.g.detach()}, scope, generator(start_seed))
            found.append(site.objective(ascend(site.objective, start, PGD(20, 0.1, scope))).item())
        loss[scope] = max(found)
    assert loss["position"] >= loss["example"] - 1e-12
    assert loss["example"] >= loss["batch"] - 1e-12
    assert loss["position"] > loss["batch"] * (1 + 1e-6)


def test_k3_the_last_channel_moves_the_delta_mask_alone() -> None:
    site = LinearSite()
    sources = {"site": torch.tensor([[[0.3, 0.6, 0.2]]], dtype=torch.float64)}
    moved = {"site": torch.tensor([[[0.3, 0.6, 0.9]]], dtype=torch.float64)}
    seen: list[Mapping[str, SiteMask]] = []

    def forward(masks: Mapping[str, SiteMask]) -> Tensor:
        seen.append(masks)
        return site.forward(masks)

    for s in (sources, moved):
        reconstruction_loss(forward, site.clean, {"site": site.g}, masks=s, kind="mse", generator=generator())
    assert torch.equal(seen[0]["site"].mask, seen[1]["site"].mask)
    assert torch.equal(seen[1]["site"].delta, torch.full((BATCH, POS), 0.9, dtype=torch.float64))


@pytest.mark.parametrize("grad_enabled", [True, False])
def test_k3_gradients_reach_the_sources_only(grad_enabled: bool) -> None:
    site = LinearSite()
    start = random_sources({"site": site.g.detach()}, "batch", generator())
    with torch.set_grad_enabled(grad_enabled):
        found = ascend(site.objective, start, PGD(steps=3))
        assert not torch.equal(found["site"], start["site"])
        persistent = PersistentSources({"site": site.g.detach()}, Persistent(warm_steps=3), generator=generator())
        persistent.warm(site.objective)
        assert not torch.equal(persistent.tensors()["site"].detach(), start["site"])
    assert all(tensor.grad is None for tensor in (site.g, site.V, site.U, start["site"], found["site"]))
    assert persistent.tensors()["site"].grad is None


# -- K4: persistent sources ----------------------------------------------------------------------------


class AdamByHand:
    """Adam(0.5, 0.99), lr 0.01, climbing, every step followed by a clamp to [0, 1]; python floats."""

    def __init__(self, start: list[float]) -> None:
        self.s, self.t = list(start), 0
        self.m, self.v = [0.0] * len(start), [0.0] * len(start)

    def step(self, gradient: list[float]) -> None:
        self.t += 1
        for i, d in enumerate(gradient):
            self.m[i] = 0.5 * self.m[i] + 0.5 * d
            self.v[i] = 0.99 * self.v[i] + 0.01 * d * d
            m_hat, v_hat = self.m[i] / (1 - 0.5**self.t), self.v[i] / (1 - 0.99**self.t)
            self.s[i] = min(max(self.s[i] + 0.01 * m_hat / (math.sqrt(v_hat) + 1e-8), 0.0), 1.0)


def persistent_pair(warm_steps: int, seed: int = 0) -> PersistentSources:
    return PersistentSources(
        {"first": rand(2, 3, 2), "second": rand(2, 3, 4)}, Persistent(warm_steps=warm_steps), generator=generator(seed)
    )


def training_step(persistent: PersistentSources, objective: Callable[[Mapping[str, Tensor]], Tensor]) -> None:
    persistent.warm(objective)
    objective(persistent.tensors()).backward()
    persistent.ascend_from_graph()


@pytest.mark.parametrize("warm_steps", [0, 1, 3])
def test_k4_equals_adam_by_hand_with_n_warm_ascents_and_one_more_per_training_step(warm_steps: int) -> None:
    objective, A, b = quadratic(8)
    calls = 0

    def counted(sources: Mapping[str, Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        return objective(sources)

    persistent = persistent_pair(warm_steps)
    by_hand = AdamByHand(flat(persistent.tensors()))
    training_steps = 40
    for i in range(training_steps):
        before = calls
        training_step(persistent, counted)
        assert calls - before == warm_steps + 1
        for _ in range(warm_steps + 1):
            by_hand.step(gradient_by_hand(A, b, by_hand.s))
        assert flat(persistent.tensors()) == pytest.approx(by_hand.s, abs=1e-12), i
        assert all(s.grad is None for s in persistent.tensors().values())
    # The clamp has been at work, or this would not test it.
    assert warm_steps < 3 or {0.0, 1.0} & set(by_hand.s)


def test_k4_the_last_ascent_uses_the_gradient_of_the_training_loss() -> None:
    persistent = persistent_pair(warm_steps=2)
    start = flat(persistent.tensors())
    persistent.warm(lambda sources: sum((s.sum() for s in sources.values()), torch.zeros(())))
    warmed = flat(persistent.tensors())
    assert all(after >= before for before, after in zip(start, warmed, strict=True))
    assert warmed != start
    by_hand = AdamByHand(start)
    for _ in range(2):
        by_hand.step([1.0] * 8)
    loss = sum((-3 * s.sum() for s in persistent.tensors().values()), torch.zeros(()))
    loss.backward()
    persistent.ascend_from_graph()
    by_hand.step([-3.0] * 8)
    assert flat(persistent.tensors()) == pytest.approx(by_hand.s, abs=1e-12)


def test_k4_sources_are_shared_over_batch_and_positions_and_ask_for_gradients() -> None:
    persistent = persistent_pair(warm_steps=1)
    assert {name: tuple(s.shape) for name, s in persistent.tensors().items()} == {
        "first": (1, 1, 3),
        "second": (1, 1, 5),
    }
    assert all(s.requires_grad and s.is_leaf for s in persistent.tensors().values())
    same = random_sources({"first": rand(2, 3, 2), "second": rand(2, 3, 4)}, "batch", generator())
    assert flat(persistent.tensors()) == flat(same)


def test_k4_sources_that_the_loss_does_not_reach_stay() -> None:
    persistent = persistent_pair(warm_steps=2)
    before = persistent.tensors()["second"].detach().clone()
    training_step(persistent, lambda sources: sources["first"].sum())
    assert torch.equal(persistent.tensors()["second"].detach(), before)
    assert not torch.equal(persistent.tensors()["first"].detach(), persistent_pair(2).tensors()["first"].detach())


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_k4_stays_in_the_unit_cube_and_reaches_the_best_corner(scale: float) -> None:
    slope = scale * torch.tensor([1.0, -1.0, 2.0, -0.5, 1.0, 1.0, -3.0, 0.2], dtype=torch.float64)
    persistent = persistent_pair(warm_steps=9)

    def objective(sources: Mapping[str, Tensor]) -> Tensor:
        return (slope * torch.cat([s.reshape(-1) for s in sources.values()])).sum()

    for _ in range(11):
        training_step(persistent, objective)
        assert all(0 <= s <= 1 for s in flat(persistent.tensors()))
    assert flat(persistent.tensors()) == [1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0]


def continued(persistent: PersistentSources, steps: int) -> list[float]:
    objective, _, _ = quadratic(8)
    for _ in range(steps):
        training_step(persistent, objective)
    return flat(persistent.tensors())


def test_k4_continues_bit_for_bit_from_a_file(tmp_path: Path) -> None:
    persistent = persistent_pair(warm_steps=2)
    continued(persistent, 3)
    # The file sorts its keys, so the sites come back in another order than they went in.
    save_file({key: x.contiguous() for key, x in persistent.tensors_by_name().items()}, tmp_path / "adversary")
    resumed = PersistentSources.from_tensors(
        load_file(tmp_path / "adversary"), persistent.spec, device=torch.device("cpu")
    )
    assert resumed.spec.warm_steps == 2
    assert flat(resumed.tensors()) == flat(persistent.tensors())
    assert all(s.requires_grad and s.is_leaf for s in resumed.tensors().values())
    assert continued(resumed, 4) == continued(persistent, 4)


@pytest.mark.parametrize("steps", [0, 2])
def test_k4_continues_bit_for_bit_when_some_sources_have_no_moments_yet(steps: int) -> None:
    persistent = persistent_pair(warm_steps=1)
    for _ in range(steps):
        training_step(persistent, lambda sources: sources["second"].square().sum())
    resumed = PersistentSources.from_tensors(persistent.tensors_by_name(), persistent.spec, device=torch.device("cpu"))
    assert continued(resumed, 3) == continued(persistent, 3)


def test_k4_restored_sources_share_no_memory_with_what_they_came_from() -> None:
    persistent = persistent_pair(warm_steps=2)
    continued(persistent, 3)
    saved = {key: x.clone() for key, x in persistent.tensors_by_name().items()}
    results = []
    for _ in range(2):
        resumed = PersistentSources.from_tensors(saved, persistent.spec, device=torch.device("cpu"))
        results.append(continued(resumed, 4))
    assert results[0] == results[1] == continued(persistent, 4)


def test_k4_without_its_moments_a_restart_would_differ() -> None:
    persistent = persistent_pair(warm_steps=2)
    continued(persistent, 3)
    forgetful = persistent_pair(warm_steps=2)
    with torch.no_grad():
        for name, s in forgetful.tensors().items():
            s.copy_(persistent.tensors()[name])
    assert continued(forgetful, 4) != continued(persistent, 4)


def test_k4_saved_tensors_that_are_kept_in_memory_are_not_changed_by_going_on() -> None:
    persistent = persistent_pair(warm_steps=2)
    continued(persistent, 3)
    saved, at_save = persistent.tensors_by_name(), flat(persistent.tensors())
    expected = continued(persistent, 4)
    resumed = PersistentSources.from_tensors(saved, persistent.spec, device=torch.device("cpu"))
    assert flat(resumed.tensors()) == at_save
    assert continued(resumed, 4) == expected
