"""Mask sources: K4b against Adam by hand for every row and position, L9 against two passes, names and budgets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from spd_lens.core import SiteMask
from spd_lens.objective import (
    PGD,
    AdversarialMasks,
    Climb,
    Merged,
    MergedMasks,
    Persistent,
    PersistentMasks,
    SampledMasks,
    mask_source,
    random_sources,
)
from tests.small_models import generator, rand

from tests.objective.test_adversary import AdamByHand  # isort: skip

G = {"first": rand(4, 3, 2), "second": rand(4, 3, 5, seed=1)}
PULL = {"first": rand(4, 3, 2, seed=5) - 0.5, "second": rand(4, 3, 5, seed=6) - 0.5}


def linear(masks: Mapping[str, SiteMask], rows: int | None = None) -> Tensor:
    """A loss that pulls every mask at every row and position with a force of its own, and the delta mask up."""
    total = torch.zeros(())
    for name, mask in masks.items():
        assert mask.mask is not None
        assert mask.delta is not None
        total = total + (mask.mask * PULL[name][: len(mask.mask)]).sum() + mask.delta.sum()
    return total


def climb(source: Any, progress: float = 1.0) -> None:
    source.climb(Climb(linear, G, generator(), progress=progress))


def test_k4b_every_row_and_position_has_a_source_of_its_own_that_climbs_by_adam() -> None:
    source = PersistentMasks(Persistent(warm_steps=2, scope="position"))
    climb(source)
    assert source.sources is not None
    found = {name: s.detach().clone() for name, s in source.sources.tensors().items()}
    assert {name: tuple(s.shape) for name, s in found.items()} == {"first": (4, 3, 3), "second": (4, 3, 6)}
    start = PersistentMasks(Persistent(warm_steps=0, scope="position"))
    climb(start)
    assert start.sources is not None
    for name, own in found.items():
        force = torch.cat([PULL[name] * (1 - G[name]), torch.ones(4, 3, 1)], dim=-1).flatten().tolist()
        by_hand = AdamByHand(start.sources.tensors()[name].detach().flatten().tolist())
        for _ in range(2):
            by_hand.step(force)
        assert own.flatten().tolist() == pytest.approx(by_hand.s, abs=1e-6)


def test_k4b_learning_rate_warms_up_and_the_adversary_starts_when_it_is_told() -> None:
    late = PersistentMasks(Persistent(start=0.5, lr_warmup=0.5, lr=0.1))
    climb(late, progress=0.49)
    assert late.sources is None
    drawn = late.masks(G, delta=True, generator=generator(3))
    expected = SampledMasks("stochastic").masks(G, delta=True, generator=generator(3))
    for name in G:
        assert torch.equal(drawn[name].mask, expected[name].mask)  # pyright: ignore
    rates = []
    for progress in (0.5, 0.625, 0.75, 1.0):
        climb(late, progress=progress)
        assert late.sources is not None
        rates.append(late.sources._adam.param_groups[0]["lr"])
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.1])


def test_k4b_state_brings_back_sources_and_moments() -> None:
    one = PersistentMasks(Persistent(scope="position"))
    climb(one)
    other = PersistentMasks(Persistent(scope="position"))
    other.load(one.state(), torch.device("cpu"))
    for source in (one, other):
        climb(source)
    assert one.sources is not None
    assert other.sources is not None
    for name, expected in one.sources.tensors().items():
        assert torch.equal(other.sources.tensors()[name], expected)


def test_a_batch_of_another_shape_is_refused_with_the_way_out() -> None:
    source = PersistentMasks(Persistent(scope="position"))
    climb(source)
    smaller = {name: g[:2] for name, g in G.items()}
    with pytest.raises(ValueError, match=r"every batch must have the same shape .* scope='batch'"):
        source.climb(Climb(linear, smaller, generator()))


def test_l9_the_first_rows_are_adversarial_everywhere_and_the_others_stochastic_where_routed() -> None:
    source = MergedMasks(Merged(0.5, Persistent(warm_steps=0, scope="position")))
    seen: list[int | None] = []

    def objective(masks: Mapping[str, SiteMask], rows: int | None) -> Tensor:
        seen.append(rows)
        return linear(masks)

    source.climb(Climb(objective, G, generator()))
    masks = source.masks(G, delta=True, generator=generator(3))
    assert source.sources is not None
    sources = source.sources.tensors()
    drawn = SampledMasks("stochastic").masks({n: g[2:] for n, g in G.items()}, delta=True, generator=generator(3))
    for name, g in G.items():
        own, s = masks[name], sources[name].detach()
        assert s.shape[0] == 2
        assert torch.allclose(own.mask[:2].detach(), g[:2] + (1 - g[:2]) * s[..., :-1])  # pyright: ignore
        assert torch.equal(own.delta[:2].detach(), s[..., -1])  # pyright: ignore
        assert torch.equal(own.mask[2:], drawn[name].mask)  # pyright: ignore
    where = torch.zeros(4, 3, dtype=torch.bool)
    routed = source.routed({"first": where, "second": None})
    assert routed["first"].tolist() == [[True] * 3] * 2 + [[False] * 3] * 2  # pyright: ignore
    assert routed["second"] is None
    assert not where.any()
    climbing = MergedMasks(Merged(0.5, Persistent(warm_steps=1, scope="position")))
    climbing.climb(Climb(objective, G, generator()))
    assert seen == [2]


def test_l9_needs_a_row_for_each() -> None:
    one_row = {name: g[:1] for name, g in G.items()}
    with pytest.raises(ValueError, match="at least two rows"):
        MergedMasks(Merged()).climb(Climb(linear, one_row, generator()))


def test_names_and_budgets_stand_for_sources(without_type_checks: None) -> None:
    assert isinstance(mask_source("stochastic"), SampledMasks)
    assert mask_source("pgd").pgd == PGD()  # pyright: ignore
    assert isinstance(mask_source(PGD(3)), AdversarialMasks)
    own = SampledMasks("none")
    assert mask_source(own) is own
    with pytest.raises(ValueError, match=r"masks='stochastik'; expected 'stochastic'"):
        mask_source("stochastik")  # pyright: ignore
    with pytest.raises(TypeError, match="masks is a int"):
        mask_source(3)  # pyright: ignore


@pytest.mark.parametrize(
    "make",
    [
        lambda: Persistent(warm_steps=-1),
        lambda: Persistent(lr=0.0),
        lambda: Persistent(lr=float("nan")),
        lambda: Persistent(start=1.0),
        lambda: Persistent(betas=(0.5, 1.0)),
        lambda: Persistent(scope="row"),  # pyright: ignore
        lambda: Merged(share=1.0),
        lambda: Merged(share=float("nan")),
        lambda: PGD(steps=-1),
        lambda: PGD(step_size=float("nan")),
    ],
)
def test_budgets_that_make_no_sense_are_refused(make: Any, without_type_checks: None) -> None:
    with pytest.raises(ValueError, match="expected"):
        make()


@pytest.mark.parametrize("parts", [(5,), (2, 3), (0, 1, 4)])
def test_k3_a_climb_goes_on_from_where_it_was(parts: tuple[int, ...]) -> None:
    """However five ascents are shared out; a linear loss moves every source by the same steps, up to 0 or 1."""
    source = AdversarialMasks(PGD(parts[0], 0.03, "position"))
    climb(source)
    for steps in parts[1:]:
        source.climb_on(Climb(linear, G, generator(9)), steps)
    starts = random_sources(G, "position", generator())
    masks = source.masks(G, delta=True, generator=generator())
    for name, g in G.items():
        slopes = torch.cat([PULL[name].sign(), torch.ones(4, 3, 1)], dim=-1)
        s = (starts[name] + 5 * 0.03 * slopes).clamp(0, 1)
        torch.testing.assert_close(masks[name].mask, g + (1 - g) * s[..., :-1])
        torch.testing.assert_close(masks[name].delta, s[..., -1])
