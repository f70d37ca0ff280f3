"""Faithfulness of kept parts against hooks written by hand and edited weights; areas and sizes against arithmetic."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from spd_lens import Decomposition, decompose
from spd_lens.circuits import (
    FaithfulnessCurve,
    HeadAndMLPParts,
    HeadAndNeuronParts,
    Parts,
    SubcomponentParts,
    circuit_of,
    compare_parts,
    faithfulness_curve,
    faithfulness_of_first,
    ranked,
    smallest_size,
)
from spd_lens.tasks import Task
from tests import oracle
from tests.conftest import needs_hooked
from tests.small_models import randn, tiny_transformer

IN, OUT = "blocks.0.mlp.W_in", "blocks.1.mlp.W_out"


def task_of(model: Any, n: int = 3, length: int = 6, seed: int = 0) -> Task:
    """Random prompts whose answer is what the model says on the clean one, wrong what it says on the corrupted."""
    generator = torch.Generator().manual_seed(seed)
    clean, corrupted = (torch.randint(1, 28, (n, length), generator=generator) for _ in range(2))
    with torch.no_grad():
        difference = model(clean)[:, -1] - model(corrupted)[:, -1]
    answers, wrong = difference.argmax(-1, keepdim=True), difference.argmin(-1, keepdim=True)
    return Task("random", clean, corrupted, answers, wrong, torch.full((n,), length - 1))


def flags(n: int, ids: list[int]) -> Tensor:
    kept = torch.zeros(n, dtype=torch.bool)
    kept[ids] = True
    return kept


@pytest.fixture
def decomposition() -> Decomposition:
    model = tiny_transformer(dtype=torch.float64)
    return decompose(model, {"embed.W_E": 6, "blocks.*.attn.W_*": 5, "blocks.*.mlp.W_*": 5, "unembed.W_U": 5})


# -- identities, on both majors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("outside", ["corrupted", "zero"])
def test_all_parts_are_the_target_and_none_is_the_corrupted_run(decomposition: Decomposition, outside: Any) -> None:
    task = task_of(decomposition.model)
    with torch.no_grad():
        clean, corrupted = decomposition.model(task.clean), decomposition.model(task.corrupted)
    for kind in (SubcomponentParts, HeadAndMLPParts, HeadAndNeuronParts):
        parts = kind(decomposition, task, outside=outside)
        every = torch.ones(len(parts), dtype=torch.bool)
        torch.testing.assert_close(parts.logits(every), clean, rtol=0, atol=1e-10)
        assert parts.faithfulness(every) == pytest.approx(1, abs=1e-9)
        none = parts.logits(~every)
        assert float((none - clean).abs().max()) > 1e-2
        if outside == "corrupted" and kind is SubcomponentParts:
            # Tokens enter through the embedding alone, which is decomposed with all the rest.
            torch.testing.assert_close(none, corrupted, rtol=0, atol=1e-10)
            assert parts.faithfulness(~every) == pytest.approx(0, abs=1e-9)


def test_zeros_outside_without_deltas_are_the_circuit_alone(decomposition: Decomposition) -> None:
    task = task_of(decomposition.model)
    parts = SubcomponentParts(decomposition, task, outside="zero", deltas=False)
    ids = {site: [0, 3] for site in decomposition}
    kept = flags(len(parts), [parts.index(f"{site}[{c}]") for site in ids for c in ids[site]])
    hooks = circuit_of(decomposition, ids).only(decomposition)
    with torch.no_grad(), decomposition.model.hooks(fwd_hooks=hooks):
        expected = decomposition.model(task.clean)
    torch.testing.assert_close(parts.logits(kept), expected, rtol=0, atol=1e-10)
    assert sum(parts.parameters[i] for i in kept.nonzero()) == circuit_of(decomposition, ids).n_parameters(
        decomposition
    )


# -- hooks written by hand --------------------------------------------------------------------------------------------


@needs_hooked
@pytest.mark.parametrize("outside", ["corrupted", "zero"])
@pytest.mark.parametrize("with_delta", [True, False])
def test_left_out_subcomponents_and_deltas_hold_the_other_prompts_values(outside: Any, with_delta: bool) -> None:
    target = oracle.CASES["ln"].build(dtype=torch.float64)
    decomposition = decompose(copy.deepcopy(target), {IN: 6, "blocks.0.attn.W_V": 6, OUT: 6})
    task = task_of(target)
    parts = SubcomponentParts(decomposition, task, outside=outside)
    ids = {IN: [1, 4], "blocks.0.attn.W_V": [0], OUT: [2, 3, 5]}
    chosen = [parts.index(f"{site}[{c}]") for site in ids for c in ids[site]]
    chosen += [parts.index(f"{OUT}[delta]")] if with_delta else []

    hooks: Any = []
    for site in ("blocks.0.attn.W_V", IN, OUT):  # in the order in which they run
        V, U = decomposition[site].V.detach(), decomposition[site].U.detach()
        W, b = oracle.weight_of(target, site), oracle.bias_of(target, site)
        x, other = (oracle.site_inputs(target, t, h)[site] for t, h in ((task.clean, hooks), (task.corrupted, [])))
        y = b.clone()
        for c in range(6):
            source = x if c in ids[site] else (other if outside == "corrupted" else None)
            if source is not None:
                y = y + (source @ V[:, c : c + 1]) @ U[c : c + 1]
        source = x if with_delta and site == OUT else (other if outside == "corrupted" else None)
        if source is not None:
            y = y + source @ (W - V @ U)
        hooks = [*hooks, (oracle.output_name(target, site), lambda value, hook, y=y: y.reshape(value.shape))]
    with torch.no_grad(), target.hooks(fwd_hooks=hooks):
        expected = target(task.clean)
    got = parts.logits(flags(len(parts), chosen))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
    with torch.no_grad():
        m, clean, corrupted = (
            float(task.logit_difference(z).mean()) for z in (expected, target(task.clean), target(task.corrupted))
        )
    f = parts.faithfulness(flags(len(parts), chosen))
    assert f == pytest.approx((m - corrupted) / (clean - corrupted), abs=1e-9)
    assert abs(f - 1) > 1e-3


@needs_hooked
def test_heads_and_mlps_at_0_are_the_model_with_edited_weights() -> None:
    target = oracle.CASES["ln"].build(dtype=torch.float64)
    decomposition = decompose(copy.deepcopy(target), {"blocks.*.attn.W_V": 5, "blocks.1.mlp.W_in": 5})
    task = task_of(target)
    parts = HeadAndMLPParts(decomposition, task, outside="zero")
    assert parts.labels == [f"head {layer}.{head}" for layer in range(2) for head in range(4)] + ["mlp 1"]
    d, d_head, d_mlp = target.cfg.d_model, target.cfg.d_head, target.cfg.d_mlp
    assert parts.parameters == [4 * d * d_head] * 8 + [2 * d * d_mlp]
    edited = copy.deepcopy(target)
    with torch.no_grad():
        for layer, head in ((0, 1), (1, 3), (1, 0)):
            edited.blocks[layer].attn.W_O[head] = 0
        edited.blocks[1].mlp.W_out.zero_()
        edited.blocks[1].mlp.b_out.zero_()
        expected = edited(task.clean)
    out = {parts.index(label) for label in ("head 0.1", "head 1.3", "head 1.0", "mlp 1")}
    got = parts.logits(flags(9, [i for i in range(9) if i not in out]))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


@needs_hooked
def test_heads_and_neurons_at_0_are_the_model_with_edited_weights() -> None:
    target = oracle.CASES["ln"].build(dtype=torch.float64)
    decomposition = decompose(copy.deepcopy(target), {"blocks.0.attn.W_V": 5, "blocks.1.mlp.W_in": 5})
    task = task_of(target)
    parts = HeadAndNeuronParts(decomposition, task, outside="zero")
    d, d_head, d_mlp = target.cfg.d_model, target.cfg.d_head, target.cfg.d_mlp
    assert parts.labels == [f"head 0.{head}" for head in range(4)] + [f"neuron 1.{i}" for i in range(d_mlp)]
    assert parts.parameters == [4 * d * d_head] * 4 + [2 * d] * d_mlp
    edited = copy.deepcopy(target)
    with torch.no_grad():
        edited.blocks[0].attn.W_O[2] = 0
        edited.blocks[1].mlp.W_out[[1, 5]] = 0
        expected = edited(task.clean)
    out = {parts.index(label) for label in ("head 0.2", "neuron 1.1", "neuron 1.5")}
    got = parts.logits(flags(len(parts), [i for i in range(len(parts)) if i not in out]))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


def test_all_neurons_of_an_mlp_at_the_corrupted_prompts_values_are_the_mlp_at_its_own(
    decomposition: Decomposition,
) -> None:
    task = task_of(decomposition.model)
    whole, fine = HeadAndMLPParts(decomposition, task), HeadAndNeuronParts(decomposition, task)
    without = {"head 1.2", "mlp 0"}
    kept = torch.tensor([label not in without for label in whole.labels])
    fine_kept = torch.tensor([label != "head 1.2" and not label.startswith("neuron 0.") for label in fine.labels])
    torch.testing.assert_close(fine.logits(fine_kept), whole.logits(kept), rtol=0, atol=1e-10)


def test_heads_and_mlps_hold_the_corrupted_prompts_values(decomposition: Decomposition) -> None:
    task, model = task_of(decomposition.model), decomposition.model
    parts = HeadAndMLPParts(decomposition, task)
    z, mlp = "blocks.1.attn.hook_z", "blocks.0.hook_mlp_out"
    with torch.no_grad():
        _, cache = model.run_with_cache(task.corrupted)

        def one_head(value: Tensor, hook: Any) -> Tensor:
            value = value.clone()
            value[:, :, 2] = cache[z][:, :, 2]
            return value

        with model.hooks(fwd_hooks=[(z, one_head), (mlp, lambda value, hook: cache[mlp])]):
            expected = model(task.clean)
    out = {parts.index("head 1.2"), parts.index("mlp 0")}
    got = parts.logits(flags(len(parts), [i for i in range(len(parts)) if i not in out]))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


# -- scores ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outside", ["corrupted", "zero"])
@pytest.mark.parametrize("kind", [SubcomponentParts, HeadAndMLPParts, HeadAndNeuronParts])
def test_scores_are_the_slope_towards_leaving_a_unit_out(
    decomposition: Decomposition, kind: type[Parts], outside: Any
) -> None:
    model = decomposition.model
    task = task_of(model)
    parts: Any = kind(decomposition, task, outside=outside)
    scores = parts.scores()
    assert scores.shape == (len(parts),)
    chosen = scores.argsort(descending=True)[:12:3].tolist()
    for i in chosen:
        # A step of 1e-5 of the way: the same hooks as in a full step, their change scaled down.
        hooks = parts.hooks(flags(len(parts), [j for j in range(len(parts)) if j != i]))
        slopes = []
        for step in (1e-5, -1e-5):
            with torch.no_grad(), model.hooks(fwd_hooks=[(name, scaled(hook, step)) for name, hook in hooks]):
                slopes.append(float(parts.metric(model(task.clean))) / (2 * step))
        assert float(scores[i]) == pytest.approx(abs(slopes[0] + slopes[1]), rel=1e-5, abs=1e-8)


def scaled(hook: Any, step: float) -> Any:
    def part_of_the_way(value: Tensor, hook: Any, whole: Any = hook) -> Tensor:
        return value + step * (whole(value.clone(), hook=hook) - value)

    return part_of_the_way


# -- curves ------------------------------------------------------------------------------------------------------------


def curve(sizes: list[int], f: list[float], n: int) -> FaithfulnessCurve:
    return FaithfulnessCurve("by hand", tuple(sizes), tuple(f), tuple(sizes), tuple(range(n)), n)


def test_areas_are_those_of_trapezoids() -> None:
    straight = curve([0, 10, 20], [0.0, 0.5, 1.0], 20)
    assert (straight.cpr, straight.cmd) == (pytest.approx(0.5), pytest.approx(0.5))
    over = curve([0, 10, 20], [0.0, 2.0, 1.0], 20)
    assert over.cpr == pytest.approx(0.5 * 1 + 0.5 * 1.5)
    assert over.cmd == pytest.approx(0.5 * 1 + 0.5 * 0.5)
    uneven = curve([0, 1, 20], [-0.5, 1.0, 1.0], 20)
    assert uneven.cpr == pytest.approx(0.05 * 0.25 + 0.95)
    assert uneven.cmd == pytest.approx(0.05 * 0.75)
    assert "CPR 0.5000, CMD 0.5000" in str(straight)
    assert straight.to_json()["cpr"] == straight.cpr


class Table(Parts):
    """Parts whose faithfulness is given, by the number that are kept."""

    def __init__(self, f: list[float]) -> None:
        self.what, self.f = "table", f
        self.labels, self.parameters = [f"u{i}" for i in range(len(f) - 1)], [10] * (len(f) - 1)
        self.asked: list[int] = []

    def faithfulness(self, kept: Tensor) -> float:
        self.asked.append(int(kept.sum()))
        return self.f[self.asked[-1]]

    def hooks(self, kept: Tensor) -> Any:
        raise NotImplementedError

    def scores(self) -> Tensor:
        return -torch.arange(float(len(self)))


@pytest.mark.parametrize("first", [0, 1, 2, 3, 17, 99, 100])
def test_the_smallest_size_is_where_a_rising_curve_reaches_the_level(first: int) -> None:
    table = Table([0.1] * first + [0.95] * (101 - first))
    assert smallest_size(table, list(range(100)), 0.9) == (first, 0.95)
    assert len(table.asked) <= 2 + 2 * 7
    with pytest.raises(ValueError, match=r"no size tried reaches faithfulness 2.0: with all 100 parts live it is 0.95"):
        smallest_size(table, list(range(100)), 2.0)


def test_sizes_rankings_and_parameters() -> None:
    table = Table([i / 100 for i in range(101)])
    got = faithfulness_curve(table)
    assert got.sizes == (0, 1, 2, 5, 10, 20, 50, 100)
    assert got.parameters == tuple(10 * size for size in got.sizes)
    assert got.cpr == pytest.approx(0.5)
    assert faithfulness_curve(Table([0.0] * 8)).sizes == tuple(range(8))
    assert faithfulness_curve(table, sizes=[3]).sizes == (0, 3, 100)
    assert ranked(table, {"u7": 1.0, "u3": 2.0})[:4] == [3, 7, 0, 1]
    assert ranked(table, torch.arange(100.0))[:2] == [99, 98]


def test_a_ranking_keeps_its_first_parts(decomposition: Decomposition) -> None:
    parts = HeadAndMLPParts(decomposition, task_of(decomposition.model))
    scores = randn(len(parts))
    order = sorted(range(len(parts)), key=lambda i: -float(scores[i]))
    got = faithfulness_curve(parts, scores)
    for size in (1, 4):
        expected = parts.faithfulness(flags(len(parts), order[:size]))
        assert got.faithfulness[got.sizes.index(size)] == pytest.approx(expected, abs=1e-12)
        assert faithfulness_of_first(parts, got.ranking, size) == pytest.approx(expected, abs=1e-12)


def test_parts_are_compared_at_the_same_level(decomposition: Decomposition) -> None:
    task = task_of(decomposition.model)
    by_number = {f"{IN}[{c}]": 5.0 - c for c in range(5)}
    got = compare_parts(decomposition, task, level=0.7, scores={"number": by_number})
    assert list(got.curves) == [
        "heads and MLPs",
        "subcomponents",
        "subcomponents and deltas",
        "subcomponents by number",
    ]
    for name in ("heads and MLPs", "subcomponents and deltas"):
        size, reached = got.sizes[name], got.faithfulness[name]
        assert size is not None
        assert reached is not None
        assert reached >= 0.7
        assert len(got.labels[name]) == size
    parts = SubcomponentParts(decomposition, task)
    labels = got.labels["subcomponents and deltas"]
    assert got.parameters["subcomponents and deltas"] == sum(parts.parameters[parts.index(label)] for label in labels)
    kept = flags(len(parts), [parts.index(label) for label in labels])
    assert parts.faithfulness(kept) == pytest.approx(got.faithfulness["subcomponents and deltas"], abs=1e-9)
    # Five random directions per matrix explain little: without the deltas the level is out of reach, and that is said.
    assert got.sizes["subcomponents"] is None
    assert "not by" in str(got)
    assert got.to_json()["parts"]["subcomponents"]["parameters"] is None


def test_a_curve_that_falls_again_is_read_where_it_was_measured(
    decomposition: Decomposition, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(decomposition.model)
    alone = SubcomponentParts(decomposition, task, deltas=False)
    n = len(alone)
    # Above the level around half of the parts, which a search by doubling from 1 on does not try.
    high = range(n // 2 - 2, n // 2 + 3)
    assert not any(2**i in high for i in range(20))
    monkeypatch.setattr(SubcomponentParts, "faithfulness", lambda self, kept: 0.9 if int(kept.sum()) in high else (
        1.0 if self._with_deltas and bool(kept.all()) else 0.1))  # fmt: skip
    got = compare_parts(decomposition, task, level=0.8)
    assert got.sizes["subcomponents"] == high[0]
    assert got.faithfulness["subcomponents"] == 0.9
    assert got.sizes["subcomponents and deltas"] is not None


def test_passes_start_at_the_first_decomposed_block() -> None:
    decomposition = decompose(tiny_transformer(dtype=torch.float64), {OUT: 5}, init="exact")
    task = task_of(decomposition.model)
    block = decomposition.host.block(0)
    assert block is not None
    parts = SubcomponentParts(decomposition, task)
    calls: list[int] = []
    handle = block.register_forward_pre_hook(lambda module, args: calls.append(1))
    faithfulness_curve(parts, torch.arange(6.0))
    assert not calls
    handle.remove()
    assert HeadAndMLPParts(decomposition, task).labels == ["mlp 1"]


def test_the_model_is_left_as_it_was(decomposition: Decomposition) -> None:
    task = task_of(decomposition.model)
    before = decomposition.model(task.clean)
    compare_parts(decomposition, task, level=0.1)
    assert torch.equal(decomposition.model(task.clean), before)
    assert not any(weight.is_watched() for weight in decomposition.values())
    assert all(p.grad is None for p in decomposition.model.parameters())


def test_mistakes_are_named(decomposition: Decomposition, without_type_checks: None) -> None:
    task = task_of(decomposition.model)
    with pytest.raises(ValueError, match="outside='mean'; expected 'corrupted'"):
        SubcomponentParts(decomposition, task, outside="mean")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="task is a Tensor; expected a Task"):
        SubcomponentParts(decomposition, task.clean)  # pyright: ignore[reportArgumentType]
    parts = SubcomponentParts(decomposition, task)
    with pytest.raises(ValueError, match=r"expected bool \(\d+,\), one per part"):
        parts.logits(torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"no part 'blocks\.0\.mlp\.W_in\(3\)'; near: 'blocks\.0"):
        faithfulness_curve(parts, {"blocks.0.mlp.W_in(3)": 1.0})
    with pytest.raises(ValueError, match="one per part, and no NaN"):
        faithfulness_curve(parts, torch.full((len(parts),), torch.nan))
    with pytest.raises(ValueError, match=r"sizes \[-1\]: expected numbers of parts between 0 and"):
        faithfulness_curve(parts, sizes=[-1])
    only_embedding = decompose(tiny_transformer(seed=1), {"embed.W_E": 4})
    with pytest.raises(ValueError, match="no head and no MLP has a decomposed matrix"):
        HeadAndMLPParts(only_embedding, task_of(only_embedding.model))
    with pytest.raises(ValueError, match="no head and no MLP has a decomposed matrix"):
        HeadAndNeuronParts(only_embedding, task_of(only_embedding.model))
