"""Parameters shared out over processes (FSDP2, on gloo) train what averaged ones train, and go on with any number."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
import torch.distributed.fsdp  # once, and not in every child
from safetensors.torch import load_file, save_file
from torch import Tensor

from spd_lens import Decomposition, TrainConfig, decompose, evaluate, train
from spd_lens.data import Batch, processes
from spd_lens.support import file_hash, write_checked
from spd_lens.training import (
    Evaluations,
    FigureLogger,
    Learner,
    Processes,
    checkpoint,
    evaluations,
    join_processes,
    loop,
    read_checkpoint,
    sharding,
    shards,
)
from tests.small_models import tiny_transformer, tokens
from tests.training.forked import run_processes
from tests.training.test_processes import _assert_close, _assert_same_run, _batches, _config

GATES: dict[str, dict[str, Any]] = {
    "shared": {"gate": "shared", "gate_width": 8},
    "scalar": {"gate": "scalar", "gate_width": 4},
    "global": {"gate": "global", "gate_width": 8, "gate_options": {"n_blocks": 2}},
}


def _fresh(gate: str = "shared") -> Decomposition:
    torch.manual_seed(0)
    # 15 does not divide by 2: rows of U and gates are shared out unevenly.
    return decompose(tiny_transformer(), {"blocks.*.mlp.W_*": 15, "blocks.1.attn.W_V": 7}, seed=3, **GATES[gate])


def _train(count: int, folder: Path, config: TrainConfig, gate: str = "shared", **arguments: Any) -> dict[str, Tensor]:
    """The tensors that all processes end with, from a run in `folder/run` unless it goes on from one."""
    folder.mkdir(parents=True, exist_ok=True)
    where = arguments if "resume_from" in arguments else {"out_dir": folder / "run"}

    def act(rank: int) -> None:
        decomposition = _fresh(gate)
        before = dict(decomposition.tensors())
        train(decomposition, _batches(), config, **where)
        assert all(p is before[name] for name, p in decomposition.tensors().items())
        save_file({k: t.detach().contiguous() for k, t in decomposition.tensors().items()}, folder / f"rank-{rank}")

    run_processes(count, act, folder / "errors")
    found = [load_file(folder / f"rank-{rank}") for rank in range(count)]
    assert all(torch.equal(found[0][name], other[name]) for other in found for name in found[0])
    return found[0]


@pytest.mark.parametrize(
    ("terms", "gate", "changes"),
    [
        ("persistent", "shared", {}),
        ("stochastic", "shared", {"extra_terms": "own"}),
        pytest.param(
            "stochastic",
            "global",
            {"accumulate": 2, "recompute": "all", "faithfulness_warmup": 2},
            marks=pytest.mark.slow,
        ),
        pytest.param("pgd", "scalar", {}, marks=pytest.mark.slow),
        pytest.param("merged", "shared", {"recompute": "passes"}, marks=pytest.mark.slow),
        pytest.param("pgd of every row", "shared", {"accumulate": 2}, marks=pytest.mark.slow),
        pytest.param("stochastic", "shared", {"precision": "bf16", "recompute": "gates"}, marks=pytest.mark.slow),
    ],
)
def test_a_shared_run_is_the_averaged_one(terms: str, gate: str, changes: dict[str, Any], tmp_path: Path) -> None:
    changes = changes | ({"extra_terms": (_Own("own"), _Own("gates"))} if "extra_terms" in changes else {})
    config = _config(terms, **changes)
    averaged = _train(2, tmp_path / "averaged", config, gate)
    _assert_close(_train(2, tmp_path / "shared", config.changed(shard=True), gate), averaged)
    _assert_same_run(tmp_path / "shared", tmp_path / "averaged")


def _is_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in b)


def _from_step_4(run: Path, folder: Path) -> Path:
    """A copy of a run, as if it had been killed after its fourth step."""
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "checkpoints" / "step-00000006")
    return folder


@pytest.mark.parametrize(
    ("first", "shares", "second", "goes_on_sharing"),
    [
        (2, True, 2, True),
        pytest.param(2, True, 4, True, marks=pytest.mark.slow),
        pytest.param(4, True, 2, True, marks=pytest.mark.slow),
        # One process has nothing to share, and reads the shards whole; what it writes is whole.
        pytest.param(2, True, 1, True, marks=pytest.mark.slow),
        pytest.param(2, True, 2, False, marks=pytest.mark.slow),
        pytest.param(2, False, 2, True, marks=pytest.mark.slow),
        pytest.param(1, True, 2, True, marks=pytest.mark.slow),
    ],
)
def test_a_shared_run_goes_on_with_any_number_of_processes(
    first: int, shares: bool, second: int, goes_on_sharing: bool, tmp_path: Path
) -> None:
    config = _config("persistent rows", steps=6)
    expected = _train(first, tmp_path / "a", config.changed(shard=shares))
    killed = _from_step_4(tmp_path / "a" / "run", tmp_path / "killed")
    read = read_checkpoint(killed / "checkpoints" / "step-00000004")
    assert len(read.shards) == (first if shares and first > 1 else 0)
    assert bool(read.tensors) != bool(read.shards)
    found = _train(second, tmp_path / "b", config.changed(shard=goes_on_sharing), resume_from=killed)
    if (first, shares) == (second, goes_on_sharing):
        assert _is_equal(found, expected)
    _assert_close(found, expected)
    written = read_checkpoint(killed / "checkpoints" / "step-00000006")
    assert len(written.shards) == (second if goes_on_sharing and second > 1 else 0)


def test_damaged_and_missing_shards_are_found(tmp_path: Path) -> None:
    path = tmp_path / "step-00000002"
    path.mkdir()
    first, second = (path / f"shard-0000{i}-model-00001-of-00001.safetensors" for i in (1, 2))
    for file in (first, second):
        save_file({"a": torch.arange(4.0)}, file)
    written = {file.name: file_hash(file) for file in (first, second)}
    content = {"step": 2, "sha256": checkpoint.hash_of(written), "shards": written, "belongs": {}, "data": {}}
    state = {"format_name": checkpoint.FORMAT, "version": checkpoint.FORMAT_VERSION}
    write_checked(path / "state.json", content, **state)
    assert read_checkpoint(path).shards == written
    damaged = bytearray(second.read_bytes())
    damaged[-1] ^= 1
    second.write_bytes(damaged)
    with pytest.raises(ValueError, match=f"{second.name} is damaged"):
        read_checkpoint(path)
    first.unlink()
    with pytest.raises(ValueError, match=f"{first.name} is missing"):
        read_checkpoint(path)
    write_checked(path / "state.json", content | {"shards": {first.name: written[first.name]}}, **state)
    with pytest.raises(ValueError, match="names other shards"):
        read_checkpoint(path)


def _zero_and_fail(decomposition: Decomposition) -> None:
    with sharding.sharded(decomposition), torch.no_grad():
        next(iter(decomposition.tensors().values())).zero_()
        raise KeyError


def test_a_process_keeps_its_part_and_the_own_modules_come_back(tmp_path: Path) -> None:
    def act(rank: int) -> None:
        join_processes(torch.device("cpu"))
        decomposition = _fresh()
        own = dict(decomposition.tensors())
        sizes = {name: t.numel() for name, t in own.items()}
        with sharding.sharded(decomposition):
            shares = decomposition.tensors()
            assert shares.keys() == own.keys()
            kept = {name: t.to_local().numel() for name, t in shares.items()}  # pyright: ignore[reportAttributeAccessIssue]
            parts = [sum(found) for found in zip(*Processes(2, rank).of_all(list(kept.values())), strict=True)]
            assert parts == list(sizes.values())
            assert sum(kept.values()) == pytest.approx(sum(sizes.values()) / 2, rel=0.1)
        with pytest.raises(KeyError):
            _zero_and_fail(decomposition)
        assert all(p is own[name] and not processes.is_shared(p) for name, p in decomposition.tensors().items())
        assert _is_equal(dict(decomposition.tensors()), dict(_fresh().tensors()))

    run_processes(2, act, tmp_path / "errors")


@pytest.mark.slow
def test_a_shared_run_that_is_not_finite_is_back_at_its_last_checkpoint(tmp_path: Path) -> None:
    config, real = _config("persistent", shard=True), loop.accumulate_gradients

    def broken(learner: Learner, batch: Batch, step: int) -> Any:
        losses, active = real(learner, batch, step)
        bad = step == 3 and learner.processes.rank == 1
        return {k: v * torch.nan if bad else v for k, v in losses.items()}, active

    def act(rank: int) -> None:
        loop.accumulate_gradients = broken  # pyright: ignore[reportPrivateImportUsage]
        decomposition = _fresh()
        with pytest.raises(ValueError, match=r"NaN or infinite at step 3.*back at step 2"):
            train(decomposition, _batches(), config, out_dir=tmp_path / "run")
        save_file({k: t.detach().contiguous() for k, t in decomposition.tensors().items()}, tmp_path / f"rank-{rank}")

    run_processes(2, act, tmp_path / "errors")
    saved = shards.read_shards(tmp_path / "run" / "checkpoints" / "step-00000002", {})
    expected = {k.removeprefix("decomposition."): t for k, t in saved.items() if k.startswith("decomposition.")}
    for rank in range(2):
        found = load_file(tmp_path / f"rank-{rank}")
        assert found.keys() == expected.keys()
        assert _is_equal(found, expected)


class _Own:
    """Of importances, of V and U (also where the term asks for them to be whole), and of gates."""

    coefficient = 0.5

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, view: Any, decomposition: Decomposition) -> Tensor:
        first, second = decomposition["blocks.0.mlp.W_in"], decomposition["blocks.1.attn.W_V"]
        if self.name == "gates":
            return sum((p.square().sum() for p in decomposition.gate_parameters()), torch.zeros(()))
        error = (first.target_weight - first.V @ first.U).square().sum()
        energy = first.whole(lambda: (first.V @ first.U * second.U.mean()).sum())
        both = 0.01 * (error + energy) + second.V.abs().sum() + view.upper["blocks.1.attn.W_V"].mean()
        return both if self.name == "own" else both + decomposition.gate_parameters()[0].sum()


def test_a_term_that_mixes_shares_with_whole_tensors_is_named(tmp_path: Path) -> None:
    def act(rank: int) -> None:
        config = _config("stochastic", shard=True, extra_terms=(_Own("mixed"),))
        with pytest.raises(ValueError, match=r"the term mixed computes with the tensors of gates"):
            train(_fresh(), _batches(), config, out_dir=tmp_path / "run")

    run_processes(2, act, tmp_path / "errors")


def _evaluated(folder: Path, rows: int, **changes: Any) -> dict[str, Tensor]:
    """A run of two processes that is evaluated and drawn on the way; what every process measured is in `folder`."""
    folder.mkdir()

    def act(rank: int) -> None:
        found: list[Any] = []
        real = evaluations.Evaluator.values

        def noted(self: evaluations.Evaluator, step: int) -> dict[str, float]:
            found.append(real(self, step))
            return found[-1]

        evaluations.Evaluator.values = noted  # pyright: ignore[reportAttributeAccessIssue]
        own = {"adversary_steps": (2,), "starts": 1, "deletion_sample": [tokens(rows, seed=5)]}
        plan = Evaluations(list(tokens(8, seed=9).split(rows)), fast_every=2, slow_every=4, options=own)
        drawn: list[Any] = []
        draw = FigureLogger(lambda step, values: None, lambda step, name, figure: drawn.append(_bars(figure)), 3)
        decomposition = _fresh()
        loggers = [draw] if rank == 0 else []
        config = _config("persistent", **changes)
        train(decomposition, _batches(), config, out_dir=folder / "run", evaluations=plan, loggers=loggers)
        assert not any(map(processes.is_shared, decomposition.tensors().values()))
        after = evaluate(decomposition, list(tokens(8, seed=9).split(rows)), together=rows > 1, **own)
        assert found[-1].items() >= after.log_values("slow/").items()
        (folder / f"{rank}.json").write_text(json.dumps([found, drawn]))
        if rank == 0:
            save_file({k: t.detach().contiguous() for k, t in decomposition.tensors().items()}, folder / "tensors")

    run_processes(2, act, folder / "errors")
    return load_file(folder / "tensors")


def _bars(figure: Any) -> list[float]:
    return [float(bar.get_width()) for bar in figure.axes[0].patches if hasattr(bar, "get_width")]


@pytest.mark.parametrize("rows", [4, pytest.param(1, marks=pytest.mark.slow)], ids=["shared out", "one row each"])
def test_a_shared_run_is_evaluated_and_drawn_as_the_averaged_one(rows: int, tmp_path: Path) -> None:
    _evaluated(tmp_path / "averaged", rows)
    found = _evaluated(tmp_path / "shared", rows, shard=True)
    _assert_same_run(tmp_path / "shared", tmp_path / "averaged")
    (first, drawn), (second, nothing) = (json.loads((tmp_path / "shared" / f"{r}.json").read_text()) for r in (0, 1))
    assert first == second
    assert [sorted({name.split("/")[0] for name in values}) for values in first] == [["fast"], ["fast", "slow"]]
    assert not nothing
    expected = json.loads((tmp_path / "averaged" / "0.json").read_text())[1]
    assert len(drawn) == len(expected) == 6
    for own, other in zip(drawn, expected, strict=True):
        assert own == pytest.approx(other, abs=1e-3)
    # The run itself does not notice.
    without = _train(2, tmp_path / "without", _config("persistent", shard=True))
    assert _is_equal(found, without)
