"""`benchmarks/reproduce.py` on a few steps: it resumes where it was, and its tensors alone give its tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks import reproduce
from benchmarks.experiments import EXPERIMENTS, Experiment
from spd_lens.files import read_tensors, write_tensors
from spd_lens.toys.features import SparseFeatures
from spd_lens.toys.tms import TMS

RUNS, STEPS, CHECKPOINT_EVERY = 3, 6, 2


class Recorded(SparseFeatures):
    """Keeps the numbers of the batches that were asked for, and is killed at one of them."""

    def __init__(self, asked: list[int], killed_at: int | None, seed: int) -> None:
        super().__init__(5, 64, probability=0.05, seed=seed)
        self.asked, self.killed_at = asked, killed_at

    def batch(self, index: int) -> Tensor:
        if index == self.killed_at:
            raise RuntimeError("killed")
        self.asked.append(index)
        return super().batch(index)


def small(asked: list[int] | None = None, killed_at: int | None = None) -> Experiment:
    """TMS 5-2 on untrained targets, of which those with an odd seed are rejected."""

    def train_targets(seeds: Sequence[int]) -> list[nn.Module]:
        return [TMS(5, 2, seed=seed) for seed in seeds]

    odd = [TMS(5, 2, seed=seed).W for seed in range(1, 40, 2)]
    full = EXPERIMENTS["tms_5-2"]
    return replace(
        full,
        group=2,
        train_targets=train_targets,
        target_problems=lambda model: ["odd"] if any(torch.equal(model.W, W) for W in odd) else [],
        features=lambda seed: Recorded([] if asked is None else asked, killed_at, seed),
        config=full.config.changed(steps=STEPS, checkpoint_every=CHECKPOINT_EVERY, faithfulness_warmup=2),
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("finished")
    reproduce.reproduce(small(), RUNS, results=directory / "results", work=directory / "work")
    reproduce.summarise(small(), directory / "results")
    return directory / "results"


def without_cpu_time(path: Path) -> dict:
    return {k: v for k, v in json.loads(path.read_text()).items() if k != "cpu_hours"}


def test_a_killed_run_continues_to_the_same_result(finished: Path, tmp_path: Path) -> None:
    results, work = tmp_path / "results", tmp_path / "work"
    # Killed in the second group, after the first checkpoint.
    reproduce.reproduce(small(), 2, results=results, work=work)
    with pytest.raises(RuntimeError, match="killed"):
        reproduce.reproduce(small(killed_at=CHECKPOINT_EVERY + 1), RUNS, results=results, work=work)
    asked: list[int] = []
    reproduce.reproduce(small(asked), RUNS, results=results, work=work)
    assert asked == list(range(CHECKPOINT_EVERY, STEPS))
    reproduce.summarise(small(), results)
    for i in range(RUNS):
        name = f"{reproduce.run_name(i)}.safetensors"
        ours, expected = read_tensors(results / name), read_tensors(finished / name)
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[key], expected[key]) for key in ours)
    assert without_cpu_time(results / "summary.json") == without_cpu_time(finished / "summary.json")


def test_a_finished_run_is_not_trained_again(finished: Path, tmp_path: Path) -> None:
    reproduce.reproduce(small(killed_at=0), RUNS, results=finished, work=tmp_path / "new")


def test_targets_are_taken_in_order_and_rejected_on_their_own_merits(finished: Path) -> None:
    targets = json.loads((finished / "targets.json").read_text())
    assert targets == {"accepted": [0, 2, 4], "rejected": {"1": ["odd"], "3": ["odd"]}}
    for i, seed in enumerate(targets["accepted"]):
        assert torch.equal(read_tensors(finished / f"run-{i:03d}.safetensors")["target|W"], TMS(5, 2, seed=seed).W)


def test_recomputing_from_the_tensors_alone_gives_the_same_files(finished: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in finished.glob("*.json")}
    for name in before:
        # What is recomputed must not be read.
        path = finished / name
        if name.startswith("run-"):
            record = json.loads(path.read_text())
            path.write_text(json.dumps({**record, "success": True, "recovery": None}))
    (finished / "summary.json").unlink()
    reproduce.summarise(small(), finished)
    assert {path.name: path.read_bytes() for path in finished.glob("*.json")} == before


def test_the_summary_has_what_readers_of_it_expect(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    wanted = {"runs", "successes", "mmcs_mean", "mmcs_std", "ml2r_mean", "ml2r_std", "settings", "versions", "command"}
    assert wanted <= summary.keys()
    assert summary["runs"] == RUNS
    assert summary["targets_rejected"] == 2
    assert summary["successes"] == RUNS - len(summary["failures"])
    records = [json.loads((finished / f"run-{i:03d}.json").read_text()) for i in range(RUNS)]
    mmcs = torch.tensor([record["recovery"]["mmcs"] for record in records], dtype=torch.float64)
    assert summary["mmcs_mean"] == pytest.approx(float(mmcs.mean()), abs=1e-5)
    assert summary["mmcs_std"] == pytest.approx(float(mmcs.std()), abs=1e-5)
    assert f"{summary['successes']} of {RUNS} runs succeed" in reproduce.table(summary)


def test_pictures_are_drawn(finished: Path) -> None:
    decomposition = reproduce.read_run(small(), finished, 0)
    for path in reproduce.save_figures(finished, decomposition):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_runs_with_other_settings_are_refused(finished: Path, tmp_path: Path) -> None:
    changed = replace(small(), config=small().config.changed(minimality=0.5))
    with pytest.raises(ValueError, match="was made with other settings"):
        reproduce.reproduce(changed, RUNS, results=finished, work=tmp_path)


def test_altered_gates_are_noticed(finished: Path, tmp_path: Path) -> None:
    tensors = read_tensors(finished / "run-000.safetensors")
    tensors["decomposition|W_enc.gate.b_out"] = tensors["decomposition|W_enc.gate.b_out"] + 1
    write_tensors(tmp_path / "run-000.safetensors", tensors)
    with pytest.raises(ValueError, match="no longer give the importances"):
        reproduce.read_run(small(), tmp_path, 0)
