"""Evaluations on the way: what the log gets, and that training itself does not notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spd_lens import Decomposition, Reconstruction, TrainConfig, decompose, evaluate, train
from spd_lens.data import TokenBatches
from spd_lens.objective import PGD, Persistent
from spd_lens.training import Evaluations, TrainResult
from tests.small_models import tiny_transformer, tokens

CONFIG = TrainConfig(
    steps=6,
    log_every=3,
    checkpoint_every=2,
    keep_checkpoints=9,
    reconstructions=(Reconstruction(), Reconstruction(masks=PGD(1)), Reconstruction(masks=Persistent())),
)
HELD_OUT = tokens(6, seed=9)


def _run(place: Path, evaluations: Evaluations | None, **more: Any) -> tuple[Decomposition, TrainResult]:
    decomposition = decompose(tiny_transformer(), {"blocks.1.mlp.W_*": 8}, gate="shared", gate_width=8, seed=3)
    given = {"out_dir": place} | more
    result = train(decomposition, TokenBatches(tokens(32), 4), CONFIG, evaluations=evaluations, **given)
    return decomposition, result


def _often() -> Evaluations:
    return Evaluations(
        list(HELD_OUT.split(2)), fast_every=2, slow_every=4, options={"adversary_steps": (2,), "starts": 1}
    )


def _training_part(result: TrainResult) -> dict[int, dict[str, float]]:
    return {
        line["step"]: {
            k: v for k, v in line.items() if k != "positions_per_second" and not k.startswith(("fast", "slow"))
        }
        for line in result.log
    }


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(t, b[name]) for name, t in a.items())


def test_training_is_the_same_bit_for_bit_with_evaluations_and_without(tmp_path: Path) -> None:
    torch.manual_seed(0)
    without, plain = _run(tmp_path / "a", None)
    drawn = torch.rand(3)
    torch.manual_seed(0)
    watched, result = _run(tmp_path / "b", _often())
    assert torch.equal(torch.rand(3), drawn)
    assert _equal(without.tensors(), watched.tensors())
    found, expected = _training_part(result), _training_part(plain)
    assert all(found[step] == line for step, line in expected.items())


def test_the_log_holds_fast_and_slow_evaluations_when_they_are_due(tmp_path: Path) -> None:
    decomposition, result = _run(tmp_path / "run", _often())
    fast = [line["step"] + 1 for line in result.log if "fast/kl_stochastic" in line]
    slow = [line["step"] + 1 for line in result.log if "slow/kl_pgd2" in line]
    assert (fast, slow) == ([2, 4, 6], [4, 6])
    report = evaluate(decomposition, list(HELD_OUT.split(2)), adversary_steps=(2,), starts=1)
    assert result.final["slow/kl_pgd2"] == report.adversarial[2]
    assert result.final["slow/l0"] == report.l0
    assert "slow/kl_deletion" in result.final
    quick = evaluate(decomposition, list(HELD_OUT.split(2)), quick=True)
    assert result.final["fast/kl_stochastic"] == quick.divergence["stochastic"]


def test_a_resumed_run_goes_on_evaluating(tmp_path: Path) -> None:
    whole, first = _run(tmp_path / "run", _often())
    again, second = _run(
        tmp_path, _often(), out_dir=None, resume_from=tmp_path / "run" / "checkpoints" / "step-00000002"
    )
    assert _equal(whole.tensors(), again.tensors())
    clock = "positions_per_second"
    assert [{**line, clock: 0} for line in first.log] == [{**line, clock: 0} for line in second.log]
    # Evaluations are no part of what a run is: it may go on without them.
    plain, _ = _run(tmp_path, None, out_dir=None, resume_from=tmp_path / "run" / "checkpoints" / "step-00000004")
    assert _equal(whole.tensors(), plain.tensors())


def test_what_makes_no_sense_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="never evaluate"):
        Evaluations(HELD_OUT)
    with pytest.raises(ValueError, match=r"near: .*starts"):
        Evaluations(HELD_OUT, slow_every=2, options={"start": 1})
    with pytest.raises(ValueError, match="used up after the first"):
        Evaluations(HELD_OUT, slow_every=2, options={"deletion_sample": iter([HELD_OUT])})
    with pytest.raises(ValueError, match="fast_every"):
        Evaluations(HELD_OUT, fast_every=0)
    with pytest.raises(ValueError, match="evaluate on"):
        _run(tmp_path / "a", Evaluations([], fast_every=1))
    assert not (tmp_path / "a" / "log.jsonl").exists()
