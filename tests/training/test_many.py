"""`train_many`: every member ends where a run of its own would have brought it."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spd_lens import Decomposition, Reconstruction, TrainConfig, decompose, train
from spd_lens.data import Batch
from spd_lens.objective import PGD
from spd_lens.toys import TMS, SparseFeatures, tms_features
from spd_lens.training import ManyResult, MemberAdam, MemberLearner, train_many
from tests.bridge_models import boot, random_tokens
from tests.conftest import needs_hooked
from tests.small_models import TiedAutoencoder, tiny_transformer, tokens

BOTH = (Reconstruction(), Reconstruction(0.5, "bernoulli", "layerwise", draws=2))
CONFIG = TrainConfig(
    steps=6, log_every=2, checkpoint_every=3, divergence="mse", reconstructions=BOTH, faithfulness_warmup=3,
    minimality=1e-2, frequency=1e-3, p_start=1.5, p_end=0.7, clip_subcomponents=0.05, clip_gates=0.05, squash="leaky",
    minimality_factors={"W_dec": 4.0},
)  # fmt: skip
# What members may differ in.
DIFFERENT = [
    {"seed": 3, "lr": 1e-2},
    {"seed": 4, "minimality": 0.0, "faithfulness": 0.0, "gate_lr": 5e-3},
    {"seed": 5, "faithfulness": 3.0, "frequency": 0.0, "faithfulness_warmup_lr": 0.05,
     "reconstructions": (Reconstruction(2.0), dataclasses.replace(BOTH[1], coefficient=0.1))},
]  # fmt: skip


def member(seed: int, *, identity: bool = False, gate: Any = "scalar") -> Decomposition:
    model = TMS(4, 2, identity=identity, seed=seed).double()
    decomposition = decompose(model, {"W_*": 5}, seed=seed, gate=gate, gate_width=3)
    return decomposition.to(torch.float64)


def data(seed: int) -> list[Tensor]:
    features = tms_features(4, 16, seed=seed)
    return [features.batch(i).double() for i in range(8)]


def tms_features_in_double(seed: int) -> list[Tensor]:
    features = tms_features(4, 16, seed=seed)
    return [features.batch(i).double() for i in range(60)]


def tensors(decomposition: Decomposition) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in decomposition.tensors().items()}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float((found[name] - value).abs().max()) < 1e-9, name


@pytest.mark.parametrize(("identity", "gate"), [(False, "scalar"), (True, "scalar"), (False, "shared")])
def test_each_member_ends_as_a_run_of_its_own(identity: bool, gate: str, tmp_path: Path) -> None:
    configs = [CONFIG.changed(**different) for different in DIFFERENT]
    together = [member(i, identity=identity, gate=gate) for i in range(3)]
    alone = [member(i, identity=identity, gate=gate) for i in range(3)]
    result = train_many(together, [data(i) for i in range(3)], configs)
    for i, (one, many, config) in enumerate(zip(alone, together, configs, strict=True)):
        before = tensors(one)
        single = train(one, data(i), config, out_dir=tmp_path / str(i))
        assert_close(tensors(many), tensors(one))
        assert float((tensors(one)["W_enc.V"] - before["W_enc.V"]).abs().max()) > 1e-3, "nothing was trained"
        for name in ("stochastic_all", "bernoulli_layerwise", "loss", "L0"):
            assert result.log[-1][name][i] == pytest.approx(single.final[name], rel=1e-5)
    assert result.failed == [None] * 3


# An adversary of their own, reconstruction as a share of everything off, and a tolerance that moves minimality.
FOUND_ON_THE_WAY = CONFIG.changed(
    reconstructions=(Reconstruction(masks=PGD(2, 0.3)), Reconstruction(0.5, PGD(1, 1.0, "position"), "layerwise"),
                     Reconstruction(routing="layerwise")),
    relative_reconstruction=True, tolerance=0.2, tolerance_rate=3.0,
)  # fmt: skip


def test_members_have_adversaries_and_weights_of_their_own_and_resume_with_them(tmp_path: Path) -> None:
    configs = [FOUND_ON_THE_WAY.changed(seed=i, tolerance=t) for i, t in enumerate((0.2, 0.9))]
    together, alone = [member(i) for i in range(2)], [member(i) for i in range(2)]
    result = train_many(together, [data(i) for i in range(2)], configs, out_dir=tmp_path / "together")
    for i, config in enumerate(configs):
        single = train(alone[i], data(i), config, out_dir=tmp_path / str(i))
        assert_close(tensors(together[i]), tensors(alone[i]))
        for name in ("pgd_all", "pgd_layerwise", "loss", "everything_off", "minimality_coefficient"):
            assert result.log[-1][name][i] == pytest.approx(single.final[name], rel=1e-5), name
    parts = [member(i) for i in range(2)]
    with pytest.raises(ValueError, match="the data ended after 4 batches"):
        train_many(parts, [iter(data(i)[:4]) for i in range(2)], configs, out_dir=tmp_path / "parts")
    parts = [member(i) for i in range(2)]
    train_many(parts, [data(i) for i in range(2)], configs, out_dir=tmp_path / "parts")
    for one, other in zip(parts, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tensors(one).values(), tensors(other).values(), strict=True))


def test_members_that_share_endless_data_have_its_batches_made_once() -> None:
    made: list[int] = []

    class Counted(SparseFeatures):
        def batch(self, index: int) -> Tensor:
            made.append(index)
            return super().batch(index).double()

    shared, own = Counted(4, 16, probability=0.05, seed=0), Counted(4, 16, probability=0.05, seed=1)
    together, alone = [member(i) for i in range(3)], [member(i) for i in range(3)]
    train_many(together, [shared, own, shared], CONFIG)
    assert sorted(made) == sorted(2 * [*range(CONFIG.steps)])
    train_many(alone, [data(0), data(1), data(0)], CONFIG)
    for one, other in zip(together, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tensors(one).values(), tensors(other).values(), strict=True))


def test_nothing_that_a_step_returns_keeps_its_graph() -> None:
    learner = MemberLearner([member(0), member(1)], [FOUND_ON_THE_WAY, FOUND_ON_THE_WAY])
    losses, importances = learner.step(torch.stack([data(0)[0], data(1)[0]]), 0)
    assert not any(t.requires_grad for t in (*losses.values(), *importances.values()))


def test_graphs_of_members_want_a_cuda_device_and_say_so() -> None:
    with pytest.raises(ValueError, match=r"the members are on cpu; cuda_graphs=True needs a CUDA device"):
        train_many([member(0)], [data(0)], CONFIG, cuda_graphs=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize("config", [CONFIG, FOUND_ON_THE_WAY], ids=["sampled", "adversary"])
def test_recorded_steps_of_members_are_the_ordinary_ones(config: TrainConfig) -> None:
    # What moves in stairs stays: penalties and the rate of a tolerance.
    config = config.changed(steps=60, p_end=None, schedule="constant", log_every=1)
    runs = []
    for graphs in (False, True):
        members = [member(i).to("cuda") for i in range(2)]
        result = train_many(members, [tms_features_in_double(i) for i in range(2)], config, cuda_graphs=graphs)
        runs.append((result.log, [tensors(m) for m in members]))
    (plain, ordinary), (replayed, recorded) = runs
    for one, other in zip(plain, replayed, strict=True):
        for name, values in one.items():
            assert other[name] == pytest.approx(values, rel=1e-6), (one["step"], name)
    for one, other in zip(ordinary, recorded, strict=True):
        assert_close(other, one)


@needs_hooked
def test_members_of_a_language_model(tmp_path: Path) -> None:
    def of(seed: int) -> Decomposition:
        model = tiny_transformer(seed, n_layers=1).double()
        patterns = {"blocks.0.mlp.W_*": 5, "blocks.0.attn.W_O": 4}
        return decompose(model, patterns, seed=seed, gate="attention", gate_width=3).to(torch.float64)

    config = TrainConfig(steps=3, log_every=1, reconstructions=(Reconstruction(),))
    batches = [[tokens(2, seed=s)] for s in range(2)]
    together, alone = [of(0), of(1)], [of(0), of(1)]
    train_many(together, batches, config)
    for i in range(2):
        train(alone[i], batches[i], config, out_dir=tmp_path / str(i))
        assert_close(tensors(together[i]), tensors(alone[i]))


def test_a_run_that_was_stopped_continues_to_the_same_end(tmp_path: Path) -> None:
    configs = [CONFIG.changed(seed=s) for s in (1, 2)]
    whole = [member(0), member(1)]
    full = train_many(whole, [data(0), data(1)], configs, out_dir=tmp_path / "whole")

    class Stop(Exception):
        pass

    def broken(seed: int) -> Any:
        yield from data(seed)[:4]
        raise Stop

    parts = [member(0), member(1)]
    with pytest.raises(Stop):
        train_many(parts, [broken(0), broken(1)], configs, out_dir=tmp_path / "parts")
    parts = [member(0), member(1)]
    resumed = train_many(parts, [data(0), data(1)], configs, out_dir=tmp_path / "parts")
    assert resumed.log == full.log
    for one, other in zip(parts, whole, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tensors(one).values(), tensors(other).values(), strict=True))
    with pytest.raises(ValueError, match="holds a run of 2 members with other configurations"):
        train_many(parts, [data(0), data(1)], configs[0], out_dir=tmp_path / "parts")


def test_a_failure_before_an_interruption_is_still_named_after_it(tmp_path: Path) -> None:
    poisoned = [x * float("nan") if i == 1 else x for i, x in enumerate(data(0))]
    config = CONFIG.changed(log_every=1)
    with pytest.raises(ValueError, match="the data ended after 4 batches"):
        train_many([member(0)], [iter(poisoned[:4])], config, out_dir=tmp_path)
    assert train_many([member(0)], [poisoned], config, out_dir=tmp_path).failed == [1]


def test_a_member_that_fails_is_named_and_leaves_the_others_alone() -> None:
    good, bad, alone = member(0), member(1), member(0)
    poisoned = [x * float("nan") if i == 3 else x for i, x in enumerate(data(1))]
    result = train_many([good, bad], [data(0), poisoned], CONFIG)
    assert result.failed == [None, 4]
    train_many([alone], [data(0)], CONFIG)
    assert_close(tensors(good), tensors(alone))


def test_the_models_get_nothing_but_their_trained_tensors() -> None:
    decompositions = [member(0), member(1)]
    before = [{n: p.detach().clone() for n, p in d.model.named_parameters()} for d in decompositions]
    train_many(decompositions, [data(0), data(1)], CONFIG)
    for decomposition, old in zip(decompositions, before, strict=True):
        trained = {id(p) for p in decomposition.subcomponent_parameters() + decomposition.gate_parameters()}
        for name, p in decomposition.model.named_parameters():
            assert torch.equal(p, old[name]) == (id(p) not in trained), name
        assert decomposition.training_record["steps"] == CONFIG.steps


def test_what_does_not_fit_together_is_refused(without_type_checks: None) -> None:
    ok, batches = [member(0), member(1)], [data(0), data(1)]
    with pytest.raises(ValueError, match="was given no decomposition"):
        train_many([], [], CONFIG)
    with pytest.raises(ValueError, match="2 decompositions, 1 sets of batches, 2 configs"):
        train_many(ok, batches[:1], CONFIG)
    with pytest.raises(ValueError, match=r"member 1 differs from the first in more than seed, lr"):
        train_many(ok, batches, [CONFIG, CONFIG.changed(steps=7)])
    more = CONFIG.changed(reconstructions=(*BOTH, Reconstruction(masks="rounded")))
    for pair in ([CONFIG, more], [more, CONFIG]):
        with pytest.raises(ValueError, match="member 1 differs from the first in more than seed, lr"):
            train_many(ok, batches, pair)
    with pytest.raises(ValueError, match="persistent_all: train_many supports random masks and PGD"):
        train_many(ok, batches, CONFIG.changed(reconstructions=(Reconstruction(masks="persistent"),)))
    with pytest.raises(ValueError, match=r"member 1 has tolerance=0\.1, the first None"):
        train_many(ok, batches, [CONFIG, CONFIG.changed(tolerance=0.1)])
    with pytest.raises(ValueError, match="stochastic_subset: train_many supports"):
        train_many(ok, batches, CONFIG.changed(reconstructions=(Reconstruction(routing="subset"),)))
    with pytest.raises(ValueError, match="neither hidden reconstruction, bf16"):
        train_many(ok, batches, CONFIG.changed(precision="bf16"))
    with pytest.raises(ValueError, match="two members share one model"):
        train_many([ok[0], ok[0]], batches, CONFIG)
    other = decompose(TMS(4, 2, seed=1).double(), {"W_*": 6}, gate_width=3).to(torch.float64)
    with pytest.raises(ValueError, match="do not have the same shape"):
        train_many([ok[0], other], batches, CONFIG)
    kinds = decompose(TiedAutoencoder(), {"*": 5})
    with pytest.raises(ValueError, match="do not have the same"):
        train_many([ok[0], kinds], batches, CONFIG)
    masked = [Batch(x, position_mask=torch.ones(16, dtype=torch.bool)) for x in data(0)]
    with pytest.raises(ValueError, match="without position masks"):
        train_many(copy.deepcopy(ok[:1]), [masked], CONFIG)


def test_a_bridge_is_refused() -> None:
    decomposition = decompose(boot("gpt2"), {"blocks.0.mlp.W_in": 4})
    with pytest.raises(ValueError, match="train_many cannot run a TransformerBridge"):
        train_many([decomposition], [[random_tokens()]], TrainConfig(steps=1))


def test_member_adam_is_adam_for_each_member() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 4, 2, generator=generator, dtype=torch.float64)
    rates, factors = torch.tensor([1e-3, 1e-1, 1.0]), (1.0, 0.5, 0.1)
    stacked = start.clone().requires_grad_()
    own = [start[i].clone().requires_grad_() for i in range(3)]
    ours = MemberAdam({"p": stacked}, rates)
    theirs = [torch.optim.Adam([p], lr=float(rates[i])) for i, p in enumerate(own)]
    for factor in factors:
        gradient = torch.randn(3, 4, 2, generator=generator, dtype=torch.float64)
        stacked.grad = gradient.clone()
        ours.step(factor, clip=0.7)
        for i, adam in enumerate(theirs):
            own[i].grad = gradient[i].clone()
            torch.nn.utils.clip_grad_norm_([own[i]], 0.7)
            adam.param_groups[0]["lr"] = float(rates[i]) * factor
            adam.step()
    torch.testing.assert_close(stacked.detach(), torch.stack([p.detach() for p in own]), rtol=1e-7, atol=1e-9)


# -- the sparsest of several starts ------------------------------------------------------------------------------------


def many(l0: list[float], spent: list[float], *, tolerances: list[float | None], relative: bool = True) -> ManyResult:
    """Twenty logged steps of members whose two reconstruction terms cost 2 and 1 parts in 4 of three times `spent`."""
    terms = (Reconstruction(), Reconstruction(0.5, routing="layerwise"))
    configs = tuple(
        TrainConfig(tolerance=t, relative_reconstruction=relative, reconstructions=terms, seed=i)
        for i, t in enumerate(tolerances)
    )
    last = {
        "loss": [1.0] * len(l0),
        "L0": l0,
        # 1 * 1.25 + .5 * .5 = 1.5, which the sum of the coefficients divides.
        "stochastic_all": [1.25 * 4 * s for s in spent],
        "stochastic_layerwise": [0.5 * 4 * s for s in spent],
        "everything_off": [4.0] * len(l0),
    }
    before = {name: [100.0 - value for value in values] for name, values in last.items()}
    return ManyResult(20, configs, [before] * 18 + [last] * 2, [None] * len(l0))


def test_the_sparsest_is_the_lowest_l0_of_those_that_kept_to_the_tolerance() -> None:
    three: dict[str, Any] = {"tolerances": [0.1, 0.1, 0.1]}
    assert many([3.0, 2.0, 4.0], [0.1, 0.12, 0.08], **three).sparsest() == 1
    assert many([3.0, 2.0, 1.0], [0.1, 0.199, 0.201], **three).sparsest() == 1
    assert many([3.0, 2.0, 1.0], [0.1, 0.12, 0.1], **three).sparsest([0, 1]) == 1
    assert many([1.0, 2.0, 3.0], [0.9, 0.4, 0.5], **three).sparsest() == 1
    failed = dataclasses.replace(many([3.0, 2.0, 1.0], [0.1, 0.1, 0.1], **three), failed=[None, None, 4])
    assert failed.sparsest() == 1


def test_a_tolerance_in_nats_is_compared_with_nats() -> None:
    assert many([2.0, 1.0], [0.02, 0.051], tolerances=[0.1, 0.1], relative=False).sparsest() == 0
    assert many([2.0, 1.0], [0.02, 0.049], tolerances=[0.1, 0.1], relative=False).sparsest() == 1


def test_what_spends_different_amounts_is_not_compared() -> None:
    with pytest.raises(ValueError, match=r"tolerances \[0.1, 0.2\]; expected one and the same"):
        many([2.0, 1.0], [0.1, 0.1], tolerances=[0.1, 0.2]).sparsest()
    with pytest.raises(ValueError, match=r"tolerances \[None\]"):
        many([2.0, 1.0], [0.1, 0.1], tolerances=[None, None]).sparsest([1])
    with pytest.raises(ValueError, match="expected some of 0 to 1"):
        many([2.0, 1.0], [0.1, 0.1], tolerances=[0.1, 0.1]).sparsest([2])
    nothing = dataclasses.replace(many([1.0], [0.1], tolerances=[0.1]), failed=[0])
    with pytest.raises(ValueError, match="has a finite loss in the log"):
        nothing.sparsest()


def test_what_train_many_logs_is_what_the_choice_reads() -> None:
    members = [member(0), member(0)]
    config = CONFIG.changed(
        steps=40, log_every=1, tolerance=0.3, relative_reconstruction=True, minimality=1e-4, frequency=0.0, lr=0.05
    )
    configs = [config, config.changed(minimality=0.5, seed=1)]
    result = train_many(members, [tms_features_in_double(0)] * 2, configs)
    tail = result.log[-4:]
    off = [tail[-1]["everything_off"][i] for i in range(2)]
    spent = [sum(t["stochastic_all"][i] + 0.5 * t["bernoulli_layerwise"][i] for t in tail) / 6 / off[i] for i in (0, 1)]
    l0 = [sum(t["L0"][i] for t in tail) for i in range(2)]
    assert max(spent) <= 0.6
    assert l0[0] != l0[1]
    assert result.sparsest() == l0.index(min(l0))
    tight = dataclasses.replace(result, configs=tuple(c.changed(tolerance=min(spent) / 3) for c in configs))
    assert tight.sparsest() == spent.index(min(spent))
