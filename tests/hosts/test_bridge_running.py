"""A decomposed TransformerBridge in use: partial passes, caches, TransformerLens's own tools, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pandas as pd
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from spd_lens import decompose, decompose_layer
from spd_lens.core import ReadPoint
from spd_lens.hosts import BridgeHost, open_host
from tests.bridge_models import (
    CONFIGS,
    GROUPED,
    HEADS,
    LAYERS,
    MODES,
    SIZES,
    TOLERANCE,
    VOCAB,
    WIDTH,
    N,
    Written,
    assert_close,
    assert_differs,
    boot,
    bridge_weight,
    every_family,
    mask_hooks,
    pristine,
    random_masks,
    random_tokens,
    run,
    swapped,
    tokenizer,
)  # fmt: skip

# -- running part of the model -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "mode"), [(family, mode) for family in CONFIGS for mode in MODES[:2]])
def test_starting_at_a_block_gives_the_whole_pass_and_runs_no_other_block(family: str, mode: str) -> None:
    n_layers = 3
    host = BridgeHost(boot(family, mode, copy.deepcopy(pristine(family, n_layers))))
    ran: list[int] = []
    for index, block in enumerate(host.model.blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
        # The model of Hugging Face and the bridge loop over one list: see `_entering`.
        assert any(module is host.model.blocks for module in host.model.original_model.modules())
    with torch.no_grad():
        for tokens in (random_tokens(), random_tokens(3, 4), random_tokens(1, 1)):
            expected = host.forward(tokens)
            for layer in range(n_layers):
                ran.clear()
                residual = host.residual_before(layer, tokens)
                assert ran == list(range(layer))
                ran.clear()
                assert torch.equal(host.forward_from(layer, residual), expected)
                assert ran == list(range(layer, n_layers))
    assert torch.equal(run(host.model, random_tokens(1, 1)), expected), "the model keeps nothing of a partial pass"


@every_family
def test_gradients_and_hooks_of_a_started_pass_are_those_of_the_whole(family: str) -> None:
    host, tokens, seen = BridgeHost(boot(family)), random_tokens(), []
    residual = host.residual_before(1, tokens).detach().requires_grad_()
    whole = residual.detach().clone().requires_grad_()
    with host.model.hooks(fwd_hooks=[("blocks.1.hook_in", lambda value, hook: whole)]):
        (expected,) = torch.autograd.grad(host.forward(tokens).square().sum(), whole)

    def double(value: Tensor, hook: Any) -> Tensor:
        seen.append(hook.name)
        return 2 * value

    (got,) = torch.autograd.grad(host.forward_from(1, residual).square().sum(), residual)
    assert_close(got, expected, 1e-6, family)
    with host.model.hooks(fwd_hooks=[("blocks.1.hook_in", double)]):
        assert torch.equal(host.residual_before(1, tokens), residual)
        doubled = host.forward_from(1, residual)
        assert seen == ["blocks.1.hook_in"]
        assert torch.equal(doubled, host.forward(tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_starting_at_a_block_keeps_the_dtype(dtype: torch.dtype) -> None:
    model = boot("gemma2", hf_model=copy.deepcopy(pristine("gemma2")).to(dtype), dtype=dtype)
    host, tokens = BridgeHost(model), random_tokens()
    with torch.no_grad():
        residual = host.residual_before(1, tokens)
        assert residual.dtype == dtype
        assert torch.equal(host.forward_from(1, residual), host.forward(tokens))


def test_a_failed_partial_pass_leaves_the_model_whole() -> None:
    host, tokens = BridgeHost(boot("gpt2")), random_tokens()
    with torch.no_grad():
        expected, residual = host.forward(tokens), host.residual_before(1, tokens)
        blocks = list(host.model.blocks)
        with pytest.raises(RuntimeError, match="must match"):
            host.forward_from(1, residual[..., :-1])
        assert all(now is before for now, before in zip(host.model.blocks, blocks, strict=True))
        assert torch.equal(host.forward(tokens), expected)
    with pytest.raises(ValueError, match=r"layer=2; this model has blocks 0\.\.1"):
        host.forward_from(LAYERS, residual)
    with pytest.raises(ValueError, match="layer=-1"):
        host.residual_before(-1, tokens)


@every_family
def test_a_clean_pass_from_a_block_records_what_the_whole_pass_records(family: str) -> None:
    everywhere, tokens = swapped(family, "compatibility"), random_tokens()
    later = [site for site in everywhere if site.startswith("blocks.1") or site == "unembed.W_U"]
    decomposition = swapped(family, "compatibility", sites=later)
    whole = decomposition.clean_pass(tokens)
    with torch.no_grad():
        residual = decomposition.host.residual_before(1, tokens)
    part = decomposition.clean_pass(residual, start_at=1)
    assert torch.equal(part.output, whole.output)
    assert set(part.inputs) == set(whole.inputs) == set(later)
    assert all(torch.equal(x, whole.inputs[site]) for site, x in part.inputs.items())
    with pytest.raises(ValueError, match="a pass from block 1 on does not reach every decomposed site"):
        everywhere.clean_pass(residual, start_at=1)


# -- key-value caches, padding ---------------------------------------------------------------------------------------


@every_family
def test_generation_with_masks_is_the_same_with_and_without_a_cache(family: str) -> None:
    decomposition, tokens = swapped(family), random_tokens(2, 4)
    hooks = mask_hooks(decomposition, random_masks(decomposition))

    def generate(cached: bool) -> Tensor:
        return decomposition.model.generate(
            tokens, max_new_tokens=6, do_sample=False, use_past_kv_cache=cached, stop_at_eos=False, verbose=False
        )

    with decomposition.model.hooks(fwd_hooks=hooks):
        masked = generate(True)
        assert torch.equal(masked, generate(False))
    assert not torch.equal(masked, generate(True))


@pytest.mark.parametrize("family", ["gpt2", "pythia", "gemma2"])
def test_gates_that_look_across_positions_know_when_a_cache_hides_some(family: str) -> None:
    decomposition, tokens = swapped(family, gate="attention", gate_width=4), random_tokens(2, 6)
    importances: list[Tensor] = []
    hooks = [(f"blocks.{layer}.hook_W_in_importance", lambda g, hook: importances.append(g)) for layer in range(LAYERS)]
    run(decomposition.model, tokens, hooks)
    expected = decomposition.importance(tokens)
    for layer, got in enumerate(importances):
        assert torch.equal(got, expected[f"blocks.{layer}.mlp.W_in"])
    assert len(importances) == LAYERS
    generate = {"max_new_tokens": 2, "do_sample": False, "stop_at_eos": False, "verbose": False}
    for layer in range(LAYERS):
        with decomposition.model.hooks(fwd_hooks=[hooks[layer]]):
            decomposition.model.generate(tokens, use_past_kv_cache=False, **generate)
            with pytest.raises(ValueError, match=r"W_in looks across positions, but this pass runs with a key-value"):
                decomposition.model.generate(tokens, use_past_kv_cache=True, **generate)


def test_masks_are_exact_under_left_padding() -> None:
    decomposition, written, tokens = swapped("gpt2"), Written("gpt2", "raw"), random_tokens()
    masks = random_masks(decomposition)
    padding = torch.ones_like(tokens)
    padding[0, :3] = 0
    with torch.no_grad(), written.masked(masks) as model:
        expected = model(tokens, attention_mask=padding)[padding.bool()]
        with decomposition.model.hooks(fwd_hooks=mask_hooks(decomposition, masks)):
            got = decomposition.model(tokens, attention_mask=padding)[padding.bool()]
    assert_close(got, expected, TOLERANCE)


# -- TransformerLens's own tools ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_activation_patching_over_a_component_column(mode: str) -> None:
    from transformer_lens.patching import generic_activation_patch
    from transformer_lens.utilities import get_act_name

    model = decompose_layer(boot("llama", mode), layer=0, n_subcomponents=N).model
    clean, corrupted = random_tokens(1, 5, seed=1), random_tokens(1, 5, seed=2)
    _, cache = model.run_with_cache(clean)
    name = get_act_name("W_in_acts", 0)
    assert name == "blocks.0.hook_W_in_acts"

    def copy_component(activation: Tensor, index: list[int], clean_activation: Tensor) -> Tensor:
        _, pos, component = index
        activation[:, pos, component] = clean_activation[:, pos, component]
        return activation

    cells = pd.DataFrame([(0, pos, c) for pos in (1, 4) for c in range(N)], columns=["layer", "pos", "component"])
    got = generic_activation_patch(
        model,
        corrupted,
        cache,
        lambda logits: logits[0, -1].square().mean(),
        copy_component,
        "W_in_acts",
        index_df=cells,
    )
    for row, (_, pos, component) in zip(got, cells.itertuples(index=False), strict=True):

        def by_hand(activation: Tensor, hook: Any, *, pos: int = pos, component: int = component) -> Tensor:
            activation[:, pos, component] = cache[name][:, pos, component]
            return activation

        assert_close(row, run(model, corrupted, [(name, by_hand)])[0, -1].square().mean(), 1e-6)
    assert len(set(got.tolist())) > N


@pytest.mark.parametrize("training", [True, False])
def test_new_modules_take_the_training_flag(training: bool) -> None:
    model = boot("gpt2").train(training)
    decompose(model, dict.fromkeys(open_host(model).site_names(), N))
    assert {module.training for module in model.modules()} == {training}


@pytest.mark.parametrize("gated", [False, True])
def test_models_of_transformer_lens_itself_are_exact(gated: bool) -> None:
    from transformer_lens.config import TransformerBridgeConfig

    more = {"normalization_type": "RMS", "gated_mlp": True, "positional_embedding_type": "rotary", "act_fn": "silu"}
    config = TransformerBridgeConfig(
        d_model=WIDTH, d_head=4, n_heads=HEADS, n_layers=LAYERS, n_ctx=32, d_vocab=VOCAB, d_mlp=24, seed=0,
        **(more if gated else {"act_fn": "gelu"}),
    )  # fmt: skip
    written, model = (TransformerBridge.boot_native(config).eval() for _ in range(2))
    decomposition, tokens = decompose(model, dict.fromkeys(open_host(model).site_names(), N)), random_tokens()
    masks = random_masks(decomposition)
    host = decomposition.host
    with torch.no_grad():
        assert torch.equal(model(tokens), written(tokens))
        for layer in range(LAYERS):
            assert torch.equal(host.forward_from(layer, host.residual_before(layer, tokens)), written(tokens))
        for site, these in masks.items():
            view = bridge_weight(written, site)
            view.copy_(these.applied_to(view.clone()))
        expected = written(tokens)
    assert_close(run(model, tokens, mask_hooks(decomposition, masks)), expected, TOLERANCE)


# -- provenance and refusals -------------------------------------------------------------------------------------------


def test_provenance_names_the_state_of_the_weights() -> None:
    model = boot("gpt2")
    host = open_host(model)
    assert isinstance(host, BridgeHost)
    assert (host.provenance().model_name, host.provenance().host) == ("gpt2", "TransformerBridge")
    assert host.provenance().details["n_layers"] == LAYERS
    states = [host.provenance().weight_processing]
    states += [BridgeHost(boot("gpt2", mode)).provenance().weight_processing for mode in MODES[1:]]
    model.enable_compatibility_mode(disable_warnings=True, fold_ln=False)
    states.append(host.provenance().weight_processing)
    assert states == [
        "raw", "compatibility mode (fold_ln)", "compatibility mode (no processing)", "compatibility mode (no fold_ln)",
    ]  # fmt: skip


def test_what_would_break_a_decomposition_is_refused_until_it_is_removed() -> None:
    decomposition = swapped("llama", sites=["blocks.0.attn.W_Q", "blocks.0.attn.W_O"])
    model = decomposition.model
    with pytest.raises(
        ValueError, match=r"enable_compatibility_mode\(\) cannot be called on a decomposed model: it rew"
    ):
        model.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(
        ValueError, match=r"Call decomposition.remove\(\), then process_weights\(\), then decompose again"
    ):
        model.process_weights(fold_ln=False)
    with pytest.raises(ValueError, match=r"attn.o.hook_out is never called.*decompose again without W_O"):
        model.set_use_attn_result(True)
    with pytest.raises(ValueError, match=r"input of a single head.*without W_Q, W_K, W_V"):
        model.cfg.use_split_qkv_input = True
    with pytest.raises(ValueError, match="set_use_attn_in"):
        model.set_use_attn_in(use_attn_in=True)
    model.set_use_split_qkv_input(False)
    decomposition.remove()
    model.set_use_attn_result(True)
    model.set_use_split_qkv_input(True)
    for site, flag in (("W_O", "use_attn_result"), ("W_V", "use_split_qkv_input")):
        with pytest.raises(
            ValueError, match=rf"blocks.1.attn.{site} cannot be decomposed while {flag} is on.*{flag}\(F"
        ):
            decompose(model, {f"blocks.1.attn.{site}": N})
    mlp = decompose_layer(model, layer=0, n_subcomponents=N)
    model.set_use_attn_result(False)
    model.set_use_attn_result(True)
    assert list(mlp) == ["blocks.0.mlp.W_gate", "blocks.0.mlp.W_in", "blocks.0.mlp.W_out"]
    mlp.remove()
    model.enable_compatibility_mode(disable_warnings=True)


def test_two_decompositions_of_one_model_are_removed_one_by_one() -> None:
    model, tokens = boot("gpt2"), random_tokens()
    expected = run(model, tokens)
    first = decompose(model, {"blocks.0.mlp.*": N})
    second = decompose(model, {"blocks.1.*": N, "embed.W_E": N})
    first.remove()
    with pytest.raises(ValueError, match="decomposed model"):
        model.enable_compatibility_mode()
    masks = random_masks(second)
    assert_differs(run(model, tokens, mask_hooks(second, masks)), expected, 0.01)
    second.remove()
    assert torch.equal(run(model, tokens), expected)
    model.enable_compatibility_mode(disable_warnings=True)


@pytest.mark.parametrize(
    ("name", "config", "site", "reason"),
    [
        (
            "mistralai/Mixtral-8x7B-v0.1",
            transformers.MixtralConfig(**SIZES, **GROUPED, num_local_experts=2, num_experts_per_tok=1),
            "blocks.0.mlp.W_in",
            "is a MoEBridge, in which TransformerLens shows no single matrix",
        ),
        (
            "facebook/opt-125m",
            transformers.OPTConfig(
                vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=HEADS, ffn_dim=24,
                max_position_embeddings=32, word_embed_proj_dim=WIDTH,
            ),
            "pos_embed.W_pos",
            "OPTLearnedPositionalEmbedding does more than look up rows",
        ),
    ],
    ids=["experts", "positions"],
)  # fmt: skip
def test_weights_that_no_hook_point_shows_are_refused_by_name(name: str, config: Any, site: str, reason: str) -> None:
    hf_model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model = TransformerBridge.boot_transformers(name, hf_model=hf_model, tokenizer=tokenizer(), device="cpu")
    names = set(model.hook_dict)
    with pytest.raises(ValueError, match=rf"{site} cannot be decomposed.*{reason}.*leave it out"):
        decompose(model, {site: N})
    assert set(model.hook_dict) == names
    decompose(model, {"*.attn.W_*": N, "embed.W_E": N}).remove()
    assert set(model.hook_dict) == names


class _Quantised(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.round())


def test_special_linear_modules_are_refused_by_name() -> None:
    model = boot("llama")
    model.blocks[1].attn.o.original_component.__class__ = _Quantised
    with pytest.raises(ValueError, match=r"blocks.1.attn.W_O cannot be decomposed: it is stored in a _Quantised"):
        decompose(model, {"blocks.1.attn.W_O": N})
    assert not any(isinstance(module, ReadPoint) for module in model.modules())


def test_models_with_two_stacks_of_blocks_are_refused() -> None:
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=WIDTH, d_kv=4, d_ff=24, num_layers=1, num_heads=HEADS, decoder_start_token_id=0
    )
    hf_model = transformers.T5ForConditionalGeneration(config).eval()
    model = TransformerBridge.boot_transformers("t5-small", hf_model=hf_model, tokenizer=tokenizer(), device="cpu")
    with pytest.raises(ValueError, match=r"T5ForConditionalGeneration\) has no single stack of blocks"):
        decompose_layer(model, layer=0)
    with pytest.raises(ValueError, match="encoder-decoder and other models with several stacks"):
        decompose(model, {"*": N})
