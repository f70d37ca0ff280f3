"""What a run finds is put back, and what it needs is set: gradients, modes, dtypes, signals, finite numbers."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from spd_lens import Batch, Decomposition, TokenBatches, TrainConfig, decompose, evaluate, train
from spd_lens.training import train_many
from tests.conftest import TL_MAJOR
from tests.small_models import tiny_transformer, tokens

SITES = {"blocks.1.mlp.W_*": 8}
CONFIG = TrainConfig(steps=3, log_every=1)


def fresh(seed: int = 3) -> Decomposition:
    return decompose(tiny_transformer(), SITES, gate="shared", gate_width=4, seed=seed)


def losses(tmp: Path, decomposition: Decomposition | None = None, **changes: Any) -> list[float]:
    result = train(decomposition or fresh(), [tokens(4)], CONFIG, out_dir=tmp, **changes)
    return [line["loss"] for line in result.log]


def all_finite(decomposition: Decomposition) -> bool:
    return all(bool(t.isfinite().all()) for t in decomposition.tensors().values())


@pytest.mark.parametrize("surroundings", [torch.no_grad, torch.inference_mode, lambda: torch.set_grad_enabled(False)])
def test_gradients_that_are_switched_off_around_train_change_nothing(surroundings: Any, tmp_path: Path) -> None:
    expected = losses(tmp_path / "plain")
    one, other = fresh(), fresh()
    with surroundings():
        assert losses(tmp_path / "off", one) == expected
        if TL_MAJOR < 4:  # bridges cannot be mapped, which train_many says
            many = train_many([other], [[tokens(4)]], CONFIG)
            assert [line["loss"][0] for line in many.log] == pytest.approx(expected, rel=1e-5)
        assert not torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    evaluate(one, [tokens(4)], adversary_steps=(2,))


def test_a_float64_default_and_a_target_in_training_mode_change_nothing(tmp_path: Path) -> None:
    expected = losses(tmp_path / "plain")
    decomposition = fresh()
    decomposition.model.train()
    torch.set_default_dtype(torch.float64)
    try:
        assert losses(tmp_path / "other", decomposition) == expected
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(module.training for module in decomposition.model.modules())


def test_gradients_that_lie_on_the_subcomponents_stay_out_of_the_first_step(tmp_path: Path) -> None:
    expected = losses(tmp_path / "plain")
    decomposition = fresh()
    for p in decomposition.subcomponent_parameters() + decomposition.gate_parameters():
        p.grad = torch.full_like(p, 100.0)
    assert losses(tmp_path / "stale", decomposition) == expected
    assert all(p.grad is None for p in decomposition.subcomponent_parameters() + decomposition.gate_parameters())


def test_a_step_that_breaks_off_leaves_no_gradient_and_no_changed_flag(tmp_path: Path) -> None:
    decomposition = fresh()
    required = {name: p.requires_grad for name, p in decomposition.model.named_parameters()}

    def broken() -> Iterator[Any]:
        yield tokens(4)
        raise RuntimeError("out of memory, say")

    with pytest.raises(RuntimeError, match="out of memory, say"):
        train(decomposition, broken(), CONFIG, out_dir=tmp_path / "run")
    assert all(p.grad is None for p in decomposition.model.parameters())
    assert {name: p.requires_grad for name, p in decomposition.model.named_parameters()} == required


def test_nan_before_the_first_checkpoint_puts_the_start_back(tmp_path: Path) -> None:
    decomposition = fresh()
    before = copy.deepcopy({name: t.detach() for name, t in decomposition.tensors().items()})
    poison = Batch(torch.full((4, 12, 16), torch.nan), 1)
    with pytest.raises(ValueError, match=r"NaN or infinite at step 1 .* as it was before"):
        train(decomposition, [tokens(4), poison], CONFIG, out_dir=tmp_path / "run")
    for name, tensor in decomposition.tensors().items():
        assert torch.equal(tensor, before[name])


def test_parameters_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    decomposition = fresh()
    with pytest.raises(ValueError, match=r"became NaN or infinite at step 0"):
        train(decomposition, [tokens(4)], CONFIG.changed(lr=1e39, checkpoint_every=1), out_dir=tmp_path / "run")
    assert all_finite(decomposition)
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))
    with torch.no_grad():
        decomposition["blocks.1.mlp.W_in"].V[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"blocks.1.mlp.W_in.V is NaN or infinite before the first step"):
        train(decomposition, [tokens(4)], CONFIG, out_dir=tmp_path / "other")


def test_an_accelerator_of_the_users_own_is_left_alone(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="an optional neighbour: nothing of ours needs it")
    mine = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    losses(tmp_path / "run")
    assert mine.mixed_precision == "bf16"
    with mine.autocast():
        assert torch.is_autocast_enabled("cpu")


SCRIPT = """
import signal, sys, threading, time, os
from pathlib import Path
from spd_lens import TokenBatches, TrainConfig, train
from tests.training.test_conditions import fresh
from tests.small_models import tokens
number, run, warm_up = int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
def ask():
    while not (run / "config.json").exists():
        time.sleep(0.01)
    time.sleep(0.7)
    os.kill(os.getpid(), number)
threading.Thread(target=ask, daemon=True).start()
config = TrainConfig(steps=1_000_000, checkpoint_every=None, faithfulness_warmup=warm_up)
result = train(fresh(), TokenBatches(tokens(8), 4), config, out_dir=run)
print("interrupted", result.interrupted, result.steps > 0)
"""


@pytest.mark.parametrize(
    ("number", "warm_up", "status", "saved"),
    [
        (signal.SIGINT, 0, 0, True),
        pytest.param(signal.SIGINT, 10**6, 0, False, marks=pytest.mark.slow),
        (signal.SIGTERM, 0, -signal.SIGTERM, True),
    ],
    ids=["ctrl-c", "ctrl-c in the warm-up", "sigterm"],
)
def test_signals_end_a_run_with_a_checkpoint(
    number: int, warm_up: int, status: int, saved: bool, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(int(number)), str(tmp_path / "run"), str(warm_up)],
        capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == status, done.stderr[-500:]
    assert bool(list((tmp_path / "run").glob("checkpoints/step-*"))) == saved
    if status == 0:
        assert f"interrupted True {saved}" in done.stdout


def test_data_that_only_knows_where_to_go_on_is_enough(tmp_path: Path) -> None:
    class Endless:
        def batches_from(self, start: int) -> Iterator[Any]:
            return TokenBatches(tokens(8), 4).batches_from(start)

    train(fresh(), Endless(), CONFIG, out_dir=tmp_path / "run")
    evaluate(fresh(), Endless(), max_batches=2, adversary_steps=())
