"""Runs on a data set that is read as they go: stopped and resumed, and by several processes, equal to the whole one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from spd_lens import Decomposition, TokenBatches, decompose, pack_tokens, train
from spd_lens.data import TokenStream
from tests.data.test_token_stream import random_texts
from tests.small_models import tiny_tokenizer, tiny_transformer
from tests.training.forked import run_processes

RUN: dict[str, Any] = {"steps": 12, "checkpoint_every": 4, "keep_checkpoints": 9, "log_every": 1, "lr": 1e-3}


def _decomposed() -> Decomposition:
    return decompose(tiny_transformer(), {"blocks.0.mlp.W_in": 6}, seed=0)


class _Counting:
    """A tokenizer that counts its texts."""

    def __init__(self) -> None:
        self.inner: Any = tiny_tokenizer(PreTrainedTokenizerFast)
        self.eos_token_id, self.bos_token_id, self.count = self.inner.eos_token_id, None, 0

    def __call__(self, text: str, **options: Any) -> Any:
        self.count += 1
        return self.inner(text, **options)


def _stream(tokenizer: Any = None, n: int = 200, **changes: Any) -> TokenStream:
    # Many shards, so that whole ones are skipped.
    source = Dataset.from_dict({"text": random_texts(n)}).to_iterable_dataset(num_shards=20)
    settings: dict[str, Any] = {"context": 6, "batch_size": 16, "shuffle": 4, "streams": 2} | changes
    return TokenStream(source, tokenizer or _Counting(), **settings)


def test_a_resumed_run_equals_the_uninterrupted_one_and_reads_one_block_again(tmp_path: Path) -> None:
    whole, again = _decomposed(), _decomposed()
    once, rest = _Counting(), _Counting()
    train(whole, _stream(once), out_dir=tmp_path / "run", **RUN)
    train(again, _stream(rest), resume_from=tmp_path / "run" / "checkpoints" / "step-00000008")
    for name, tensor in whole.tensors().items():
        assert torch.equal(again.tensors()[name], tensor), name
    # Of 12 batches 4 are missing, and of each of the 2 streams the first document is looked at.
    assert rest.count < 0.7 * once.count


@pytest.mark.parametrize(("first", "second"), [(2, 1), (1, 2)])
def test_processes_train_what_one_trains_and_go_on_in_another_number(first: int, second: int, tmp_path: Path) -> None:
    whole = _decomposed()
    train(whole, _stream(), out_dir=tmp_path / "one", **RUN)

    def act(name: str, **arguments: Any) -> Any:
        def run(rank: int) -> None:
            decomposition, tokenizer = _decomposed(), _Counting()
            train(decomposition, _stream(tokenizer), **arguments)
            tensors = {name: t.detach().contiguous() for name, t in decomposition.tensors().items()}
            save_file(tensors, tmp_path / f"{name}-{rank}.safetensors")
            (tmp_path / f"{name}-{rank}.txt").write_text(str(tokenizer.count))

        return run

    run_processes(first, act("first", out_dir=tmp_path / "run", **RUN), tmp_path / "errors")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000008"
    run_processes(second, act("second", resume_from=checkpoint), tmp_path / "errors")
    for name in ("first", "second"):
        found = load_file(tmp_path / f"{name}-0.safetensors")
        for key, tensor in whole.tensors().items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=2e-4, msg=f"{name} {key}")
    counts = [int(path.read_text()) for path in sorted(tmp_path.glob("first-*.txt"))]
    if first == 2:
        one = _Counting()
        train(_decomposed(), _stream(one), out_dir=tmp_path / "counted", **RUN)
        assert sum(counts) <= one.count + 2
        assert max(counts) < 0.7 * one.count


def test_a_checkpoint_of_a_stream_is_refused_on_rows_and_the_other_way_round(tmp_path: Path) -> None:
    stream = _stream()
    rows = TokenBatches(pack_tokens(random_texts(60), _Counting(), 6), 16)
    for name, first, second in (("a", stream, rows), ("b", rows, stream)):
        decomposition = decompose(tiny_transformer(), {"blocks.0.mlp.W_in": 6}, seed=0)
        train(decomposition, first, steps=2, out_dir=tmp_path / name)
        with pytest.raises(ValueError, match="run on other data"):
            train(decomposition, second, resume_from=tmp_path / name)
