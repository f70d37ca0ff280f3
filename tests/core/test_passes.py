"""Passes that overlap, and where passes may start."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spd_lens import Decomposition, cache_residuals, decompose
from spd_lens.core import SiteMask
from spd_lens.data import TokenBatches
from tests.bridge_models import boot
from tests.conftest import needs_hooked
from tests.small_models import tiny_transformer, tokens

HOSTS: dict[str, Callable[[], Any]] = {"transformer": tiny_transformer, "bridge": lambda: boot("llama")}
on_both = pytest.mark.parametrize("host", HOSTS)


def half_on(host: str) -> tuple[Decomposition, list[tuple[str, Any]]]:
    decomposition = decompose(HOSTS[host](), {"*": 4})
    return decomposition, decomposition.keep({site: [0, 2] for site in decomposition})


def rows(k: int) -> Tensor:
    return tokens(1, seed=k, length=6) % 30


# -- passes that overlap ----------------------------------------------------------------------------------------------


@on_both
def test_threads_under_one_ablation_get_what_each_would_get_alone(host: str) -> None:
    decomposition, hooks = half_on(host)
    model, odd = decomposition.model, []
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        alone = [model(rows(k)) for k in range(3)]

        def work(k: int) -> None:
            for _ in range(6):
                with torch.no_grad():
                    if not torch.equal(model(rows(k)), alone[k]):
                        odd.append(k)

        threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert odd == []


@on_both
def test_a_plain_pass_in_another_thread_does_not_enter_a_clean_pass(host: str) -> None:
    decomposition, _ = half_on(host)
    expected = decomposition.clean_pass(rows(0))
    points = [name for name in decomposition.model.hook_dict if name.endswith("hook_resid_post")][:1]
    hidden = decomposition.clean_pass(rows(0), hidden_points=points).hidden
    done, started = threading.Event(), threading.Event()

    def visitor() -> None:
        while not done.is_set():
            with torch.no_grad():
                decomposition.model(rows(1))
            started.set()

    thread = threading.Thread(target=visitor)
    thread.start()
    try:
        started.wait(60)
        for _ in range(6):
            found = decomposition.clean_pass(rows(0), hidden_points=points)
            assert all(torch.equal(x, expected.inputs[site]) for site, x in found.inputs.items())
            assert all(torch.equal(x, expected.residuals[layer]) for layer, x in found.residuals.items())
            assert all(torch.equal(x, hidden[name]) for name, x in found.hidden.items())
    finally:
        done.set()
        thread.join()


@needs_hooked
@pytest.mark.parametrize("how", ["call", "run_with_hooks"])
@pytest.mark.parametrize(
    "place", ["hook_embed", "blocks.0.attn.hook_z", "blocks.0.hook_attn_out", "blocks.1.mlp.hook_pre"]
)
def test_a_hook_that_runs_the_model_again_leaves_the_outer_pass_as_it_is(place: str, how: str) -> None:
    decomposition, hooks = half_on("transformer")
    model, inside = decomposition.model, []
    expected = model.run_with_hooks(rows(0), fwd_hooks=hooks)
    other = model.run_with_hooks(rows(1), fwd_hooks=hooks)

    def again(value: Tensor, hook: Any) -> None:
        if not inside:
            inside.append(None)
            inside.append(model(rows(1)) if how == "call" else model.run_with_hooks(rows(1)))

    assert torch.equal(model.run_with_hooks(rows(0), fwd_hooks=[*hooks, (place, again)]), expected)
    assert torch.equal(inside[1], other)


@needs_hooked
def test_a_pass_inside_that_fails_and_is_caught_leaves_the_outer_pass_as_it_is() -> None:
    decomposition, hooks = half_on("transformer")
    model, tried = decomposition.model, []
    expected = model.run_with_hooks(rows(0), fwd_hooks=hooks)

    def fail(value: Tensor, hook: Any) -> None:
        if len(tried) == 1:
            raise ValueError("inside")

    def again(value: Tensor, hook: Any) -> None:
        if not tried:
            tried.append(None)
            with pytest.raises(ValueError, match="inside"):
                model(rows(1))
            tried.append(None)

    # The inner pass ends between reading and using the input of block 1's W_in.
    late = [("blocks.1.mlp.hook_pre", fail), ("blocks.1.attn.hook_q", again)]
    assert torch.equal(model.run_with_hooks(rows(0), fwd_hooks=[*hooks, *late]), expected)


def test_a_model_that_runs_again_inside_a_clean_pass_is_refused() -> None:
    decomposition, _ = half_on("transformer")
    model, inside = decomposition.model, []

    def again(value: Tensor, hook: Any) -> None:
        if not inside:
            inside.append(model(rows(1)))

    place = next(name for name in model.hook_dict if name.startswith("blocks.1."))
    with model.hooks(fwd_hooks=[(place, again)]), pytest.raises(RuntimeError, match="reached twice in one clean pass"):
        decomposition.clean_pass(rows(0))


# -- the way back -----------------------------------------------------------------------------------------------------


@on_both
def test_a_copied_model_knows_its_decomposition(host: str) -> None:
    decomposition, hooks = half_on(host)
    assert Decomposition.of(decomposition.model) is decomposition
    twin = copy.deepcopy(decomposition.model)
    assert Decomposition.of(twin).model is twin
    Decomposition.of(twin).remove()
    with pytest.raises(ValueError, match="has no decomposition; expected one"):
        Decomposition.of(twin)
    decomposition.model.run_with_hooks(rows(0), fwd_hooks=hooks)


def test_two_decompositions_of_one_model_are_named() -> None:
    model = tiny_transformer()
    decompose(model, {"blocks.0.mlp.W_in": 3})
    decompose(model, {"blocks.1.mlp.W_in": 3})
    with pytest.raises(ValueError, match=r"2 decompositions, of blocks.0.mlp.W_in, blocks.1.mlp.W_in; expected one"):
        Decomposition.of(model)


# -- where a pass may start -------------------------------------------------------------------------------------------


class _ReadsEmbeddings(nn.Module):
    """A block's attention that also reads what the embedding returned, as Zamba2's shared blocks do."""

    def __init__(self, attn: nn.Module, embed: nn.Module) -> None:
        super().__init__()
        self.attn, self.seen = attn, []
        embed.register_forward_hook(lambda module, args, out: self.seen.append(out))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.attn(*args, **kwargs) + (self.seen.pop() if self.seen else 0.0)


@needs_hooked
def test_a_block_that_reads_more_than_the_residual_stream_is_never_entered() -> None:
    model: Any = tiny_transformer(n_layers=3)
    model.blocks[1].attn = _ReadsEmbeddings(model.blocks[1].attn, model.embed)
    decomposition = decompose(model, {"blocks.*.mlp.W_in": 4})
    clean = decomposition.clean_pass(rows(0))
    for layer, starts in ((1, False), (2, True)):
        masks = {f"blocks.{layer}.mlp.W_in": SiteMask(torch.zeros(4))}
        whole = decomposition.masked_forward(rows(0), masks)
        assert torch.equal(decomposition.masked_forward(rows(0), masks, residuals=clean.residuals), whole)
        assert decomposition.starts.is_exact(layer, clean.residuals[layer], rows(0)) is starts


@on_both
def test_a_pass_under_autocast_does_not_go_on_from_a_stream_that_was_recorded_without(host: str) -> None:
    decomposition = decompose(HOSTS[host](), {"blocks.1.mlp.W_out": 4})
    masks = {"blocks.1.mlp.W_out": SiteMask(torch.full((4,), 0.5))}
    clean = decomposition.clean_pass(rows(0))
    with torch.no_grad():
        decomposition.masked_forward(rows(0), masks, residuals=clean.residuals)
        with torch.autocast("cpu", torch.bfloat16):
            whole = decomposition.masked_forward(rows(0), masks)
            assert torch.equal(decomposition.masked_forward(rows(0), masks, residuals=clean.residuals), whole)


@on_both
def test_where_a_pass_may_start_does_not_depend_on_the_shape(host: str) -> None:
    decomposition = decompose(HOSTS[host](), {"blocks.1.mlp.W_*": 4})
    masks = {site: SiteMask(torch.full((4,), 0.5)) for site in decomposition}
    with torch.no_grad():
        # Tried on a single token; then used for all of these.
        for n, length in ((1, 1), (3, 12), (1, 5), (17, 2)):
            batch = tokens(n, length=length) % 30
            residuals = decomposition.clean_pass(batch).residuals
            assert list(residuals) == [1]
            passed = decomposition.masked_forward(batch, masks, residuals=residuals)
            assert torch.equal(passed, decomposition.masked_forward(batch, masks))
    assert decomposition.starts.is_exact(1, residuals[1], batch)


@needs_hooked
def test_residuals_are_not_cached_where_padding_on_the_left_hides_positions() -> None:
    from transformers import PreTrainedTokenizerFast

    from tests.small_models import tiny_tokenizer

    model: Any = tiny_transformer()
    model.tokenizer = tiny_tokenizer(PreTrainedTokenizerFast)
    model.tokenizer.padding_side = "left"
    decomposition = decompose(model, {"blocks.1.mlp.W_in": 4})
    with pytest.raises(ValueError, match="cannot start at block 1: its blocks read more than the residual stream"):
        cache_residuals(decomposition, TokenBatches(tokens(4), 2))


# -- padded rows ------------------------------------------------------------------------------------------------------


@on_both
def test_tokens_behind_padding_are_what_they_are_alone(host: str) -> None:
    decomposition, _ = half_on(host)
    short = rows(0)
    padded = torch.cat([rows(1)[:, :3], short], dim=1)
    mask = torch.tensor([[0] * 3 + [1] * short.shape[1]])
    masks = {site: SiteMask(torch.full((4,), 0.5)) for site in decomposition}
    clean = decomposition.clean_pass(padded, attention_mask=mask)
    assert clean.residuals == {}
    assert torch.allclose(clean.output[:, 3:], decomposition.clean_pass(short).output, atol=1e-4)
    alone = decomposition.masked_forward(short, masks)
    assert torch.allclose(decomposition.masked_forward(padded, masks, attention_mask=mask)[:, 3:], alone, atol=1e-4)
    assert not torch.allclose(decomposition.masked_forward(padded, masks)[:, 3:], alone, atol=1e-2)


def test_an_attention_mask_that_cannot_reach_the_model_is_refused() -> None:
    decomposition, _ = half_on("transformer")
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 3\) and tokens \(1, 6\)"):
        decomposition.clean_pass(rows(0), attention_mask=torch.ones(1, 3))
    decomposition.remove()
    decomposition = decompose(decomposition.model, {"blocks.1.mlp.W_*": 4})
    clean = decomposition.clean_pass(rows(0))
    with pytest.raises(ValueError, match="has lost what the mask does before it"):
        decomposition.clean_pass(clean.residuals[1], start_at=1, attention_mask=torch.ones(1, 6))
