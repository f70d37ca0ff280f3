"""Two processes, each with half of the batches, train what one process trains on the whole."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from spd_lens import Reconstruction, TrainConfig, train
from tests.small_models import tokens
from tests.training.test_loop import _fresh, _tensors

# Deterministic terms only: masks are drawn independently on every process.
CONFIG = TrainConfig(
    steps=4, log_every=1, minimality=1e-2, frequency=1e-2, reconstructions=(Reconstruction(1.0, "none", "all"),)
)

_WORKER = """
import sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
from safetensors.torch import save_file
from spd_lens import train
from tests.small_models import tokens
from tests.training.test_processes import CONFIG
from tests.training.test_loop import _fresh
d = _fresh()
train(d, list(tokens(32).split(4)), CONFIG, out_dir={run!r})
rank = torch.distributed.get_rank()
assert torch.distributed.get_world_size() == 2
save_file({{k: v.detach().contiguous() for k, v in d.tensors().items()}}, f"{{sys.argv[1]}}-{{rank}}.safetensors")
# Without this a process can abort on its way out, in gloo's threads.
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def test_two_processes_equal_one_with_the_joined_batches(tmp_path: Path) -> None:
    code = _WORKER.format(root=str(Path(__file__).parents[2]), run=str(tmp_path / "run"))
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "rank")],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=300)
        assert worker.returncode == 0, errors
    first, second = (load_file(tmp_path / f"rank-{rank}.safetensors") for rank in range(2))
    alone = _fresh()
    train(alone, list(tokens(32).split(8)), CONFIG, out_dir=tmp_path / "alone")
    for name, expected in _tensors(alone).items():
        assert torch.equal(first[name], second[name]), name
        # One Adam step of a rounding difference can be a whole step where a gradient is near 0.
        torch.testing.assert_close(first[name], expected, rtol=1e-3, atol=2e-4)
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == CONFIG.steps
