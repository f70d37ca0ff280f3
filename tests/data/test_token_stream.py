"""A data set read as training goes, against the same data read whole; going on anywhere gives the same batches."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, load_dataset
from transformers import PreTrainedTokenizerFast

from spd_lens import pack_tokens
from spd_lens.data import Batch, Cutting, Document, TokenStream, as_batch
from tests.small_models import tiny_tokenizer

N_DOCUMENTS = 60


def _tokenizer() -> Any:
    return tiny_tokenizer(PreTrainedTokenizerFast)


def random_texts(n: int = N_DOCUMENTS) -> list[str]:
    """Documents of 0 to 40 words."""
    generator = np.random.default_rng(0)
    return [" ".join(f"w{i}" for i in generator.integers(1, 29, size=generator.integers(0, 41))) for _ in range(n)]


def _rows(batches: Any, n: int) -> torch.Tensor:
    return torch.cat([batch.inputs for batch in islice(iter(batches), n)])


def _whole(texts: list[str], context: int = 6) -> list[list[int]]:
    return pack_tokens(texts, _tokenizer(), context).tolist()


def _sources(folder: Path) -> Iterator[tuple[str, Any]]:
    texts = random_texts()
    dataset = Dataset.from_dict({"text": texts})
    yield "memory", dataset
    yield "streamed", dataset.to_iterable_dataset(num_shards=1)
    dataset.save_to_disk(folder / "arrow")
    yield "save_to_disk", folder / "arrow"
    DatasetDict({"train": dataset, "other": dataset.select([0])}).save_to_disk(folder / "splits")
    yield "save_to_disk of splits", str(folder / "splits")
    dataset.to_json(folder / "lines" / "train.jsonl")
    yield "a folder of files", folder / "lines"
    dataset.to_parquet(folder / "parquet.parquet")
    yield (
        "parquet",
        load_dataset(
            "parquet", data_files=str(folder / "parquet.parquet"), streaming=True, split="train", cache_dir=str(folder)
        ),
    )


def test_every_source_gives_the_windows_of_the_whole_reading_again_and_again(tmp_path: Path) -> None:
    expected = _whole(random_texts())
    twice = expected + expected
    for name, source in _sources(tmp_path):
        stream = TokenStream(source, _tokenizer(), context=6, batch_size=2)
        assert _rows(stream, len(expected)).tolist() == twice[: 2 * len(expected)], name


def test_text_files_are_documents(tmp_path: Path) -> None:
    texts = [text for text in random_texts(8) if text]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    files = [tmp_path / f"{i}.txt" for i in range(len(texts))]
    stream = TokenStream(files, _tokenizer(), context=6, batch_size=1)
    assert _rows(stream, 20).tolist() == _whole(texts)[:20]


def test_rows_of_token_ids_are_taken_as_they_are() -> None:
    rows = np.random.default_rng(1).integers(0, 30, size=(9, 7)).tolist()
    stream = TokenStream(Dataset.from_dict({"input_ids": rows}), column="input_ids", context=7, batch_size=3)
    assert _rows(stream, 3).tolist() == rows
    packed = TokenStream(
        Dataset.from_dict({"input_ids": rows}), column="input_ids", context=4, batch_size=1, separator=5
    )
    joined = [i for row in rows for i in [*row, 5]]
    assert _rows(packed, 18).tolist() == [joined[k : k + 4] for k in range(0, 72, 4)]


def test_windows_of_documents_apart_hold_one_document_each_and_all_of_it() -> None:
    tokenizer, texts = _tokenizer(), random_texts()
    source = Dataset.from_dict({"text": texts})
    expected = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces = [[0, *[*ids, 0][k : k + 5]] for k in range(0, len(ids) + 1, 5)] if ids else []
        expected += pieces
    stream = TokenStream(source, tokenizer, context=6, batch_size=1, documents="apart", prepend_bos=True)
    for batch, piece in zip(stream, expected, strict=False):
        assert batch.inputs[0, : len(piece)].tolist() == piece
        mask = [i < len(piece) for i in range(6)]
        assert (batch.attention_mask is None and all(mask)) or batch.attention_mask[0].tolist() == mask
        assert (batch.position_mask is None and all(mask)) or batch.position_mask[0].tolist() == mask


def test_excluded_tokens_do_not_count() -> None:
    stream = TokenStream(
        Dataset.from_dict({"text": random_texts()}), _tokenizer(), context=6, batch_size=2, exclude=[0, 3]
    )
    for batch in islice(stream, 10):
        expected = [[t not in (0, 3) for t in row] for row in batch.inputs.tolist()]
        assert batch.position_mask is not None
        assert batch.position_mask.tolist() == expected


@pytest.mark.parametrize("shuffle", [0, 7])
@pytest.mark.parametrize("streams", [1, 4])
def test_going_on_anywhere_gives_the_batches_of_the_run_that_was_not_stopped(
    shuffle: int, streams: int, tmp_path: Path
) -> None:
    dataset = Dataset.from_dict({"text": random_texts()})
    dataset.to_json(tmp_path / "train.jsonl")
    for name, source in (("memory", dataset), ("a folder of files", tmp_path)):
        settings: dict[str, Any] = {"context": 6, "batch_size": 4, "shuffle": shuffle, "streams": streams, "seed": 3}
        whole = [batch.inputs for batch in islice(TokenStream(source, _tokenizer(), **settings), 70)]
        for taken in (0, 1, 13, 60):
            stopped = TokenStream(source, _tokenizer(), **settings)
            for _ in islice(stopped, taken):
                pass
            position = json.loads(json.dumps(stopped.position()))
            assert len(json.dumps(position)) < 2000 * streams
            again = TokenStream(source, _tokenizer(), **settings).at(position).batches_from(taken)
            for expected, batch in zip(whole[taken:], again, strict=False):
                assert torch.equal(batch.inputs, expected), (name, taken)


def test_shuffling_is_local_seeded_and_loses_nothing() -> None:
    source, settings = Dataset.from_dict({"text": random_texts()}), {"context": 6, "batch_size": 1}
    plain = _rows(TokenStream(source, _tokenizer(), **settings), 180).tolist()
    orders = {}
    for seed in (0, 1):
        found = _rows(TokenStream(source, _tokenizer(), shuffle=9, seed=seed, **settings), 180).tolist()
        for k in range(0, 180, 9):
            assert sorted(found[k : k + 9]) == sorted(plain[k : k + 9])
        orders[seed] = found
    assert orders[0] != plain
    assert orders[0] != orders[1]


def test_processes_share_the_batches_of_one_and_read_their_own_streams_alone() -> None:
    texts = random_texts()
    seen: list[str] = []
    tokenizer: Any = _tokenizer()

    def noting(text: str, **options: Any) -> Any:
        seen.append(text)
        return tokenizer(text, **options)

    noting.eos_token_id, noting.bos_token_id = tokenizer.eos_token_id, None  # pyright: ignore[reportFunctionMemberAccess]
    source = Dataset.from_dict({"text": texts})
    whole = TokenStream(source, noting, context=6, batch_size=4, streams=4, shuffle=3)
    expected = [batch.inputs for batch in islice(whole, 12)]
    for count in (2, 4):
        read = []
        for rank in range(count):
            seen.clear()
            own = whole.for_process(rank, count)
            for batch, all_rows in zip(own, expected, strict=False):
                assert torch.equal(batch.inputs, all_rows[rank::count])
            read.append(set(seen))
        assert not set.intersection(*read) - {""}
    with pytest.raises(ValueError, match="4 streams for 3 processes"):
        whole.for_process(0, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: Dataset.from_dict({"text": s[1:]}), "first document of a stream is another"),
        (lambda s: Dataset.from_dict({"text": [*s[:20], "w1 w2", *s[21:]]}), "next document of a stream is another"),
    ],
)
def test_other_data_is_refused_when_a_run_goes_on(change: Any, message: str) -> None:
    texts = [text for text in random_texts() if text]
    settings: dict[str, Any] = {"context": 6, "batch_size": 1}
    stream = TokenStream(Dataset.from_dict({"text": texts}), _tokenizer(), **settings)
    for _ in stream:
        if stream.position()["streams"]["0"]["place"]["source"] is not None and _is_in_document(stream, texts, 20):
            break
    position = stream.position()
    with pytest.raises(ValueError, match=message):
        next(TokenStream(change(texts), _tokenizer(), **settings).at(position).batches_from(position["batch"]))


def _is_in_document(stream: TokenStream, texts: list[str], number: int) -> bool:
    ids = _tokenizer()(texts[number], add_special_tokens=False)["input_ids"]
    return stream.position()["streams"]["0"]["place"]["here"] == Document(ids, None).digest


def test_windows_in_a_file_are_those_of_the_stream(tmp_path: Path) -> None:
    stream = TokenStream(Dataset.from_dict({"text": random_texts()}), _tokenizer(), context=6, batch_size=4)
    path = stream.write_tokens(tmp_path / "tokens.npy", 30)
    assert np.load(path, mmap_mode="r").tolist() == _whole(random_texts())[:30]
    apart = TokenStream(
        Dataset.from_dict({"text": random_texts()}), _tokenizer(), context=6, batch_size=4, documents="apart"
    )
    with pytest.raises(ValueError, match="use 'joined'"):
        apart.write_tokens(tmp_path / "other.npy", 3)


def test_a_long_document_is_cut_without_copying_its_rest_for_every_window() -> None:
    cutting = Cutting(6, (), (0,), "joined")
    n, tokens = cutting.windows([1, 2], list(range(40_000)))
    assert n == 40_003 // 6
    assert [cutting.window(tokens, k) for k in (0, n - 1)] == [tokens[:6], tokens[(n - 1) * 6 : n * 6]]
    assert cutting.left(tokens) == tokens[n * 6 :]


def test_mistakes_are_named(tmp_path: Path, without_type_checks: None) -> None:
    tokenizer, data = _tokenizer(), Dataset.from_dict({"text": ["w1 w2 w3 w4", None, "w5"], "n": [1, 2, 3]})
    good: dict[str, Any] = {"context": 4, "batch_size": 2}

    def first(source: Any, tokenizer: Any = tokenizer, **changes: Any) -> Batch:
        return as_batch(next(iter(TokenStream(source, tokenizer, **{**good, **changes}))))

    assert first(data, skip_empty=True).inputs.shape == (2, 4)
    for source, changes, kind, message in (
        (data, {"column": "txt"}, ValueError, "no column 'txt'; near: 'text'"),
        (data, {}, TypeError, "holds a NoneType.*skip_empty=True"),
        (data, {"column": "n"}, TypeError, "holds a int; expected text, or a row of token ids"),
        (data, {"tokenizer": None}, TypeError, "give a tokenizer"),
        (data, {"streams": 3}, ValueError, "batch_size=2 with streams=3; expected a multiple"),
        (data, {"documents": "joint"}, ValueError, "expected 'joined' or 'apart'"),
        (data, {"context": 400, "skip_empty": True}, ValueError, "fewer than 400 tokens"),
        (data, {"tokenizer": None, "prepend_bos": True}, ValueError, "without a tokenizer"),
        (DatasetDict({"train": data}), {}, ValueError, "choose one of them"),
        (["no.txt"], {}, ValueError, "there is no file no.txt"),
        (3, {}, TypeError, "expected a data set of `datasets`"),
        (Dataset.from_dict({"text": []}), {}, ValueError, "the data set is empty"),
        (str(tmp_path / "none"), {}, ValueError, "cannot be loaded"),
    ):
        with pytest.raises(kind, match=message):
            first(source, **changes)
