"""The files of a run: one process at a time, one history, and nothing else than what they belong to."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from spd_lens import Decomposition, TokenBatches, TrainConfig, cache_residuals, decompose, train
from spd_lens.training import RunFiles, open_run, read_checkpoint, train_many, write_checkpoint
from tests.conftest import needs_hooked
from tests.small_models import tiny_transformer, tokens
from tests.support.killing import killed_at_every_operation

CONFIG = TrainConfig(steps=8, log_every=1, checkpoint_every=2, keep_checkpoints=9)
STATE: dict[str, Any] = {"belongs": {}, "data": {"first": "a", "last": "b", "index": 0}}


def fresh(model_seed: int = 0, **settings: Any) -> Decomposition:
    arguments: dict[str, Any] = {"gate_width": 4, "seed": 3} | settings
    return decompose(tiny_transformer(model_seed), {"blocks.1.mlp.W_in": 5}, **arguments)


def data(**changes: Any) -> TokenBatches:
    arguments: dict[str, Any] = {"batch_size": 4, "seed": 0} | changes
    return TokenBatches(arguments.pop("rows", tokens(16)), **arguments)


def steps(run: Path) -> list[int]:
    return [line["step"] for line in RunFiles(run).read_log()]


def values(decomposition: Decomposition) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in decomposition.tensors().items()}


# -- history -----------------------------------------------------------------------------------------------------------


def test_going_on_from_an_older_checkpoint_sets_the_newer_ones_aside(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(fresh(), data(), CONFIG, out_dir=run)

    def stop(step: int, line: Any) -> None:
        if step == 4:
            signal.raise_signal(signal.SIGINT)

    stopped = train(fresh(), data(), resume_from=run / "checkpoints" / "step-00000004", loggers=[stop])
    assert stopped.steps == 6
    assert [p.name for p in RunFiles(run).checkpoints()] == [f"step-{n:08d}" for n in (2, 4, 6)]
    assert sorted(os.listdir(run / "abandoned-1")) == ["log.jsonl", "step-00000006", "step-00000008"]
    aside = [json.loads(line)["step"] for line in (run / "abandoned-1" / "log.jsonl").read_text().splitlines()]
    assert aside == [4, 5, 6, 7]
    again = train(fresh(), data(), resume_from=run)
    assert [line["step"] for line in again.log] == list(range(8))


def test_a_run_killed_before_its_first_checkpoint_logs_every_step_once(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:

        def kill(step: int, line: Any) -> None:
            if step == 3:
                os._exit(9)

        try:
            train(fresh(), data(), CONFIG.changed(checkpoint_every=None), out_dir=tmp_path, loggers=[kill])
        finally:
            os._exit(1)  # never on into the tests of the parent
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    train(fresh(), data(), resume_from=tmp_path)
    assert steps(tmp_path) == list(range(8))


def test_the_newest_checkpoint_that_is_damaged_names_an_older_one(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    for step in (1, 2, 3):
        files.save(step, {"x": torch.ones(2)}, keep=9, **STATE)
    path = files.checkpoints()[-1] / "state.json"
    path.write_text(path.read_text().replace('"step": 3', '"step": 2'))
    older = str(files.checkpoints()[1])
    with pytest.raises(ValueError, match=rf"step-00000003/state.json is damaged.*resume_from='{older}'"):
        files.newest()


def test_a_checkpoint_that_is_killed_is_whole_or_not_there_and_old_ones_stay(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    files.save(1, {"x": torch.ones(2)}, keep=1, **STATE)
    found = []
    for _ in killed_at_every_operation(lambda: files.save(2, {"x": torch.ones(2)}, keep=1, **STATE)):
        newest = files.newest()
        assert newest is not None
        found.append(newest.step)
        for path in files.checkpoints():
            read_checkpoint(path)
            path.rename(tmp_path / f"done-{len(found)}-{path.name}")
        files.save(1, {"x": torch.ones(2)}, keep=1, **STATE)
    print(f"{len(found)} kills: {found.count(1)} times the old checkpoint, {found.count(2)} times the new one")
    assert set(found) == {1, 2}
    assert found == sorted(found)


def test_a_checkpoint_under_another_name_or_elsewhere_is_refused(tmp_path: Path) -> None:
    train(fresh(), data(), CONFIG, out_dir=tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000004"
    os.rename(checkpoint, checkpoint.with_name("step-00000005"))
    with pytest.raises(ValueError, match="holds step 4; expected the name step-00000004"):
        train(fresh(), data(), resume_from=checkpoint.with_name("step-00000005"))
    write_checkpoint(tmp_path / "step-00000001", 1, {"x": torch.ones(1)}, **STATE)
    with pytest.raises(ValueError, match="holds neither a run nor a checkpoint"):
        train(fresh(), data(), resume_from=tmp_path / "step-00000001")


# -- one process at a time ------------------------------------------------------------------------------------------


def test_a_live_run_is_neither_resumed_nor_disturbed_by_looking(tmp_path: Path) -> None:
    files, _ = open_run(tmp_path / "run", None, ())
    with files.held():
        files.begin(CONFIG, {})
        files.save(1, {"x": torch.ones(2)}, keep=1, **STATE)
        before = sorted(p.name for p in files.directory.rglob("*"))
        other = RunFiles(tmp_path / "run")
        assert other.newest() is not None
        with pytest.raises(ValueError, match="is already in use: process"), other.held():
            raise AssertionError("two owners")
        assert sorted(p.name for p in files.directory.rglob("*")) == before


def test_runs_without_a_name_never_share_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda how: "20000101-000000")
    opened = [open_run(None, None, ())[0] for _ in range(3)]
    for files in opened:
        with files.held():
            files.begin(CONFIG, {})
    assert [files.directory.name for files in opened] == [f"20000101-000000{end}" for end in ("", "-1", "-2")]


# -- what it belongs to ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("decomposition", "batches", "text"),
    [
        (lambda: fresh(model_seed=1), data, "target: weights was"),
        (lambda: fresh(gate="shared"), data, "decomposition: gate was 'scalar' and is 'shared'"),
        (fresh, lambda: data(batch_size=2), "batch_size was 4 and is 2"),
        (fresh, lambda: data(seed=1), "seed was 0 and is 1"),
        (fresh, lambda: data(rows=tokens(16, seed=9)), "tokens was"),
        (fresh, lambda: [tokens(4, seed=7)] * 9, "batch number 0 is another"),
    ],
)
def test_another_model_decomposition_or_data_is_refused_by_name(
    tmp_path: Path, decomposition: Any, batches: Any, text: str
) -> None:
    train(fresh(), data(), CONFIG, out_dir=tmp_path)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=text):
        train(decomposition(), batches(), resume_from=tmp_path / "checkpoints" / "step-00000004")
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("again", [list, lambda rows: DataLoader(torch.cat(rows), batch_size=4)])
def test_a_finished_run_on_other_data_is_refused_too(tmp_path: Path, again: Any) -> None:
    rows, others = ([tokens(4, seed=seed) for seed in seeds] for seeds in ((1, 2, 3), (1, 2, 9)))
    train(fresh(), again(rows), CONFIG.changed(steps=3), out_dir=tmp_path)
    with pytest.raises(ValueError, match="belongs to a run on other data: batch number 2 is another"):
        train(fresh(), again(others), resume_from=tmp_path)
    assert train(fresh(), again(rows), resume_from=tmp_path).steps == 3


def test_the_same_tokens_with_another_padding_are_other_data(tmp_path: Path) -> None:
    rows, ones = tokens(4), torch.ones_like(tokens(4))
    padded = ones.clone()
    padded[:, :2] = 0
    train(fresh(), [{"tokens": rows, "attention_mask": padded}] * 9, CONFIG, out_dir=tmp_path)
    with pytest.raises(ValueError, match="batch number 0 is another"):
        train(fresh(), [{"tokens": rows, "attention_mask": ones}] * 9, resume_from=tmp_path)


@pytest.mark.parametrize(("penalty", "name", "first"), [("power", "p", 1.0), ("smooth_l0", "gamma", 0.7)])
def test_the_log_has_the_number_that_the_penalty_anneals(tmp_path: Path, penalty: Any, name: str, first: float) -> None:
    config = CONFIG.changed(steps=2, penalty=penalty, gamma_start=0.7)
    lines = train(fresh(), data(), config, out_dir=tmp_path).log
    assert lines[0][name] == first
    assert {"p", "gamma"} & lines[0].keys() == {name}


@needs_hooked
def test_train_many_refuses_other_members(tmp_path: Path) -> None:
    config = CONFIG.changed(divergence="mse")
    rows = [list(tokens(16, seed=s).split(4)) for s in range(2)]
    train_many([fresh(0), fresh(1)], rows, config, out_dir=tmp_path)
    with pytest.raises(ValueError, match=r"\(member 1\) belongs to another run: target: weights"):
        train_many([fresh(0), fresh(2)], rows, config, out_dir=tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000008")
    with pytest.raises(ValueError, match=r"\(member 1\) belongs to a run on other data: batch number 0"):
        train_many([fresh(0), fresh(1)], [rows[0], rows[0]], config, out_dir=tmp_path)


def test_a_loader_resumes_if_its_order_can_be_had_again(tmp_path: Path) -> None:
    def loader(seed: int | None) -> DataLoader[Tensor]:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return DataLoader(list(tokens(16)), batch_size=4, shuffle=True, generator=generator)  # pyright: ignore

    whole, resumed = fresh(), fresh()
    train(whole, loader(0), CONFIG, out_dir=tmp_path / "seeded")
    checkpoint = tmp_path / "seeded" / "checkpoints" / "step-00000006"
    with pytest.raises(ValueError, match=r"shuffled with seed 0' and is 'shuffled with seed 1"):
        train(fresh(), loader(1), resume_from=checkpoint)
    train(resumed, loader(0), resume_from=checkpoint)
    assert all(torch.equal(t, values(resumed)[name]) for name, t in values(whole).items())
    train(fresh(), loader(None), CONFIG, out_dir=tmp_path / "global")
    with pytest.raises(ValueError, match="takes the order from the global random state"):
        train(fresh(), loader(None), resume_from=tmp_path / "global")


def test_residual_streams_are_for_one_target_and_for_sites_behind_them(tmp_path: Path) -> None:
    cached = cache_residuals(fresh(), data())
    train(fresh(seed=8), cached, CONFIG, out_dir=tmp_path / "a")  # another decomposition of the same target
    with pytest.raises(ValueError, match="these residual streams are of another model: weights was"):
        train(fresh(1), cached, CONFIG, out_dir=tmp_path / "b")
    early = decompose(tiny_transformer(), {"blocks.*.mlp.W_in": 4})
    with pytest.raises(ValueError, match=r"enter block 1, but blocks.0.mlp.W_in comes before it"):
        train(early, cached, CONFIG, out_dir=tmp_path / "b")
    assert not (tmp_path / "b").exists()
    hooked = fresh()
    hooked.model.add_hook("blocks.0.hook_mlp_out", lambda value, hook: value * 0)
    with pytest.raises(ValueError, match=r"blocks\.0\..* has a hook on it"):
        cache_residuals(hooked, data())
    with pytest.raises(ValueError, match="a pass from block 1 on does not reach every decomposed site"):
        early.clean_pass(torch.zeros(1, 3, early.model.cfg.d_model), start_at=1)
