"""Twenty kills of a job of two processes, of either or both, at any moment and in the midst of a checkpoint.

What goes on equals what was not killed.
"""

from __future__ import annotations

import os
import random
import re
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spd_lens import Reconstruction, TokenBatches, TrainConfig, train
from spd_lens.objective import Persistent
from spd_lens.support import owners
from tests.small_models import tokens
from tests.training.forked import errors_of, run_processes, start_processes, wait_for
from tests.training.test_loop import _fresh

# A checkpoint after every step: many of the kills fall into one.
CONFIG = TrainConfig(
    steps=90,
    log_every=1,
    checkpoint_every=1,
    frequency=1e-2,
    clip_subcomponents=1.0,
    reconstructions=(Reconstruction(1.0, Persistent(scope="example", lr=0.05)), Reconstruction(0.5, "stochastic", 0.5)),
)
KILLS = 20
# Every so many of them is aimed at a checkpoint that is half written.
AIMED = 4


def _job(run: Path, result: Path, begun: bool, shard: bool) -> None:
    decomposition = _fresh()
    data = TokenBatches(tokens(32), 8, seed=1)
    config = CONFIG.changed(shard=shard)
    train(decomposition, data, config, **({"resume_from": run} if begun else {"out_dir": run}))
    if os.environ["RANK"] == "0":
        save_file({name: t.detach().contiguous() for name, t in decomposition.tensors().items()}, result)


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True], ids=["averaged", "shared out"])
def test_twenty_kills_of_two_processes_change_nothing(
    shard: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPD_LENS_TIMEOUT", "20")
    run_processes(
        2, lambda rank: _job(tmp_path / "whole", tmp_path / "expected", False, shard), tmp_path / "errors-whole"
    )
    chance = random.Random(0)
    run, result, kills, ended = tmp_path / "run", tmp_path / "found", 0, False
    victims, half_written = [], 0
    while not ended:
        errors = tmp_path / f"errors-{kills}"
        # Asked once: one of the processes may have begun the run before the other looks.
        begun = (run / "config.json").is_file()
        pids = start_processes(2, lambda rank, begun=begun: _job(run, result, begun, shard), errors)
        if kills < KILLS:
            before = _steps(run)
            deadline = time.monotonic() + 60
            # Some steps of its own first, so that the job ends one day.
            while _steps(run) < min(before + 2, CONFIG.steps) and time.monotonic() < deadline:
                time.sleep(0.002)
            if kills % AIMED == 0:
                while not _half_written(run) and time.monotonic() < deadline:
                    pass
                chosen = chance.choice([[0], [0, 1]])
            else:
                time.sleep(chance.random() * 0.05)
                chosen = chance.choice([[0], [1], [0, 1]])
            victims.append(tuple(chosen))
            for rank in chosen:
                with suppress(ProcessLookupError):
                    os.kill(pids[rank], signal.SIGKILL)
            statuses = wait_for(pids, errors)
            half_written += bool(_half_written(run))
            ended = statuses == [0, 0]
            kills += 1
        else:
            assert wait_for(pids, errors) == [0, 0], errors_of(errors)
            ended = True
    assert set(victims) == {(0,), (1,), (0, 1)}
    assert kills == KILLS
    assert half_written >= 3
    expected, found = load_file(tmp_path / "expected"), load_file(result)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    steps = [line.split(",")[0] for line in (run / "log.jsonl").read_text().splitlines()]
    assert len(steps) == len(set(steps)) == CONFIG.steps


def _half_written(run: Path) -> list[Path]:
    """Checkpoints that were begun and are not there yet (or never will be)."""
    done = _steps(run)
    found = [(path, re.match(r"\.step-(\d+)\.", path.name)) for path in owners.temporaries(run / "checkpoints")]
    return [path for path, step in found if step and int(step[1]) > done]


def _steps(run: Path) -> int:
    names = sorted((run / "checkpoints").glob("step-*")) if (run / "checkpoints").is_dir() else []
    return int(names[-1].name.removeprefix("step-")) if names else 0
