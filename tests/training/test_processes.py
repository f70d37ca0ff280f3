"""Several processes train, on their rows of every batch, what one process trains on all of them."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spd_lens import PGD, Batch, Decomposition, Reconstruction, TokenBatches, TrainConfig, evaluate, harvest, train
from spd_lens.core import RowsGenerator, integers, sample_masks, sample_routing, uniform
from spd_lens.objective import Merged, Persistent
from spd_lens.statistics import Harvest
from spd_lens.training import Processes, loop
from tests.small_models import tokens
from tests.training.forked import errors_of, run_processes, start_processes, wait_for
from tests.training.test_loop import _fresh

# Everything that draws, climbs, counts or clips.
TERMS = {
    "stochastic": (Reconstruction(1.0, "stochastic", "all"), Reconstruction(0.5, "stochastic", "subset")),
    "static": (Reconstruction(1.0, "bernoulli", 0.5), Reconstruction(0.5, "stochastic", "layerwise")),
    "pgd": (Reconstruction(1.0, PGD(steps=2, step_size=0.2)), Reconstruction(0.5, "stochastic")),
    "pgd of every row": (Reconstruction(1.0, PGD(steps=2, scope="position"), "subset"),),
    "persistent": (Reconstruction(1.0, Persistent(lr=0.05)), Reconstruction(0.5, "stochastic")),
    "persistent rows": (Reconstruction(1.0, Persistent(scope="example", lr=0.05)),),
    "merged": (Reconstruction(1.0, Merged(0.5, Persistent(scope="position", lr=0.05))),),
}
# Sums in another order differ by a rounding; one Adam step of it can be a whole step where a gradient is near 0.
CLOSE = {"rtol": 1e-3, "atol": 2e-4}
LOSSES_CLOSE = {"rel": 2e-4, "abs": 1e-6}


def _config(terms: str, **changes: Any) -> TrainConfig:
    return TrainConfig(
        steps=4,
        log_every=1,
        checkpoint_every=2,
        lr=1e-3,
        minimality=1e-2,
        frequency=1e-2,
        clip_subcomponents=0.5,
        clip_gates=0.5,
        reconstructions=TERMS[terms],
    ).changed(**changes)


def _batches(masked: bool = False) -> list[Any]:
    """Batches of 8 rows; `masked`: the later a row, the fewer of its positions count."""
    batches: list[Any] = list(tokens(32).split(8))
    if not masked:
        return batches
    rows, width = batches[0].shape
    counts = torch.arange(width) < torch.linspace(width, 1, rows).long().unsqueeze(1)
    return [Batch(batch, position_mask=counts) for batch in batches]


def _train(count: int, folder: Path, config: TrainConfig, batches: Any, **arguments: Any) -> dict[str, Tensor]:
    """Train with `count` processes; the tensors, which all of them must have. The log is in `folder/run`."""
    folder.mkdir(parents=True, exist_ok=True)

    def act(rank: int) -> None:
        decomposition = _fresh()
        result = train(decomposition, batches, config, out_dir=folder / "run", **arguments)
        assert len(result.log) == config.steps
        tensors = {name: t.detach().contiguous() for name, t in decomposition.tensors().items()}
        save_file(tensors, folder / f"rank-{rank}.safetensors")

    run_processes(count, act, folder / "errors")
    found = [load_file(folder / f"rank-{rank}.safetensors") for rank in range(count)]
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in found[0])
    return found[0]


def _log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]


def _assert_same_run(a: Path, b: Path) -> None:
    assert len(_log(a)) == len(_log(b))
    for one, other in zip(_log(a), _log(b), strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {"positions_per_second"}:
            assert one[name] == pytest.approx(other[name], **LOSSES_CLOSE), (one["step"], name)


def _assert_close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, expected in b.items():
        torch.testing.assert_close(a[name], expected, **CLOSE, msg=name)


QUICK = ("stochastic", "persistent")


@pytest.mark.parametrize("terms", [t if t in QUICK else pytest.param(t, marks=pytest.mark.slow) for t in TERMS])
def test_two_and_four_processes_train_what_one_trains(terms: str, tmp_path: Path) -> None:
    config = _config(terms)
    alone = _train(1, tmp_path / "1", config, _batches())
    for count in (2, 4):
        _assert_close(_train(count, tmp_path / str(count), config, _batches()), alone)
        _assert_same_run(tmp_path / str(count), tmp_path / "1")


@pytest.mark.parametrize("terms", ["stochastic", pytest.param("pgd", marks=pytest.mark.slow)])
def test_rows_with_fewer_positions_that_count_weigh_less(terms: str, tmp_path: Path) -> None:
    config = _config(terms)
    alone = _train(1, tmp_path / "1", config, _batches(masked=True))
    _assert_close(_train(2, tmp_path / "2", config, _batches(masked=True)), alone)
    _assert_same_run(tmp_path / "2", tmp_path / "1")


def test_a_process_reads_its_rows_of_token_batches_alone(tmp_path: Path) -> None:
    data = TokenBatches(tokens(32), 8, seed=3, exclude=[0])
    whole = next(iter(data))
    for rank in range(4):
        own = next(iter(data.for_process(rank, 4)))
        expected = Processes(4, rank).own_rows(whole)
        assert torch.equal(own.inputs, expected.inputs)
        assert own.position_mask is not None
        assert torch.equal(own.position_mask, expected.position_mask)
    alone = _train(1, tmp_path / "1", _config("stochastic"), data)
    _assert_close(_train(2, tmp_path / "2", _config("stochastic"), data), alone)
    with pytest.raises(ValueError, match="8 rows for 3 processes; expected a multiple"):
        data.for_process(0, 3)
    with pytest.raises(ValueError, match="8 rows for 3 processes; expected a batch size"):
        Processes(3, 0).own_rows(whole)


@pytest.mark.parametrize(
    ("terms", "first", "second"),
    [
        ("persistent rows", 2, 1),
        ("persistent rows", 1, 2),
        pytest.param("stochastic", 2, 4, marks=pytest.mark.slow),
        pytest.param("stochastic", 2, 1, marks=pytest.mark.slow),
    ],
)
def test_any_number_of_processes_goes_on(terms: str, first: int, second: int, tmp_path: Path) -> None:
    config = _config(terms, steps=6)
    expected = _train(1, tmp_path / "whole", config, _batches())
    _train(first, tmp_path / "a", config, _batches())
    # As if it had been killed after its second step.
    run = tmp_path / "a" / "run"
    (tmp_path / "b").mkdir()
    for later in sorted((run / "checkpoints").iterdir())[:-1]:
        assert later.name == "step-00000004"

    def act(rank: int) -> None:
        decomposition = _fresh()
        train(decomposition, _batches(), resume_from=run / "checkpoints" / "step-00000004")
        if rank == 0:
            save_file({k: v.detach().contiguous() for k, v in decomposition.tensors().items()}, tmp_path / "b" / "t")

    run_processes(second, act, tmp_path / "errors")
    _assert_close(load_file(tmp_path / "b" / "t"), expected)


def test_evaluation_and_harvest_are_the_same_in_every_process(tmp_path: Path) -> None:
    def act(rank: int) -> None:
        decomposition = _fresh()
        train(decomposition, _batches(), _config("stochastic"), out_dir=tmp_path / f"run-{count}")
        report = evaluate(decomposition, _batches(), max_batches=2, adversary_steps=(2,))
        rates = [site.firing_rate.tolist() for site in harvest(decomposition, _batches()).values()]
        values = {"divergence": report.divergence, "adversarial": list(report.adversarial.values()), "rates": rates}
        (tmp_path / f"{count}-{rank}.json").write_text(json.dumps(values))

    for count in (1, 2):
        run_processes(count, act, tmp_path / "errors")
    alone, first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    assert first == second
    assert first["divergence"] == pytest.approx(alone["divergence"], rel=1e-3, abs=1e-6)
    assert first["adversarial"] == pytest.approx(alone["adversarial"], rel=1e-3)
    for own, expected in zip(first["rates"], alone["rates"], strict=True):
        assert own == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("span", [None, pytest.param(5, marks=pytest.mark.slow)])
def test_evaluation_shared_out_is_that_of_one_process(span: int | None, tmp_path: Path) -> None:
    """Three processes, which 8 rows do not divide by; the later a row, the fewer of its positions count."""
    options: dict[str, Any] = {"max_batches": 2, "adversary_steps": (2,), "starts": 2, "span": span}

    def act(rank: int) -> None:
        report = evaluate(
            _fresh(), _batches(masked=True), deletion_sample=[tokens(7, seed=5)], together=True, **options
        )
        (tmp_path / f"{rank}.json").write_text(json.dumps(report.to_json()))

    run_processes(3, act, tmp_path / "errors")
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert found[1] == found[0]
    assert found[2] == found[0]
    alone = evaluate(_fresh(), _batches(masked=True), deletion_sample=[tokens(7, seed=5)], **options).to_json()
    _assert_same_numbers(found[0], json.loads(json.dumps(alone)))


def _assert_same_numbers(found: Any, expected: Any, where: str = "") -> None:
    """Counts and words are equal, and what is measured to 1e-4."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name in expected:
            _assert_same_numbers(found[name], expected[name], f"{where}/{name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            _assert_same_numbers(one, other, f"{where}/{i}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6), where
    elif not isinstance(expected, str):  # in words numbers are rounded
        assert found == expected, where


def test_harvest_shared_out_is_that_of_one_process(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_batches": 3, "top_k": 2, "random_k": 2, "effect_batches": 1}

    def act(rank: int) -> None:
        where: dict[str, Any] = {"out_dir": tmp_path / "harvest", "together": True, "save_every": 1}
        harvest(_fresh(), _batches(masked=True)[:2], **options, **where)  # as if stopped there
        found = harvest(_fresh(), _batches(masked=True), **options, **where)
        save_file(found.sums.tensors(), tmp_path / f"rank-{rank}")
        assert found.sums.n_batches == 3

    run_processes(3, act, tmp_path / "errors")
    ranks = [load_file(tmp_path / f"rank-{rank}") for rank in range(3)]
    expected = harvest(_fresh(), _batches(masked=True), **options).sums
    for name, tensor in expected.tensors().items():
        assert all(torch.equal(other[name], ranks[0][name]) for other in ranks), name
        if not name.startswith("events."):
            torch.testing.assert_close(ranks[0][name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    saved = Harvest.load(tmp_path / "harvest").sums
    assert (saved.n_positions, saved.read) == (expected.n_positions, expected.read)
    assert saved.effect_positions == expected.effect_positions


def test_fewer_rows_than_processes_are_refused() -> None:
    with pytest.raises(ValueError, match="2 rows for 3 processes; expected at least one row for each"):
        Processes(3, 0).some_rows(Batch(tokens(2)))


def test_draws_of_processes_are_rows_of_one_processs_draws() -> None:
    shape = (8, 5, 3)
    plain = torch.Generator().manual_seed(7)
    expected = [uniform(shape, plain), integers(0, 9, (8, 5), plain), uniform((2, 8, 5), plain, rows=1)]
    for rank in range(4):
        own = RowsGenerator.of("cpu", 7, rank=rank, count=4)
        found = [uniform((2, 5, 3), own), integers(0, 9, (2, 5), own), uniform((2, 2, 5), own, rows=1)]
        assert torch.equal(found[0], expected[0][rank::4])
        assert torch.equal(found[1], expected[1][rank::4])
        assert torch.equal(found[2], expected[2][:, rank::4])
        assert torch.equal(own.get_state(), plain.get_state())


def test_masks_and_routing_differ_between_processes() -> None:
    g = {"a": torch.full((2, 5, 3), 0.5), "b": torch.full((2, 5, 3), 0.5)}
    shapes = {name: value.shape[:-1] for name, value in g.items()}
    own = [RowsGenerator.of("cpu", 7, rank=rank, count=2) for rank in range(2)]
    first, second = (sample_masks(g, generator=generator)["a"].mask for generator in own)
    assert first is not None
    assert second is not None
    assert not torch.equal(first, second)
    routed = [sample_routing(shapes, 0.5, generator=generator)[0]["a"] for generator in own]
    assert not torch.equal(routed[0], routed[1])  # pyright: ignore[reportArgumentType]


def test_a_signal_to_one_process_stops_all_at_the_same_step(tmp_path: Path) -> None:
    config = _config("stochastic", steps=100_000, checkpoint_every=None)
    run = tmp_path / "run"

    def act(rank: int) -> None:
        result = train(_fresh(), _batches(), config, out_dir=run)
        (tmp_path / f"steps-{rank}").write_text(f"{result.steps} {result.interrupted}")

    pids = start_processes(2, act, tmp_path / "errors")
    _wait_until(lambda: (run / "log.jsonl").exists())
    os.kill(pids[1], signal.SIGINT)
    assert wait_for(pids, tmp_path / "errors") == [0, 0], errors_of(tmp_path / "errors")
    first, second = ((tmp_path / f"steps-{rank}").read_text() for rank in range(2))
    assert first == second
    assert first.endswith("True")


def test_a_signal_between_two_questions_is_seen_at_the_end(tmp_path: Path) -> None:
    config = _config("stochastic", steps=loop.STEPS_BETWEEN_QUESTIONS + 2, log_every=100)

    def act(rank: int) -> None:
        class Data:
            def __iter__(self) -> Iterator[Tensor]:
                for i, batch in enumerate(2 * _batches()):
                    if i == loop.STEPS_BETWEEN_QUESTIONS + 1 and rank == 1:
                        signal.raise_signal(signal.SIGINT)
                    yield batch

        result = train(_fresh(), Data(), config, out_dir=tmp_path / "run")
        (tmp_path / f"interrupted-{rank}").write_text(str(result.interrupted))

    run_processes(2, act, tmp_path / "errors")
    assert [(tmp_path / f"interrupted-{rank}").read_text() for rank in range(2)] == ["True", "True"]


def test_a_loss_that_is_not_finite_in_one_process_ends_all(tmp_path: Path) -> None:
    def act(rank: int) -> None:
        decomposition = _fresh()
        before = {name: t.detach().clone() for name, t in decomposition.tensors().items()}
        broken = _Broken(rank == 1)
        with pytest.raises(ValueError, match="NaN or infinite at step 2"):
            train(decomposition, _batches(), _config("stochastic", extra_terms=(broken,), checkpoint_every=None),
                  out_dir=tmp_path / "run")  # fmt: skip
        assert all(torch.equal(before[name], t) for name, t in decomposition.tensors().items())

    run_processes(2, act, tmp_path / "errors")


class _Broken:
    name, coefficient = "broken", 1.0

    def __init__(self, here: bool) -> None:
        self.here = here

    def __call__(self, view: Any, decomposition: Decomposition) -> Tensor:
        zero = sum((p.sum() * 0 for p in decomposition.subcomponent_parameters()), torch.zeros(()))
        return zero + (float("nan") if self.here and view.step == 2 else 0.0)


@pytest.mark.parametrize(("number", "within"), [(signal.SIGKILL, 10.0), (signal.SIGSTOP, 20.0)])
def test_a_process_that_dies_or_stalls_ends_the_others(
    number: signal.Signals, within: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPD_LENS_TIMEOUT", "5")
    config = _config("stochastic", steps=100_000, checkpoint_every=None)
    run = tmp_path / "run"
    pids = start_processes(2, lambda rank: train(_fresh(), _batches(), config, out_dir=run), tmp_path / "errors")
    _wait_until(lambda: (run / "log.jsonl").exists())
    os.kill(pids[1], number)
    began = time.monotonic()
    assert wait_for(pids[:1], tmp_path / "errors") == [1]
    assert time.monotonic() - began < within
    os.kill(pids[1], signal.SIGKILL)
    os.waitpid(pids[1], 0)


def _wait_until(true: Any, timeout: float = 60.0) -> None:
    deadline = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)
