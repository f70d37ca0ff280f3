"""A decomposed TransformerBridge is exact: against models whose weights were overwritten by hand (bridge_models.py)."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from spd_lens import decompose
from spd_lens.core import DecomposedWeight, ReadPoint, SiteMask
from spd_lens.hosts import open_host
from tests.bridge_models import (
    TOLERANCE,
    N,
    Written,
    all_sites,
    assert_close,
    assert_differs,
    boot,
    bridge_weight,
    every_case,
    every_family,
    hf_weight,
    mask_hooks,
    pristine,
    random_masks,
    random_tokens,
    run,
    scale_of,
    swapped,
    untie,
)  # fmt: skip

# -- the target, bit for bit -------------------------------------------------------------------------------------


@every_case
def test_an_unwatched_swap_and_unit_masks_give_the_target_bit_for_bit(family: str, mode: str) -> None:
    target, tokens = boot(family, mode), random_tokens()
    decomposition = swapped(family, mode)
    model = decomposition.model
    with torch.no_grad():
        expected, expected_cache = target.run_with_cache(tokens)
        logits, cache = model.run_with_cache(tokens, names_filter=list(expected_cache))
        watched_logits, watched_cache = model.run_with_cache(tokens)
    assert torch.equal(logits, expected)
    assert torch.equal(watched_logits, expected)
    assert set(cache) == set(expected_cache)
    for name, value in expected_cache.items():
        assert torch.equal(cache[name], value), name
        assert torch.equal(watched_cache[name], value), name
    points = {point for weight in decomposition.values() for point in weight.site.point_names()}
    assert set(watched_cache) - set(expected_cache) == points
    for weight in decomposition.values():
        acts, importance, mask, delta = (watched_cache[name] for name in weight.site.point_names())
        assert acts.shape == importance.shape == mask.shape == (2, 7, N)
        assert delta.shape == (2, 7, 1)


# -- the weight oracle -------------------------------------------------------------------------------------------


@every_case
def test_masks_act_like_the_masked_weight(family: str, mode: str) -> None:
    tokens, decomposition, written = random_tokens(), swapped(family, mode), Written(family, mode)
    assert list(decomposition) == all_sites(family)
    every = random_masks(decomposition)
    clean = run(decomposition.model, tokens)
    single = [] if mode == "no_processing" else [[site] for site in every]
    for names in [*single, list(every)]:
        masks = {site: every[site] for site in names}
        got = run(decomposition.model, tokens, mask_hooks(decomposition, masks))
        with written.masked(masks) as model:
            expected = run(model, tokens)
        assert_close(got, expected, TOLERANCE, ", ".join(names))
        assert_differs(expected, clean, 0.003, f"{names}: the masks do too little to test anything")
    assert_close(run(written.bridge, tokens), clean, 1e-6, "the oracle did not restore its weights")


@every_family
def test_masks_act_like_the_masked_weight_in_plain_hugging_face_models(family: str) -> None:
    tokens, decomposition, model = random_tokens(), swapped(family), copy.deepcopy(pristine(family))
    masks = random_masks(decomposition)
    untie(model)
    with torch.no_grad():
        for site, these in masks.items():
            view, scale = hf_weight(model, site), scale_of(family, site)
            W = view.reshape(view.shape[0], -1) * scale
            view.copy_((these.applied_to(W) / scale).reshape(view.shape))
        expected = model(tokens).logits
    assert_close(run(decomposition.model, tokens, mask_hooks(decomposition, masks)), expected, TOLERANCE, family)


@every_case
def test_the_site_reads_and_writes_the_weight_in_use(family: str, mode: str) -> None:
    # Of a deep copy: TransformerLens 3.9 keeps some weights twice, and a copy separates the two.
    decomposition, tokens = copy.deepcopy(swapped(family, mode)), random_tokens()
    model = decomposition.model
    for site, weight in decomposition.items():
        view = bridge_weight(model, site) if mode == "compatibility" else hf_weight(pristine(family), site)
        expected = view.detach().reshape(view.shape[0], -1) * scale_of(family, site)
        assert torch.equal(weight.target_weight, expected), site
    for site, weight in decomposition.items():
        old, new = weight.target_weight.detach().clone(), torch.randn_like(weight.target_weight)
        before = run(model, tokens)
        weight.site.matrix.write(new)
        assert_close(weight.target_weight, new, 1e-6, site)
        assert_differs(run(model, tokens), before, 0.003, site)
        weight.site.matrix.write(old)


PATCHED = (
    "embed.hook_in", "hook_embed", "pos_embed.hook_in", "blocks.1.hook_in", "blocks.1.ln1.hook_out",
    "blocks.1.attn.hook_in", "blocks.1.attn.q.hook_in", "blocks.1.attn.v.hook_in", "blocks.1.attn.hook_z",
    "blocks.1.hook_resid_mid", "blocks.1.ln2.hook_out", "blocks.1.mlp.hook_in", "blocks.1.mlp.in.hook_in",
    "blocks.1.mlp.gate.hook_in", "blocks.1.mlp.hook_pre", "blocks.1.mlp.hook_post", "unembed.hook_in",
)  # fmt: skip
# In compatibility mode TransformerLens never calls these.
SILENT = ("blocks.1.mlp.in.hook_in", "blocks.1.mlp.gate.hook_in")


def patch(value: Tensor, hook: Any) -> Tensor:
    """A patch of one position: a changed direction, or another token or position."""
    value = value.clone()
    if value.is_floating_point():
        value[:, 2] += torch.linspace(-2, 1, value.shape[-1]) ** 3
    else:
        value[:, 2] = (value[:, 2] + 3) % 30
    return value


@every_case
def test_masks_together_with_upstream_patches_act_like_the_masked_weight(family: str, mode: str) -> None:
    tokens, decomposition, written = random_tokens(), swapped(family, mode), Written(family, mode)
    masks = random_masks(decomposition)
    hooks = mask_hooks(decomposition, masks)
    names = [name for name in PATCHED if name in written.bridge.hook_dict]
    assert len(names) > 9
    never_called = SILENT if mode == "compatibility" and family not in ("gpt2", "pythia") else ()
    with written.masked(masks) as model:
        unpatched = run(model, tokens)
        for index, name in enumerate(names):
            expected = run(model, tokens, [(name, patch)])
            if name not in never_called:
                assert_differs(expected, unpatched, 0.003, name)
            both = [*hooks, (name, patch)] if index % 2 else [(name, patch), *hooks]
            assert_close(run(decomposition.model, tokens, both), expected, TOLERANCE, name)


@every_family
def test_patches_added_before_the_swap_act_too(family: str) -> None:
    tokens, target, written = random_tokens(), boot(family, "compatibility"), Written(family, "compatibility")
    for name in ("attn.hook_z", "ln2.hook_out", "mlp.hook_in", "mlp.hook_post"):
        for model in (target, written.bridge):
            model.add_hook(f"blocks.1.{name}", patch)
    decomposition = decompose(target, dict.fromkeys(all_sites(family), N))
    masks = random_masks(decomposition)
    with written.masked(masks) as model:
        assert_close(run(target, tokens, mask_hooks(decomposition, masks)), run(model, tokens), TOLERANCE, family)


def test_the_weight_oracle_tells_a_wrong_delta_and_a_wrong_mask() -> None:
    tokens, decomposition, written = random_tokens(), swapped("llama"), Written("llama", "raw")
    masks = random_masks(decomposition)
    got = run(decomposition.model, tokens, mask_hooks(decomposition, masks))
    for site, these in masks.items():
        for wrong in (replace(these, delta=1.0), replace(these, mask=these.mask.flip(0))):
            with written.masked({**masks, site: wrong}) as model:
                assert_differs(got, run(model, tokens), 20 * TOLERANCE, site)


@every_case
def test_a_patched_activation_moves_the_output_by_its_image(family: str, mode: str) -> None:
    tokens, decomposition = random_tokens(), swapped(family, mode)
    masks = random_masks(decomposition)
    for site, weight in decomposition.items():
        change, outputs = torch.randn(2, 7, N), []
        names = weight.site.point_names()

        def note(y: Tensor, hook: Any, *, outputs: list[Tensor] = outputs) -> None:
            outputs.append(y.flatten(2).clone())

        hooks = [*mask_hooks(decomposition, {site: masks[site]}), (weight.site.output.name, note)]
        run(decomposition.model, tokens, hooks)
        run(decomposition.model, tokens, [*hooks, (names[0], lambda a, hook, change=change: a + change)])
        expected = (masks[site].mask * change) @ weight.U.detach()
        assert_close(outputs[1] - outputs[0], expected, TOLERANCE, site)


@every_family
def test_given_masks_and_recorded_inputs_agree_with_hooks(family: str) -> None:
    tokens, decomposition = random_tokens(), swapped(family, "compatibility")
    masks = random_masks(decomposition)
    given = {s: SiteMask(m.mask.expand(2, 7, N), torch.full((2, 7), m.delta)) for s, m in masks.items()}
    with torch.no_grad():
        got = decomposition.masked_forward(tokens, given)
        inputs = decomposition.clean_pass(tokens).inputs
        _, cache = decomposition.model.run_with_cache(tokens)
    assert_close(got, run(decomposition.model, tokens, mask_hooks(decomposition, masks)), 1e-6, "")
    for site, weight in decomposition.items():
        x = nn.functional.one_hot(inputs[site], weight.V.shape[0]).float() if weight.site.is_lookup else inputs[site]
        assert_close(cache[weight.site.point_names()[0]], x @ weight.V.detach(), 1e-5, site)


# -- hook names ------------------------------------------------------------------------------------------------------


def pytorch_hooks(model: nn.Module) -> dict[str, list[Any]]:
    """The forward hooks of PyTorch's own on every module that has any."""
    hooks = {
        name: [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        for name, module in model.named_modules()
    }
    return {name: found for name, found in hooks.items() if found}


@every_case
def test_remove_gives_the_model_back(family: str, mode: str) -> None:
    model, tokens = boot(family, mode), random_tokens()
    names, classes = set(model.hook_dict), {n: type(p) for n, p in model.hook_dict.items()}
    own_names = [set(block._hook_registry) for block in model.blocks]
    expected = run(model, tokens)
    # A bridge puts PyTorch hooks of its own on its norms in the first pass.
    hooks = pytorch_hooks(model)
    decomposition = decompose(model, dict.fromkeys(open_host(model).site_names(), N))
    assert pytorch_hooks(model) != hooks
    assert any(type(point) is DecomposedWeight for point in model.hook_dict.values())
    decomposition.remove()
    assert set(model.hook_dict) == names
    assert {n: type(p) for n, p in model.hook_dict.items()} == classes
    assert [set(block._hook_registry) for block in model.blocks] == own_names
    assert pytorch_hooks(model) == hooks
    assert not any(isinstance(module, ReadPoint) for module in model.modules())
    assert torch.equal(run(model, tokens), expected)
    assert pytorch_hooks(model) == hooks
    assert "enable_compatibility_mode" not in vars(model)
    if mode == "raw":
        model.enable_compatibility_mode(disable_warnings=True)
        assert {n for n in model.hook_dict if "W_" in n} == set()


def test_new_points_answer_to_every_way_of_hooking() -> None:
    decomposition, tokens = swapped("llama", sites=["blocks.0.mlp.W_in"]), random_tokens()
    model, seen = decomposition.model, []
    name = "blocks.0.hook_W_in_acts"

    def note(value: Tensor, hook: Any) -> None:
        seen.append((hook.name, tuple(value.shape)))

    model.run_with_hooks(tokens, fwd_hooks=[(name, note)])
    model.run_with_hooks(tokens, fwd_hooks=[(lambda n: n.endswith("W_in_acts"), note)])
    with model.hooks(fwd_hooks=[(name, note)]):
        model(tokens)
    model.add_hook(name, note)
    model(tokens)
    model.reset_hooks()
    model(tokens)
    assert seen == [(name, (2, 7, N))] * 4
    assert isinstance(model.blocks[0].hook_W_in_acts, HookPoint)
    assert model.blocks[0].hook_W_in_acts is model.hook_dict[name]


def test_backward_hooks_on_a_mask_see_its_gradient() -> None:
    decomposition, tokens, seen = swapped("gpt2", sites=["blocks.0.mlp.W_out"]), random_tokens(), []
    hook = ("blocks.0.hook_W_out_mask", lambda gradient, hook: seen.append(gradient.shape))
    with decomposition.model.hooks(bwd_hooks=[hook]):
        decomposition.model(tokens, return_type="loss").backward()
    assert seen == [(2, 7, N)]


@every_family
def test_a_deep_copy_is_independent(family: str) -> None:
    tokens, decomposition = random_tokens(), swapped(family, "compatibility")
    masks = random_masks(decomposition)
    expected = run(decomposition.model, tokens, mask_hooks(decomposition, masks))
    other = copy.deepcopy(decomposition)
    assert torch.equal(run(other.model, tokens, mask_hooks(other, masks)), expected)
    with torch.no_grad():
        for weight in other.values():
            weight.site.matrix.write(torch.zeros_like(weight.target_weight))
            weight.U.zero_()
    assert torch.equal(run(decomposition.model, tokens, mask_hooks(decomposition, masks)), expected)
    assert_differs(run(other.model, tokens, mask_hooks(other, masks)), expected, 0.5)
    with pytest.raises(ValueError, match="cannot be called on a decomposed model"):
        other.model.enable_compatibility_mode()
    other.remove()
    assert torch.equal(run(decomposition.model, tokens, mask_hooks(decomposition, masks)), expected)
