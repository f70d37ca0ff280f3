"""Windows of tokens from texts and data sets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from spd_lens import load_tokens, pack_tokens
from spd_lens.data import cut_windows
from tests.small_models import tiny_tokenizer


def test_packed_windows_are_the_joined_texts_cut_up() -> None:
    tokenizer = tiny_tokenizer(PreTrainedTokenizerFast)
    packed = pack_tokens(["w1 w2 w3", "w4 w5", "w6 w7"], tokenizer, 4)
    assert packed.tolist() == [[1, 2, 3, 0], [4, 5, 0, 6]]
    with_bos = pack_tokens(["w1 w2 w3", "w4 w5"], tokenizer, 4, prepend_bos=True)
    assert with_bos.tolist() == [[0, 1, 2, 3], [0, 0, 4, 5]]
    assert len(pack_tokens(["w1 w2 w3"] * 100, tokenizer, 4, max_rows=3)) == 3


def test_too_little_text_is_an_error() -> None:
    with pytest.raises(ValueError, match="not one window of context=8"):
        pack_tokens(["w1 w2"], tiny_tokenizer(PreTrainedTokenizerFast), 8)


def test_a_dataset_is_tokenised_and_packed_and_streamed() -> None:
    from datasets import Dataset

    tokenizer = tiny_tokenizer(PreTrainedTokenizerFast)
    data = Dataset.from_dict({"text": ["w1 w2 w3", "w4 w5"] * 5, "other": [1] * 10})
    expected = pack_tokens(["w1 w2 w3", "w4 w5"] * 5, tokenizer, 4, max_rows=3)
    assert torch.equal(load_tokens(data, tokenizer, 4, max_rows=3), expected)
    assert torch.equal(load_tokens(data.to_iterable_dataset(), tokenizer, 4, max_rows=3), expected)
    with pytest.raises(ValueError, match="no column 'body'; its columns"):
        load_tokens(data, tokenizer, 4, column="body")


def test_windows_of_one_row_have_a_bos_before_each_stretch() -> None:
    ids = torch.arange(1, 9)
    assert cut_windows(ids, 4, bos=0).tolist() == [[0, 1, 2, 3], [0, 4, 5, 6]]
    assert cut_windows(ids, 3).tolist() == [[1, 2, 3], [4, 5, 6]]
    with pytest.raises(ValueError, match="context=1"):
        cut_windows(ids, 1)


def test_one_text_is_not_a_list_of_characters(without_type_checks: None) -> None:
    with pytest.raises(TypeError, match=r"texts is a str; expected a list of texts: pack_tokens\(\[text\]"):
        pack_tokens("w1 w2 w3", tiny_tokenizer(PreTrainedTokenizerFast), 4)


def test_null_rows_are_named_or_left_out_and_empty_texts_add_nothing(without_type_checks: None) -> None:
    tokenizer = tiny_tokenizer(PreTrainedTokenizerFast)
    texts: list[Any] = ["w1 w2 w3", "", None, "w4 w5", "w6 w7"]
    with pytest.raises(TypeError, match="text 2 is None; skip_empty=True leaves such rows out"):
        pack_tokens(texts, tokenizer, 4)
    assert pack_tokens(texts, tokenizer, 4, skip_empty=True).tolist() == [[1, 2, 3, 0], [4, 5, 0, 6]]
    with pytest.raises(TypeError, match=r"text 0 is a dict with keys.*load_tokens"):
        pack_tokens([{"text": "w1"}], tokenizer, 4)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="text 1 is a int"):
        pack_tokens(["w1", 5], tokenizer, 4)  # pyright: ignore[reportArgumentType]


class Counting:
    """A tokenizer that gives as many tokens as the text says, and counts how many it was asked for."""

    eos_token_id = bos_token_id = 0

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, text: str, **kwargs: object) -> dict[str, list[int]]:
        self.calls += 1
        return {"input_ids": list(range(1, int(text) + 1))}


def test_documents_of_all_lengths_give_the_windows_of_the_joined_row() -> None:
    lengths = [1, 7, 30, 2, 2, 64, 5]
    joined = [token for n in lengths for token in [*range(1, n + 1), 0]]
    for context in (2, 3, 8, 31):
        expected = [joined[i : i + context] for i in range(0, len(joined) - context + 1, context)]
        assert pack_tokens(map(str, lengths), Counting(), context).tolist() == expected


def test_no_more_texts_are_read_than_the_rows_need() -> None:
    tokenizer = Counting()
    rows = pack_tokens((str(5) for _ in range(1000)), tokenizer, 4, max_rows=3)
    assert rows.shape == (3, 4)
    assert tokenizer.calls == 2


def test_one_long_document_takes_time_in_proportion() -> None:
    # 400,000 tokens in windows of 2: 200,000 windows, which took minutes when each moved all the rest.
    assert pack_tokens(["400000"], Counting(), 2).shape == (200_000, 2)


def test_the_first_row_of_a_generator_is_not_lost() -> None:
    tokenizer = tiny_tokenizer(PreTrainedTokenizerFast)
    texts = ["w1 w2 w3", "w4 w5", "w6 w7"]
    assert torch.equal(load_tokens(({"text": t} for t in texts), tokenizer, 4), pack_tokens(texts, tokenizer, 4))


def test_a_data_set_without_a_split_names_its_splits() -> None:
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_dict({"text": ["w1"] * 9})
    with pytest.raises(ValueError, match="a DatasetDict with the splits 'train', 'test'; choose one"):
        load_tokens(DatasetDict({"train": rows, "test": rows}), tiny_tokenizer(PreTrainedTokenizerFast), 4)
    with pytest.raises(TypeError, match=r"the rows are of type str.*pack_tokens"):
        load_tokens(["w1 w2"], tiny_tokenizer(PreTrainedTokenizerFast), 4)


def test_arguments_are_checked_before_a_text_is_read(without_type_checks: None) -> None:
    tokenizer = Counting()
    for arguments, error, text in (
        ({"context": 1}, ValueError, "context=1; expected at least 2"),
        ({"context": 4.0}, TypeError, "context=4.0; expected a whole number"),
        ({"max_rows": 0}, ValueError, "max_rows=0; expected at least 1"),
        ({"tokenizer": object()}, TypeError, "tokenizer is a object; expected a tokenizer such as model.tokenizer"),
    ):
        with pytest.raises(error, match=text):
            pack_tokens(["9"], **{"tokenizer": tokenizer, "context": 4, **arguments})
    assert tokenizer.calls == 0
