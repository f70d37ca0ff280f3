"""The deletion test (E8), against weights that are really written."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from spd_lens import Decomposition, decompose, evaluate
from spd_lens.evaluation import Needs, needed_at
from tests.conftest import needs_hooked
from tests.small_models import tiny_transformer, tokens

SITES = ("W_in", "W_out")


def _decomposition() -> tuple[Decomposition, nn.Module]:
    """A decomposition in which some subcomponents are never needed and most are needed here and there."""
    model = tiny_transformer(dtype=torch.float64)
    plain = copy.deepcopy(model)
    decomposition = decompose(model, {"blocks.1.mlp.W_*": 20}, gate="shared", gate_width=8, init="exact")
    decomposition.to(torch.float64)
    with torch.no_grad():
        for weight in decomposition.values():
            assert weight.gate is not None
            weight.gate.b_out -= 0.6  # pyright: ignore[reportOperatorIssue]
            weight.gate.b_out[:5] = -100.0  # pyright: ignore[reportIndexIssue]
    return decomposition, plain


def _kl_of_written(decomposition: Decomposition, plain: nn.Module, kept: dict[str, Tensor], rows: Tensor) -> float:
    """KL from the target to a copy whose weights are the sum of what is kept."""
    edited = copy.deepcopy(plain)
    with torch.no_grad():
        for letter in SITES:
            name = f"blocks.1.mlp.{letter}"
            weight, on = decomposition[name], kept[name]
            summed = torch.zeros_like(weight.target_weight)
            for c in on.nonzero().flatten().tolist():
                summed += torch.outer(weight.V[:, c], weight.U[c])
            getattr(edited.blocks[1].mlp, letter).copy_(summed)
        p, q = plain(rows).softmax(-1), edited(rows).softmax(-1)
    return float((p * (p / q).log()).sum(-1).mean())


@needs_hooked
@torch.no_grad()
def test_the_deletion_test_equals_deleting_from_the_weights() -> None:
    decomposition, plain = _decomposition()
    rows = tokens(5)
    report = evaluate(decomposition, [rows[:3], rows[3:]], adversary_steps=())
    assert report.deletion is not None
    g = decomposition.importance(rows)
    needed = {name: (own >= 0.01).flatten(0, 1).any(0) for name, own in g.items()}
    assert report.deletion.never_needed == {name: int((~own).sum()) for name, own in needed.items()}
    assert all(count >= 5 for count in report.deletion.never_needed.values())
    assert report.deletion.divergence["never needed off"] == pytest.approx(
        _kl_of_written(decomposition, plain, needed, rows), rel=1e-6
    )
    by_text = []
    for i in range(len(rows)):
        own = {name: (value[i] >= 0.01).any(0) for name, value in g.items()}
        by_text.append(_kl_of_written(decomposition, plain, own, rows[i : i + 1]))
    assert report.deletion.divergence["own union"] == pytest.approx(sum(by_text) / len(by_text), rel=1e-6)
    kept = sum(float((own >= 0.01).any(1).sum(-1).double().mean()) for own in g.values())
    assert report.deletion.kept["own union"] == pytest.approx(kept)


def test_a_larger_sample_can_only_spare_more() -> None:
    decomposition, _ = _decomposition()
    alone = evaluate(decomposition, [tokens(1)], adversary_steps=()).deletion
    sampled = evaluate(
        decomposition, [tokens(1)], adversary_steps=(), deletion_sample=[tokens(20, seed=1), tokens(20, seed=2)]
    ).deletion
    assert alone is not None
    assert sampled is not None
    assert sampled.sample_positions == alone.sample_positions + 2 * 20 * 12
    assert sum(sampled.never_needed.values()) < sum(alone.never_needed.values())
    assert set(alone.divergence) == {"never needed off"}  # one text has no others to be compared with


def _importances(rows: int, positions: int, C: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(rows, positions, C, generator=generator) > 0.8).float()


def test_the_control_is_as_large_and_made_of_what_other_texts_need() -> None:
    g = _importances(6, 10, 40, seed=0)
    g[2, :, 30:] = 1.0
    g[[0, 1, 3, 4, 5], :, 30:] = 0.0
    needs = Needs(torch.Generator().manual_seed(0), 1)
    needs.add({"site": needed_at(g)}, 6)
    drawn = torch.stack([needs.of_others(2, {"site": 12})["site"] for _ in range(30)])
    assert (drawn.sum(1) == 12).all()
    assert not drawn[:, 30:].any()  # only text 2 itself needs these
    assert drawn[:, :30].any(0).all()
    assert int(needs.of_others(2, {"site": 35})["site"].sum()) == 30  # no more is needed by anyone


def test_the_control_prefers_what_its_64_positions_need() -> None:
    g = torch.zeros(2, 400, 30)
    g[1, :, 0] = 1.0  # every position of the other text needs 0, one of them all the rest
    g[1, 7, :] = 1.0
    needs = Needs(torch.Generator().manual_seed(0), 1)
    needs.add({"site": needed_at(g)}, 2)
    assert all(bool(needs.of_others(0, {"site": 29})["site"].sum() == 29) for _ in range(3))
    first = [bool(needs.of_others(0, {"site": 1})["site"][0]) for _ in range(20)]
    assert sum(first) >= 15


def test_one_text_alone_and_models_without_positions_have_no_control() -> None:
    decomposition, _ = _decomposition()
    report = evaluate(decomposition, [tokens(1)], adversary_steps=(), deletion=False)
    assert report.deletion is None
    assert "never needed" not in str(report)
