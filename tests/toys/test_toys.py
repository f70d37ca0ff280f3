"""Toy models against formulas written out by hand, their data, and the training of targets."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap

from spd_lens import decompose, decompose_layer
from spd_lens.data import as_batch
from spd_lens.hosts import open_host
from spd_lens.toys import (
    TMS,
    ResidMLP,
    SparseFeatures,
    features,
    folded_output,
    one_hot_inputs,
    resid_mlp_features,
    tms_features,
    tms_gradients,
    tms_target_report,
    train_many_tms,
    train_resid_mlp,
    train_target,
    train_tms,
)
from spd_lens.training import train
from tests.small_models import rand, randn


def shaken(model: TMS) -> TMS:
    """With a bias, so that a forgotten one shows."""
    with torch.no_grad():
        model.b += torch.linspace(-0.3, 0.3, len(model.b))
    return model


# -- TMS -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("identity", [False, True])
def test_tms_equals_its_formula_entry_by_entry(identity: bool) -> None:
    model = shaken(TMS(4, 3, identity=identity, seed=1))
    x = torch.rand(6, 4)
    W, b, out = model.W.detach(), model.b.detach(), model(x).detach()
    for k, i in itertools.product(range(6), range(4)):
        pre = float(b[i]) + sum(float(x[k, j] * W[j, h] * W[i, h]) for j in range(4) for h in range(3))
        assert float(out[k, i]) == pytest.approx(max(0.0, pre), abs=1e-6)
    assert bool((out == 0).any())
    assert bool((out > 0).any())


def test_tms_hook_points_see_hidden_and_preactivation() -> None:
    model = shaken(TMS(4, 3, identity=True))
    x = torch.rand(6, 4)
    out, cache = model.run_with_cache(x)
    assert list(cache.keys()) == ["hook_input", "hook_hidden", "hook_identity", "hook_pre"]
    torch.testing.assert_close(cache["hook_hidden"], x @ model.W)
    torch.testing.assert_close(cache["hook_identity"], cache["hook_hidden"])
    assert torch.equal(out, torch.relu(cache["hook_pre"]))
    assert "hook_identity" not in TMS(4, 3).hook_dict


def test_the_identity_is_not_trained() -> None:
    model = TMS(4, 3, identity=True)
    assert sorted(name for name, _ in model.named_parameters()) == ["W", "b"]
    assert torch.equal(dict(model.named_buffers())["W_id"], torch.eye(3))


def test_same_seed_same_tms_whatever_the_global_seed() -> None:
    first = TMS(5, 2, seed=3)
    torch.manual_seed(77)
    assert torch.equal(first.W, TMS(5, 2, seed=3).W)
    assert torch.equal(first.W, TMS(5, 2, identity=True, seed=3).W)
    assert not torch.equal(first.W, TMS(5, 2, seed=4).W)


@pytest.mark.parametrize("identity", [False, True])
def test_masked_tms_equals_a_tms_of_edited_weights(identity: bool) -> None:
    model = shaken(TMS(5, 2, identity=identity))
    plain, x = copy.deepcopy(model), torch.rand(11, 5)
    decomposition = decompose(model, {"*": 7})
    assert list(decomposition) == ["W_enc", *(["W_id"] if identity else []), "W_dec"]
    assert decomposition["W_dec"].tied_to is decomposition["W_enc"]
    assert torch.equal(model(x), plain(x))

    masks = {name: torch.rand(7) for name in decomposition}
    with model.hooks(fwd_hooks=decomposition.mask(masks, delta=0.3)):
        out = model(x)
    edited = {
        name: (w.V * masks[name]) @ w.U + 0.3 * (w.target_weight - w.V @ w.U) for name, w in decomposition.items()
    }
    hidden = x @ edited["W_enc"]
    if identity:
        hidden = hidden @ edited["W_id"]
    torch.testing.assert_close(out, torch.relu(hidden @ edited["W_dec"] + plain.b))


@pytest.mark.parametrize("identity", [False, True])
def test_tms_runs_under_vmap_over_stacked_parameters(identity: bool) -> None:
    models = [shaken(TMS(5, 2, identity=identity, seed=s)) for s in range(3)]
    decompositions = [decompose(model, {"*": 7}, seed=s) for s, model in enumerate(models)]
    parameters, buffers = stack_module_state(list(models))
    x = torch.rand(3, 6, 5)
    out = vmap(lambda p, b, x: functional_call(models[0], (p, b), (x,)))(parameters, buffers, x)
    for i, decomposition in enumerate(decompositions):
        torch.testing.assert_close(out[i], decomposition.masked_forward(x[i], {}))


# -- ResidMLP --------------------------------------------------------------------------------------------------------


def test_resid_mlp_equals_its_formula_neuron_by_neuron() -> None:
    model = ResidMLP(4, 9, n_layers=2, d_mlp=3, seed=1)
    x = torch.randn(5, 4)
    for k in range(5):
        r = sum(x[k, i] * model.W_E[i] for i in range(4))
        for block in model.blocks:
            added = torch.zeros(9)
            for n in range(3):
                added = added + torch.clamp(r @ block.mlp.W_in[:, n], min=0) * block.mlp.W_out[n]
            r = r + added
        torch.testing.assert_close(model(x)[k], torch.stack([r @ model.W_E[i] for i in range(4)]))
    torch.testing.assert_close(model.labels(torch.tensor([-2.0, 3.0])), torch.tensor([-2.0, 6.0]))


def test_resid_mlp_embedding_is_fixed_with_unit_rows() -> None:
    model = ResidMLP(seed=2)
    assert model.W_E.shape == (100, 1000)
    torch.testing.assert_close(model.W_E.norm(dim=1), torch.ones(100))
    assert torch.equal(model.W_U, model.W_E.T)
    assert sorted(name for name, _ in model.named_parameters()) == ["blocks.0.mlp.W_in", "blocks.0.mlp.W_out"]
    assert torch.equal(model.W_E, ResidMLP(seed=2).W_E)
    assert not torch.equal(model.W_E, ResidMLP(seed=3).W_E)


def test_resid_mlp_is_decomposed_by_block() -> None:
    model = ResidMLP(6, 12, n_layers=3, d_mlp=2)
    host = open_host(model)
    assert host.n_layers() == 3
    assert host.block(1) is model.blocks[1]
    assert host.default_sites(2) == ("mlp.W_in", "mlp.W_out")
    plain, x = copy.deepcopy(model), torch.randn(7, 6)
    decomposition = decompose_layer(model, 1, 5)
    assert list(decomposition) == ["blocks.1.mlp.W_in", "blocks.1.mlp.W_out"]
    assert torch.equal(model(x), plain(x))

    masks = {name: torch.rand(5) for name in decomposition}
    with model.hooks(fwd_hooks=decomposition.mask(masks, delta=0.0)):
        out = model(x)
    with torch.no_grad():
        for name, w in decomposition.items():
            plain.get_parameter(name).copy_((w.V * masks[name]) @ w.U)
    torch.testing.assert_close(out, plain(x))
    decomposition.remove()
    assert sorted(model.hook_dict) == sorted(plain.hook_dict)


def test_resid_mlp_runs_under_vmap_over_stacked_parameters() -> None:
    models = [ResidMLP(6, 12, n_layers=2, d_mlp=3, seed=s) for s in range(3)]
    x = torch.randn(3, 4, 6)
    out = vmap(lambda p, b, x: functional_call(models[0], (p, b), (x,)))(*stack_module_state(list(models)), x)
    torch.testing.assert_close(out, torch.stack([model(x[i]) for i, model in enumerate(models)]))


@pytest.mark.parametrize("gate", ["scalar", "vector", "shared", "global"])
def test_gates_of_every_kind_without_positions_read_the_toys(gate: str) -> None:
    for model, n_features in ((TMS(5, 2, identity=True), 5), (ResidMLP(6, 12, n_layers=2, d_mlp=3), 6)):
        decomposition = decompose(model, {"*": 4}, gate=gate)  # pyright: ignore[reportArgumentType]
        importances = decomposition.importance(one_hot_inputs(n_features))
        assert {tuple(g.shape) for g in importances.values()} == {(n_features, 4)}


# -- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("data", "probability", "low"), [
    (tms_features(40, 20_000, seed=1), 0.05, 0.0),
    (resid_mlp_features(100, 20_000, seed=1), 0.01, -1.0),
    (SparseFeatures(7, 50_000, probability=0.6, low=2.0, high=3.0), 0.6, 2.0),
])  # fmt: skip
def test_features_are_active_at_the_rate_with_uniform_values(
    data: SparseFeatures, probability: float, low: float
) -> None:
    x = data.batch(0)
    n = x.numel()
    active = x != 0
    deviation = math.sqrt(probability * (1 - probability) / len(x))
    assert float((active.float().mean(0) - probability).abs().max()) < 5 * deviation
    values = x[active]
    width = data.high - low
    assert float(values.min()) >= low
    assert float(values.max()) <= data.high
    assert float(values.mean()) == pytest.approx(low + width / 2, abs=5 * width / math.sqrt(12 * n * probability))
    quarters = torch.histc(values, 4, low, data.high) / len(values)
    assert quarters.tolist() == pytest.approx([0.25] * 4, abs=5 * math.sqrt(0.1875 / (n * probability)))


def test_features_are_independent_of_each_other_and_of_the_next_row() -> None:
    active = (tms_features(8, 100_000).batch(0) != 0).double()
    for other in (active, active.roll(1, 0)):
        together = active.T @ other / len(active)
        expected = torch.full((8, 8), 0.05**2).double()
        if other is active:
            expected.fill_diagonal_(0.05)
        assert float((together - expected).abs().max()) < 5 * math.sqrt(0.05 / 100_000)


def test_a_batch_depends_on_seed_and_number_alone() -> None:
    data = tms_features(40, 64, seed=5)
    first = list(itertools.islice(data, 6))
    assert [torch.equal(x, data.batch(i)) for i, x in enumerate(first)] == [True] * 6
    later = list(itertools.islice(tms_features(40, 64, seed=5).batches_from(4), 2))
    assert all(torch.equal(x, y) for x, y in zip(first[4:], later, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], tms_features(40, 64, seed=6).batch(0))


def test_probability_one_makes_every_feature_active() -> None:
    assert bool((SparseFeatures(3, 1000, probability=1.0, low=1.0, high=2.0).batch(0) >= 1).all())


def test_draws_that_were_too_short_are_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "SPARE_DEVIATIONS", -1e9)  # eight gaps at a time
    active = tms_features(10, 20_000).batch(0) != 0
    for quarter in active.chunk(4):
        assert float(quarter.float().mean()) == pytest.approx(0.05, abs=5 * math.sqrt(0.05 / quarter.numel()))


def test_features_are_what_training_accepts_and_can_be_resumed(tmp_path) -> None:
    data = tms_features(5, 32)
    assert as_batch(data.batch(0)).n_positions == 32

    def run(steps: int, **arguments: object) -> Tensor:
        decomposition = decompose(TMS(5, 2), {"*": 6})
        train(decomposition, data, steps=steps, divergence="mse", schedule="constant", **arguments)  # pyright: ignore
        return decomposition["W_enc"].V.detach()

    straight = run(6, out_dir=tmp_path / "a", checkpoint_every=3, keep_checkpoints=5)
    again = run(6, resume_from=tmp_path / "a" / "checkpoints" / "step-00000003")
    assert torch.equal(straight, again)


def test_one_hot_inputs_have_one_feature_each() -> None:
    x = one_hot_inputs(3)
    assert x.tolist() == [[0.75, 0, 0], [0, 0.75, 0], [0, 0, 0.75]]


@pytest.mark.parametrize(("arguments", "message"), [
    ({"probability": 0.0}, "probability=0; expected a number above 0 and at most 1"),
    ({"probability": 0.1, "low": 1.0}, "low=1.0 and high=1.0; expected low < high"),
    ({"probability": 0.1, "seed": -1}, "seed=-1; expected at least 0"),
])  # fmt: skip
def test_impossible_features_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseFeatures(3, 4, **arguments)


# -- training targets ------------------------------------------------------------------------------------------------


def test_closed_form_gradients_equal_autograd() -> None:
    W, b, x = randn(3, 5, 2, seed=1), randn(3, 5, seed=2), rand(3, 5, 40, seed=3)
    loss, by_W, by_b = tms_gradients(W.clone(), b.clone(), x.clone())
    for i in range(3):
        Wi, bi, xi = W[i].requires_grad_(), b[i].requires_grad_(), x[i].T
        expected = (torch.relu(xi @ Wi @ Wi.T + bi) - xi).square().mean()
        expected.backward()
        torch.testing.assert_close(loss[i], expected)
        torch.testing.assert_close(by_W[i], Wi.grad)
        torch.testing.assert_close(by_b[i], bi.grad)


def test_train_tms_equals_a_plain_loop() -> None:
    fast, plain = TMS(5, 2, identity=True, seed=2), TMS(5, 2, identity=True, seed=2)
    losses = train_tms(fast, steps=40, batch_size=256, seed=7)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=5e-3, weight_decay=0.01)
    expected = []
    for x in itertools.islice(tms_features(5, 256, seed=7), 40):
        loss = (plain(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(float(loss.detach()))
    torch.testing.assert_close(losses, torch.tensor(expected))
    torch.testing.assert_close(fast.W, plain.W, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(fast.b, plain.b, atol=1e-5, rtol=1e-4)
    assert not torch.equal(fast.W, TMS(5, 2, seed=2).W)


def test_many_targets_at_once_equal_single_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_target, "ENTRIES_AT_ONCE", 2 * 128 * 5)  # two members at once, so five make three groups
    seeds = [3, 0, 8, 1, 5]
    many = train_many_tms(5, 2, seeds, steps=60, batch_size=128)
    for seed, model in zip(seeds, many, strict=True):
        single = TMS(5, 2, seed=seed)
        train_tms(single, steps=60, batch_size=128, seed=seed)
        torch.testing.assert_close(model.W, single.W, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(model.b, single.b, atol=1e-5, rtol=1e-4)
    assert all(p.requires_grad for p in many[0].parameters())


def test_tms_learns_every_feature() -> None:
    models = train_many_tms(5, 2, range(6), steps=4_000)
    assert [tms_target_report(model).accepted for model in models] == [True] * 6
    assert [tms_target_report(TMS(5, 2, seed=s)).accepted for s in range(6)] == [False] * 6


def hand_made(angles: list[float], lengths: list[float], bias: float) -> TMS:
    model = TMS(5, 2)
    with torch.no_grad():
        turns = 2 * math.pi * torch.tensor(angles)
        model.W.copy_(torch.stack([turns.cos(), turns.sin()], dim=1) * torch.tensor(lengths)[:, None])
        model.b.fill_(bias)
    return model


def test_acceptance_is_about_features_and_loss() -> None:
    turns = [0.0, 0.2, 0.4, 0.6, 0.8]
    assert tms_target_report(hand_made(turns, [1.133] * 5, -0.245)).problems == ()

    (given_up, too_high) = tms_target_report(hand_made([0, 0.25, 0.5, 0.75, 0], [1, 1, 1, 1, 0.01], 0)).problems
    assert given_up.startswith("features [4] were not learned")
    assert "times the best" in too_high

    (only,) = tms_target_report(hand_made(turns, [1.0] * 5, 0)).problems
    assert only.startswith("the loss")
    assert tms_target_report(hand_made(turns, [1.0] * 5, 0), best_loss=1.0).accepted


def test_an_unknown_size_needs_the_best_loss() -> None:
    with pytest.raises(ValueError, match="7 features in 3 dimensions; train several seeds"):
        tms_target_report(TMS(7, 3))


@pytest.mark.parametrize("n_layers", [1, 3])
def test_folded_output_equals_the_model(n_layers: int) -> None:
    model = ResidMLP(7, 20, n_layers=n_layers, d_mlp=4, seed=1).double()
    x = randn(30, 7)
    torch.testing.assert_close(folded_output(model, x), model(x))


def test_train_resid_mlp_equals_a_plain_loop() -> None:
    fast, plain = (ResidMLP(10, 30, n_layers=2, d_mlp=3, seed=1) for _ in range(2))
    losses = train_resid_mlp(fast, steps=30, batch_size=200, seed=4)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30)
    expected = []
    for x in itertools.islice(resid_mlp_features(10, 200, seed=4), 30):
        loss = (plain(x) - plain.labels(x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        expected.append(float(loss.detach()))
    torch.testing.assert_close(losses, torch.tensor(expected), atol=1e-7, rtol=1e-4)
    for name, p in fast.named_parameters():
        torch.testing.assert_close(p, plain.get_parameter(name), atol=1e-4, rtol=1e-3)


def test_resid_mlp_learns_more_than_to_copy() -> None:
    model = ResidMLP(20, 100, n_layers=1, d_mlp=10)
    train_resid_mlp(model, steps=400, batch_size=1024)
    x = resid_mlp_features(20, 20_000, seed=99).batch(0)
    copying = torch.relu(x).square().mean()
    assert float((model(x) - model.labels(x)).square().mean().detach()) < 0.55 * float(copying)
