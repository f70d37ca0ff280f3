"""The shipped tiny language model: hosts agree, the recorded held-out loss is real, the text is split cleanly."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import time
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors import safe_open
from torch import Tensor

from spd_lens.data import cut_windows
from spd_lens.models import (
    TINY_LM_DIRECTORY,
    load_moby_dick,
    load_tiny_lm,
    load_tiny_lm_hf,
    load_tiny_lm_tokenizer,
)

TL_VERSION = importlib.metadata.version("transformer_lens")
HAS_HOOKED = int(TL_VERSION.split(".")[0]) < 4
needs_hooked = pytest.mark.skipif(
    not HAS_HOOKED, reason=f"transformer_lens {TL_VERSION} has no HookedTransformer (removed in 4.0)"
)
HOSTS = [pytest.param("hooked", marks=needs_hooked), "bridge"]
PROMPT = "The white whale"


@pytest.fixture(scope="module")
def recipe() -> dict[str, Any]:
    return json.loads((TINY_LM_DIRECTORY / "recipe.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def held_out_slice(recipe: dict[str, Any]) -> Int[Tensor, "window pos"]:
    """The windows behind the recipe's `moby_dick_slice`."""
    tokenizer = load_tiny_lm_tokenizer()
    ids = torch.tensor(tokenizer.encode(load_moby_dick("held_out"), add_special_tokens=False))
    n_windows = recipe["held_out_loss_nats_per_token"]["moby_dick_slice"]["tokens"] // (recipe["n_ctx"] - 1)
    return cut_windows(ids, 128, bos=tokenizer.bos_token_id)[:n_windows]


def kept_log_probs(
    logits: Float[Tensor, "window pos d_vocab"], windows: Int[Tensor, "window pos"]
) -> Float[Tensor, "window pos_but_last"]:
    """Log probability of each token given the tokens before it."""
    log_probs = F.log_softmax(logits[:, :-1].double(), dim=-1)
    return log_probs.gather(-1, windows[:, 1:, None]).squeeze(-1)


def moby_bigram_loss(windows: Int[Tensor, "window pos"]) -> float:
    """Loss of a bigram model (absolute discounting over an add-one unigram) fitted on the shipped text."""
    tokenizer = load_tiny_lm_tokenizer()
    ids = torch.tensor(tokenizer.encode(load_moby_dick("train"), add_special_tokens=False))
    pairs = ids[:-1] * 2048 + ids[1:]
    counts = torch.bincount(pairs, minlength=2048**2).reshape(2048, 2048).double()
    unigram = (counts.sum(0) + 1) / (counts.sum() + 2048)
    totals = counts.sum(1, keepdim=True)
    discounted = (counts - 0.75).clamp(min=0) / totals.clamp(min=1)
    bigram = discounted + (1 - discounted.sum(1, keepdim=True)) * unigram
    return -bigram[windows[:, 1:-1], windows[:, 2:]].log().mean().item()


@pytest.mark.parametrize("host", HOSTS)
def test_host_computes_the_logits_of_the_plain_model(host: Any, held_out_slice: Tensor) -> None:
    tokens = held_out_slice[:4]
    with torch.no_grad():
        logits = load_tiny_lm(host=host)(tokens)
        expected = load_tiny_lm_hf()(tokens).logits
    assert logits.shape == (4, 128, 2048)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@needs_hooked
def test_both_hosts_agree_in_float64(held_out_slice: Tensor) -> None:
    tokens = held_out_slice[:2]
    with torch.no_grad():
        logits = [load_tiny_lm(host=host, dtype=torch.float64)(tokens) for host in ("hooked", "bridge")]
    assert logits[0].dtype == torch.float64
    torch.testing.assert_close(logits[0], logits[1], atol=1e-10, rtol=0)


@pytest.mark.parametrize("host", HOSTS)
def test_host_is_ready_to_use(host: Any) -> None:
    model = load_tiny_lm(host=host)
    assert model.cfg.model_name == "tiny_lm"
    assert model.cfg.normalization_type == "LN"
    assert (model.cfg.n_layers, model.cfg.d_model, model.cfg.n_heads, model.cfg.n_ctx) == (2, 128, 4, 128)
    assert not model.training
    tokens = model.to_tokens(PROMPT)
    assert tokens[0, 0] == model.tokenizer.bos_token_id
    assert model.tokenizer.decode(tokens[0, 1:]) == PROMPT


def test_default_host_follows_the_installed_version() -> None:
    expected = "HookedTransformer" if HAS_HOOKED else "TransformerBridge"
    assert type(load_tiny_lm()).__name__ == expected


@pytest.mark.skipif(HAS_HOOKED, reason=f"transformer_lens {TL_VERSION} still has HookedTransformer")
def test_hooked_is_refused_without_hooked_transformer() -> None:
    with pytest.raises(ValueError, match=r"no longer has HookedTransformer.*Use host='bridge'"):
        load_tiny_lm(host="hooked")


def test_unusable_arguments_are_refused() -> None:
    # The test suite checks annotations at run time; users have no such check and see the functions' own errors.
    load, book = inspect.unwrap(load_tiny_lm), inspect.unwrap(load_moby_dick)
    with pytest.raises(ValueError, match="host is 'vllm'; expected 'hooked', 'bridge' or None"):
        load(host="vllm")
    with pytest.raises(TypeError, match="dtype is 'float32'; expected a torch dtype"):
        load(dtype="float32")
    with pytest.raises(ValueError, match=r"dtype is torch\.int64; expected a floating point type"):
        load(dtype=torch.int64)
    with pytest.raises(ValueError, match="split is 'test'; expected 'train' or 'held_out'"):
        book("test")


@pytest.mark.parametrize("host", HOSTS)
def test_loading_is_quick_silent_and_leaves_the_seed_alone(host: Any) -> None:
    load_tiny_lm(host=host)  # the first call also imports transformer_lens
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_tiny_lm(host=host)
    assert time.perf_counter() - started < 5
    torch.testing.assert_close(torch.rand(3), expected)


def test_recorded_loss_is_what_the_weights_give(recipe: dict[str, Any], held_out_slice: Tensor) -> None:
    claim = recipe["held_out_loss_nats_per_token"]["moby_dick_slice"]
    with torch.no_grad():
        loss = -kept_log_probs(load_tiny_lm()(held_out_slice), held_out_slice).mean().item()
    assert claim["tokens"] == held_out_slice[:, 1:].numel()
    assert loss == pytest.approx(claim["model"], abs=2e-3)


def test_model_is_far_better_than_unigram_and_bigram(recipe: dict[str, Any]) -> None:
    for name, losses in recipe["held_out_loss_nats_per_token"].items():
        assert losses["model"] < losses["bigram"] - 0.4, name
        assert losses["bigram"] < losses["unigram"] - 1, name


def test_model_beats_a_bigram_fitted_here(held_out_slice: Tensor) -> None:
    # Without the first token of each window, whose only context is the BOS.
    with torch.no_grad():
        loss = -kept_log_probs(load_tiny_lm()(held_out_slice), held_out_slice)[:, 1:].mean().item()
    assert loss < moby_bigram_loss(held_out_slice) - 0.4


@pytest.mark.parametrize("host", HOSTS)
def test_greedy_generation_follows_the_plain_model(host: Any) -> None:
    model = load_tiny_lm(host=host)
    expected = model.to_tokens(PROMPT)
    reference = load_tiny_lm_hf()
    with torch.no_grad():
        for _ in range(12):
            following = reference(expected).logits[:, -1].argmax(-1, keepdim=True)
            expected = torch.cat([expected, following], dim=1)
    text = model.generate(PROMPT, max_new_tokens=12, do_sample=False, stop_at_eos=False, verbose=False)
    assert text == model.tokenizer.decode(expected[0, 1:])


def test_splits_do_not_overlap() -> None:
    train, held_out = load_moby_dick("train"), load_moby_dick("held_out")
    assert "CHAPTER 123. " in train
    assert "CHAPTER 124. " not in train
    assert held_out.startswith("CHAPTER 124. ")
    assert "found another orphan" in held_out
    assert 0.09 < len(held_out) / (len(train) + len(held_out)) < 0.11
    known = set(train.split("\n\n"))
    assert not [p for p in held_out.split("\n\n") if len(p) > 60 and p in known]


def test_text_is_clean() -> None:
    text = load_moby_dick("train") + load_moby_dick("held_out")
    assert "Call me Ishmael. Some years ago" in text
    positions = [text.index(f"\nCHAPTER {number}. ") for number in range(1, 136)]
    assert positions == sorted(positions)
    assert not [mark for mark in ("\r", "\t", "\n\n\n", "\ufffd") if mark in text]


def test_tokenizer_has_one_special_token_and_loses_nothing() -> None:
    tokenizer = load_tiny_lm_tokenizer()
    assert len(tokenizer) == 2048
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id
    assert tokenizer.convert_ids_to_tokens(tokenizer.bos_token_id) == "<|endoftext|>"
    text = 'Ünïcode — "quotes", 3.14\n\tand\u2028more whales'
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_files_are_small_and_never_pickled(recipe: dict[str, Any]) -> None:
    files = [path for path in TINY_LM_DIRECTORY.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json", ".jsonl", ".md"}
    own = [path for path in files if path.parent == TINY_LM_DIRECTORY]
    assert sum(path.stat().st_size for path in own) < 5_000_000
    assert sum(path.stat().st_size for path in files if path not in own) < 20_000_000
    with safe_open(TINY_LM_DIRECTORY / "model.safetensors", framework="pt") as stored:
        shapes = [stored.get_slice(name).get_shape() for name in stored.keys()]  # noqa: SIM118
    assert sum(torch.Size(shape).numel() for shape in shapes) == recipe["n_params"]


def test_embeddings_are_not_tied() -> None:
    model = load_tiny_lm_hf()
    assert not torch.equal(model.lm_head.weight, model.transformer.wte.weight)
    assert model.lm_head.weight.data_ptr() != model.transformer.wte.weight.data_ptr()


def test_recipe_says_how_and_from_what(recipe: dict[str, Any]) -> None:
    assert {"command", "seed", "versions", "steps", "batch_windows", "tokens_seen", "baselines"} <= recipe.keys()
    assert recipe["optimizer"]["lr_peak"] > 0
    assert "CC0-1.0" in recipe["text"]["data_licence"]


def test_the_shipped_decomposition_is_all_matrices_of_the_blocks_and_adds_up_to_them():
    decomposition = load_tiny_lm(decomposed=True)
    assert len(decomposition) == 12
    assert sum(weight.n_subcomponents for _, weight in decomposition.items()) == 4736
    plain = dict(load_tiny_lm_hf().named_parameters())
    for block in (0, 1):
        for name, parameter in (("W_in", "c_fc"), ("W_out", "c_proj")):
            weight = decomposition[f"blocks.{block}.mlp.{name}"]
            stored = plain[f"transformer.h.{block}.mlp.{parameter}.weight"]
            assert ((weight.V @ weight.U - stored).norm() / stored.norm()).item() < 0.01


def test_the_shipped_decomposition_belongs_to_float32_weights_and_says_so():
    with pytest.raises(ValueError, match="float32"):
        load_tiny_lm(dtype=torch.bfloat16, decomposed=True)
