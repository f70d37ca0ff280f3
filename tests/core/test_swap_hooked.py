"""A swapped HookedTransformer against an oracle that shares no code with the swap (see oracle.py)."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from spd_lens import Decomposition, decompose, decompose_layer
from spd_lens.core import SiteMask
from tests import oracle
from tests.conftest import needs_hooked
from tests.oracle import CASES, SWITCHES, Case, Masks, assert_close, assert_differs

pytestmark = needs_hooked

N = 7  # subcomponents per site: below every rank, so the delta is never small
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
F32, F64 = 1e-4, 1e-10


def swapped(target: Any, sites: Iterable[str] | None = None, n: int = N, **kwargs: Any) -> Decomposition:
    """The decomposition of a deep copy of `target`: the target itself stays unswapped."""
    names = oracle.all_sites(target) if sites is None else sites
    return decompose(copy.deepcopy(target), dict.fromkeys(names, n), **kwargs)


@functools.cache
def prepared(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Decomposition]:
    """An unswapped target and its decomposed copy, shared by tests that only add hooks: those leave nothing behind."""
    target = CASES[name].build(dtype=dtype)
    return target, swapped(target)


def random_masks(
    decomposition: Decomposition, sites: Iterable[str], like: tuple[int, ...] = (), seed: int = 5
) -> dict[str, Masks]:
    """Random masks `[*like C]` and deltas `[*like]` in [-0.5, 1.5] with the decomposition's own factors."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for site in sites:
        V, U = decomposition[site].V.detach(), decomposition[site].U.detach()
        mask = torch.rand(*like, V.shape[1], generator=generator) * 2 - 0.5
        delta = torch.rand(like, generator=generator) * 2 - 0.5
        masks[site] = Masks(V, U, mask.to(V), delta.to(V))
    return masks


def mask_hooks(decomposition: Decomposition, masks: Mapping[str, Masks]) -> list[tuple[str, Any]]:
    """The library's hooks for `masks`."""
    return decomposition.mask(
        {site: these.mask for site, these in masks.items()}, {site: these.delta for site, these in masks.items()}
    )


def run(model: Any, tokens: Tensor, hooks: Iterable[tuple[str, Any]] = (), **kwargs: Any) -> Tensor:
    """Logits under forward hooks, without gradients."""
    with torch.no_grad(), model.hooks(fwd_hooks=list(hooks)):
        return model(tokens, **kwargs)


def check_weight_oracle(target: Any, decomposition: Decomposition, tolerance: float) -> None:
    """Every site alone, then all together, at random `[C]` masks and scalar deltas, against the written copy."""
    tokens = oracle.tokens_for(target)
    clean = run(target, tokens)
    every = random_masks(decomposition, decomposition)
    for names in [[site] for site in every] + [list(every)]:
        masks = {site: every[site] for site in names}
        got = run(decomposition.model, tokens, mask_hooks(decomposition, masks))
        expected = oracle.run_written(target, masks, tokens)
        assert_close(got, expected, tolerance, ", ".join(names))
        if len(names) > 1:
            assert_differs(expected, clean, 0.05, "the masks do too little to test anything")


# -- the target, bit for bit -----------------------------------------------------------------------------------


@every_case
def test_unwatched_swap_gives_the_target_bit_for_bit(case: Case) -> None:
    target, decomposition = prepared(case.name)
    model = decomposition.model
    tokens = oracle.tokens_for(target)
    with torch.no_grad():
        expected, expected_cache = target.run_with_cache(tokens)
        old_names = set(target.hook_dict)
        logits, cache = model.run_with_cache(tokens, names_filter=lambda name: name in old_names)
    assert torch.equal(logits, expected)
    assert torch.equal(run(model, tokens), expected)
    assert list(cache) == list(expected_cache)
    assert all(torch.equal(cache[name], expected_cache[name]) for name in expected_cache)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_unit_masks_give_the_target_bit_for_bit(case: Case, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and (case.process or case.cfg.get("use_qk_norm")):
        pytest.skip("TransformerLens folds in fp32; its qk-norm is fp32 only")
    target = case.build(dtype=dtype)
    tokens = oracle.tokens_for(target)
    with torch.no_grad():
        expected, expected_cache = target.run_with_cache(tokens)
        decomposition = swapped(target, gate="shared", gate_width=4)
        logits, cache = decomposition.model.run_with_cache(tokens)
    assert torch.equal(logits, expected)
    assert all(torch.equal(cache[name], expected_cache[name]) for name in expected_cache)
    new = [point for site in decomposition.values() for point in site.site.point_names()]
    assert set(cache) - set(expected_cache) == set(new)


@every_case
def test_new_points_have_a_position_axis_and_start_from_ones(case: Case) -> None:
    target, decomposition = prepared(case.name)
    tokens = oracle.tokens_for(target, batch=3, pos=5)
    _, cache = decomposition.model.run_with_cache(tokens)
    heads_apart = target.cfg.use_split_qkv_input or target.cfg.use_attn_in
    for site, weight in decomposition.items():
        acts, importance, mask, delta = (cache[name] for name in weight.site.point_names())
        per_head = heads_apart and site.rsplit(".", 1)[-1] in ("W_Q", "W_K", "W_V")
        assert acts.shape[:2] == (3, 5)
        assert acts.ndim == 3 + per_head, site
        assert acts.shape == importance.shape == mask.shape == (*delta.shape[:-1], N)
        assert delta.shape[-1] == 1
        assert torch.equal(mask, torch.ones_like(mask))
        assert torch.equal(delta, torch.ones_like(delta))


# -- the weight oracle -----------------------------------------------------------------------------------------


@every_case
def test_masks_act_like_the_masked_weight_fp32(case: Case) -> None:
    check_weight_oracle(*prepared(case.name), F32)


@every_case
def test_masks_act_like_the_masked_weight_fp64(case: Case) -> None:
    if case.name == "alibi":
        pytest.skip("TransformerLens keeps the ALiBi bias in fp32; covered in fp32")
    check_weight_oracle(*prepared(case.name, torch.float64), F64)


@pytest.mark.parametrize("name", ["ln", "rms", "no_norm", "gated", "gqa", "rotary", "attn_result", "split_qkv"])
def test_masks_act_like_the_masked_weight_bf16(name: str) -> None:
    target = CASES[name].build(dtype=torch.bfloat16)
    exact = copy.deepcopy(target).to(torch.float64)
    tokens = oracle.tokens_for(target)
    decomposition = swapped(target)
    masks = random_masks(decomposition, decomposition)
    got = run(decomposition.model, tokens, mask_hooks(decomposition, masks)).double()
    in_bf16 = oracle.run_written(target, masks, tokens).double()
    truth = oracle.run_written(exact, masks, tokens)
    # bf16 keeps 8 bits (relative rounding 2^-9 = 0.2 %), and some twenty roundings on the way to the logits add up.
    # The swap must be no worse than twice what rounding does to the masked weights themselves.
    rounding = float((in_bf16 - truth).abs().max())
    assert float((got - truth).abs().max()) <= 2 * rounding + 0.004 * float(truth.abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_weight_that_is_wholly_masked_leaves_the_bias_in_half_precision(dtype: torch.dtype) -> None:
    """With mask and delta 0 the output is b. The rounding of y0 must cancel, or 0.2 % of a large output stays."""
    target = CASES["ln"].build(dtype=dtype)
    with torch.no_grad():
        for site in oracle.all_sites(target):  # outputs a thousand times the bias, as massive activations are
            target.get_parameter(oracle.parameter_name(target, site)).mul_(30)
    tokens = oracle.tokens_for(target)
    decomposition = swapped(target)
    for site in ("blocks.0.attn.W_V", "blocks.0.attn.W_O", "blocks.0.mlp.W_in", "blocks.1.mlp.W_out", "unembed.W_U"):
        name = oracle.output_name(target, site)
        with torch.no_grad(), decomposition.model.hooks(fwd_hooks=decomposition.keep({site: []})):
            _, cache = decomposition.model.run_with_cache(tokens, names_filter=name)
        bias = oracle.bias_of(target, site).reshape(cache[name].shape[2:])
        assert_close(cache[name].double(), bias.double().expand(cache[name].shape), 2**-8, site)


@pytest.mark.parametrize("name", ["moe", "post_norm", "norm_before_and_after", "embedding_norm"])
def test_sites_that_stay_possible_in_refused_architectures_are_exact(name: str) -> None:
    cfg, refused = REFUSALS[name][:2]
    target = oracle.tiny_model(**cfg)
    sites = [site for site in oracle.all_sites(target) if site not in refused and "mlp" not in site]
    check_weight_oracle(target, swapped(target, sites), F32)


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_flipped_after_the_swap_keeps_masks_exact(switch: str) -> None:
    setter, cfg = SWITCHES[switch]
    target = oracle.tiny_model(**cfg)
    tokens = oracle.tokens_for(target)
    decomposition = swapped(target)
    getattr(decomposition.model, setter)(True)
    getattr(target, setter)(True)
    masks = random_masks(decomposition, decomposition)
    assert torch.equal(run(decomposition.model, tokens), run(target, tokens))
    got = run(decomposition.model, tokens, mask_hooks(decomposition, masks))
    assert_close(got, oracle.run_written(target, masks, tokens), F32)
    getattr(decomposition.model, setter)(False)
    got = run(decomposition.model, tokens, mask_hooks(decomposition, masks))
    assert_close(got, oracle.run_written(target, masks, tokens), F32)


def test_the_weight_oracle_tells_wrong_factors_and_a_forgotten_delta() -> None:
    target, decomposition = prepared("ln")
    tokens = oracle.tokens_for(target)
    masks = random_masks(decomposition, decomposition)
    got = run(decomposition.model, tokens, mask_hooks(decomposition, masks))
    for site, these in masks.items():
        wrong = Masks(these.V, these.U, these.mask, torch.ones(()))
        expected = oracle.run_written(target, {**masks, site: wrong}, tokens)
        assert_differs(got, expected, 20 * F32, f"{site} without its delta")
        wrong = Masks(these.V, these.U, these.mask.flip(0), these.delta)
        expected = oracle.run_written(target, {**masks, site: wrong}, tokens)
        assert_differs(got, expected, 20 * F32, f"{site} with the mask reversed")


# -- masks that differ by example and by position --------------------------------------------------------------


@every_case
def test_masks_that_differ_by_example_act_like_one_masked_model_per_example(case: Case) -> None:
    target, decomposition = prepared(case.name)
    tokens = oracle.tokens_for(target, batch=3, pos=4)
    masks = random_masks(decomposition, decomposition, like=(3, 1))
    wide = {s: Masks(m.V, m.U, m.mask.expand(3, 4, N), m.delta.expand(3, 4)) for s, m in masks.items()}
    got = run(decomposition.model, tokens, mask_hooks(decomposition, wide))
    for example in range(3):
        one = {s: Masks(m.V, m.U, m.mask[example, 0], m.delta[example, 0]) for s, m in masks.items()}
        expected = oracle.run_written(target, one, tokens[example : example + 1])
        assert_close(got[example : example + 1], expected, F32, f"example {example}")


@every_case
def test_masks_that_differ_by_position_give_the_output_written_by_hand(case: Case) -> None:
    target, decomposition = prepared(case.name, torch.float64)
    tokens = oracle.tokens_for(target, batch=3, pos=5)
    inputs = oracle.site_inputs(target, tokens)
    for site, masks in random_masks(decomposition, decomposition, like=(3, 5)).items():
        with torch.no_grad(), decomposition.model.hooks(fwd_hooks=mask_hooks(decomposition, {site: masks})):
            logits, cache = decomposition.model.run_with_cache(tokens, names_filter=oracle.output_name(target, site))
            by_hand = oracle.output_by_hand(target, site, inputs[site], masks)
        assert_close(cache[oracle.output_name(target, site)], by_hand, F64, site)
        expected = run(target, tokens, [(oracle.output_name(target, site), lambda _, hook, by_hand=by_hand: by_hand)])
        assert_close(logits, expected, F64, site)


@every_case
def test_masks_of_all_sites_that_differ_by_position_give_the_hand_hooked_model(case: Case) -> None:
    target, decomposition = prepared(case.name, torch.float64)
    tokens = oracle.tokens_for(target, batch=2, pos=4)
    masks = random_masks(decomposition, decomposition, like=(2, 4))
    got = run(decomposition.model, tokens, mask_hooks(decomposition, masks))
    hand = copy.deepcopy(target)
    assert_close(got, run(hand, tokens, oracle.hand_hooks(hand, masks)), F64 * 10)


@every_case
def test_masks_handed_over_without_hooks_give_the_same_output(case: Case) -> None:
    target, decomposition = prepared(case.name, torch.float64)
    tokens = oracle.tokens_for(target, batch=2, pos=4)
    masks = random_masks(decomposition, decomposition, like=(2, 4))
    expected = run(decomposition.model, tokens, mask_hooks(decomposition, masks))
    given_masks = {site: SiteMask(mask=m.mask, delta=m.delta) for site, m in masks.items()}
    with torch.no_grad():
        assert torch.equal(decomposition.masked_forward(tokens, given_masks), expected)
    routed = torch.tensor([[True, False, True, False], [False, True, True, False]])
    with torch.no_grad():
        got = decomposition.masked_forward(
            tokens, {s: SiteMask(mask=m.mask, delta=m.delta, routed=routed) for s, m in masks.items()}
        )
    kept = {
        s: Masks(m.V, m.U, torch.where(routed[..., None], m.mask, 1.0), torch.where(routed, m.delta, 1.0))
        for s, m in masks.items()
    }
    # Only the routed rows are computed, and a matmul of fewer rows may round differently.
    assert_close(got, run(decomposition.model, tokens, mask_hooks(decomposition, kept)), F64)


@pytest.mark.parametrize("batch", [1, 3, 4])
@pytest.mark.parametrize("point", ["mask", "delta_mask"])
def test_a_mask_that_a_hook_returns_broadcasts_as_tensors_do(point: str, batch: int) -> None:
    """A hook may return anything that broadcasts to the point's shape: `[]`, `[C]`, `[pos C]` (`[pos 1]`)."""
    target, decomposition = prepared("ln", torch.float64)
    tokens = oracle.tokens_for(target, batch=batch, pos=4)
    for site in ("embed.W_E", "blocks.0.attn.W_K", "blocks.0.attn.W_O", "blocks.1.mlp.W_in", "unembed.W_U"):
        weight = decomposition[site]
        name = weight.site.point_names()[2 if point == "mask" else 3]
        full = (batch, 4, N if point == "mask" else 1)
        for axes in range(len(full) + 1):
            small = torch.rand(full[len(full) - axes :], dtype=torch.float64)
            got = run(decomposition.model, tokens, [(name, lambda _, hook, small=small: small)])
            whole = small.expand(full).clone()
            expected = run(decomposition.model, tokens, [(name, lambda _, hook, whole=whole: whole)])
            assert_close(got, expected, F64, f"{site}: {tuple(small.shape)}")


@pytest.mark.parametrize("pos", [3, 4, 5])
@pytest.mark.parametrize("cfg", [{}, {"n_key_value_heads": 2}, {"n_heads": 1}], ids=["heads", "grouped", "one_head"])
def test_a_delta_by_position_is_not_taken_for_one_by_head(cfg: dict[str, Any], pos: int) -> None:
    """Under split inputs a delta `[batch pos]` may look like `[batch head]` where there are as many of both."""
    target = oracle.tiny_model(use_split_qkv_input=True, dtype=torch.float64, **cfg)
    tokens = oracle.tokens_for(target, batch=2, pos=pos)
    decomposition = swapped(target, ["blocks.0.attn.W_Q", "blocks.0.attn.W_K", "blocks.1.attn.W_V"])
    masks = random_masks(decomposition, decomposition, like=(2, pos))
    hand = copy.deepcopy(target)
    expected = run(hand, tokens, oracle.hand_hooks(hand, masks))
    assert_close(run(decomposition.model, tokens, mask_hooks(decomposition, masks)), expected, F64)


# -- masks together with other hooks ---------------------------------------------------------------------------


def shift(value: Tensor, hook: Any) -> Tensor:
    """A patch that returns a new tensor."""
    return value * 0.5 + torch.linspace(-1, 1, value.shape[-1], dtype=value.dtype)


def shift_in_place(value: Tensor, hook: Any) -> Tensor:
    """A patch that writes in place, as TransformerLens users do."""
    value[:, 1] = torch.linspace(-1, 1, value.shape[-1], dtype=value.dtype)
    return value


PATCHES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "plain": (
        {},
        ["hook_embed", "hook_pos_embed", "blocks.0.hook_resid_pre", "blocks.0.ln1.hook_normalized",
         "blocks.0.attn.hook_q", "blocks.0.attn.hook_v", "blocks.0.attn.hook_pattern", "blocks.0.attn.hook_z",
         "blocks.0.hook_attn_out", "blocks.0.hook_resid_mid", "blocks.0.ln2.hook_scale", "blocks.1.mlp.hook_pre",
         "blocks.1.mlp.hook_post", "blocks.1.hook_mlp_out", "blocks.1.hook_resid_post",
         "ln_final.hook_normalized", "unembed.hook_in", "unembed.hook_out"],
    ),
    "split": (
        {"use_split_qkv_input": True},
        ["blocks.0.hook_q_input", "blocks.1.hook_k_input", "blocks.1.hook_v_input", "blocks.0.attn.hook_k"],
    ),
    "split_gqa": (
        {"use_split_qkv_input": True, "n_key_value_heads": 2}, ["blocks.0.hook_k_input", "blocks.1.hook_v_input"],
    ),
    "attn_in": ({"use_attn_in": True}, ["blocks.1.hook_attn_in"]),
    "mlp_in": ({"use_hook_mlp_in": True}, ["blocks.0.hook_mlp_in"]),
    "result": ({"use_attn_result": True}, ["blocks.0.attn.hook_result", "blocks.1.attn.hook_result"]),
    "gated": (
        {"gated_mlp": True}, ["blocks.0.mlp.hook_pre", "blocks.0.mlp.hook_pre_linear", "blocks.1.mlp.hook_post"],
    ),
    "solu": ({"act_fn": "solu_ln"}, ["blocks.0.mlp.hook_mid", "blocks.0.mlp.ln.hook_normalized"]),
    "no_norm": ({"normalization_type": None}, ["blocks.0.hook_resid_pre", "blocks.0.hook_resid_mid"]),
}  # fmt: skip
every_patch = pytest.mark.parametrize(
    ("cfg", "place"),
    [pytest.param(cfg, place, id=f"{name}-{place}") for name, (cfg, places) in PATCHES.items() for place in places],
)


@every_patch
@pytest.mark.parametrize("patch", [shift, shift_in_place], ids=["new_tensor", "in_place"])
def test_masks_and_a_patch_act_like_the_patched_masked_weights(
    cfg: dict[str, Any], place: str, patch: Callable[..., Tensor]
) -> None:
    target = oracle.tiny_model(dtype=torch.float64, **cfg)
    tokens = oracle.tokens_for(target)
    decomposition = swapped(target)
    masks = random_masks(decomposition, decomposition)
    hooks = mask_hooks(decomposition, masks)
    expected = patched_and_masked(target, masks, tokens, place, patch)
    for order in ([(place, patch), *hooks], [*hooks, (place, patch)]):
        assert_close(run(decomposition.model, tokens, order), expected, F64)


@every_patch
def test_masks_and_a_patch_that_was_there_before_the_swap_act_alike(cfg: dict[str, Any], place: str) -> None:
    target = oracle.tiny_model(dtype=torch.float64, **cfg)
    tokens, pristine = oracle.tokens_for(target), copy.deepcopy(target)
    target.add_perma_hook(place, shift)
    decomposition = decompose(target, dict.fromkeys(oracle.all_sites(target), N))
    masks = random_masks(decomposition, decomposition)
    got = run(decomposition.model, tokens, mask_hooks(decomposition, masks))
    assert_close(got, patched_and_masked(pristine, masks, tokens, place, shift), F64)


def patched_and_masked(
    target: Any, masks: Mapping[str, Masks], tokens: Tensor, place: str, patch: Callable[..., Tensor]
) -> Tensor:
    """Logits of the written copy under the patch."""
    patched = oracle.run_written(target, masks, tokens, [(place, patch)])
    assert_differs(patched, oracle.run_written(target, masks, tokens), 1e-3, "the patch does nothing")
    return patched


def test_capturing_before_the_patch_would_be_noticed() -> None:
    """The mistake the previous test is for: with the input of W_out taken before the patch, the logits differ."""
    target = oracle.tiny_model(dtype=torch.float64)
    tokens = oracle.tokens_for(target)
    site, place = "blocks.1.mlp.W_out", "blocks.1.mlp.hook_post"
    decomposition = swapped(target, [site])
    masks = random_masks(decomposition, [site])
    clean_input = oracle.site_inputs(target, tokens)[site]
    y = oracle.output_by_hand(target, site, clean_input, masks[site])
    stale = run(target, tokens, [(place, shift), (oracle.output_name(target, site), lambda _, hook: y)])
    assert_differs(run(decomposition.model, tokens, [*mask_hooks(decomposition, masks), (place, shift)]), stale, 0.01)


def test_left_padding_keeps_masks_exact() -> None:
    for name in ("ln", "rotary", "shortformer", "gqa"):
        target = CASES[name].build(dtype=torch.float64)
        tokens = oracle.tokens_for(target, batch=3, pos=6)
        attention_mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]])
        decomposition = swapped(target)
        masks = random_masks(decomposition, decomposition)
        assert torch.equal(
            run(decomposition.model, tokens, attention_mask=attention_mask),
            run(target, tokens, attention_mask=attention_mask),
        )
        got = run(decomposition.model, tokens, mask_hooks(decomposition, masks), attention_mask=attention_mask)
        expected = oracle.run_written(target, masks, tokens, attention_mask=attention_mask)
        if "pos_embed.W_pos" not in masks:
            assert_close(got, expected, F64, name)
            continue
        # TransformerLens gives padding the zero vector whatever W_pos is, and so must the masked site.
        assert_close(got, expected, F64, name)
        with decomposition.model.hooks(fwd_hooks=mask_hooks(decomposition, masks)):
            _, cache = decomposition.model.run_with_cache(tokens, attention_mask=attention_mask)
        assert bool((cache["hook_pos_embed"][attention_mask == 0] == 0).all())
        assert bool((cache["hook_W_pos_acts"][attention_mask == 0] == 0).all())
        rows = (attention_mask.cumsum(1) - 1).clamp_min(0)
        expected_acts = decomposition["pos_embed.W_pos"].V.detach()[rows] * attention_mask[..., None]
        assert torch.equal(cache["hook_W_pos_acts"].detach(), expected_acts)


# -- patched activations ---------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("in_place", [False, True], ids=["new_tensor", "in_place"])
def test_a_patched_activation_moves_the_output_by_mask_times_change_through_U(case: Case, in_place: bool) -> None:
    target, decomposition = prepared(case.name, torch.float64)
    tokens = oracle.tokens_for(target, batch=2, pos=5)
    inputs = oracle.site_inputs(target, tokens)
    for site, masks in random_masks(decomposition, decomposition, like=(2, 5)).items():
        x = inputs[site]
        change = torch.zeros(*x.shape[:-1], N, dtype=torch.float64)
        change[:, 2] = torch.linspace(-1, 1, N, dtype=torch.float64)

        def patch(acts: Tensor, hook: Any, *, change: Tensor = change) -> Tensor:
            if in_place:
                acts[:, 2] += change[:, 2]
                return acts
            return acts + change

        acts_name = decomposition[site].site.point_names()[0]
        for these, hooks in [
            (masks, mask_hooks(decomposition, {site: masks})),
            (Masks(masks.V, masks.U, torch.ones(N).double(), torch.ones(()).double()), []),
        ]:
            with torch.no_grad(), decomposition.model.hooks(fwd_hooks=[(acts_name, patch), *hooks]):
                _, cache = decomposition.model.run_with_cache(tokens, names_filter=oracle.output_name(target, site))
            expected = oracle.output_by_hand(target, site, x, these, change)
            assert_close(cache[oracle.output_name(target, site)].detach(), expected, F64, site)


@pytest.mark.parametrize("point", ["acts", "mask", "delta_mask"])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_a_hook_that_writes_in_place_acts_like_one_that_returns_and_leaves_nothing_behind(
    point: str, grad: bool
) -> None:
    target, decomposition = prepared("ln")
    tokens = oracle.tokens_for(target)
    model = decomposition.model

    def in_place(value: Tensor, hook: Any) -> Tensor:
        value[:, 1:3] = 0
        return value

    def in_place_without_return(value: Tensor, hook: Any) -> None:
        value[:, 1:3] = 0

    def returned(value: Tensor, hook: Any) -> Tensor:
        keep = torch.ones(value.shape[1], dtype=value.dtype)
        keep[1:3] = 0
        return value * keep.reshape(-1, *[1] * (value.ndim - 2))

    with torch.set_grad_enabled(grad):
        clean = model(tokens)
        for site, weight in decomposition.items():
            name = weight.site.point_names()[("acts", "importance", "mask", "delta_mask").index(point)]
            expected = model.run_with_hooks(tokens, fwd_hooks=[(name, returned)])
            assert_differs(expected, clean, 1e-4, site)
            for hook in (in_place, in_place_without_return):
                assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=[(name, hook)]), expected), site
            logits, cache = model.run_with_cache(tokens, names_filter=name)
            assert torch.equal(logits, clean)
            if point != "acts":
                assert torch.equal(cache[name], torch.ones_like(cache[name]))


# -- TransformerLens's own tools -------------------------------------------------------------------------------


def test_activation_names_reach_the_new_points() -> None:
    from transformer_lens.utilities import get_act_name

    model = prepared("gated")[1].model
    for short in ("W_Q", "W_K", "W_V", "W_O", "W_gate", "W_in", "W_out"):
        for suffix in ("acts", "importance", "mask", "delta_mask"):
            name = get_act_name(f"{short}_{suffix}", 1)
            assert name in model.hook_dict
            assert model.hook_dict[name].name == name
            assert model.hook_dict[name].layer() == 1


def test_generic_activation_patch_works_on_subcomponents() -> None:
    import pandas as pd
    from transformer_lens.patching import generic_activation_patch

    target, decomposition = prepared("ln", torch.float64)
    clean_tokens, corrupted = oracle.tokens_for(target, batch=1), oracle.tokens_for(target, batch=1, seed=9)
    model = decomposition.model
    _, clean_cache = model.run_with_cache(clean_tokens)

    def metric(logits: Tensor) -> Tensor:
        return logits[0, -1, 3] - logits[0, -1, 4]

    def setter(acts: Tensor, index: list[int], clean: Tensor) -> Tensor:
        _, pos, component = index
        acts[:, pos, component] = clean[:, pos, component]
        return acts

    rows = [(layer, pos, c) for layer in range(2) for pos in (2, 4) for c in (0, 5)]
    frame = pd.DataFrame(rows, columns=["layer", "pos", "component"])
    got = generic_activation_patch(
        model, corrupted, clean_cache, metric, setter, activation_name="W_in_acts", index_df=frame
    )
    assert got.shape == (len(rows),)
    for value, (layer, pos, c) in zip(got, rows, strict=True):
        site = f"blocks.{layer}.mlp.W_in"
        name, weight = oracle.output_name(target, site), decomposition[site]
        clean_x = oracle.site_inputs(target, clean_tokens)[site]
        x = oracle.site_inputs(target, corrupted)[site]
        step = ((clean_x - x)[:, pos] @ weight.V[:, c] * weight.U[c]).detach()

        def add(y: Tensor, hook: Any, *, pos: int = pos, step: Tensor = step) -> Tensor:
            y[:, pos] += step
            return y

        assert float(value) == pytest.approx(float(metric(run(target, corrupted, [(name, add)]))), rel=1e-5, abs=1e-6)


def test_a_cached_run_with_gradients_includes_the_new_points() -> None:
    target = CASES["ln"].build(dtype=torch.float64)
    tokens = oracle.tokens_for(target)
    _, expected = target.run_with_cache(tokens, incl_bwd=True, return_type="loss")
    decomposition = swapped(target)
    _, cache = decomposition.model.run_with_cache(tokens, incl_bwd=True, return_type="loss")
    for name in expected:
        assert_close(cache[name], expected[name], F64, name)
    for weight in decomposition.values():
        acts, _, mask, delta = weight.site.point_names()
        for name in (acts, mask, delta):
            assert cache[f"{name}_grad"].shape == cache[name].shape


# -- refusals --------------------------------------------------------------------------------------------------

REFUSALS: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "moe": (
        {"num_experts": 3, "experts_per_token": 2, "gated_mlp": True, "act_fn": "silu"},
        [f"blocks.{i}.mlp.{w}" for i in range(2) for w in ("W_gate", "W_in", "W_out")],
        "MLP of block . is a MoE.*mixture-of-experts",
    ),
    "norm_before_and_after": (
        {"use_normalization_before_and_after": True, "normalization_type": "RMS"},
        [f"blocks.{i}.{w}" for i in range(2) for w in ("attn.W_O", "mlp.W_out")],
        "normalises its output before hook_(attn|mlp)_out",
    ),
    "post_norm": (
        {"original_architecture": "Olmo2ForCausalLM", "normalization_type": "RMS"},
        [f"blocks.{i}.{w}" for i in range(2) for w in ("attn.W_O", "mlp.W_out")],
        "normalises its output before hook_(attn|mlp)_out",
    ),
    "embedding_norm": ({"post_embedding_ln": True}, ["embed.W_E"], "normalises the embedding before hook_embed"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_weights_without_an_exact_output_place_are_refused_by_name(name: str) -> None:
    cfg, refused, reason = REFUSALS[name]
    model = oracle.tiny_model(**cfg)
    before = list(model.hook_dict)
    for site in refused:
        with pytest.raises(ValueError, match=rf"{site} cannot be decomposed.*{reason}"):
            decompose(model, {site: 3})
    with pytest.raises(ValueError, match="cannot be decomposed"):
        decompose(model, {"*": 3})
    assert list(model.hook_dict) == before


def test_quantised_weights_are_refused_with_the_way_out() -> None:
    model = CASES["ln"].build()
    model.cfg.load_in_4bit = True
    with pytest.raises(ValueError, match=r"4-bit quantised.*load it without load_in_4bit"):
        decompose(model, {"blocks.0.mlp.W_in": 3})


@pytest.mark.parametrize(
    ("cfg", "site"),
    [
        ({"positional_embedding_type": "alibi"}, "pos_embed.W_pos"),
        ({"gated_mlp": True, "act_fn": "solu_ln"}, "blocks.0.mlp.W_in"),  # TransformerLens then leaves W_in out
    ],
)
def test_weights_that_the_forward_pass_never_uses_are_refused(cfg: dict[str, Any], site: str) -> None:
    """The model owns them, but masking them would silently do nothing."""
    with pytest.raises(ValueError, match=site):
        decompose(oracle.tiny_model(**cfg), {site: 3})


# HookedEncoder announces the removal of the class in TransformerLens 4, as HookedTransformer does.
@pytest.mark.filterwarnings("ignore:HookedEncoder is deprecated:DeprecationWarning")
def test_the_blocks_of_an_encoder_are_exact_and_its_embedding_is_refused() -> None:
    from transformer_lens import HookedEncoder

    cfg = {"n_layers": 1, "d_model": 16, "n_heads": 2, "d_head": 8, "d_mlp": 20, "d_vocab": oracle.VOCAB, "n_ctx": 8}
    target = HookedEncoder(
        {**cfg, "act_fn": "gelu", "normalization_type": "LN", "attention_dir": "bidirectional", "device": "cpu"},
        move_to_device=False,
    ).double()
    for parameter in target.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    sites = [site for site in oracle.all_sites(target) if "embed.W_" not in site or "unembed" in site]
    check_weight_oracle(target, swapped(target, sites), F64)
    with pytest.raises(ValueError, match=r"embed\.W_E"):
        decompose(target, {"embed.W_E": 3})


# -- masks compose ---------------------------------------------------------------------------------------------

ids = st.lists(st.integers(0, N - 1), max_size=4)
steps = st.lists(st.tuples(st.sampled_from(["ablate", "keep", "mask"]), ids), min_size=1, max_size=4)


def composed_model() -> tuple[Any, Decomposition, Tensor, str]:
    """One swapped model for all hypothesis examples."""
    target, decomposition = prepared("ln", torch.float64)
    return target, decomposition, oracle.tokens_for(target, batch=1, pos=3), "blocks.0.mlp.W_in"


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(steps, st.randoms(use_true_random=False))
def test_ablate_keep_and_mask_multiply_in_any_order(chosen: list[tuple[str, list[int]]], shuffler: Any) -> None:
    target, decomposition, tokens, site = composed_model()
    mask, delta = torch.ones(N).double(), torch.ones(()).double()
    lists = []
    for kind, members in chosen:
        if kind == "ablate":
            mask[members] = 0
            lists.append(decomposition.ablate({site: members}))
        elif kind == "keep":
            inside = torch.zeros(N).double()
            inside[members] = 1
            mask, delta = mask * inside, delta * 0
            lists.append(decomposition.keep({site: members}))
        else:
            factor = torch.linspace(0.2, 1.4, N).double()
            factor[members] *= 0.5
            mask, delta = mask * factor, delta * 0.7
            lists.append(decomposition.mask({site: factor}, 0.7))
    shuffler.shuffle(lists)
    weight = decomposition[site]
    masks = {site: Masks(weight.V.detach(), weight.U.detach(), mask, delta)}
    got = run(decomposition.model, tokens, [hook for part in lists for hook in part])
    assert_close(got, oracle.run_written(target, masks, tokens), F64)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(ids, st.one_of(st.integers(-50, -1), st.integers(N, 50)), st.sampled_from(["ablate", "keep"]))
def test_ids_out_of_range_are_an_error_that_names_them(members: list[int], wrong: int, kind: str) -> None:
    _, decomposition, _, site = composed_model()
    with pytest.raises(ValueError, match=rf"subcomponents \[{wrong}\] of {site}: expected ids in 0..{N - 1}"):
        getattr(decomposition, kind)({site: [*members, wrong]})


def test_bools_are_not_taken_for_the_ids_0_and_1() -> None:
    _, decomposition, _, site = composed_model()
    with pytest.raises((TypeError, ValueError), match="ids"):
        decomposition.ablate({site: [True, False, True]})


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(batch=st.integers(1, 3), pos=st.integers(1, 6), shape=st.sampled_from(["C", "1 1 C", "b 1 C", "1 p C", "b p C"]))
def test_every_documented_mask_shape_acts_on_its_own_axes(batch: int, pos: int, shape: str) -> None:
    target, decomposition, _, site = composed_model()
    tokens = oracle.tokens_for(target, batch=batch, pos=pos, seed=batch * 10 + pos)
    sizes = {"b": batch, "p": pos, "C": N, "1": 1}
    mask = torch.rand([sizes[axis] for axis in shape.split()]).double()
    weight = decomposition[site]
    full = Masks(weight.V.detach(), weight.U.detach(), mask.expand(batch, pos, N), torch.ones(batch, pos).double())
    x = oracle.site_inputs(target, tokens)[site]
    y = oracle.output_by_hand(target, site, x, full)
    expected = run(target, tokens, [(oracle.output_name(target, site), lambda _, hook: y)])
    assert_close(run(decomposition.model, tokens, decomposition.mask({site: mask})), expected, F64)


@pytest.mark.parametrize("shape", [(4, N), (3, N), (1, 1, 1, N)])
def test_a_mask_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    """`[pos C]` would be read as `[batch 1 C]`, silently wherever batch equals pos."""
    _, decomposition, _, site = composed_model()
    tokens = oracle.tokens_for(decomposition.model, batch=4, pos=4)
    with pytest.raises((ValueError, RuntimeError)):
        run(decomposition.model, tokens, decomposition.mask({site: torch.rand(shape).double()}))


def test_the_default_sites_are_the_mlp() -> None:
    assert list(decompose_layer(CASES["gated"].build(), 1, 3)) == [f"blocks.1.mlp.W_{k}" for k in ("gate", "in", "out")]
    assert list(decompose_layer(CASES["ln"].build(), 0, 3)) == ["blocks.0.mlp.W_in", "blocks.0.mlp.W_out"]
    with pytest.raises(ValueError, match=r"block 0 has no MLP matrices; name sites"):
        decompose_layer(CASES["attn_only"].build(), 0, 3)
