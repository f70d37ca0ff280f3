# ruff: noqa: E501 (a table, one mistake a line; its patterns are patterns)
"""Likely mistakes, one line each: every one is a TypeError or ValueError of ours that says what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch

from spd_lens import (
    Batch,
    Decomposition,
    TokenBatches,
    cache_residuals,
    decompose,
    decompose_layer,
    evaluate,
    harvest,
    load_tokens,
    pack_tokens,
    train,
)
from spd_lens.circuits import find_circuit
from spd_lens.graphs import attribution_graph, dataset_graph
from spd_lens.models import load_tiny_lm_tokenizer, open_model
from spd_lens.patching import ablation_effects, activation_patching, attribution_patching, path_patching
from tests.small_models import D_VOCAB, tiny_transformer, tokens

SITE = "blocks.1.mlp.W_in"
T = tokens(2)


def _last(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, -1, 0]


def _zeroed() -> Any:
    model = tiny_transformer()
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "mlp" in name and p.ndim == 2).zero_()
    return model


MISTAKES: dict[str, tuple[Callable[[Decomposition, Any], Any], str]] = {
    # decomposing
    "sites is a text": (lambda d, m: decompose_layer(m, 0, 4, sites="mlp.W_in"), r"sites='mlp.W_in'; expected a list of names"),
    "sites has whole names": (lambda d, m: decompose_layer(m, 0, 4, sites=["blocks.0.mlp.W_in"]), "names within block 0, such as 'mlp.W_in'"),
    "sites has numbers": (lambda d, m: decompose_layer(m, 0, 4, sites=[0]), "sites holds 0; expected names"),
    "sites mistyped": (lambda d, m: decompose_layer(m, 0, 4, sites=["mlp.W_on"]), "near names: .*mlp.W_in"),
    "layer is a text": (lambda d, m: decompose_layer(m, "0", 4), "layer='0'; expected the number of a block, 0..1"),
    "layer is a fraction": (lambda d, m: decompose_layer(m, 0.0, 4), "layer=0.0; expected the number of a block"),
    "layer out of range": (lambda d, m: decompose_layer(m, 2, 4), "layer=2; this model has blocks 0..1"),
    "patterns are a list": (lambda d, m: decompose(m, [SITE]), r"expected \{pattern: C\}, for example"),
    "patterns are a text": (lambda d, m: decompose(m, SITE), r"expected \{pattern: C\}"),
    "patterns are a number": (lambda d, m: decompose(m, 8), r"expected \{pattern: C\}"),
    "no pattern": (lambda d, m: decompose(m, {}), "no pattern given; sites of this model"),
    "pattern is a number": (lambda d, m: decompose(m, {0: 4}), "0 is no pattern of site names"),
    "C is a fraction": (lambda d, m: decompose(m, {"blocks.0.mlp.W_in": 2.5}), "is 2.5; expected an int"),
    "C is zero": (lambda d, m: decompose(m, {"blocks.0.mlp.W_in": 0}), "expected at least 1"),
    "seed is a text": (lambda d, m: decompose(m, {"blocks.0.mlp.W_in": 2}, seed="1"), "seed='1'; expected a whole number"),
    "no model": (lambda d, m: decompose("gpt2", {"blocks.0.mlp.W_in": 2}), "given a str; expected a TransformerLens model"),
    "twice": (lambda d, m: decompose(m, {SITE: 2}), "is decomposed already"),
    "a matrix of zeros": (lambda d, m: decompose(_zeroed(), {"blocks.0.mlp.W_in": 2}), "is zero everywhere, so there is nothing"),
    # a decomposition in use
    "importance of text": (lambda d, m: d.importance("a text"), r"tokens is text; expected token ids \[batch pos\]: model.to_tokens"),
    "importance of texts": (lambda d, m: d.importance(["a text"]), "tokens is text"),
    "importance of a row": (lambda d, m: d.importance(T[0]), r"expected \[batch pos\] \(for one prompt: tokens\[None\]"),
    "importance of floats": (lambda d, m: d.importance(T.float()), "dtype torch.float32; expected an integer tensor"),
    "importance of a mask": (lambda d, m: d.importance(T > 3), "boolean, which looks like a mask"),
    "importance out of range": (lambda d, m: d.importance(T + D_VOCAB), "but the vocabulary is 0..39"),
    "importance too long": (lambda d, m: d.importance(tokens(1, length=13)), "this model's context is 12"),
    "importance of a dict": (lambda d, m: d.importance({"input_ids": T}), r"for example tokens\['input_ids'\]"),
    "importance of nothing": (lambda d, m: d.importance(T[:0]), "it is empty"),
    "importance of ragged rows": (lambda d, m: d.importance([[1, 2], [3]]), r"rows of different lengths \(1, 2\)"),
    "importance of None": (lambda d, m: d.importance(None), "tokens is a NoneType; expected a tensor"),
    "summary of text": (lambda d, m: d.summary("a text"), "tokens is text"),
    # data
    "batch size a text": (lambda d, m: TokenBatches(T, "2"), "batch_size='2'; expected a whole number"),
    "exclude is an id": (lambda d, m: TokenBatches(T, 2, exclude=0), "exclude=0; expected a list of token ids"),
    "exclude is None inside": (lambda d, m: TokenBatches(T, 2, exclude=[None]), "does this tokenizer have that token"),
    "a mask of other numbers": (lambda d, m: Batch(T, position_mask=T + 2), "other numbers than 0 and 1"),
    "a mask of another shape": (lambda d, m: Batch(T, position_mask=T[:, :3] > 0), r"expected \(2, 12\)"),
    "one text to pack": (lambda d, m: pack_tokens("a", load_tiny_lm_tokenizer(), 8), r"pack_tokens\(\[text\]"),
    "packing with a model": (lambda d, m: pack_tokens(["a"], m.cfg, 8), "expected a tokenizer such as model.tokenizer"),
    "texts as a data set": (lambda d, m: load_tokens(["a"], load_tiny_lm_tokenizer(), 8), "for a list of texts"),
    "a data set that is a number": (lambda d, m: load_tokens(3, load_tiny_lm_tokenizer(), 8), "dataset is a int"),
    "caching a list": (lambda d, m: cache_residuals(d, [T]), "expected TokenBatches"),
    # the four that read data, more of them in tests/data/test_streams.py
    "train swapped": (lambda d, m: train(T, d), "train was given a Tensor; expected a Decomposition"),
    "train on a model": (lambda d, m: train(m, T), "train was given a .*; expected a Decomposition: decompose"),
    "evaluate text": (lambda d, m: evaluate(d, "a"), "the data is text"),
    "evaluate no batches": (lambda d, m: evaluate(d, T, max_batches=0), "max_batches=0; expected at least 1"),
    "harvest no batches": (lambda d, m: harvest(d, T, max_batches=0), "max_batches=0; expected at least 1"),
    "harvest half a batch": (lambda d, m: harvest(d, T, max_batches=0.5), "max_batches=0.5; expected a whole number"),
    "graph of text": (lambda d, m: dataset_graph(d, "a"), "the data is text"),
    # patching, graphs, circuits
    "ablating text": (lambda d, m: ablation_effects(d, "a", _last), "tokens is text"),
    "ablating on a model": (lambda d, m: ablation_effects(m, T, _last), "expected a Decomposition"),
    "patching text": (lambda d, m: activation_patching(d, "a", T, _last), "corrupted_tokens is text"),
    "patching from text": (lambda d, m: activation_patching(d, T, "a", _last), "clean tokens is text"),
    "attributing floats": (lambda d, m: attribution_patching(d, T.float(), T, _last), "expected an integer tensor"),
    "paths of a row": (
        lambda d, m: path_patching(d, T[0], T[0], _last, senders=None, receivers=None), r"corrupted_tokens has shape \(12,\)",
    ),
    "a graph of text": (lambda d, m: attribution_graph(d, "a"), "tokens is text"),
    "a circuit of text": (lambda d, m: find_circuit(d, "a"), "is text; expected token ids"),
    # models
    "opening nothing": (lambda d, m: open_model("./nothing-here"), "there is no such folder"),
    "opening a model": (lambda d, m: open_model(m), "expected a model's name"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_likely_mistake_is_named_in_words(
    mistake: str, without_type_checks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    decomposition = decompose(tiny_transformer(), {SITE: 4})
    make, text = MISTAKES[mistake]
    with pytest.raises((TypeError, ValueError), match=text) as raised:
        make(decomposition, decomposition.model)
    assert not isinstance(raised.value, jaxtyping.TypeCheckError)


@pytest.mark.parametrize(
    "make", [lambda t: t.int(), lambda t: t.to(torch.uint8), lambda t: t.numpy(), lambda t: t.tolist()]
)
def test_tokens_of_every_kind_are_the_same_tokens(make: Callable[[torch.Tensor], Any]) -> None:
    decomposition = decompose(tiny_transformer(), {SITE: 4})
    expected = decomposition.importance(T)[SITE]
    assert torch.equal(decomposition.importance(make(T))[SITE], expected)
