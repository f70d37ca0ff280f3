"""What a CUDA card computes is what the CPU computes, and a step never waits for it. Skipped where there is no card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from spd_lens import Decomposition, Reconstruction, TrainConfig, decompose, evaluate, harvest, train
from spd_lens.data import Batch, TokenBatches
from spd_lens.objective import PGD, Persistent
from spd_lens.training import Learner, accumulate_gradients, apply_gradients, make_learner, set_learning_rates
from tests.small_models import tiny_transformer, tokens

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")

# Nothing of it is drawn: generators of a card draw other numbers.
NOT_DRAWN = TrainConfig(
    steps=4,
    lr=1e-3,
    schedule="constant",
    minimality=1e-2,
    frequency=1e-2,
    reconstructions=(Reconstruction(masks="importance", routing="all"), Reconstruction(masks="off", routing="all")),
    clip_subcomponents=0.5,
    clip_gates=0.5,
    log_every=1,
)


def _fresh(device: str, gate: str = "shared", **options: Any) -> Decomposition:
    torch.manual_seed(0)
    sites = {"blocks.*.mlp.W_*": 20, "blocks.1.attn.W_[QO]": 12}
    return decompose(tiny_transformer(), sites, gate=gate, gate_width=8, seed=3, **options).to(device)


def _batches() -> TokenBatches:
    return TokenBatches(tokens(16), 4, seed=1)


def _assert_close(found: Decomposition, expected: Decomposition) -> None:
    for name, value in expected.tensors().items():
        torch.testing.assert_close(found.tensors()[name].cpu(), value, rtol=1e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize("gate", ["scalar", "vector", "shared", "attention", "global"])
@pytest.mark.parametrize("changes", [{}, {"accumulate": 2, "recompute": "all"}])
def test_a_run_on_a_card_is_that_on_the_cpu(gate: str, changes: dict[str, Any], tmp_path: Path) -> None:
    runs = []
    for device in ("cpu", "cuda"):
        decomposition = _fresh(device, gate)
        runs.append((decomposition, train(decomposition, _batches(), NOT_DRAWN, out_dir=tmp_path / device, **changes)))
    for one, other in zip(runs[0][1].log, runs[1][1].log, strict=True):
        for name in one.keys() - {"positions_per_second"}:
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name
    _assert_close(runs[1][0], runs[0][0])


def _ready(decomposition: Decomposition, config: TrainConfig) -> Learner:
    for p in decomposition.model.parameters():
        p.requires_grad_(False)
    for p in decomposition.subcomponent_parameters() + decomposition.gate_parameters():
        p.requires_grad_(True)
    return make_learner(decomposition, config)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("gate", ["scalar", "shared", "global"])
def test_a_step_never_waits_for_the_card(gate: str, precision: str) -> None:
    config = NOT_DRAWN.changed(
        precision=precision,
        reconstructions=(
            Reconstruction(),
            Reconstruction(routing="subset"),
            Reconstruction(masks=PGD(steps=2)),
            Reconstruction(masks=Persistent(), routing=0.5),
        ),
    )
    learner = _ready(_fresh("cuda", gate), config)
    batch = Batch(tokens(4).to("cuda"))

    def step(k: int) -> dict[str, Tensor]:
        set_learning_rates(learner, k)
        losses, _ = accumulate_gradients(learner, batch, k)
        apply_gradients(learner)
        return losses

    step(0)  # what is asked once only: where passes may start, libraries
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        losses = step(1)
        with pytest.raises(RuntimeError, match="synchroniz"):
            losses["minimality"].item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_evaluation_and_harvest_on_a_card_are_those_on_the_cpu() -> None:
    reports, harvests = [], []
    for device in ("cpu", "cuda"):
        decomposition = _fresh(device)
        reports.append(evaluate(decomposition, _batches(), max_batches=2, quick=True))
        harvests.append(harvest(decomposition, _batches(), max_batches=2, top_k=2))
    for name in ("importance", "all on, no delta", "all off"):
        assert reports[1].divergence[name] == pytest.approx(reports[0].divergence[name], rel=1e-3, abs=1e-5)
    for name, site in harvests[0].items():
        other = harvests[1][name].firing_rate.cpu()
        torch.testing.assert_close(other, site.firing_rate.cpu(), rtol=0, atol=0.02)


def test_a_card_alone_may_share_out_its_parameters(tmp_path: Path) -> None:
    """One process has all shards, but goes through FSDP on the card: streams, gathering, reducing."""
    decompositions = []
    dist.init_process_group("nccl", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        for shard in (False, True):
            decomposition = _fresh("cuda")
            train(decomposition, _batches(), NOT_DRAWN, out_dir=tmp_path / str(shard), shard=shard)
            decompositions.append(decomposition)
    finally:
        dist.destroy_process_group()
    for name, value in decompositions[0].tensors().items():
        torch.testing.assert_close(decompositions[1].tensors()[name], value, rtol=1e-3, atol=2e-4, msg=name)
