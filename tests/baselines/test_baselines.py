"""Baselines: APD against jacobians, loops and hand-made solutions; fixed subcomponents that sum to W and still fail."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, jacrev

from spd_lens import TrainConfig
from spd_lens.baselines import (
    APD,
    APD_RESID_MLP_1,
    APD_TMS_5_2,
    APD_TMS_40_10,
    APDConfig,
    APDLearner,
    apd_report,
    batch_top_k,
    component_recovery,
    cut_off,
    decompose_fixed,
    fixed_factors,
    train_apd,
    train_gates,
)
from spd_lens.toys import TMS, Recovery, ResidMLP, SparseFeatures, tms_features, tms_report
from tests.small_models import rand, randn

TINY = APDConfig(n_components=4, k=0.6, lr=0.03, steps=6, batch_size=24, rank=2, simplicity=0.7, p=0.9)


def tms(seed: int = 0) -> TMS:
    """A TMS with a bias, in float64."""
    model = TMS(5, 3, seed=seed).double()
    with torch.no_grad():
        model.b.copy_(0.2 * randn(5, seed=seed))
    return model


def resid_mlp(seed: int = 0) -> ResidMLP:
    return ResidMLP(6, 9, 1, 4, seed=seed).double()


# Name of the matrix in APD, of the parameter in the model.
PARAMETERS = {TMS: {"W": "W"}, ResidMLP: {"W_in": "blocks.0.mlp.W_in", "W_out": "blocks.0.mlp.W_out"}}


def random_apd(model: Any, config: APDConfig, seed: int = 0) -> APD:
    factors: list[dict[str, Tensor]] = [{}, {}]
    for i, (name, path) in enumerate(PARAMETERS[type(model)].items()):
        for side, length in zip(factors, model.get_parameter(path).shape, strict=True):
            side[name] = 0.5 * randn(config.n_components, config.rank or 1, length, seed=10 * seed + i + 5 * len(side))
    return APD(model, config, *factors, [])


def parameters_of(model: Any, matrices: dict[str, Tensor]) -> dict[str, Tensor]:
    return {path: matrices[name] for name, path in PARAMETERS[type(model)].items()}


def attributions_by_jacobian(apd: APD, x: Tensor) -> Tensor:
    """From the whole jacobian of the model itself."""
    model, names = apd.model, PARAMETERS[type(apd.model)]
    P = {name: apd.components(name) for name in names}
    at = {name: model.get_parameter(path).detach() for name, path in names.items()}
    if apd.config.attributions_from == "components":
        at = {name: p.sum(0) for name, p in P.items()}
    rows = []
    for row in x:
        jacobian = jacrev(lambda p, row=row: functional_call(model, p, row))(parameters_of(model, at))
        inner = sum(torch.einsum("oij,cij->co", jacobian[path], P[name]) for name, path in names.items())
        rows.append(torch.as_tensor(inner).square().mean(1).sqrt())
    return torch.stack(rows).detach()


# -- attributions, top-k, losses -------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["target", "components"])
@pytest.mark.parametrize("make", [tms, resid_mlp])
def test_attributions_equal_those_from_the_jacobian(make: Any, at: Any) -> None:
    apd = random_apd(make(), TINY.changed(attributions_from=at))
    x = randn(7, 5 if make is tms else 6, seed=3)
    expected = attributions_by_jacobian(apd, x)
    assert (expected > 1e-3).double().mean() > 0.8
    for entries_at_once in (250_000, 2 * x.numel()):  # all components together, and two by two
        found = apd.attributions(x, entries_at_once=entries_at_once)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_batch_top_k_equals_sorting_all_pairs() -> None:
    scores = rand(3, 6, 4, seed=2)
    counts = torch.tensor([1, 9, 30])
    found = batch_top_k(scores, counts)
    for member, count in enumerate([1, 9, 24]):
        order = sorted(((float(scores[member, b, c]), b, c) for b in range(6) for c in range(4)), reverse=True)
        expected = torch.zeros(6, 4, dtype=torch.float64)
        for _, b, c in order[:count]:
            expected[b, c] = 1
        assert torch.equal(found[member], expected)


def losses_by_hand(apd: APD, x: Tensor) -> dict[str, float]:
    """Input by input, the model itself run with the parameters of each input's active components."""
    model, config, names = apd.model, apd.config, PARAMETERS[type(apd.model)]
    P = {name: apd.components(name).detach() for name in names}
    target = {name: model.get_parameter(path).detach() for name, path in names.items()}
    n_entries = sum(W.numel() for W in target.values())
    A = attributions_by_jacobian(apd, x)
    limit = A.flatten().sort(descending=True).values[config.n_active - 1]
    minimality = simplicity = hidden = 0.0
    for row, scores in zip(x, A, strict=True):
        active = [c for c in range(config.n_components) if scores[c] >= limit]
        kappa = {name: p[active].sum(0) for name, p in P.items()}
        outputs, acts = [], []
        for matrices in (target, kappa):
            kept: list[Tensor] = []
            hooks = []
            if isinstance(model, ResidMLP):
                hook = model.mlps()[0].hook_post.register_forward_hook(lambda m, i, out, kept=kept: kept.append(out))
                hooks.append(hook)
            outputs.append(functional_call(model, parameters_of(model, matrices), row).detach())
            acts.append(kept)
            for hook in hooks:
                hook.remove()
        minimality += float((outputs[0] - outputs[1]).square().mean()) / len(x)
        if isinstance(model, ResidMLP):
            hidden += float((acts[0][0] - acts[1][0]).square().mean()) / len(x)
        for c in active:
            for name in names:
                for v, u in zip(apd.V[name][c], apd.U[name][c], strict=True):
                    simplicity += float(v.norm() * u.norm()) ** config.p / n_entries / len(x)
    errors = sum(float((P[name].sum(0) - W).square().sum()) for name, W in target.items())
    found = {"faithfulness": errors / n_entries, "minimality": minimality, "simplicity": simplicity}
    return found | ({"hidden": hidden} if isinstance(model, ResidMLP) else {})


@pytest.mark.parametrize("make", [tms, resid_mlp])
def test_losses_equal_a_computation_input_by_input(make: Any) -> None:
    # The second member has another k and another number of inputs that are zero.
    configs = [TINY, TINY.changed(seed=1, k=1.1)]
    run = APDLearner([make(0), make(1)], configs)
    for i in range(2):
        own = random_apd(make(i), configs[i], seed=i)
        with torch.no_grad():
            for side, values in ((run.V, own.V), (run.U, own.U)):
                for name, value in values.items():
                    side[name][i] = value
    n_features = run.target.n_features
    run.data = [SparseFeatures(n_features, 24, probability=0.25, low=-1.0, seed=seed) for seed in (0, 1)]
    losses = run.losses(run.batch(0))
    whole = [source.batch(0).double() for source in run.data]
    zeros = [int((x == 0).all(1).sum()) for x in whole]
    assert zeros[0] != zeros[1]
    assert min(zeros) > 0
    for i, apd in enumerate(run.results()):
        expected = losses_by_hand(apd, whole[i])
        assert expected.keys() == losses.keys()
        for name, value in expected.items():
            assert value > 1e-6
            assert float(losses[name][i].detach()) == pytest.approx(value, rel=1e-9), name


# -- training --------------------------------------------------------------------------------------------------------


def triangle() -> TMS:
    """TMS 3-2: three directions at 120 degrees, whose interference the ReLU removes."""
    model, angles = TMS(3, 2), torch.arange(3) * 2 * math.pi / 3
    with torch.no_grad():
        model.W.copy_(torch.stack([angles.cos(), angles.sin()], dim=1))
    return model


def test_it_learns_one_shrunken_component_per_feature() -> None:
    config = APD_TMS_5_2.changed(n_components=3, k=0.14, steps=300, batch_size=1024, seed=2)
    (apd,) = train_apd([triangle()], config, log_every=50)
    for name in ("faithfulness", "minimality"):
        assert apd.log[-1][name] < 0.2 * apd.log[0][name]
    report = apd_report(apd)
    assert report.success_but_for_length
    assert report.components.n_alive == 3
    assert report.recovery.mmcs > 0.99
    assert 0.6 < report.recovery.ml2r < 0.95
    assert not report.success
    assert report.faithfulness["W"] < 1e-3


def test_members_do_not_influence_each_other() -> None:
    configs = [TINY, TINY.changed(seed=3, k=0.9, simplicity=0.1, minimality=3.0)]
    together = train_apd([tms(0), tms(1)], configs)
    for i, config in enumerate(configs):
        (alone,) = train_apd([tms(i)], config)
        torch.testing.assert_close(together[i].V, alone.V, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(together[i].U, alone.U, rtol=1e-9, atol=1e-11)
        assert together[i].log[-1]["minimality"] == pytest.approx(alone.log[-1]["minimality"], rel=1e-9)


def test_an_interrupted_run_continues_to_the_same_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TINY.changed(unit_norm=True, hidden=1.0)
    (whole,) = train_apd([resid_mlp()], config, log_every=2)
    step = APDLearner.step

    def breaks(self: Any, x: Any, now: int) -> Any:
        if now == 5:
            raise KeyboardInterrupt
        return step(self, x, now)

    monkeypatch.setattr(APDLearner, "step", breaks)
    with pytest.raises(KeyboardInterrupt):
        train_apd([resid_mlp()], config, out_dir=tmp_path / "run", checkpoint_every=2, log_every=2)
    monkeypatch.setattr(APDLearner, "step", step)
    (resumed,) = train_apd([resid_mlp()], config, out_dir=tmp_path / "run", checkpoint_every=2, log_every=2)
    assert resumed.log == whole.log
    for name in whole.V:
        assert torch.equal(resumed.V[name], whole.V[name])
        assert torch.equal(resumed.U[name], whole.U[name])
        torch.testing.assert_close(whole.V[name].norm(dim=-1), torch.ones(4, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="holds an APD run of 1 members with other configs"):
        train_apd([resid_mlp()], config.changed(k=1.0), out_dir=tmp_path / "run")


def test_schedules_and_published_counts() -> None:
    assert APD_TMS_5_2.n_active == 432
    assert APD_TMS_40_10.n_active == 2048
    assert APD_RESID_MLP_1.n_active == 327
    constant, cosine = TINY.changed(steps=100), TINY.changed(steps=100, schedule="cosine", warmup=0.1)
    assert [constant.lr_factor(t) for t in (0, 4, 5, 99)] == [0.2, 1, 1, 1]
    assert [cosine.lr_factor(t) for t in (0, 9, 10, 55)] == pytest.approx([0.1, 1, 1, math.cos(math.pi / 4)])


def test_what_cannot_be_decomposed_is_refused() -> None:
    with pytest.raises(ValueError, match="has 2 blocks; APD is implemented for one"):
        train_apd([ResidMLP(4, 6, 2, 2)], TINY)
    with pytest.raises(ValueError, match=r"a matrix in the middle \(\+ID\)"):
        train_apd([TMS(5, 2, identity=True)], TINY)
    with pytest.raises(ValueError, match="2 models and 1 configs"):
        train_apd([tms(0), tms(1)], [TINY])
    with pytest.raises(ValueError, match="member 1 differs from the first in more than seed, k"):
        train_apd([tms(0), tms(1)], [TINY, TINY.changed(p=0.5)])
    with pytest.raises(ValueError, match="do not have the same sizes"):
        train_apd([tms(0), TMS(5, 2).double()], TINY)
    with pytest.raises(ValueError, match="no component would ever be active"):
        TINY.changed(k=0.01)
    with pytest.raises(ValueError, match=r"warmup=1\.0"):
        TINY.changed(warmup=1.0)
    with pytest.raises(ValueError, match="n_components=0; expected at least 1"):
        TINY.changed(n_components=0)


# -- reports ---------------------------------------------------------------------------------------------------------


def test_recovery_of_rank_one_components_is_that_of_subcomponents() -> None:
    V, U, W = randn(6, 9, seed=1), randn(9, 4, seed=2), randn(6, 4, seed=3)
    G = (rand(6, 9, seed=4) > 0.9).double()
    P = torch.einsum("fc,ch->cfh", V, U)
    ours, theirs = component_recovery(P, W, G), Recovery.of(V, U, W, G)
    for name in ("mmcs", "ml2r", "mmcs_all", "ml2r_all"):
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-12)
    assert ours.mmcs < ours.mmcs_all
    assert component_recovery(P, W, torch.zeros(6, 9, dtype=torch.float64)).mmcs == 0


def hand_made(P: Tensor) -> APD:
    """An APD of the triangle from components `[C features hidden]`; the last one is never used."""
    left, s, right = torch.linalg.svd(torch.cat([P, torch.zeros(1, *P.shape[1:])]), full_matrices=False)
    config = APD_TMS_5_2.changed(n_components=len(P) + 1, k=0.14, steps=1, attributions_from="target")
    return APD(triangle(), config, {"W": left.mT}, {"W": s[..., None] * right}, [])


def test_reports_of_right_shrunken_and_mixed_components() -> None:
    W = triangle().W.detach()
    right = torch.diag_embed(torch.eye(3)) @ W
    report = apd_report(hand_made(right))
    assert report.success
    assert report.components.n_alive == 3
    assert report.faithfulness["W"] < 1e-12
    assert "the known solution" in str(report)
    shrunk = apd_report(hand_made(0.9 * right))
    assert shrunk.problems == ("APD: ML2R 0.900 is not within 0.95 to 1.05",)
    assert shrunk.success_but_for_length
    two_in_one = apd_report(hand_made(torch.stack([right[0] + right[1], right[2]])))
    assert two_in_one.recovery.mmcs == pytest.approx(1, abs=1e-6)
    assert two_in_one.problems[0] == "APD: 2 subcomponents alive for 3 features"
    assert not two_in_one.success_but_for_length
    halves = apd_report(hand_made(torch.cat([right / 2, right / 2])))
    assert "APD: 6 subcomponents alive for 3 features" in halves.problems


def test_the_cut_off_divides_training_batches_as_top_k_does() -> None:
    apd = hand_made(torch.diag_embed(torch.eye(3)) @ triangle().W.detach())
    x = tms_features(3, 50_000, seed=9).batch(0)
    rate = float((apd.attributions(x) >= cut_off(apd)).float().sum(1).mean())
    assert rate == pytest.approx(0.14, rel=0.05)


def test_the_report_of_a_hand_made_resid_mlp() -> None:
    """One neuron per feature, which reads and writes nothing else."""
    model = ResidMLP(10, 40, 1, 10)
    mlp, back = model.mlps()[0], torch.linalg.pinv(model.W_E)
    with torch.no_grad():
        mlp.W_in.copy_(0.8 * back)
        mlp.W_out.copy_(1.2 * back.T)
    V = {"W_in": back.T, "W_out": (mlp.W_out @ model.W_U).T.detach()}
    U = {"W_in": (model.W_E @ mlp.W_in).detach(), "W_out": back.T}
    config = APD_RESID_MLP_1.changed(n_components=10, k=0.04, steps=1, batch_size=2048)
    factors = [{name: t[:, None] for name, t in side.items()} for side in (V, U)]
    report = apd_report(APD(model, config, *factors, []))
    assert report.success
    assert report.contribution_error is not None
    assert report.contribution_error < 1e-4
    factors[1]["W_out"] = 0.5 * factors[1]["W_out"]
    halved = apd_report(APD(model, config, *factors, []))
    assert halved.contribution_error == pytest.approx(0.5, abs=1e-4)


# -- fixed subcomponents ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 2), (2, 5), (3, 3)])
@pytest.mark.parametrize("subcomponents", ["svd", "random", "rows"])
def test_fixed_factors_sum_to_the_matrix(subcomponents: Any, shape: tuple[int, int]) -> None:
    W, C = randn(*shape, seed=1), 6
    V, U = fixed_factors(W, subcomponents, C, seed=4)
    assert (V.shape, U.shape) == ((shape[0], C), (C, shape[1]))
    torch.testing.assert_close(V @ U, W, rtol=1e-9, atol=1e-9)
    if subcomponents == "svd":
        lengths = V.norm(dim=0) * U.norm(dim=1)
        torch.testing.assert_close(lengths[: min(shape)], torch.linalg.svdvals(W))
        assert (lengths[min(shape) :] == 0).all()
    if subcomponents == "random":
        assert not torch.allclose(V, fixed_factors(W, subcomponents, C, seed=5)[0])
    least = shape[0] if subcomponents == "rows" else min(shape)
    with pytest.raises(ValueError, match=f"sum to a {shape[0]} x {shape[1]} matrix from {least} on"):
        fixed_factors(W, subcomponents, least - 1)


@pytest.mark.slow  # three trainings
def test_gates_on_singular_or_random_subcomponents_fail_where_those_on_rows_succeed() -> None:
    model = TMS(5, 2)
    angles = torch.arange(5) * 2 * math.pi / 5
    with torch.no_grad():
        model.W.copy_(1.13 * torch.stack([angles.cos(), angles.sin()], dim=1))
        model.b.fill_(-0.25)
    kinds: list[Any] = ["rows", "svd", "random"]
    members = [decompose_fixed(copy.deepcopy(model), {"*": 5}, subcomponents) for subcomponents in kinds]
    before = [{n: t.clone() for n, t in d.tensors().items()} for d in members]
    config = TrainConfig(steps=200, lr=3e-2, minimality=3e-3, divergence="mse", faithfulness_warmup=5, log_every=100)
    train_gates(members, [tms_features(5, 256, seed=1)] * 3, config)
    reports = dict(zip(kinds, [tms_report(d) for d in members], strict=True))
    for d, old in zip(members, before, strict=True):
        for name, tensor in d.tensors().items():
            assert torch.equal(tensor, old[name]) == name.endswith((".V", ".U")), name
        torch.testing.assert_close(d["W_dec"].weight, d["W_dec"].target_weight)
    assert reports["rows"].encoder.problems("W_enc") == []
    assert reports["rows"].recovery.problems("W_enc") == []
    for subcomponents in ("svd", "random"):
        assert reports[subcomponents].encoder.problems("W_enc") != []
        assert reports[subcomponents].recovery.mmcs < 0.97
    assert reports["svd"].encoder.n_alive == 2
