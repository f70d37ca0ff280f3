"""Swapping in and out leaves no trace; copies are independent; the model stays an ordinary TransformerLens model."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spd_lens import Decomposition, decompose, decompose_layer
from tests import oracle
from tests.conftest import needs_hooked
from tests.oracle import CASES, Masks, assert_close, assert_differs

pytestmark = needs_hooked

N = 5
LIFE = ["ln", "no_norm", "solu_ln", "llama_gqa", "shortformer", "attn_only", "attn_result", "split_qkv"]
life_cases = pytest.mark.parametrize("name", LIFE)


def all_decomposed(model: Any, **kwargs: Any) -> Decomposition:
    """Every site of `model` itself, decomposed."""
    return decompose(model, dict.fromkeys(oracle.all_sites(model), N), **kwargs)


def anatomy(model: Any) -> dict[str, Any]:
    """Everything about a model that removing a decomposition has to bring back, apart from its outputs."""
    return {
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "identities": [id(module) for module in model.modules()],
        "state": list(model.state_dict()),
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "training": [module.training for module in model.modules()],
        "hooks": [(name, id(point)) for name, point in model.hook_dict.items()],
        "mod_dict": [(name, id(module)) for name, module in model.mod_dict.items()],
        "vars": [(name, list(vars(module))) for name, module in model.named_modules()],
        "children": [(name, list(module._modules)) for name, module in model.named_modules()],
        "pytorch_hooks": [
            (name, *map(len, (module._forward_hooks, module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs)))
            for name, module in model.named_modules()
        ],
        "point_names": [(name, point.name) for name, point in model.hook_dict.items()],
    }  # fmt: skip


def assert_same_anatomy(model: Any, before: dict[str, Any]) -> None:
    after = anatomy(model)
    for what in before:
        assert after[what] == before[what], what


def logits_of(model: Any, tokens: Tensor, hooks: Any = (), **kwargs: Any) -> Tensor:
    with torch.no_grad(), model.hooks(fwd_hooks=list(hooks)):
        return model(tokens, **kwargs)


def half_masks(decomposition: Decomposition) -> list[tuple[str, Any]]:
    """Hooks that mask every site differently: enough to change every output."""
    masks = {
        site: torch.linspace(0.1 + 0.01 * i, 1.2, w.n_subcomponents, dtype=w.V.dtype)
        for i, (site, w) in enumerate(decomposition.items())
    }
    return decomposition.mask(masks, 0.5)


# -- out again -------------------------------------------------------------------------------------------------


@life_cases
@pytest.mark.parametrize("gate", ["scalar", "shared", "attention", "global"])
def test_remove_brings_back_modules_names_state_and_outputs(name: str, gate: Any) -> None:
    model = CASES[name].build()
    tokens = oracle.tokens_for(model)
    before, expected = anatomy(model), logits_of(model, tokens)
    decomposition = all_decomposed(model, gate=gate, gate_width=4)
    logits_of(model, tokens, half_masks(decomposition))
    if not (gate == "global" and name == "split_qkv"):  # see the test of that refusal
        decomposition.importance(tokens)
    decomposition.remove()
    assert_same_anatomy(model, before)
    assert torch.equal(logits_of(model, tokens), expected)


def test_the_anatomy_check_sees_a_swap() -> None:
    model = CASES["ln"].build()
    before = anatomy(model)
    decompose_layer(model, 0, N)
    after = anatomy(model)
    unchanged = {what for what in before if before[what] == after[what]}
    assert not unchanged & {"modules", "state", "hooks", "mod_dict", "vars", "children", "pytorch_hooks"}


@pytest.mark.parametrize("first_out", [0, 1])
def test_two_decompositions_of_one_model_come_out_in_any_order(first_out: int) -> None:
    model = CASES["ln"].build()
    tokens = oracle.tokens_for(model)
    before, pristine = anatomy(model), copy.deepcopy(model)
    both = [
        decompose(model, {"blocks.0.attn.W_Q": N, "blocks.0.mlp.W_out": N}, gate="attention", gate_width=4),
        decompose(model, {"blocks.0.attn.W_[KVO]": N, "blocks.0.mlp.W_in": N}, gate="attention", gate_width=4),
    ]
    both[first_out].remove()
    stays = both[1 - first_out]
    masks = {
        site: Masks(w.V.detach(), w.U.detach(), torch.linspace(0, 1, N), torch.tensor(0.5)) for site, w in stays.items()
    }
    hooks = stays.mask({site: m.mask for site, m in masks.items()}, 0.5)
    expected = oracle.run_written(pristine, masks, tokens)
    assert_close(logits_of(model, tokens, hooks), expected, 1e-4)
    stays.remove()
    assert_same_anatomy(model, before)


@pytest.mark.parametrize("use", ["remove", "importance", "clean_pass", "masked_forward", "masked_hidden", "summary"])
def test_a_removed_decomposition_says_so_and_leaves_the_model_alone(use: str) -> None:
    model = CASES["ln"].build()
    tokens, before = oracle.tokens_for(model), anatomy(model)
    decomposition = decompose_layer(model, 0, N)
    decomposition.remove()
    arguments = {
        "remove": (),
        "summary": (),
        "masked_forward": (tokens, {}),
        "masked_hidden": (tokens, {}, ["blocks.0.mlp.hook_pre"]),
    }.get(use, (tokens,))
    with pytest.raises(ValueError, match="was removed from its model"):
        getattr(decomposition, use)(*arguments)
    assert repr(decomposition) == "Decomposition(HookedTransformer, removed)"
    assert_same_anatomy(model, before)
    decompose_layer(model, 0, N).remove()


def test_a_global_gate_refuses_inputs_split_by_head_with_the_reason() -> None:
    decomposition = all_decomposed(CASES["split_qkv"].build(), gate="global", gate_width=4)
    with pytest.raises(ValueError, match="use_split_qkv_input"):
        decomposition.importance(oracle.tokens_for(decomposition.model))


@pytest.mark.parametrize("point", ["blocks.0.mlp.hook_pre", "blocks.0.mlp.hook_post", "blocks.0.hook_mlp_out"])
@pytest.mark.parametrize("permanent", [False, True])
@pytest.mark.parametrize("added", ["before_the_swap", "after_the_swap"])
def test_hooks_on_old_names_survive_the_swap_and_its_removal(point: str, permanent: bool, added: str) -> None:
    model = CASES["ln"].build()
    tokens = oracle.tokens_for(model)
    calls: list[str] = []

    def scale(value: Tensor, hook: Any) -> Tensor:
        calls.append(hook.name)
        return value * 0.5

    expected = model.run_with_hooks(tokens, fwd_hooks=[(point, scale)]).detach()
    calls.clear()
    if added == "before_the_swap":
        model.add_hook(point, scale, is_permanent=permanent)
    decomposition = decompose_layer(model, 0, N)
    if added == "after_the_swap":
        model.add_hook(point, scale, is_permanent=permanent)
    with torch.no_grad():
        assert torch.equal(model(tokens), expected)
        decomposition.remove()
        assert torch.equal(model(tokens), expected)
    assert calls == [point, point]
    model.reset_hooks(including_permanent=True)
    assert not torch.equal(logits_of(model, tokens), expected)


def test_plain_pytorch_hooks_survive_the_swap_and_its_removal() -> None:
    model = CASES["ln"].build()
    tokens, calls = oracle.tokens_for(model), []
    for path in ("blocks.0.mlp", "blocks.0.mlp.hook_post", "blocks.0.mlp.hook_pre", "blocks.0"):
        model.get_submodule(path).register_forward_pre_hook(lambda module, args, path=path: calls.append(path))
    logits_of(model, tokens)
    expected = list(calls)
    for _ in range(2):
        copied = copy.deepcopy(all_decomposed(model, gate="attention", gate_width=4))
        for decomposed in (model, copied.model):
            calls.clear()
            logits_of(decomposed, tokens)
            assert calls == expected
        copied.remove()
        calls.clear()
        logits_of(copied.model, tokens)
        assert calls == expected
        model = copied.model


def test_removing_inside_a_hook_context_gives_the_target_and_leaves_the_context_usable() -> None:
    model = CASES["ln"].build()
    tokens = oracle.tokens_for(model)
    expected, before = logits_of(model, tokens), anatomy(model)
    decomposition = decompose_layer(model, 0, N)
    with torch.no_grad(), model.hooks(fwd_hooks=half_masks(decomposition)):
        assert not torch.equal(model(tokens), expected)
        decomposition.remove()
        assert torch.equal(model(tokens), expected)
    assert_same_anatomy(model, before)


# -- failures leave the model alone ----------------------------------------------------------------------------


@pytest.mark.parametrize("call", [1, 2, 4, 5, 9, 30, 51, 52])
def test_a_failure_half_way_through_a_swap_leaves_the_model_unchanged(
    call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spd_lens.hosts import Host

    model = CASES["ln"].build()
    tokens = oracle.tokens_for(model)
    before, expected = anatomy(model), logits_of(model, tokens)
    original, count = Host.add_point, iter(range(1, 1000))

    def failing(self: Host, *args: Any) -> None:
        if next(count) == call:
            raise KeyboardInterrupt("half-way")
        original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Host, "add_point", failing)
        with pytest.raises(KeyboardInterrupt, match="half-way"):
            all_decomposed(model, gate="attention", gate_width=4)
    assert_same_anatomy(model, before)
    assert torch.equal(logits_of(model, tokens), expected)
    all_decomposed(model).remove()
    assert_same_anatomy(model, before)


def test_decomposing_twice_is_refused_and_changes_nothing() -> None:
    model = CASES["ln"].build()
    decomposition = decompose_layer(model, 0, N)
    before = anatomy(model)
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.W_in is decomposed already; remove\(\)"):
        decompose(model, {"blocks.1.mlp.W_in": N, "blocks.0.mlp.W_in": N})
    assert_same_anatomy(model, before)
    decomposition.remove()


def nan_in_the_weight(model: Any) -> None:
    model.blocks[0].mlp.W_in.data[3, 4] = torch.nan


def infinity_in_the_weight(model: Any) -> None:
    model.blocks[0].mlp.W_in.data[3, 4] = -torch.inf


def nothing(model: Any) -> None:
    pass


@pytest.mark.parametrize(
    ("spoil", "arguments", "error", "text"),
    [
        (nothing, {"blocks.0.mlp.W_inn": 3}, ValueError, r"no site matches 'blocks.0.mlp.W_inn'.*'blocks.0.mlp.W_in'"),
        (nothing, {"blocks.0.mlp.W_in": 3, "blocks.*.W_Z": 3}, ValueError, r"no site matches 'blocks.\*.W_Z'; near"),
        (nothing, {"blocks.7.mlp.W_in": 3}, ValueError, r"no site matches.*near names: 'blocks.\d.mlp.W_in'"),
        (nothing, {}, ValueError, "no pattern given"),
        (nothing, {"blocks.0.mlp.W_in": 0}, ValueError, r"n_subcomponents=0 for blocks.0.mlp.W_in; expected at"),
        (nothing, {"blocks.0.mlp.W_in": -2}, ValueError, r"n_subcomponents=-2.*expected at least 1"),
        (nan_in_the_weight, {"blocks.0.mlp.W_in": 3}, ValueError, r"blocks.0.mlp.W_in contains NaN or infinite"),
        (infinity_in_the_weight, {"*.W_in": 3}, ValueError, r"blocks.0.mlp.W_in contains NaN or infinite"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named_before_anything_changes(
    spoil: Callable[[Any], None], arguments: dict[str, Any], error: type[Exception], text: str
) -> None:
    model = CASES["ln"].build()
    spoil(model)
    before = anatomy(model)
    with pytest.raises(error, match=text):
        decompose(model, arguments)
    assert_same_anatomy(model, before)


@pytest.mark.parametrize("layer", [-1, 2, 7])
def test_a_layer_out_of_range_is_named(layer: int) -> None:
    with pytest.raises(ValueError, match=rf"layer={layer}; this model has blocks 0..1"):
        decompose_layer(CASES["ln"].build(), layer, N)


def test_settings_that_no_gate_or_initialisation_knows_are_refused_before_anything_changes() -> None:
    model = CASES["ln"].build()
    before = anatomy(model)
    for gate in ("scalar", "attention", "global"):
        with pytest.raises(ValueError, match="gate_width=0"):
            decompose_layer(model, 0, N, gate=gate, gate_width=0)
    assert_same_anatomy(model, before)


@pytest.mark.parametrize("site", ["W_Inn", "mlp.W_inn", "mlp.W_in "])
def test_an_unknown_site_of_a_block_lists_near_names(site: str) -> None:
    with pytest.raises(ValueError, match=r"near names: .*'blocks\.0\.mlp\.W_in'"):
        decompose_layer(CASES["ln"].build(), 0, N, sites=[site])


def test_an_unknown_decomposed_site_lists_near_names() -> None:
    decomposition = decompose_layer(CASES["ln"].build(), 0, N)
    for call in (decomposition.ablate, decomposition.keep):
        with pytest.raises(ValueError, match=r"no decomposed site 'blocks.1.mlp.W_in'; near: 'blocks.0.mlp.W_in'"):
            call({"blocks.1.mlp.W_in": [0]})
    with pytest.raises(ValueError, match="no decomposed site"):
        decomposition.mask({"blocks.1.mlp.W_in": torch.ones(N)})
    with pytest.raises(KeyError, match="no decomposed site"):  # as every mapping
        decomposition["blocks.1.mlp.W_in"]


def test_models_that_are_not_transformer_lens_are_refused() -> None:
    with pytest.raises(TypeError, match="given a Linear; expected a TransformerLens model"):
        decompose(nn.Linear(2, 2), {"weight": 1})


# -- what is left behind while it is in ------------------------------------------------------------------------


def kept_inputs(decomposition: Decomposition) -> list[Any]:
    state = next(iter(decomposition.values())).swapped.state
    waiting = [site for call in state.calls for site, inputs in call.inputs.items() if inputs]
    return [*state.calls, *waiting, *state.outside]


@life_cases
def test_no_input_is_kept_after_a_pass(name: str) -> None:
    decomposition = all_decomposed(CASES[name].build())
    tokens = oracle.tokens_for(decomposition.model)
    decomposition.model(tokens)
    assert kept_inputs(decomposition) == []
    decomposition.model.run_with_hooks(tokens, fwd_hooks=half_masks(decomposition))
    assert kept_inputs(decomposition) == []
    decomposition.importance(tokens)
    assert kept_inputs(decomposition) == []


class Stop(Exception):
    """Raised by a user's hook to end a pass early."""


def stop_here(value: Tensor, hook: Any) -> None:
    raise Stop


@pytest.mark.parametrize("place", ["blocks.0.attn.hook_q", "blocks.0.attn.hook_pattern", "blocks.1.mlp.hook_post"])
def test_a_pass_that_a_hook_ends_early_leaves_the_model_copyable_and_exact(place: str) -> None:
    model = CASES["ln"].build()
    tokens = oracle.tokens_for(model)
    expected = logits_of(model, tokens)
    decomposition = all_decomposed(model)
    masked = logits_of(model, tokens, half_masks(decomposition))
    with pytest.raises(Stop):
        model.run_with_hooks(tokens, fwd_hooks=[*half_masks(decomposition), (place, stop_here)])
    assert torch.equal(logits_of(model, tokens, half_masks(decomposition)), masked)
    with pytest.raises(Stop):
        model.run_with_hooks(tokens, fwd_hooks=[*half_masks(decomposition), (place, stop_here)])
    twin = copy.deepcopy(model)  # a kept input with a graph would raise here
    assert torch.equal(logits_of(twin, tokens), expected)


def test_a_clean_pass_that_fails_ends_the_recording() -> None:
    model = CASES["ln"].build()
    tokens = oracle.tokens_for(model)
    decomposition = all_decomposed(model)
    masked = logits_of(model, tokens, half_masks(decomposition))
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_mid", stop_here)]), pytest.raises(Stop):
        decomposition.clean_pass(tokens)
    assert torch.equal(logits_of(model, tokens, half_masks(decomposition)), masked)


def test_a_masked_pass_inside_another_gives_the_outer_masks_back() -> None:
    from spd_lens.core import SiteMask, given_masks

    decomposition = all_decomposed(CASES["ln"].build())
    tokens, site = oracle.tokens_for(decomposition.model), "blocks.0.mlp.W_in"
    with torch.no_grad(), given_masks(dict(decomposition), {site: SiteMask(mask=torch.zeros(N))}):
        outer = decomposition.model(tokens)
        decomposition.masked_forward(tokens, {"blocks.1.mlp.W_in": SiteMask(mask=torch.zeros(N))})
        decomposition.clean_pass(tokens)
        assert torch.equal(decomposition.model(tokens), outer)


def test_a_removed_model_is_freed() -> None:
    model = CASES["ln"].build()
    decomposition = all_decomposed(model, gate="attention", gate_width=4)
    model.run_with_hooks(oracle.tokens_for(model), fwd_hooks=half_masks(decomposition))
    watched = weakref.ref(decomposition["blocks.0.mlp.W_in"].subcomponents)
    decomposition.remove()
    del decomposition
    gc.collect()
    assert watched() is None


# -- copies ----------------------------------------------------------------------------------------------------


@life_cases
@pytest.mark.parametrize("what", ["model", "decomposition", "pickle"])
def test_a_copy_reads_its_own_activations_and_masks_act_on_one_only(name: str, what: str) -> None:
    pristine = CASES[name].build(dtype=torch.float64)
    tokens, others = oracle.tokens_for(pristine), oracle.tokens_for(pristine, seed=8)
    decomposition = all_decomposed(copy.deepcopy(pristine), gate="attention", gate_width=4)
    model = decomposition.model
    hooks = half_masks(decomposition)
    masks = {
        site: Masks(w.V.detach(), w.U.detach(), hook.keywords["factor"], torch.tensor(0.5, dtype=torch.float64))
        for (site, w), (_, hook) in zip(decomposition.items(), hooks, strict=False)
    }
    if what == "model":
        twin = copy.deepcopy(model)
    elif what == "decomposition":
        twin_decomposition = copy.deepcopy(decomposition)
        twin = twin_decomposition.model
        assert twin is not model
        assert all(twin_decomposition[s] is twin.hook_dict[oracle.output_name(pristine, s)] for s in decomposition)
    else:
        twin = pickle.loads(pickle.dumps(decomposition)).model
    clean = logits_of(pristine, tokens)
    with model.hooks(fwd_hooks=hooks):
        assert torch.equal(logits_of(twin, tokens), clean)
    with twin.hooks(fwd_hooks=hooks), torch.no_grad():
        assert torch.equal(logits_of(model, tokens), clean)
        model(others)  # would be read by a copy that captures from the original
        got = twin(tokens)
    assert_close(got, oracle.run_written(pristine, masks, tokens), 1e-10)
    assert_differs(got, clean, 0.01)


def test_removing_from_a_copy_leaves_the_original_swapped_and_the_other_way_round() -> None:
    pristine = CASES["ln"].build()
    tokens = oracle.tokens_for(pristine)
    for remove_the_copy in (True, False):
        decomposition = all_decomposed(copy.deepcopy(pristine), gate="attention", gate_width=4)
        masked = logits_of(decomposition.model, tokens, half_masks(decomposition))
        twin = copy.deepcopy(decomposition)
        out, stays = (twin, decomposition) if remove_the_copy else (decomposition, twin)
        out.remove()
        assert torch.equal(logits_of(out.model, tokens), logits_of(pristine, tokens))
        assert [name for name, _ in out.model.named_modules()] == [name for name, _ in pristine.named_modules()]
        assert torch.equal(logits_of(stays.model, tokens, half_masks(stays)), masked)
        stays.remove()
        assert [list(vars(m)) for m in stays.model.modules()] == [list(vars(m)) for m in pristine.modules()]


def test_training_a_copy_leaves_the_original_factors_alone() -> None:
    decomposition = all_decomposed(CASES["ln"].build())
    twin = copy.deepcopy(decomposition)
    before = [p.detach().clone() for p in decomposition.subcomponent_parameters()]
    with torch.no_grad():
        for p in twin.subcomponent_parameters():
            p.add_(1)
    assert all(torch.equal(p, b) for p, b in zip(decomposition.subcomponent_parameters(), before, strict=True))


# -- an ordinary TransformerLens model -------------------------------------------------------------------------


def test_resetting_all_hooks_keeps_the_swap_working() -> None:
    pristine = CASES["ln"].build()
    tokens = oracle.tokens_for(pristine)
    decomposition = all_decomposed(copy.deepcopy(pristine))
    masked = logits_of(decomposition.model, tokens, half_masks(decomposition))
    for name, hook in half_masks(decomposition):
        decomposition.model.add_hook(name, hook, is_permanent=True)
    assert torch.equal(logits_of(decomposition.model, tokens), masked)
    decomposition.model.reset_hooks(including_permanent=True)
    assert torch.equal(logits_of(decomposition.model, tokens), logits_of(pristine, tokens))
    assert torch.equal(logits_of(decomposition.model, tokens, half_masks(decomposition)), masked)


def test_setting_the_model_up_again_finds_the_same_hook_names() -> None:
    decomposition = all_decomposed(CASES["ln"].build())
    model, before = decomposition.model, {name: id(point) for name, point in decomposition.model.hook_dict.items()}
    tokens = oracle.tokens_for(model)
    masked = logits_of(model, tokens, half_masks(decomposition))
    model.setup()
    assert {name: id(point) for name, point in model.hook_dict.items()} == before
    assert torch.equal(logits_of(model, tokens, half_masks(decomposition)), masked)


@pytest.mark.parametrize("training", [True, False])
def test_new_modules_take_the_training_flag_of_the_model_and_follow_it(training: bool) -> None:
    model = CASES["ln"].build()
    model.train(training)
    decomposition = all_decomposed(model, gate="attention", gate_width=4)
    assert all(module.training == training for module in model.modules())
    model.train(not training)
    assert all(module.training != training for module in model.modules())
    decomposition.remove()
    assert all(module.training != training for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("via", ["model", "decomposition"])
def test_changing_the_dtype_after_the_swap_keeps_masks_exact(dtype: torch.dtype, via: str) -> None:
    target = CASES["ln"].build()
    tokens = oracle.tokens_for(target)
    decomposition = all_decomposed(copy.deepcopy(target))
    model = decomposition.model
    (model if via == "model" else decomposition).to(dtype)
    target.to(dtype)
    assert torch.equal(logits_of(model, tokens), logits_of(target, tokens))
    half = half_masks(decomposition)
    masks = {
        s: Masks(*(x.detach().to(dtype) for x in (w.V, w.U, hook.keywords["factor"])), torch.tensor(0.5, dtype=dtype))
        for (s, w), (_, hook) in zip(decomposition.items(), half, strict=False)
    }
    got = logits_of(model, tokens, half)
    assert got.dtype == dtype
    # bf16 keeps 8 bits: each of some twenty roundings costs up to 0.2 %.
    assert_close(got, oracle.run_written(target, masks, tokens), 1e-10 if dtype == torch.float64 else 0.05)


@pytest.mark.parametrize("stop", [0, 1, -1])
def test_stopping_at_a_layer_and_starting_from_it_work_under_masks(stop: int) -> None:
    target = CASES["ln"].build(dtype=torch.float64)
    tokens = oracle.tokens_for(target)
    decomposition = all_decomposed(copy.deepcopy(target))
    hooks = half_masks(decomposition)
    masks = {
        s: Masks(w.V.detach(), w.U.detach(), hook.keywords["factor"], torch.tensor(0.5, dtype=torch.float64))
        for (s, w), (_, hook) in zip(decomposition.items(), hooks, strict=False)
    }
    residual = logits_of(decomposition.model, tokens, hooks, stop_at_layer=stop)
    assert_close(residual, oracle.run_written(target, masks, tokens, stop_at_layer=stop), 1e-10)
    assert kept_inputs(decomposition) == []
    rest = logits_of(decomposition.model, residual, hooks, start_at_layer=stop)
    assert_close(rest, oracle.run_written(target, masks, tokens), 1e-10)


def fake_tokenizer() -> Any:
    """What `generate` asks of a tokenizer when it is given tokens."""
    return SimpleNamespace(padding_side="right", pad_token_id=-1, bos_token_id=0, eos_token_id=None)


@pytest.mark.parametrize("name", ["ln", "llama_gqa", "rotary", "gqa", "shortformer", "alibi"])
def test_generating_with_a_key_value_cache_equals_generating_without_under_ablation(name: str) -> None:
    target = CASES[name].build(dtype=torch.float64)
    prompt = oracle.tokens_for(target, batch=2, pos=3)
    decomposition = all_decomposed(copy.deepcopy(target))
    model, written = decomposition.model, {}
    sites = [site for site in decomposition if "embed" not in site]  # generate() embeds once, outside the hooks
    hooks = decomposition.ablate({site: [0, 3] for site in sites}) + decomposition.keep({sites[2]: [1, 2, 3]})
    for site in sites:
        mask, delta = torch.ones(N).double(), torch.ones(()).double()
        mask[[0, 3]] = 0
        if site == sites[2]:
            mask[[0, 4]], delta = 0, torch.zeros(()).double()
        written[site] = Masks(decomposition[site].V.detach(), decomposition[site].U.detach(), mask, delta)
    oracle_model = oracle.written_copy(target, written)
    settings = {"max_new_tokens": 6, "do_sample": False, "stop_at_eos": False, "verbose": False}
    for each in (model, oracle_model):
        each.tokenizer = fake_tokenizer()
    with model.hooks(fwd_hooks=hooks):
        cached, whole = (model.generate(prompt, use_past_kv_cache=use, **settings) for use in (True, False))
        logits = model.generate(prompt, output_logits=True, **settings).logits
    expected = oracle_model.generate(prompt, output_logits=True, **settings)
    assert torch.equal(cached, whole)
    assert torch.equal(cached, expected.sequences)
    for got, wanted in zip(logits, expected.logits, strict=True):
        assert_close(got, wanted, 1e-10)


@pytest.mark.parametrize("name", ["ln", "rotary", "gqa", "split_qkv", "alibi"])
def test_a_padded_sequence_in_subcomponents_equals_the_whole_under_masks_of_every_site(name: str) -> None:
    from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

    decomposition = all_decomposed(CASES[name].build(dtype=torch.float64))
    model, tokens = decomposition.model, oracle.tokens_for(decomposition.model, pos=6)
    attention_mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    hooks = half_masks(decomposition)
    whole = logits_of(model, tokens, hooks, attention_mask=attention_mask)
    cache = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", 2)
    subcomponents = [
        logits_of(model, tokens[:, i:j], hooks, attention_mask=attention_mask[:, i:j], past_kv_cache=cache)
        for i, j in ((0, 4), (4, 5), (5, 6))
    ]
    assert_close(torch.cat(subcomponents, 1)[:, 2:], whole[:, 2:], 1e-10)


def test_an_attention_gate_refuses_a_pass_that_hides_positions() -> None:
    model = CASES["ln"].build()
    prompt = oracle.tokens_for(model, pos=3)
    decomposition = decompose_layer(model, 1, N, gate="attention", gate_width=4)
    model.tokenizer = fake_tokenizer()
    point = "blocks.1.hook_W_in_importance"
    settings = {"max_new_tokens": 3, "do_sample": False, "stop_at_eos": False, "verbose": False}
    with model.hooks(fwd_hooks=[(point, lambda value, hook: None)]):
        with pytest.raises(ValueError, match=r"attention gate of blocks\.1\.mlp\.W_in.*key-value cache"):
            model.generate(prompt, **settings)
        model.generate(prompt, use_past_kv_cache=False, **settings)
        model(prompt)
    with model.hooks(fwd_hooks=decomposition.ablate({"blocks.1.mlp.W_in": [0]})):
        model.generate(prompt, **settings)


def test_importance_in_a_pass_is_the_clean_importance_when_nothing_is_masked() -> None:
    for gate in ("scalar", "vector", "shared", "attention"):
        decomposition = all_decomposed(CASES["ln"].build(), gate=gate, gate_width=4)
        tokens = oracle.tokens_for(decomposition.model)
        expected = decomposition.importance(tokens)
        with torch.no_grad():
            _, cache = decomposition.model.run_with_cache(tokens, names_filter=lambda name: "importance" in name)
        for site, weight in decomposition.items():
            assert torch.equal(cache[weight.site.point_names()[1]], expected[site]), site


def test_importance_ignores_masks_and_patches_on_the_sites_own_points() -> None:
    decomposition = all_decomposed(CASES["ln"].build())
    tokens = oracle.tokens_for(decomposition.model)
    expected = decomposition.importance(tokens)
    with decomposition.model.hooks(fwd_hooks=half_masks(decomposition)):
        got = decomposition.importance(tokens)
    assert all(torch.equal(got[site], expected[site]) for site in expected)


def test_gradients_are_not_tracked_where_the_user_says_so() -> None:
    decomposition = all_decomposed(CASES["ln"].build())
    tokens, hooks = oracle.tokens_for(decomposition.model), half_masks(decomposition)
    with torch.no_grad():
        assert not decomposition.model.run_with_hooks(tokens, fwd_hooks=hooks).requires_grad
    with torch.inference_mode():
        inference = decomposition.model.run_with_hooks(tokens, fwd_hooks=hooks)
    with_grad = decomposition.model.run_with_hooks(tokens, fwd_hooks=hooks)
    assert with_grad.requires_grad
    assert torch.equal(inference, with_grad.detach())


# -- plain PyTorch hooks and lone HookPoints -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "site"), [("blocks.0.mlp", "blocks.0.mlp.W_in"), ("blocks.0.attn", "blocks.0.attn.W_V")]
)
def test_a_pytorch_pre_hook_added_later_raises_once_and_is_then_obeyed(path: str, site: str) -> None:
    target = CASES["ln"].build(dtype=torch.float64)
    tokens = oracle.tokens_for(target)
    decomposition = all_decomposed(copy.deepcopy(target))
    model, weight = decomposition.model, decomposition[site]

    def double(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return tuple(2 * a for a in args), {k: 2 * v if k.endswith("_input") else v for k, v in kwargs.items()}

    for each in (model, target):
        each.get_submodule(path).register_forward_pre_hook(double, with_kwargs=True)
    assert torch.equal(logits_of(model, tokens), logits_of(target, tokens))
    hooks = decomposition.mask({site: torch.zeros(N).double()}, 0.5)
    with pytest.raises(RuntimeError, match=r"forward pre-hook was added to a .* after it was decomposed"):
        logits_of(model, tokens, hooks)
    masks = {site: Masks(weight.V.detach(), weight.U.detach(), torch.zeros(N).double(), torch.tensor(0.5).double())}
    assert_close(logits_of(model, tokens, hooks), oracle.run_written(target, masks, tokens), 1e-10)


@pytest.mark.parametrize(
    ("path", "site"), [("blocks.0.mlp", "blocks.0.mlp.W_out"), ("blocks.0.attn", "blocks.0.attn.W_O")]
)
def test_a_pytorch_hook_that_changes_the_output_before_the_swap_sees_it_is_not_ignored(path: str, site: str) -> None:
    """What mlp and attn return passes their plain forward hooks before hook_mlp_out and hook_attn_out."""
    model = CASES["ln"].build()
    tokens = oracle.tokens_for(model)
    decomposition = all_decomposed(model)
    model.get_submodule(path).register_forward_hook(lambda module, args, out: out.square())
    logits_of(model, tokens)
    with pytest.raises(RuntimeError, match="forward hook"):
        logits_of(model, tokens, decomposition.keep({site: [0]}))


def test_a_decomposed_hook_point_called_alone_says_what_is_missing() -> None:
    model = CASES["ln"].build()
    decomposition = decompose_layer(model, 0, N)
    y = torch.randn(2, 3, 40)
    assert model.blocks[0].mlp.hook_pre(y) is y
    with (
        model.hooks(fwd_hooks=decomposition.ablate({"blocks.0.mlp.W_in": [0]})),
        pytest.raises(RuntimeError, match=r"blocks.0.mlp.W_in: its output HookPoint was called without its input"),
    ):
        model.blocks[0].mlp.hook_pre(y)


@pytest.mark.parametrize("point", ["acts", "mask", "delta_mask"])
@pytest.mark.parametrize("wrong", ["shape", "type"])
def test_a_hook_that_returns_something_else_is_named(point: str, wrong: str) -> None:
    model = CASES["ln"].build()
    decompose_layer(model, 0, N)
    name = f"blocks.0.hook_W_in_{point}"
    with pytest.raises(ValueError, match=rf"a hook on {name} returned"):
        logits_of(
            model, oracle.tokens_for(model), [(name, lambda v, hook: torch.ones(2, 5, 99) if wrong == "shape" else 1.0)]
        )


@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
def test_plain_pytorch_hooks_on_the_new_points_count_as_watching(kind: str) -> None:
    target = CASES["ln"].build()
    tokens = oracle.tokens_for(target)
    model = copy.deepcopy(target)
    decomposition = decompose_layer(model, 0, N)
    expected = logits_of(model, tokens, decomposition.mask({"blocks.0.mlp.W_in": torch.full((N,), 0.5)}))
    point = model.hook_dict["blocks.0.hook_W_in_mask"]
    if kind == "forward":
        handle = point.register_forward_hook(lambda module, args, out: out * 0.5)
    else:
        handle = point.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
    assert torch.equal(logits_of(model, tokens), expected)
    handle.remove()
    assert torch.equal(logits_of(model, tokens), logits_of(target, tokens))


# -- devices ---------------------------------------------------------------------------------------------------


class RejectsCpuOperands(TorchDispatchMode):
    """Raises when an operation gets a CPU tensor with axes: meta kernels accept it, a GPU would not."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        moves = func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
        if not moves and any(t.device.type == "cpu" and t.ndim > 0 for t in tensors):
            raise AssertionError(f"{func} was given a CPU tensor on a model that lives elsewhere")
        return func(*args, **kwargs)


def test_the_device_check_can_fail() -> None:
    x = torch.ones(3, device="meta")
    x * torch.tensor(2.0)
    with RejectsCpuOperands():
        x * torch.tensor(2.0)
        with pytest.raises(AssertionError, match="was given a CPU tensor"):
            x * torch.ones(3)


def on_meta(decomposition: Decomposition) -> Any:
    """Move to device meta and say so in the config, without TransformerLens's printing."""
    decomposition.model.cfg.device = "meta"
    nn.Module.to(decomposition.model, "meta")
    return decomposition.model


@pytest.mark.parametrize("name", ["ln", "gqa_ungrouped", "split_qkv", "attn_result", "llama_gqa", "shortformer"])
def test_a_masked_model_on_another_device_never_touches_the_cpu(name: str) -> None:
    decomposition = all_decomposed(CASES[name].build(), gate="attention", gate_width=4)
    cpu_masks = {site: torch.rand(2, 5, N) for site in decomposition}
    cpu_deltas = {site: torch.rand(2, 5) for site in decomposition}
    model = on_meta(decomposition)
    tokens = torch.zeros(2, 5, dtype=torch.int64, device="meta")
    everything = [name for weight in decomposition.values() for name in weight.site.point_names()]
    hooks = [
        *decomposition.mask(cpu_masks, cpu_deltas),
        *decomposition.mask({site: mask[0, 0] for site, mask in cpu_masks.items()}, 0.3),
        *decomposition.ablate({site: [0] for site in decomposition}),
        *decomposition.keep({site: [1] for site in decomposition}),
        *[(name, lambda value, hook: value) for name in everything],
    ]
    with RejectsCpuOperands():
        with model.hooks(fwd_hooks=hooks, bwd_hooks=[(name, lambda gradient, hook: None) for name in everything]):
            model(tokens).sum().backward()
        decomposition.importance(tokens)
    assert all(p.grad is not None and p.grad.device.type == "meta" for p in decomposition.subcomponent_parameters())


def test_left_padding_on_another_device_never_touches_the_cpu() -> None:
    decomposition = all_decomposed(CASES["ln"].build())
    model = on_meta(decomposition)
    tokens = torch.zeros(2, 5, dtype=torch.int64, device="meta")
    with RejectsCpuOperands(), model.hooks(fwd_hooks=decomposition.ablate({site: [0] for site in decomposition})):
        model(tokens, attention_mask=torch.ones(2, 5, dtype=torch.int64, device="meta"))


# -- cost ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_unwatched_swap_costs_less_than_two_percent_of_a_forward() -> None:
    """In a process of its own: this one may check types at every call, which costs several per cent."""
    script = Path(__file__).parents[2] / "benchmarks" / "overhead.py"
    found = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    measured = json.loads(found.stdout)
    assert measured["added_ms"] < 0.02 * measured["forward_ms"], measured
    assert measured["forward_ms"] >= 50, "a forward is too short to measure 2 % of it"
    assert measured["ratio"] < 1.02, measured
