"""Tensors that are kept give the verdict that stands beside them; those that are not say how they are made."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.apd_experiments import APD_EXPERIMENTS, read_apd
from experiments.paper import EXPERIMENTS
from experiments.reproduce import read_run, summarise
from experiments.tensor_files import MANIFEST, read_run_tensors, write_run_tensors
from spd_lens.baselines import apd_report

RESULTS = Path(__file__).parents[2] / "experiments" / "results"
MANIFESTS = sorted(RESULTS.glob(f"*/{MANIFEST}"))
KEPT = sorted(RESULTS.glob("*/*.safetensors"))


def same(ours: Any, recorded: Any, place: str = "") -> None:
    """Equal, but for the last digits of floats, which depend on the processor."""
    if isinstance(recorded, dict):
        for key, value in recorded.items():
            same(ours[key], value, f"{place}.{key}")
    elif isinstance(recorded, list):
        assert len(ours) == len(recorded), place
        for a, b in zip(ours, recorded, strict=True):
            same(a, b, place)
    elif isinstance(recorded, float):
        assert ours == pytest.approx(recorded, rel=1e-3, abs=1e-6), place
    else:
        assert ours == recorded, place


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.parent.name)
def test_the_verdict_of_a_kept_run_follows_from_its_tensors(path: Path) -> None:
    name, run = path.parent.name, int(path.stem.removeprefix("run-"))
    if name in APD_EXPERIMENTS:
        report: Any = apd_report(read_apd(APD_EXPERIMENTS[name], path.parent, run))
    else:
        report = EXPERIMENTS[name].report(read_run(EXPERIMENTS[name], path.parent, run))
    recorded = json.loads(path.with_suffix(".json").read_text())
    assert report.success == recorded["success"]
    assert list(report.problems) == recorded["problems"]
    measured = json.loads(json.dumps(asdict(report)))
    same(measured, {key: recorded[key] for key in measured})


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.parent.name)
def test_every_run_has_the_hash_of_its_tensors_and_their_command(path: Path) -> None:
    manifest = json.loads(path.read_text())
    records = {record.with_suffix(".safetensors").name for record in path.parent.glob("run-*.json")}
    assert set(manifest["files"]) == records
    assert manifest["command"].startswith(f"python experiments/reproduce.py {path.parent.name} --seeds {len(records)} ")
    for file in path.parent.glob("*.safetensors"):
        assert hashlib.sha256(file.read_bytes()).hexdigest() == manifest["files"][file.name]["sha256"]


def test_what_is_kept_is_small() -> None:
    assert len({path.parent for path in KEPT}) == len(KEPT)
    assert sum(path.stat().st_size for path in KEPT) < 2_000_000


def test_a_file_that_is_not_kept_says_the_command_that_makes_it() -> None:
    with pytest.raises(FileNotFoundError, match=r"reproduce.py tms_5-2 --seeds 100 --results runs/again"):
        read_run_tensors(RESULTS / "tms_5-2" / "run-001.safetensors")


def test_another_file_under_the_name_of_a_run_is_noticed(tmp_path: Path) -> None:
    write_run_tensors(tmp_path / "run-000.safetensors", {"W": torch.ones(3)})
    assert torch.equal(read_run_tensors(tmp_path / "run-000.safetensors")["W"], torch.ones(3))
    other = tmp_path / "run-001.safetensors"
    write_run_tensors(other, {"W": torch.zeros(3)})
    other.replace(tmp_path / "run-000.safetensors")
    with pytest.raises(ValueError, match="is not the file that"):
        read_run_tensors(tmp_path / "run-000.safetensors")


def test_a_summary_counts_the_records_of_runs_without_tensors_but_recomputes_none_of_them(tmp_path: Path) -> None:
    experiment = EXPERIMENTS["tms_5-2"]
    directory = shutil.copytree(RESULTS / "tms_5-2", tmp_path / "tms_5-2")
    before = json.loads((directory / "summary.json").read_text())
    same(summarise(experiment, directory), before)
    with pytest.raises(FileNotFoundError, match="run-001"):
        summarise(experiment, directory, recompute=True)
