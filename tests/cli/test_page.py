"""Every command of "From a laptop to a cluster" runs as it is pasted from the page, from top to bottom in one folder.

Only the file that `spd-lens demo --config` prints is made small before it is used.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from spd_lens.cli import read_yaml, yaml_file
from spd_lens.models import load_moby_dick
from tests.conftest import TL_MAJOR
from tests.training.forked import free_port

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "laptop_to_cluster.md").read_text(encoding="utf-8")
STARTS = ("spd-lens ", "torchrun ", "sh ", "pip ")
# What cannot be run here.
NOT_RUN = {
    "pip install": "this environment has it",
    "--submit slurm": "there is no SLURM",
}


def _blocks() -> list[str]:
    """The indented blocks of the page, in its order."""
    found = re.findall(r"(?:^    \S.*\n(?:    .*\n)*)", PAGE, re.MULTILINE)
    return [re.sub(r"^    ", "", block, flags=re.MULTILINE) for block in found]


def commands_of_page() -> list[str]:
    """Every shell line, with its comment and its continuation lines."""
    lines = [block.replace("\\\n", "") for block in _blocks() if block.startswith(STARTS)]
    return [line for block in lines for line in block.splitlines()]


def files_of_page() -> list[dict[str, Any]]:
    """Every block of YAML."""
    return [yaml.safe_load(block) for block in _blocks() if not block.startswith(STARTS)]


def test_the_page_has_commands_and_pieces_of_files() -> None:
    commands, files = commands_of_page(), files_of_page()
    assert len(commands) >= 20
    assert {next(iter(file)) for file in files} == {"data", "log", "model"}
    for words in NOT_RUN:
        assert any(words in line for line in commands), words
    # Inline, and not in a block.
    assert "`wandb: {project: spd,\nmode: offline}`" in PAGE


class Shell:
    """A folder in which lines are run as in a terminal."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        own = {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
        quiet = {"WANDB_SILENT": "true", "SPD_LENS_TIMEOUT": "120", "PET_MASTER_PORT": str(free_port())}
        self.environment = {**os.environ, **own, **quiet}

    def __call__(self, line: str) -> str:
        done = subprocess.run(
            ["bash", "-c", line], cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=900,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def change(self, **sections: Any) -> None:
        """Sections of `config.yaml`, as a reader writes them there."""
        path = self.folder / "config.yaml"
        path.write_text(yaml_file.write_yaml({**read_yaml(path).values, **sections}))


@pytest.mark.slow  # some forty processes, each of which imports torch
def test_every_command_of_the_page_runs_as_pasted(tmp_path: Path) -> None:
    shell, commands, files = Shell(tmp_path), commands_of_page(), files_of_page()
    data, log = (next(file for file in files if name in file) for name in ("data", "log"))
    assert commands[0].startswith("spd-lens demo --config > config.yaml")
    shell(commands[0])
    small = read_yaml(tmp_path / "config.yaml").values
    small["data"] |= {"context": 16, "max_rows": 32}
    small["train"] |= {"steps": 4, "log_every": 1}
    small["evaluate"] |= {"data": {"split": "held_out", "max_rows": 8}, "adversary_steps": [2]}
    shell.change(**small)
    for line in commands[1:]:
        if any(words in line for words in NOT_RUN) or ("--batched" in line and TL_MAJOR >= 4):
            continue
        shell(line)
    assert json.loads((tmp_path / "runs" / "sweep" / "sweep.json").read_text())["picture"]
    assert (tmp_path / "jobs" / "joint" / "decomposition").is_dir()
    # "Data that does not fit", in the place of the file's own data.
    (tmp_path / "books").mkdir()
    for i, name in enumerate([*data["data"]["files"], *data["evaluate"]["data"]["files"]]):
        (tmp_path / name).write_text(load_moby_dick("train")[i * 20_000 : (i + 1) * 20_000], encoding="utf-8")
    shell.change(**data, out_dir="runs/streamed")
    for line in ("train config.yaml", "train config.yaml --resume auto", "evaluate runs/streamed"):
        shell(f"spd-lens {line}")
    # "Watching a run".
    offline = yaml.safe_load(re.sub(r"\s+", " ", re.search(r"`(wandb: \{[^`]*\})`", PAGE)[1]))  # pyright: ignore[reportOptionalSubscript]
    shell.change(**{**small, **log, "log": log["log"] | offline, "out_dir": "runs/watched"})
    shell("spd-lens train config.yaml")
    written = (tmp_path / "runs" / "watched" / "log.jsonl").read_text().splitlines()
    assert any(name.startswith("slow/") for name in json.loads(written[-1]))
    assert list((tmp_path / "runs" / "watched" / "tensorboard").glob("events.*"))
    assert list((tmp_path / "runs" / "watched").glob("wandb/offline-run-*/*.wandb"))
