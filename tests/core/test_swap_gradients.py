"""Gradients through a masked, swapped model against autograd through the oracle's unswapped copies (float64)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from spd_lens import Decomposition, decompose
from spd_lens.core import SiteMask
from tests import oracle
from tests.conftest import needs_hooked
from tests.oracle import CASES, Case, Masks, assert_close, assert_differs

pytestmark = needs_hooked

N, TOLERANCE = 6, 1e-9
SOME = [
    "ln", "rms_folded", "no_norm", "gated", "solu_ln", "gqa", "gqa_ungrouped", "mqa", "one_head", "rotary",
    "shortformer", "parallel", "split_qkv", "split_qkv_gqa", "split_qkv_gqa_ungrouped", "attn_result", "hook_mlp_in",
]  # fmt: skip
some_cases = pytest.mark.parametrize("case", [CASES[name] for name in SOME], ids=SOME)


def swapped(target: Any) -> Decomposition:
    """Every site of a deep copy of `target`, decomposed."""
    return decompose(copy.deepcopy(target), dict.fromkeys(oracle.all_sites(target), N))


def leaves(decomposition: Decomposition, like: tuple[int, ...] = ()) -> dict[str, Masks]:
    """Random masks and deltas, and copies of `V` and `U`, that all require gradients."""
    generator = torch.Generator().manual_seed(3)

    def leaf(value: Tensor) -> Tensor:
        return value.detach().clone().requires_grad_()

    return {
        site: Masks(
            leaf(weight.V),
            leaf(weight.U),
            leaf(torch.rand(*like, N, generator=generator, dtype=torch.float64) * 2 - 0.5),
            leaf(torch.rand(like, generator=generator, dtype=torch.float64) * 2 - 0.5),
        )
        for site, weight in decomposition.items()
    }


def scalar_of(logits: Tensor) -> Tensor:
    """Some scalar of the logits in which every entry has a weight of its own."""
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).sin()
    return (logits.flatten().softmax(0) * weights).sum() + 0.1 * (logits.flatten() * weights).sum()


def gradients(output: Tensor, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradient of `output` with respect to every named tensor; zeros where it does not depend on it."""
    found = torch.autograd.grad(output, list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(named[name]) if g is None else g for name, g in zip(named, found, strict=True)}


def named_leaves(masks: Mapping[str, Masks], parts: Iterable[str]) -> dict[str, Tensor]:
    return {f"{site} {part}": getattr(these, part) for site, these in masks.items() for part in parts}


def oracle_logits(target: Any, masks: Mapping[str, Masks], tokens: Tensor) -> Tensor:
    """Logits of the unswapped copy with every weight written as a function of its V, U, mask and delta."""
    replaced = {}
    for site, these in masks.items():
        name = oracle.parameter_name(target, site)
        stored = target.get_parameter(name)
        matrix = oracle.masked_matrix(oracle.as_matrix(site, stored), these)
        replaced[name] = oracle.as_stored(site, matrix, stored.shape)
    return functional_call(target, replaced, (tokens,))


def assert_same_gradients(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Close in every tensor, on the scale of the largest gradient of that kind; and not all zero."""
    assert got.keys() == expected.keys()
    scale = max(float(g.abs().max()) for g in expected.values())
    assert scale > 0
    for name in expected:
        error = float((got[name] - expected[name]).abs().max())
        assert error <= TOLERANCE * max(scale, 1), f"{name}: off by {error:.3g} at scale {scale:.3g}"


@some_cases
def test_gradients_of_masks_deltas_V_and_U_are_those_of_the_masked_weights(case: Case) -> None:
    target = case.build(dtype=torch.float64)
    tokens = oracle.tokens_for(target, pos=4)
    decomposition = swapped(target)
    masks = leaves(decomposition)
    hooks = decomposition.mask({s: m.mask for s, m in masks.items()}, {s: m.delta for s, m in masks.items()})
    output = scalar_of(decomposition.model.run_with_hooks(tokens, fwd_hooks=hooks))
    own = {f"{s} {part}": getattr(w, part) for s, w in decomposition.items() for part in ("V", "U")}
    got = gradients(output, {**named_leaves(masks, ("mask", "delta")), **own})
    expected_output = scalar_of(oracle_logits(target, masks, tokens))
    expected = gradients(expected_output, named_leaves(masks, ("mask", "delta", "V", "U")))
    assert_close(output, expected_output, TOLERANCE)
    assert_same_gradients(got, {name: expected[name] for name in got})


@some_cases
def test_gradients_of_masks_that_differ_by_position_are_those_of_the_hand_hooked_copy(case: Case) -> None:
    target = case.build(dtype=torch.float64)
    tokens = oracle.tokens_for(target, pos=4)
    decomposition = swapped(target)
    masks = leaves(decomposition, like=(2, 4))
    changes = {
        s: torch.zeros(*x.shape[:-1], N, dtype=torch.float64, requires_grad=True)
        for s, x in oracle.site_inputs(target, tokens).items()
        if s in masks
    }
    hooks = decomposition.mask({s: m.mask for s, m in masks.items()}, {s: m.delta for s, m in masks.items()})
    for site, change in changes.items():
        point = decomposition[site].site.point_names()[0]
        hooks.append((point, lambda acts, hook, change=change: acts + change))
    own = {f"{s} {part}": getattr(w, part) for s, w in decomposition.items() for part in ("V", "U")}
    acts = {f"{s} acts": change for s, change in changes.items()}
    output = scalar_of(decomposition.model.run_with_hooks(tokens, fwd_hooks=hooks))
    got = gradients(output, {**named_leaves(masks, ("mask", "delta")), **acts, **own})
    hand = copy.deepcopy(target)
    with hand.hooks(fwd_hooks=oracle.hand_hooks(hand, masks, changes)):
        expected_output = scalar_of(hand(tokens))
    expected = gradients(expected_output, {**named_leaves(masks, ("mask", "delta", "V", "U")), **acts})
    assert_same_gradients(got, {name: expected[name] for name in got})


@pytest.mark.parametrize("case", [CASES["ln"], CASES["gqa"], CASES["split_qkv"]], ids=lambda case: case.name)
def test_masks_handed_over_without_hooks_have_the_same_gradients(case: Case) -> None:
    target = case.build(dtype=torch.float64)
    tokens = oracle.tokens_for(target, pos=4)
    decomposition = swapped(target)
    masks = leaves(decomposition, like=(2, 4))
    own = {f"{s} {part}": getattr(w, part) for s, w in decomposition.items() for part in ("V", "U")}
    wanted = {**named_leaves(masks, ("mask", "delta")), **own}
    hooks = decomposition.mask({s: m.mask for s, m in masks.items()}, {s: m.delta for s, m in masks.items()})
    expected = gradients(scalar_of(decomposition.model.run_with_hooks(tokens, fwd_hooks=hooks)), wanted)
    given = {s: SiteMask(mask=m.mask, delta=m.delta) for s, m in masks.items()}
    got = gradients(scalar_of(decomposition.masked_forward(tokens, given)), wanted)
    assert_same_gradients(got, expected)


@some_cases
def test_backward_hooks_on_masks_and_activations_see_the_gradient_of_the_hand_hooked_copy(case: Case) -> None:
    target = case.build(dtype=torch.float64)
    tokens = oracle.tokens_for(target, pos=4)
    decomposition = swapped(target)
    inputs = oracle.site_inputs(target, tokens)
    ones = {
        s: Masks(
            w.V.detach(),
            w.U.detach(),
            torch.ones(2, 4, N, dtype=torch.float64, requires_grad=True),
            torch.ones(2, 4, dtype=torch.float64, requires_grad=True),
        )
        for s, w in decomposition.items()
    }
    changes = {s: torch.zeros(*inputs[s].shape[:-1], N, dtype=torch.float64, requires_grad=True) for s in decomposition}
    hand = copy.deepcopy(target)
    with hand.hooks(fwd_hooks=oracle.hand_hooks(hand, ones, changes)):
        output = scalar_of(hand(tokens))
    leaves_by_point = {
        name: leaf
        for site, weight in decomposition.items()
        for name, leaf in zip(
            [weight.site.point_names()[i] for i in (0, 2, 3)],
            (changes[site], ones[site].mask, ones[site].delta),
            strict=True,
        )
    }
    expected = gradients(output, leaves_by_point)
    seen: dict[str, Tensor] = {}

    def note(gradient: Tensor, hook: Any) -> None:
        seen[hook.name] = gradient.detach()

    with decomposition.model.hooks(bwd_hooks=[(name, note) for name in leaves_by_point]):
        scalar_of(decomposition.model(tokens)).backward()
    for weight in decomposition.values():  # the oracle has one mask for all heads: sum over the swap's head axis
        for index in (2, 3):
            name = weight.site.point_names()[index]
            seen[name] = seen[name].squeeze(-1) if index == 3 else seen[name]
            if seen[name].ndim > expected[name].ndim:
                seen[name] = seen[name].sum(2)
    assert_same_gradients(seen, expected)


def test_backward_hooks_can_change_the_gradient() -> None:
    target = CASES["ln"].build(dtype=torch.float64)
    tokens = oracle.tokens_for(target, pos=4)
    decomposition = swapped(target)
    weight = decomposition["blocks.0.mlp.W_in"]

    def of_V(**hooks: Any) -> Tensor:
        decomposition.model.zero_grad()
        with decomposition.model.hooks(**hooks):
            scalar_of(decomposition.model(tokens)).backward()
        assert weight.subcomponents.V.grad is not None
        return weight.subcomponents.V.grad.clone()

    def stop(gradient: Tensor, hook: Any) -> Tensor:
        return torch.zeros_like(gradient)

    acts, _, mask, _ = weight.site.point_names()
    halve = (mask, lambda mask, hook: mask * 0.5)
    free, stopped = of_V(fwd_hooks=[halve]), of_V(fwd_hooks=[halve], bwd_hooks=[(acts, stop)])
    assert_differs(stopped, free, 0.01)


@pytest.mark.parametrize("watched", [False, True], ids=["unwatched", "watched"])
@some_cases
def test_the_target_gets_the_gradients_of_the_unswapped_model_when_nothing_is_masked(case: Case, watched: bool) -> None:
    target = case.build(dtype=torch.float64)
    tokens = oracle.tokens_for(target, pos=4)
    decomposition = swapped(target)
    scalar_of(target(tokens)).backward()
    model, points = decomposition.model, [p for w in decomposition.values() for p in w.site.point_names()]
    with model.hooks(fwd_hooks=[(p, lambda value, hook: value) for p in points] if watched else []):
        scalar_of(model(tokens)).backward()
    own = dict(model.named_parameters())
    for name, parameter in target.named_parameters():
        assert (parameter.grad is None) == (own[name].grad is None), name
        if parameter.grad is not None and watched:  # gradients may then be added up in another order
            assert_close(own[name].grad, parameter.grad, 1e-12, name)
        elif parameter.grad is not None:
            assert torch.equal(own[name].grad, parameter.grad), name
    if not watched:
        assert all(p.grad is None for p in decomposition.subcomponent_parameters())


@pytest.mark.parametrize("case", [CASES["ln"], CASES["gqa"], CASES["attn_result"]], ids=lambda case: case.name)
def test_the_target_gets_the_gradients_of_the_masked_weights_when_the_user_asks(case: Case) -> None:
    target = case.build(dtype=torch.float64)
    tokens = oracle.tokens_for(target, pos=4)
    decomposition = swapped(target)
    masks = leaves(decomposition)
    hooks = decomposition.mask({s: m.mask for s, m in masks.items()}, {s: m.delta for s, m in masks.items()})
    own = dict(decomposition.model.named_parameters())
    names = [name for name, _ in target.named_parameters()]
    output = scalar_of(decomposition.model.run_with_hooks(tokens, fwd_hooks=hooks))
    got = gradients(output, {name: own[name] for name in names})
    expected = gradients(scalar_of(oracle_logits(target, masks, tokens)), dict(target.named_parameters()))
    assert_same_gradients(got, expected)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_swap_does_not_change_requires_grad(frozen: bool) -> None:
    target = CASES["ln"].build()
    for name, parameter in target.named_parameters():
        parameter.requires_grad_(not frozen and "W_in" not in name)
    before = {name: parameter.requires_grad for name, parameter in target.named_parameters()}
    decomposition = decompose(target, dict.fromkeys(oracle.all_sites(target), N))
    decomposition.clean_pass(oracle.tokens_for(target))
    now = dict(target.named_parameters())
    assert {name: now[name].requires_grad for name in before} == before
    assert all(p.requires_grad for p in decomposition.subcomponent_parameters() + decomposition.gate_parameters())
    decomposition.remove()
    assert {name: parameter.requires_grad for name, parameter in target.named_parameters()} == before


def test_masks_can_be_trained_through_hooks_while_the_target_is_frozen() -> None:
    target = CASES["ln"].build(dtype=torch.float64)
    target.requires_grad_(False)
    tokens = oracle.tokens_for(target)
    clean = target(tokens)
    decomposition = swapped(target)
    for parameter in decomposition.subcomponent_parameters():
        parameter.requires_grad_(False)
    mask = torch.zeros(N, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([mask], lr=0.1)
    losses = []
    for _ in range(30):
        logits = decomposition.model.run_with_hooks(tokens, fwd_hooks=decomposition.mask({"blocks.0.mlp.W_in": mask}))
        loss = (logits - clean).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_the_gradient_oracle_tells_a_delta_that_is_taken_from_the_masked_activation() -> None:
    """The mistake `(m - d) * a'`: the values agree wherever no activation is patched, the oracle's gradients do not."""
    target = CASES["ln"].build(dtype=torch.float64)
    tokens = oracle.tokens_for(target, pos=4)
    site = "blocks.0.mlp.W_in"
    x = oracle.site_inputs(target, tokens)[site]
    W, b = oracle.weight_of(target, site).detach(), oracle.bias_of(target, site).detach()
    masks = leaves(swapped(target), like=(2, 4))[site]
    change = torch.zeros(2, 4, N, dtype=torch.float64, requires_grad=True)
    right = oracle.output_by_hand(target, site, x, masks, change)
    d = masks.delta[..., None]
    wrong = b + d * (x @ W) + ((masks.mask - d) * (x @ masks.V + change)) @ masks.U
    assert_close(wrong, right, TOLERANCE)
    direction = torch.linspace(-1, 1, right.numel(), dtype=torch.float64).reshape(right.shape)
    got, expected = (torch.autograd.grad((y * direction).sum(), change)[0] for y in (wrong, right))
    assert_differs(got, expected, 0.1)
