"""Processes that were given different things say so, and what only looks different to one of them changes nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from spd_lens import Decomposition, TokenBatches, decompose, evaluate, harvest, train
from spd_lens.data import TokenStream
from spd_lens.training import Evaluations, evaluations
from tests.small_models import tiny_transformer, tokens
from tests.training.forked import run_processes
from tests.training.test_loop import _fresh
from tests.training.test_processes import _assert_close, _assert_same_run, _batches, _config, _train


def _trained(out: Path, data: Any, decomposition: Decomposition | None = None, **changes: Any) -> None:
    train(decomposition or _fresh(), data, _config("stochastic"), out_dir=out, **changes)


def _decomposed(model: int = 0, seed: int = 0) -> Decomposition:
    return decompose(tiny_transformer(model), {"blocks.*.mlp.W_*": 8}, seed=seed)


def _moved(by: float) -> Decomposition:
    decomposition = _fresh()
    with torch.no_grad():
        decomposition.subcomponent_parameters()[0].add_(by)
    return decomposition


def _loader(rank: int) -> Any:
    # Behind everything that seeds: its order is drawn from the global random state.
    torch.manual_seed(rank)
    return DataLoader(tokens(32), batch_size=8, shuffle=True)  # pyright: ignore[reportArgumentType]


def _stream(rows: list[list[int]], **changes: Any) -> TokenStream:
    source = Dataset.from_dict({"ids": rows})
    return TokenStream(source, column="ids", context=12, batch_size=8, streams=2, **changes)


def _watched(rank: int) -> Evaluations | None:
    return None if rank else Evaluations(tokens(8), fast_every=2)


# What a process is given by its rank, and what all of them say.
OTHERS: dict[str, tuple[str, Callable[[int, Path], Any]]] = {
    "seed": (
        "1 was given something else than process 0: decomposition: seed was 0 and is 1",
        lambda rank, out: _trained(out, _batches(), _decomposed(seed=rank)),
    ),
    "start": ("something else.*: V, U and gates was", lambda rank, out: _trained(out, _batches(), _moved(by=rank))),
    "model": (
        "1 was given something else than process 0: target: weights was",
        lambda rank, out: _trained(out, _batches(), _decomposed(model=rank)),
    ),
    "config": ("config: seed was 0 and is 1", lambda rank, out: _trained(out, _batches(), seed=rank)),
    "how": ("config: accumulate was 1 and is 2", lambda rank, out: _trained(out, _batches(), accumulate=1 + rank)),
    "watched": ("evaluations: ", lambda rank, out: _trained(out, _batches(), evaluations=_watched(rank))),
    "stream": (
        "data: seed was 0 and is 1",
        lambda rank, out: _trained(out, _stream(tokens(32).tolist(), shuffle=4, seed=rank)),
    ),
    "rows": ("1 was given other data than process 0", lambda rank, out: _trained(out, _batches()[rank:])),
    "drawn": ("other data", lambda rank, out: _trained(out, TokenBatches(tokens(32), 8, seed=rank))),
    "order": (
        "other data.*generator=torch",
        lambda rank, out: _trained(out, decomposition=_fresh(), data=_loader(rank)),
    ),
    "evaluate": ("other data", lambda rank, out: evaluate(_fresh(), _batches()[rank:], together=True)),
    "harvest": ("other data", lambda rank, out: harvest(_fresh(), _batches()[rank:], together=True)),
}


def test_what_differs_between_processes_is_named_in_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPD_LENS_TIMEOUT", "60")

    def act(rank: int) -> None:
        for name, (message, call) in OTHERS.items():
            with pytest.raises(ValueError, match=message):
                call(rank, tmp_path / name)
            assert not (tmp_path / name / "log.jsonl").exists()

    run_processes(2, act, tmp_path / "errors")


def test_rows_of_one_process_may_have_no_padding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPD_LENS_TIMEOUT", "30")
    # The first of two streams has the first half of the documents: whole windows; the others are shorter.
    rows = [row[: 12 if i < 32 else 7] for i, row in enumerate(tokens(64).tolist())]
    first = next(iter(_stream(rows, documents="apart").for_process(0, 2)))
    second = next(iter(_stream(rows, documents="apart").for_process(1, 2)))
    assert first.position_mask is not None
    assert second.position_mask is not None
    assert (bool(first.position_mask.all()), bool(second.position_mask.all())) == (True, False)
    config = _config("stochastic")
    alone = _train(1, tmp_path / "1", config, _stream(rows, documents="apart"))
    _assert_close(_train(2, tmp_path / "2", config, _stream(rows, documents="apart")), alone)
    _assert_same_run(tmp_path / "2", tmp_path / "1")


def test_batches_too_small_to_share_are_evaluated_by_every_process(tmp_path: Path) -> None:
    """Also those of the deletion sample alone; the values are those of one process."""
    options = {"adversary_steps": (), "deletion_sample": [tokens(1, seed=5)]}
    plan = Evaluations(list(tokens(8, seed=9).split(4)), slow_every=2, options=options)
    alone = _train(1, tmp_path / "1", _config("stochastic"), _batches(), evaluations=plan)
    _assert_close(_train(2, tmp_path / "2", _config("stochastic"), _batches(), evaluations=plan), alone)
    _assert_same_run(tmp_path / "2", tmp_path / "1")


@pytest.mark.slow  # waits
def test_no_process_waits_for_an_evaluation_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPD_LENS_TIMEOUT", "5")
    real = evaluations.evaluate

    @wraps(real)
    def slow(*given: Any, **options: Any) -> Any:
        time.sleep(8)
        return real(*given, **options)

    monkeypatch.setattr(evaluations, "evaluate", slow)
    plan = Evaluations(tokens(1, seed=9), fast_every=4)
    _train(2, tmp_path / "run", _config("stochastic"), _batches(), evaluations=plan)
