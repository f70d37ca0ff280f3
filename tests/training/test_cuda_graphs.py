"""A whole step from public pieces, and its recording as a CUDA graph."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from spd_lens import Decomposition, Reconstruction, TrainConfig, decompose, train
from spd_lens.data import Batch, TokenBatches
from spd_lens.objective import Persistent
from spd_lens.training import GraphedStep, Learner, make_learner, take_step
from tests.bridge_models import swapped
from tests.conftest import needs_hooked
from tests.small_models import tiny_transformer, tokens

CONFIG = TrainConfig(
    steps=8,
    schedule="constant",
    faithfulness_warmup=0,
    minimality=1e-3,
    frequency=1e-3,
    reconstructions=(Reconstruction(masks=Persistent(), routing="all"),),
    clip_subcomponents=1.0,
    clip_gates=1.0,
    log_every=1,
)


def _learner(device: str, config: TrainConfig = CONFIG) -> tuple[Decomposition, Learner]:
    decomposition = decompose(
        tiny_transformer().to(device), {"blocks.1.mlp.W_*": 20}, gate="shared", gate_width=8, seed=3
    )
    for p in decomposition.model.parameters():
        p.requires_grad_(False)
    for p in decomposition.subcomponent_parameters() + decomposition.gate_parameters():
        p.requires_grad_(True)
    return decomposition, make_learner(decomposition, config)


def _batches(device: str, n: int) -> list[Batch]:
    source = TokenBatches(tokens(8, 6), batch_size=4, seed=1)
    return [batch.to(torch.device(device)) for batch, _ in zip(source, range(n), strict=False)]


def _parameters(decomposition: Decomposition) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in decomposition.tensors().items()}


def test_steps_taken_one_by_one_are_those_of_train(tmp_path: Path) -> None:
    trained, _ = _learner("cpu")
    train(trained, TokenBatches(tokens(8, 6), batch_size=4, seed=1), CONFIG, out_dir=tmp_path / "run")
    stepped, learner = _learner("cpu")
    for step, batch in enumerate(_batches("cpu", CONFIG.steps)):
        losses, active, norms = take_step(learner, batch, step)
    assert all(torch.equal(t, _parameters(trained)[name]) for name, t in _parameters(stepped).items())
    assert losses.keys() == {"persistent_all", "minimality", "frequency", "faithfulness"}
    assert active.keys() == set(stepped)
    assert norms.keys() == {"grad_norm_subcomponents", "grad_norm_gates"}


def test_a_bridge_is_refused_by_name() -> None:
    decomposition = swapped("gpt2", sites=["blocks.1.mlp.W_in"], gate="shared", gate_width=8)
    with pytest.raises(ValueError, match=r"TransformerBridge.*use `train`, or a HookedTransformer"):
        GraphedStep(make_learner(decomposition, CONFIG))


@needs_hooked
def test_a_graph_wants_a_cuda_device_and_says_so() -> None:
    _, learner = _learner("cpu")
    with pytest.raises(ValueError, match=r"decomposition is on cpu.*use `train`"):
        GraphedStep(learner)


@needs_hooked
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_recorded_steps_are_the_ordinary_ones() -> None:
    (plain, one), (recorded, other) = _learner("cuda"), _learner("cuda")
    graphed = GraphedStep(other, steps_per_capture=4)
    for step, batch in enumerate(_batches("cuda", 14)):
        expected = take_step(one, batch, step)[0]
        found = graphed(batch, step)[0]
        assert found.keys() == expected.keys()
        for name, loss in expected.items():
            torch.testing.assert_close(found[name], loss, rtol=1e-4, atol=1e-6)
    for name, value in _parameters(plain).items():
        torch.testing.assert_close(_parameters(recorded)[name], value, rtol=1e-3, atol=1e-5)


@needs_hooked
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_a_batch_of_another_shape_is_refused() -> None:
    _, learner = _learner("cuda")
    graphed = GraphedStep(learner)
    first = _batches("cuda", 1)[0]
    graphed(first, 0)
    with pytest.raises(ValueError, match="keep the batch size"):
        graphed(Batch(first.inputs[:2]), 1)
