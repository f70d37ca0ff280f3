"""Jobs of submitit, here with its local executor: blocks and sweeps, and a job that is asked for a checkpoint."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from spd_lens.cli import STOPPED, CommandJob, ConfigError, open_saved, submit
from tests.cli.test_commands import BLOCKS, CONFIG, invoke

submitit = pytest.importorskip("submitit")


@pytest.mark.slow  # processes that import torch, started by others
def test_a_job_that_is_asked_for_a_checkpoint_goes_on_and_ends_like_one_that_was_not(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG.replace("steps: 4", "steps: 400").replace("every: 2", "every: 50"))
    train = ["train", str(tmp_path / "config.yaml"), "--resume", "auto", "--out"]
    alone, asked = submit([[[*train, str(tmp_path / n)]] for n in ("alone", "asked")], tmp_path / "s", cluster="local")
    log = tmp_path / "asked" / "log.jsonl"
    deadline = time.monotonic() + 300
    while not (log.exists() and log.read_text().count("\n") > 3) and time.monotonic() < deadline:
        time.sleep(0.05)
    controller = asked.job_id
    task = Path(f"/proc/{controller}/task/{controller}/children").read_text().split()[0]
    # What SLURM sends when the time is nearly over.
    os.kill(int(task), signal.SIGUSR2)
    assert alone.result() == 0
    assert asked.result() == 0
    assert "stopped after" in asked.stderr()
    for name, tensor in open_saved(tmp_path / "alone", None)[0].tensors().items():
        assert torch.equal(open_saved(tmp_path / "asked", None)[0].tensors()[name], tensor), name


@pytest.mark.slow  # processes that import torch, started by others
def test_blocks_are_submitted_merged_and_trained_on_together(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(BLOCKS)
    out = tmp_path / "jobs"
    split = ("plan", tmp_path / "config.yaml", "--split", "blocks", "--joint", "3", "--out", out)
    found = json.loads(invoke(*split, "--submit", "local", "--json").stdout)
    assert [job["status"] for job in found["jobs"]] == [0, 0]
    merge, joint = (line.split("|| ")[-1].split()[1:] for line in (out / "finish.sh").read_text().splitlines()[2:])
    invoke(*merge)
    assert json.loads(invoke(*joint, "--json").stdout)["steps"] == 3
    merged, _ = open_saved(out / "merged", "tiny_lm")
    for block in (0, 1):
        for name, tensor in open_saved(out / f"block-00{block}", None)[0].tensors().items():
            assert torch.equal(merged.tensors()[name], tensor)
    trained, _ = open_saved(out / "joint", None)
    assert list(trained) == list(merged)
    assert not torch.equal(trained["blocks.1.mlp.W_in"].V, merged["blocks.1.mlp.W_in"].V)


@pytest.mark.slow  # processes that import torch, started by others
def test_a_sweep_is_submitted_and_what_is_finished_is_not_submitted_again(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    sweep = ("sweep", tmp_path / "config.yaml", "--over", "train.minimality=1e-4,1e-2", "--out", tmp_path / "sweep")
    found = json.loads(invoke(*sweep, "--submit", "local", "--json").stdout)
    assert [row["status"] for row in found["runs"]] == [0, 0]
    assert Path(found["picture"]).is_file()
    logs = set((tmp_path / "sweep" / "submitit").iterdir())
    assert json.loads(invoke(*sweep, "--submit", "local", "--json").stdout) == found
    assert set((tmp_path / "sweep" / "submitit").iterdir()) == logs


def test_a_job_ends_at_the_first_command_that_fails(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    wrong = ["train", str(tmp_path / "none.yaml")]
    assert CommandJob()([wrong, ["--version"]]) == 2
    assert "none.yaml" in capfd.readouterr().err


def test_mistakes_are_named(tmp_path: Path) -> None:
    for arguments, message in (
        ({"cluster": "slrum"}, "near: 'slurm'"),
        ({"cluster": "local", "options": ["timeout_min"]}, "expected NAME=VALUE"),
        ({"cluster": "local", "options": ["time_min=3"]}, "time_min"),
    ):
        with pytest.raises(ConfigError, match=message):
            submit([], tmp_path / "s", **arguments)
    assert STOPPED == 75
