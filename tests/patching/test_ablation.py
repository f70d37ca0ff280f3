"""`ablation_effects` against weights that are really edited, hooks written by hand, and one pass at a time."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from spd_lens import Decomposition, decompose
from spd_lens.core import Unit, units_of
from spd_lens.patching import ablation_effects
from tests import bridge_models, oracle
from tests.conftest import TL_MAJOR, needs_hooked
from tests.small_models import TiedAutoencoder, tiny_transformer, tokens

IN, OUT = "blocks.0.mlp.W_in", "blocks.1.mlp.W_out"
CASES = ["ln", "gqa", "split_qkv", "attn_result", "llama_gqa_folded", "neox"]


def metric(logits: Tensor) -> Tensor:
    """One number per row that every position has a say in, not linear in the logits."""
    return logits[:, -1].log_softmax(-1)[:, 3] + 0.3 * logits.log_softmax(-1)[:, :, 5].mean(1)


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Within `tolerance` of the largest expected entry, which is not 0."""
    assert got.shape == expected.shape
    scale = float(expected.abs().max())
    assert scale > 1e-3
    assert float((got - expected).abs().max()) <= tolerance * scale


@pytest.fixture
def decomposition() -> Decomposition:
    sites = {"blocks.*.mlp.W_*": 6, "blocks.*.attn.W_[VO]": 5, "unembed.W_U": 4, "embed.W_E": 7}
    return decompose(tiny_transformer(), sites, gate="shared", gate_width=8)


# -- weights edited for real -------------------------------------------------------------------------------------


def one_hot(n: int, ids: list[int]) -> Tensor:
    mask = torch.zeros(n)
    mask[ids] = 1
    return mask


@needs_hooked
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("test", ["necessity", "sufficiency"])
def test_zero_ablation_is_the_model_with_edited_weights(name: str, test: Any) -> None:
    target = oracle.CASES[name].build()
    sites = oracle.all_sites(target)
    decomposition = decompose(copy.deepcopy(target), dict.fromkeys(sites, 5))
    rows = oracle.tokens_for(target, batch=3)
    groups = [{site: [1]} for site in sites] + [{sites[2]: [0, 4], sites[-2]: [2]}]
    got = ablation_effects(decomposition, rows, metric, groups, test=test)
    for unit, value in zip(got.units, got.values[:, 0], strict=True):
        masks = {}
        for site in unit.sites:
            V, U = decomposition[site].V.detach(), decomposition[site].U.detach()
            named = one_hot(5, unit.ids_at(site))
            removed = test == "necessity"
            masks[site] = oracle.Masks(V, U, 1 - named if removed else named, torch.tensor(float(removed)))
        close(value, metric(oracle.run_written(target, masks, rows)))
    close(got.baseline, metric(oracle.run_written(target, {}, rows)))
    assert float(got.effects.abs().max()) > 0.01


@pytest.mark.parametrize(
    ("family", "mode"), [("gpt2", "raw"), ("gpt2", "compatibility"), ("llama", "raw"), ("gemma2", "compatibility")]
)
def test_zero_ablation_of_bridges_is_the_model_with_edited_weights(family: str, mode: str) -> None:
    written = bridge_models.Written(family, mode)
    decomposition = bridge_models.swapped(family, mode)
    rows = bridge_models.random_tokens(3)
    got = ablation_effects(decomposition, rows, metric, [{site: [1, 3]} for site in decomposition])
    for unit, value in zip(got.units, got.values[:, 0], strict=True):
        (site,) = unit.sites
        weight = decomposition[site]
        masks = bridge_models.Masks(
            weight.V.detach(), weight.U.detach(), 1 - one_hot(bridge_models.N, unit.ids_at(site)), 1.0
        )
        with written.masked({site: masks}) as model:
            close(value, metric(bridge_models.run(model, rows)))


# -- hooks written by hand ---------------------------------------------------------------------------------------


@needs_hooked
@pytest.mark.parametrize("kind", ["mean", "position_mean", "resample", "importance"])
@pytest.mark.parametrize("test", ["necessity", "sufficiency"])
@pytest.mark.parametrize("site", [IN, OUT, "blocks.0.attn.W_V", "unembed.W_U", "embed.W_E"])
def test_other_kinds_are_the_activations_replaced_by_hand(kind: Any, test: Any, site: str) -> None:
    target = oracle.CASES["ln"].build(dtype=torch.float64)
    decomposition = decompose(copy.deepcopy(target), dict.fromkeys(oracle.all_sites(target), 5), gate="shared")
    rows, other = oracle.tokens_for(target, batch=3), oracle.tokens_for(target, batch=3, seed=9)
    reference = None if kind == "importance" else other
    position = 2
    got = ablation_effects(
        decomposition, rows, metric, {site: [3]}, kind=kind, test=test, positions=[position], reference=reference
    )

    V, U = decomposition[site].V.detach(), decomposition[site].U.detach()
    a, a_other = (oracle.site_inputs(target, t)[site] @ V for t in (rows, other))
    new = {
        "mean": a_other.mean((0, 1)).expand_as(a),
        "position_mean": a_other.mean(0).expand_as(a),
        "resample": a_other,
        "importance": decomposition.importance(rows)[site] * a,
    }[kind]
    replaced = one_hot(5, [3]).bool() if test == "necessity" else ~one_hot(5, [3]).bool()
    change = torch.zeros_like(a)
    change[:, position] = torch.where(replaced, new - a, 0.0)[:, position]
    delta = torch.ones(rows.shape, dtype=torch.float64)
    if test == "sufficiency":
        delta[:, position] = 0
    masks = {site: oracle.Masks(V, U, torch.ones(5, dtype=torch.float64), delta)}
    hand = copy.deepcopy(target)
    with torch.no_grad(), hand.hooks(fwd_hooks=oracle.hand_hooks(hand, masks, {site: change})):
        expected = metric(hand(rows))
    torch.testing.assert_close(got.values[0, 0], expected, rtol=0, atol=1e-9)
    assert float(got.effects.abs().max()) > 1e-6


def test_resample_without_reference_takes_the_row_before(decomposition: Decomposition) -> None:
    rows = tokens(3)
    default = ablation_effects(decomposition, rows, metric, {IN: [0, 2]}, kind="resample")
    given = ablation_effects(decomposition, rows, metric, {IN: [0, 2]}, kind="resample", reference=rows.roll(1, 0))
    assert torch.equal(default.values, given.values)
    assert float(default.effects.abs().max()) > 1e-3


# -- batching ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("test", ["necessity", "sufficiency"])
@pytest.mark.parametrize("positions", [None, "each", [0, -1]])
def test_many_ablations_in_one_pass_equal_one_at_a_time(
    decomposition: Decomposition, test: Any, positions: Any
) -> None:
    rows = tokens(2)
    ids = [{IN: [1]}, {OUT: [0, 5]}, {IN: [2], OUT: [3]}, {"unembed.W_U": [1]}, {"embed.W_E": [0]}]
    together = ablation_effects(decomposition, rows, metric, ids, test=test, positions=positions)
    alone = ablation_effects(decomposition, rows, metric, ids, test=test, positions=positions, per_pass=1)
    torch.testing.assert_close(together.values, alone.values, rtol=0, atol=1e-5)
    assert together.positions == {None: None, "each": tuple(range(12))}.get(
        positions if not isinstance(positions, list) else "x", (0, 11)
    )


def test_a_position_is_the_mask_hook_at_that_position(decomposition: Decomposition) -> None:
    rows = tokens(2)
    got = ablation_effects(decomposition, rows, metric, {IN: [4], OUT: [1]}, positions="each")
    for u, (site, c) in enumerate([(IN, 4), (OUT, 1)]):
        for p in range(rows.shape[1]):
            mask = torch.ones(*rows.shape, 6)
            mask[:, p, c] = 0
            with torch.no_grad(), decomposition.model.hooks(fwd_hooks=decomposition.mask({site: mask})):
                torch.testing.assert_close(got.values[u, p], metric(decomposition.model(rows)), rtol=0, atol=1e-5)


def test_everywhere_is_the_hooks_of_ablate_and_keep(decomposition: Decomposition) -> None:
    rows = tokens(2)
    for test, hooks_of in (("necessity", decomposition.ablate), ("sufficiency", decomposition.keep)):
        got = ablation_effects(decomposition, rows, metric, [{IN: [4], OUT: [1, 2]}], test=test)  # pyright: ignore
        with torch.no_grad(), decomposition.model.hooks(fwd_hooks=hooks_of({IN: [4], OUT: [1, 2]})):
            torch.testing.assert_close(got.values[0, 0], metric(decomposition.model(rows)), rtol=0, atol=1e-5)


def test_hooks_of_the_user_act_in_all_passes(decomposition: Decomposition) -> None:
    rows = tokens(2)
    with decomposition.model.hooks(fwd_hooks=decomposition.ablate({"blocks.0.mlp.W_out": [1, 2]})):
        got = ablation_effects(decomposition, rows, metric, {OUT: [3]})
    both = {"blocks.0.mlp.W_out": [1, 2], OUT: [3]}
    for expected, ids in ((got.baseline, {"blocks.0.mlp.W_out": [1, 2]}), (got.values[0, 0], both)):
        with torch.no_grad(), decomposition.model.hooks(fwd_hooks=decomposition.ablate(ids)):
            torch.testing.assert_close(expected, metric(decomposition.model(rows)), rtol=0, atol=1e-5)


def test_blocks_before_the_first_ablated_site_run_once(decomposition: Decomposition) -> None:
    calls: list[int] = []
    block = decomposition.host.block(0)
    assert block is not None
    handle = block.register_forward_pre_hook(lambda module, args: calls.append(1))
    first = ablation_effects(decomposition, tokens(2), metric, {OUT: None}, per_pass=2)
    # The clean pass, and once for a decomposition the whole pass that tries whether others may start at the block.
    assert len(calls) == 2
    again = ablation_effects(decomposition, tokens(2), metric, {OUT: None}, per_pass=2)
    assert len(calls) == 3
    handle.remove()
    assert torch.equal(first.values, again.values)


def test_the_model_is_left_as_it_was(decomposition: Decomposition) -> None:
    rows = tokens(2)
    before = decomposition.model(rows)
    ablation_effects(decomposition, rows, metric, {IN: None}, positions="each")
    with pytest.raises(RuntimeError, match="half-way"):
        ablation_effects(decomposition, rows, failing_metric())
    assert torch.equal(decomposition.model(rows), before)
    assert not any(weight.is_watched() for weight in decomposition.values())


def failing_metric() -> Any:
    seen: list[int] = []

    def fail(logits: Tensor) -> Tensor:
        seen.append(1)
        if len(seen) > 3:
            raise RuntimeError("half-way")
        return logits.mean()

    return fail


def test_importance_ablation_at_importance_1_changes_nothing_and_at_0_is_zero_ablation(
    decomposition: Decomposition,
) -> None:
    rows = tokens(2)
    gate = decomposition[IN].gate
    assert gate is not None
    bias = [p for p in gate.parameters() if p.shape == (6,)][-1]
    with torch.no_grad():
        bias.copy_(1000 * torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0]))
    got = ablation_effects(decomposition, rows, metric, {IN: None}, kind="importance")
    zero = ablation_effects(decomposition, rows, metric, {IN: None})
    torch.testing.assert_close(got.effects[0::2], torch.zeros(3, 1), rtol=0, atol=1e-6)
    torch.testing.assert_close(got.effects[1::2], zero.effects[1::2], rtol=0, atol=1e-6)
    assert float(zero.effects[1::2].abs().min()) > 1e-4


def test_a_model_without_positions() -> None:
    model = TiedAutoencoder()
    decomposition = decompose(model, {"encoder.W": 3, "decoder.W": None})
    x = torch.rand(4, 5, generator=torch.Generator().manual_seed(0))
    got = ablation_effects(decomposition, x, lambda out: out.sum(-1), {"encoder.W": None})
    V, U, W, b = decomposition["encoder.W"].V, decomposition["encoder.W"].U, model.W, model.b
    for c in range(3):
        hidden = x @ (W - V[:, c : c + 1] @ U[c : c + 1])
        expected = torch.relu(hidden @ W.T + b).sum(-1)
        torch.testing.assert_close(got.values[c, 0], expected.detach())


# -- the result --------------------------------------------------------------------------------------------------


def test_labels_top_and_grid_agree_with_the_values(decomposition: Decomposition) -> None:
    got = ablation_effects(decomposition, tokens(3), metric, {IN: [5, 2], OUT: None}, positions=[1, 7])
    grid = got.grid(IN)
    assert grid.shape == (2, 6)
    assert grid.isnan().sum() == 8
    assert float(grid[1, 2]) == float(got.effects[1, 1])
    top = got.top(3)
    assert abs(top[0].effect) == float(got.effects.abs().max())
    assert [abs(e.effect) for e in top] == sorted((abs(e.effect) for e in top), reverse=True)
    row = got.units.index(Unit(((top[0].site, top[0].id),)))
    assert float(got.effects[row, (1, 7).index(top[0].position)]) == top[0].effect  # pyright: ignore
    assert f"{top[0].unit}" in str(got).splitlines()[3]
    assert str(units_of(decomposition, [{IN: [3, 1], OUT: [0]}])[0]) == f"{IN}[1, 3] + {OUT}[0]"


def test_intervals_are_students_t_over_examples(decomposition: Decomposition) -> None:
    from scipy import stats

    got = ablation_effects(decomposition, tokens(6), metric, {IN: [0, 1]})
    low, high = got.interval(0.9)
    for u in range(2):
        differences = (got.values[u, 0] - got.baseline).double().numpy()
        expected = stats.t.interval(0.9, 5, loc=differences.mean(), scale=stats.sem(differences))
        assert (float(low[u, 0]), float(high[u, 0])) == pytest.approx(expected, rel=1e-4)


def test_a_scalar_metric_gives_the_mean_and_no_standard_error(decomposition: Decomposition) -> None:
    rows = tokens(4)
    per_row = ablation_effects(decomposition, rows, metric, {IN: [0, 1]})
    scalar = ablation_effects(decomposition, rows, lambda logits: metric(logits).mean(), {IN: [0, 1]})
    assert scalar.values.shape == (2, 1, 1)
    torch.testing.assert_close(scalar.effects, per_row.effects, rtol=0, atol=1e-6)
    number = ablation_effects(decomposition, rows, lambda logits: float(metric(logits).mean()), {IN: [0, 1]})
    torch.testing.assert_close(number.effects, scalar.effects)
    with pytest.raises(ValueError, match="standard error needs at least two examples, and the metric gave 1"):
        _ = scalar.standard_error


def test_results_become_those_of_transformer_lens_4(decomposition: Decomposition) -> None:
    got = ablation_effects(decomposition, tokens(5), metric, [{IN: [0]}, {IN: [1], OUT: [2]}], positions=[0, 3])
    if TL_MAJOR < 4:
        with pytest.raises(ValueError, match="no PatchingResult"):
            got.to_transformer_lens()
        return
    result = got.to_transformer_lens()
    torch.testing.assert_close(result.effect().mean(-1), got.effects.flatten())
    torch.testing.assert_close(result.effect().std(-1) / 5**0.5, got.standard_error.flatten())
    torch.testing.assert_close(result.mean(), got.values.mean(-1).flatten())
    low, high = result.bootstrap_ci(of_effect=True)
    assert bool((low <= got.effects.flatten()).all())
    assert bool((high >= got.effects.flatten()).all())
    frame = result.to_dataframe()
    assert len(frame) == 4 * 5
    assert list(result.index_df["position"]) == [0, 3, 0, 3]
    assert result.index_df["subcomponent"][2] == f"{IN}[1] + {OUT}[2]"
    own = ablation_effects(decomposition, tokens(5), metric, [Unit(((IN, 0),), (3,)), Unit(((IN, 1),), (3, 4))])
    assert list(own.to_transformer_lens().index_df["position"]) == [3, "3, 4"]


def test_units_at_positions_of_their_own_are_no_grid(decomposition: Decomposition) -> None:
    """One row would show one of two effects of the same subcomponent."""
    got = ablation_effects(decomposition, tokens(5), metric, [Unit(((IN, 0),), (3,)), Unit(((IN, 0),), (4,))])
    assert float((got.effects[0] - got.effects[1]).abs()) > 0
    with pytest.raises(ValueError, match=r"W_in\[0\] @3 has positions of its own, and a grid has one row"):
        got.grid(IN)


# -- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"ids": {"blocks.0.mlp.W_on": [1]}}, r"no decomposed site 'blocks.0.mlp.W_on'; near: 'blocks.0.mlp.W_in'"),
        ({"ids": {IN: [6]}}, r"\[6\] of blocks.0.mlp.W_in: expected ids in 0..5"),
        ({"ids": {IN: [[1, 1]]}}, r"names subcomponents of blocks.0.mlp.W_in twice: \[1, 1\]"),
        ({"ids": [{IN: [1]}, {IN: [1]}]}, r"blocks.0.mlp.W_in\[1\] is named twice"),
        ({"ids": {}}, "ids names no subcomponent at all"),
        ({"ids": [{IN: []}]}, "a group of ids is empty"),
        ({"kind": "noise"}, "kind='noise'; expected 'zero', 'mean', 'position_mean', 'resample'"),
        ({"test": "both"}, "test='both'; expected 'necessity'"),
        ({"positions": [12]}, r"positions \[12\]: expected some of 0..11"),
        ({"positions": [1, -11]}, "name a position twice"),
        ({"positions": "all"}, "positions='all'; expected None"),
        ({"per_pass": 0}, "per_pass=0; expected at least 1"),
        ({"reference": tokens(2)}, "reference is given, but kind='zero' does not use one"),
        ({"kind": "resample", "reference": tokens(3)}, r"reference has shape \(3, 12\).*\(2, 12\)"),
        ({"kind": "position_mean", "reference": tokens(2)[:, :5]}, r"needs prompts as long as the tokens, \(2, 12\)"),
        ({"kind": "resample", "tokens": tokens(1)}, "there is only one; give reference"),
        ({"tokens": tokens(2) + 40}, r"token ids run from .* the vocabulary is 0..39"),
        ({"tokens": tokens(2)[0]}, r"tokens has shape \(12,\); expected \[batch pos\]"),
        ({"metric": lambda logits: logits[:, :2, 0]}, r"shape \(2, 2\); expected a scalar, or one number per row"),
    ],
)  # fmt: skip
def test_mistakes_are_named(
    decomposition: Decomposition, without_type_checks: None, arguments: dict[str, Any], text: str
) -> None:
    given = {"tokens": tokens(2), "metric": metric, "ids": {IN: [1]}, **arguments}
    with pytest.raises(ValueError, match=text):
        ablation_effects(decomposition, given.pop("tokens"), given.pop("metric"), given.pop("ids"), **given)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"ids": {IN: [1.5]}}, r"subcomponents \[1.5\] of blocks.0.mlp.W_in: expected integer ids"),
        ({"ids": {IN: "3"}}, r"ids\['blocks.0.mlp.W_in'\] is '3'; expected integers"),
        ({"ids": 3}, "ids is 3; expected {site: ids}, a Unit"),
        ({"ids": [IN]}, "ids holds a str; expected {site: ids}"),
        ({"tokens": "a b"}, "tokens is text; expected token ids"),
        ({"metric": lambda logits: "good"}, "the metric returned a str"),
    ],
)  # fmt: skip
def test_wrong_types_are_named(
    decomposition: Decomposition, without_type_checks: None, arguments: dict[str, Any], text: str
) -> None:
    given = {"tokens": tokens(2), "metric": metric, "ids": {IN: [1]}, **arguments}
    with pytest.raises(TypeError, match=text):
        ablation_effects(decomposition, given["tokens"], given["metric"], given["ids"])


def test_a_removed_decomposition_is_refused(decomposition: Decomposition, without_type_checks: None) -> None:
    decomposition.remove()
    with pytest.raises(ValueError, match="was removed from its model"):
        ablation_effects(decomposition, tokens(2), metric)
