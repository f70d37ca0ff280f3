"""What terms weigh where the run finds it: the divergence with everything off, and a tolerance; by hand, in float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spd_lens import Decomposition, Reconstruction, TrainConfig, decompose, train
from spd_lens.data import as_batch
from spd_lens.toys import TMS, tms_features
from spd_lens.training import accumulate_gradients, make_learner, take_step
from tests.conftest import needs_hooked
from tests.small_models import tiny_transformer, tokens

CONFIG = TrainConfig(
    steps=6, log_every=1, checkpoint_every=3, divergence="mse", minimality=1e-2, frequency=1e-3,
    reconstructions=(Reconstruction(), Reconstruction(0.5, "bernoulli", "layerwise")), relative_reconstruction=True,
)  # fmt: skip


def toy(seed: int = 0) -> Decomposition:
    model = TMS(4, 2, seed=seed).double()
    return decompose(model, {"W_*": 5}, seed=seed, gate_width=3).to(torch.float64)


def data(n: int = 8) -> list[Tensor]:
    features = tms_features(4, 16, seed=3)
    return [features.batch(i).double() for i in range(n)]


def off(decomposition: Decomposition, x: Tensor) -> float:
    """The mean over rows and outputs of the square of what the model loses when both matrices are zero."""
    W, b = decomposition.model.W.detach(), decomposition.model.b.detach()
    whole, without = torch.relu(x @ W @ W.T + b), torch.relu(b).expand_as(x)
    return float((whole - without).square().mean())


def gradients(decomposition: Decomposition, config: TrainConfig, x: Tensor) -> list[Tensor]:
    learner = make_learner(decomposition, config)
    accumulate_gradients(learner, as_batch(x), 0)
    return [p.grad.clone() for group in learner.optimizer.param_groups for p in group["params"] if p.grad is not None]


def test_reconstruction_is_divided_by_what_everything_off_costs() -> None:
    decomposition, x = toy(), data()[0]
    cost = off(decomposition, x)
    terms = tuple(Reconstruction(term.coefficient / cost, term.masks, term.routing) for term in CONFIG.reconstructions)
    by_hand = CONFIG.changed(relative_reconstruction=False, reconstructions=terms)
    for found, expected in zip(gradients(toy(), CONFIG, x), gradients(toy(), by_hand, x), strict=True):
        assert torch.allclose(found, expected, rtol=1e-10, atol=1e-14)
    plain = gradients(toy(), CONFIG.changed(relative_reconstruction=False), x)
    assert not torch.allclose(gradients(toy(), CONFIG, x)[0], plain[0], rtol=1e-2)


def test_everything_off_is_the_mean_over_the_first_steps_and_then_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spd_lens.training.weights.MEASURED_STEPS", 4)
    decomposition = toy()
    costs = [off(decomposition, x) for x in data()]
    result = train(decomposition, data(), CONFIG, out_dir=tmp_path)
    for i, line in enumerate(result.log):
        seen = costs[: min(i + 1, 4)]
        assert line["everything_off"] == pytest.approx(sum(seen) / len(seen), rel=1e-6)
        weighted = (line["stochastic_all"] + 0.5 * line["bernoulli_layerwise"]) / line["everything_off"]
        own = line["faithfulness"] + 1e-2 * line["minimality"] + 1e-3 * line["frequency"]
        assert line["loss"] == pytest.approx(weighted + own, rel=1e-5)


@pytest.mark.parametrize("relative", [False, True])
def test_the_coefficient_follows_what_is_spent(relative: bool) -> None:
    config = CONFIG.changed(tolerance=0.1, tolerance_rate=3.0, relative_reconstruction=relative)
    learner = make_learner(toy(), config)
    log, costs = 0.0, []
    for step, x in enumerate(data(6)):
        costs.append(off(learner.decomposition, x))
        minimality = float(learner.weights.of("minimality"))
        assert minimality == pytest.approx(1e-2 * torch.tensor(log, dtype=torch.float64).exp().item(), rel=1e-10)
        losses, _, _ = take_step(learner, as_batch(x), step)
        spent = (float(losses["stochastic_all"]) + 0.5 * float(losses["bernoulli_layerwise"])) / 1.5
        spent = spent * len(costs) / sum(costs) if relative else spent
        log += 3.0 / 6 * config.lr_factor(step) * max(-1.0, min(1.0, 1 - spent / 0.1))
    assert abs(log) > 0.1


def test_a_wide_tolerance_ends_sparser_than_a_narrow_one(tmp_path: Path) -> None:
    ends = []
    for tolerance in (1e-3, 0.5):
        config = CONFIG.changed(steps=40, tolerance=tolerance, lr=2e-2, reconstructions=(Reconstruction(),))
        log = train(toy(), data(40), config, out_dir=tmp_path / str(tolerance)).log[-10:]
        ends.append([sum(line[key] for line in log) / 10 for key in ("L0", "stochastic_all", "minimality_coefficient")])
    narrow, wide = ends
    assert wide[0] < narrow[0]
    assert wide[1] > narrow[1]
    assert wide[2] > 3 * narrow[2]


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    config = CONFIG.changed(tolerance=0.1)
    whole, part = toy(), toy()
    train(whole, data(), config, out_dir=tmp_path / "whole")
    with pytest.raises(ValueError, match="the data ended"):
        train(part, iter(data(4)), config, out_dir=tmp_path / "part")
    resumed = toy()
    result = train(resumed, data(), resume_from=tmp_path / "part")
    assert result.steps == 6
    for one, other in zip(whole.tensors().values(), resumed.tensors().values(), strict=True):
        assert torch.equal(one, other)


@needs_hooked
def test_on_a_language_model_everything_off_is_a_kl(tmp_path: Path) -> None:
    model = tiny_transformer(0, n_layers=2).double()
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        for block in zeroed.blocks:
            block.mlp.W_in.zero_()
    batch = tokens(3, seed=1)
    with torch.no_grad():
        log_p, log_q = (m(batch).log_softmax(-1) for m in (model, zeroed))
    expected = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    decomposition = decompose(model, {"blocks.*.mlp.W_in": 6}).to(torch.float64)
    config = TrainConfig(steps=1, relative_reconstruction=True, reconstructions=(Reconstruction(masks="pgd"),))
    result = train(decomposition, [batch], config, out_dir=tmp_path)
    assert result.final["everything_off"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tolerance": 0.0}, "tolerance"),
        ({"tolerance": 0.1, "minimality": 0.0}, "with minimality=0; expected where its coefficient starts"),
        ({"reconstructions": (), "minimality": 0.0, "frequency": 0.0}, "without a reconstruction term"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CONFIG.changed(**changes)
