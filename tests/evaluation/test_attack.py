"""The worst case (K3, E1, E1b): against brute force, its ladder, its span."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spd_lens import Decomposition, Reconstruction, decompose, evaluate, train
from spd_lens.core import SiteMask
from spd_lens.data import as_batch
from spd_lens.evaluation import LADDER, Attack, Held, Passes, WorstMasks, climb, worst_case
from spd_lens.objective import Climb
from tests.small_models import TiedAutoencoder, generator, tiny_transformer, tokens


def _autoencoder(seed: int) -> tuple[Decomposition, Tensor]:
    decomposition = decompose(TiedAutoencoder(seed=seed).double(), {"*": 3}, seed=seed)
    decomposition.to(torch.float64)
    x = torch.rand(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return decomposition, x


def _worst_corner(decomposition: Decomposition, x: Tensor) -> float:
    """The largest error over all 256 corners of the sources, with the masked model written out."""
    g = decomposition.importance(x)
    weight = decomposition["encoder.W"]
    V, U, W, b = weight.V.detach(), weight.U.detach(), weight.target_weight.detach(), decomposition.model.b.detach()
    clean = torch.relu(x @ W @ W.T + b)
    worst = 0.0
    for corner in itertools.product((0.0, 1.0), repeat=8):
        s = torch.tensor(corner, dtype=torch.float64)
        m_in = g["encoder.W"] + (1 - g["encoder.W"]) * s[:3]
        m_out = g["decoder.W"] + (1 - g["decoder.W"]) * s[4:7]
        hidden = (m_in * (x @ V)) @ U + s[3] * (x @ (W - V @ U))
        out = (m_out * (hidden @ U.T)) @ V.T + s[7] * (hidden @ (W - V @ U).T)
        worst = max(worst, float((torch.relu(out + b) - clean).square().mean()))
    return worst


@pytest.mark.parametrize("seed", range(4))
def test_the_adversary_reaches_what_brute_force_over_all_corners_finds(seed: int) -> None:
    decomposition, x = _autoencoder(seed)
    found = worst_case(decomposition, [x], steps=(40,), starts=16, kind="mse").divergence[40]
    assert 0.98 * _worst_corner(decomposition, x) <= found <= 1.1 * _worst_corner(decomposition, x)


class Tent(Held):
    """A divergence of one source with its peak of 1 at 0.53; it remembers every value that was asked for."""

    def __init__(self) -> None:
        values: dict[str, Any] = {"importances": {"s": torch.zeros(1, 1)}, "counted": torch.ones(1, dtype=torch.bool)}
        for name, value in {**values, "seen": []}.items():
            object.__setattr__(self, name, value)

    def forward(self, masks: Mapping[str, SiteMask]) -> Tensor:
        mask = masks["s"].mask
        assert mask is not None
        return mask.flatten()

    def divergences(self, output: Tensor) -> Tensor:
        value = 1 - (output - 0.53).abs()
        self.seen.append(float(value.detach()))  # pyright: ignore[reportAttributeAccessIssue]
        return value


def _climb(tent: Tent, budgets: tuple[int, ...], start: float = 0.0) -> dict[int, float]:
    with torch.no_grad():
        found = climb([tent], {"s": torch.tensor([[start, 0.5]])}, budgets, 0.1)
    return {steps: value for steps, (value, _) in found.items()}


def test_the_reported_value_is_the_largest_at_any_step_and_one_climb_serves_the_ladder() -> None:
    tent = Tent()
    found = _climb(tent, LADDER)
    seen: list[float] = tent.seen  # pyright: ignore[reportAttributeAccessIssue]
    assert len(seen) == max(LADDER) + 1
    for steps, value in found.items():
        assert value == pytest.approx(max(seen[: steps + 1]), abs=1e-6)
    assert list(found.values()) == sorted(found.values())
    # The last point is not always the best one, so that reporting it would understate.
    assert any(seen[steps] < value for steps, value in found.items())


def test_falling_steps_reach_a_peak_that_steps_of_one_size_jump_over() -> None:
    assert _climb(Tent(), (160,))[160] > 0.999
    fixed, source = 0.0, 0.0
    for _ in range(160):
        fixed = max(fixed, 1 - abs(source - 0.53))
        source += 0.1 if source < 0.53 else -0.1
    assert fixed < 0.98


def test_a_budget_gives_the_same_alone_and_within_a_ladder() -> None:
    decomposition, x = _autoencoder(0)
    ladder = worst_case(decomposition, [x], steps=(5, 12, 30), kind="mse", seed=3)
    for steps in (5, 12, 30):
        alone = worst_case(decomposition, [x], steps=(steps,), kind="mse", seed=3)
        assert alone.divergence[steps] == ladder.divergence[steps]


def test_more_starts_never_find_less() -> None:
    decomposition, x = _autoencoder(1)
    found = [worst_case(decomposition, [x], steps=(3,), starts=n, kind="mse").divergence[3] for n in (1, 2, 5)]
    assert found == sorted(found)


def _decomposition() -> Decomposition:
    model = tiny_transformer(dtype=torch.float64)
    decomposition = decompose(model, {"blocks.1.mlp.W_*": 20}, gate="shared", gate_width=8)
    decomposition.to(torch.float64)
    return decomposition


def test_a_span_is_attacked_the_same_whatever_batches_it_comes_in() -> None:
    decomposition, rows = _decomposition(), tokens(6)
    whole = worst_case(decomposition, [rows], steps=(6,), starts=1)
    parts = worst_case(decomposition, [rows[:1], rows[1:4], rows[4:]], steps=(6,), starts=1)
    assert parts.divergence[6] == pytest.approx(whole.divergence[6], rel=1e-9)


def test_a_source_for_fewer_rows_does_more_damage_and_the_span_is_stated() -> None:
    decomposition, rows = _decomposition(), tokens(6)
    batches = [rows[:4], rows[4:]]
    wide = evaluate(decomposition, batches, adversary_steps=(30,), starts=4, deletion=False)
    narrow = evaluate(decomposition, batches, adversary_steps=(30,), starts=4, span=2, deletion=False)
    assert narrow.adversarial[30] > wide.adversarial[30]
    assert wide.attack is not None
    assert (wide.attack.span_rows, wide.attack.span_positions, wide.attack.spans) == (6, 12, 1)
    assert narrow.attack is not None
    assert (narrow.attack.span_rows, narrow.attack.spans) == (2, 3)
    assert "one source over 2 rows x 12 positions, mean of 3 such spans" in str(narrow)


@pytest.mark.parametrize(("span", "sizes"), [(None, [7]), (3, [3, 4]), (2, [2, 2, 3]), (4, [7]), (7, [7]), (99, [7])])
def test_spans_have_at_least_the_rows_asked_for_and_lose_none(span: int | None, sizes: list[int]) -> None:
    rows = tokens(7)
    passes = Passes(_decomposition(), [as_batch(part) for part in (rows[:3], rows[3:5], rows[5:])], "kl")
    groups = passes.in_spans(span)
    assert [sum(len(held.counted) for held in group) for group in groups] == sizes
    assert torch.equal(torch.cat([held.batch.inputs for group in groups for held in group]), rows)


def test_passes_that_do_not_fit_into_memory_are_made_again_with_the_same_result() -> None:
    decomposition, batches = _decomposition(), [as_batch(tokens(2)), as_batch(tokens(2, seed=1))]
    kept, remade = (Passes(decomposition, batches, "kl", kept_bytes=room) for room in (2**30, 0))
    assert kept[0] is kept[0]
    assert remade[0] is not remade[0]
    assert torch.equal(kept[1].clean, remade[1].clean)


def test_what_is_important_is_out_of_the_adversarys_reach() -> None:
    decomposition, rows = _decomposition(), tokens(2)
    exact = decompose(tiny_transformer(dtype=torch.float64), {"blocks.1.mlp.W_in": 20}, init="exact")
    exact.to(torch.float64)
    ones = {name: torch.ones_like(g) for name, g in exact.importance(rows).items()}
    assert worst_case(exact, [rows], steps=(3,), importances=ones).divergence[3] < 1e-6
    assert worst_case(decomposition, [rows], steps=(3,)).divergence[3] > 1e-2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"adversary_steps": (-1,)}, r"adversary_steps\[0\]=-1; expected at least 0"),
        ({"adversary_step_size": 0.0}, "step_size=0; expected a number above 0 and at most 1"),
        ({"starts": 0}, "at least 1"),
        ({"span": 0}, "at least 1"),
    ],
)
def test_impossible_budgets_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        evaluate(_decomposition(), [tokens(2)], **arguments)


def test_as_a_mask_source_it_finds_what_worst_case_finds_and_training_uses_it(tmp_path: Path) -> None:
    decomposition, x = _autoencoder(0)
    attack = Attack(steps=(3, 10), starts=2)
    expected = worst_case(decomposition, [x], steps=attack.steps, starts=2, kind="mse")
    g = {name: p.detach() for name, p in decomposition.importance(x).items()}
    clean = decomposition.model(x).detach()
    source = WorstMasks(attack)

    def objective(masks: Mapping[str, SiteMask], rows: int | None) -> Tensor:
        return (decomposition.masked_forward(x, masks) - clean).square().mean()

    source.climb(Climb(objective, g, torch.Generator().manual_seed(0)))
    found = source.found.divergence
    assert found[10] == pytest.approx(objective(source.masks(g, delta=True, generator=generator()), None).item())
    assert found == pytest.approx(expected.divergence, rel=1e-5)
    term = Reconstruction(masks=WorstMasks(Attack(steps=(2,), starts=1)))
    result = train(decomposition, [x], steps=2, divergence="mse", reconstructions=(term,), out_dir=tmp_path / "run")
    assert result.final["worst_all"] > 0


def test_several_processes_are_refused_each_would_climb_on_rows_of_its_own() -> None:
    source = WorstMasks(Attack(steps=(2,)))
    source.whole_batch = lambda gradients, shared: None
    with pytest.raises(ValueError, match=r"WorstMasks with several processes: .* use PGD or Persistent"):
        source.climb(Climb(lambda masks, rows: torch.zeros(()), {"W": torch.zeros(2, 3)}, generator()))


def test_masks_without_a_budget_are_refused() -> None:
    with pytest.raises(ValueError, match="without a budget"):
        WorstMasks(Attack(()))


class Scripted:
    """A divergence that is what the script says, whatever the sources; it rises in them, and remembers them."""

    importances: Mapping[str, Tensor] = {"s": torch.zeros(1, 1)}

    def __init__(self, values: list[float]) -> None:
        self.values, self.seen = values, list[float]()

    def total(self, sources: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        source = sources["s"].sum()
        self.seen.append(float(source.detach()))
        return self.values[len(self.seen) - 1] + source - source.detach(), 1


def test_a_window_counts_its_ten_steps_and_not_the_point_it_begins_from() -> None:
    # 7 of the first 10 steps go up, which is under three quarters: the size is halved, and x goes on from the best.
    ground = Scripted([float(v) for v in [0, 1, 2, 3, 4, 5, 6, 7, 5, 4, 3, 8]])
    with torch.no_grad():
        climb([ground], {"s": torch.tensor([[0.0]])}, (11,), 0.01)
    assert ground.seen[:11] == pytest.approx([0.01 * k for k in range(11)], abs=1e-6)
    assert ground.seen[11] == pytest.approx(0.07 + 0.75 * 0.005, abs=1e-6)
