"""Activation, attribution and path patching against TransformerLens's own patching, hooks by hand, and arithmetic."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from transformer_lens import patching as tl_patching

from spd_lens import Decomposition, decompose
from spd_lens.core import Unit, units_of
from spd_lens.patching import Frozen, activation_patching, attribution_patching, direct_changes, path_patching
from tests import bridge_models, oracle
from tests.conftest import needs_hooked
from tests.small_models import tiny_transformer, tokens

IN, OUT = "blocks.0.mlp.W_in", "blocks.1.mlp.W_out"
CLEAN, CORRUPTED = tokens(3, seed=1), tokens(3, seed=2)


def metric(logits: Tensor) -> Tensor:
    """One number per row, not linear in the logits."""
    return logits[:, -1].log_softmax(-1)[:, 3] + 0.3 * logits.log_softmax(-1)[:, :, 5].mean(1)


@pytest.fixture
def decomposition() -> Decomposition:
    sites = {"blocks.*.mlp.W_*": 6, "blocks.*.attn.W_[VO]": 5, "unembed.W_U": 4, "embed.W_E": 7}
    return decompose(tiny_transformer(), sites, gate="shared", gate_width=8)


def clean_cache(decomposition: Decomposition, clean: Tensor = CLEAN) -> Any:
    with torch.no_grad():
        return decomposition.model.run_with_cache(clean)[1]


# -- exact activation patching -----------------------------------------------------------------------------------


def test_patching_equals_transformer_lens_patching_one_at_a_time(decomposition: Decomposition) -> None:
    decomposition.model.eval()
    cache = clean_cache(decomposition)
    got = activation_patching(decomposition, CORRUPTED, cache, metric, {"blocks.1.mlp.W_in": [0, 4]})
    rows = pd.DataFrame([(1, p, c) for c in (0, 4) for p in range(CORRUPTED.shape[1])], columns=["layer", "pos", "c"])

    def setter(acts: Tensor, index: list[int], clean: Tensor) -> Tensor:
        _, p, c = index
        acts[:, p, c] = clean[:, p, c]
        return acts

    with torch.no_grad():
        expected = tl_patching.generic_activation_patch(
            decomposition.model,
            CORRUPTED,
            cache,
            lambda logits: metric(logits).mean(),
            setter,
            "W_in_acts",
            index_df=rows,
        )
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(got.values.mean(-1).flatten(), expected, rtol=0, atol=1e-5)
    assert float(got.effects.abs().max()) > 1e-3


@needs_hooked
@pytest.mark.parametrize("name", ["ln", "gqa", "split_qkv", "llama_gqa_folded"])
def test_patching_is_the_clean_activation_written_in_by_hand(name: str) -> None:
    target = oracle.CASES[name].build(dtype=torch.float64)
    decomposition = decompose(copy.deepcopy(target), dict.fromkeys(oracle.all_sites(target), 5))
    clean, corrupted = oracle.tokens_for(target), oracle.tokens_for(target, seed=4)
    inputs = [oracle.site_inputs(target, t) for t in (clean, corrupted)]
    for site, weight in decomposition.items():
        V, U = weight.V.detach(), weight.U.detach()
        got = activation_patching(decomposition, corrupted, clean, metric, {site: [2]}, positions=[3])
        # Under split inputs a subcomponent has one activation per head; all of them are patched.
        change = torch.zeros_like(inputs[0][site] @ V)
        change[:, 3, ..., 2] = ((inputs[0][site] - inputs[1][site]) @ V)[:, 3, ..., 2]
        masks = {site: oracle.Masks(V, U, torch.ones(5, dtype=torch.float64), torch.ones((), dtype=torch.float64))}
        hand = copy.deepcopy(target)
        with torch.no_grad(), hand.hooks(fwd_hooks=oracle.hand_hooks(hand, masks, {site: change})):
            torch.testing.assert_close(got.values[0, 0], metric(hand(corrupted)), rtol=0, atol=1e-9)
        with torch.no_grad():
            torch.testing.assert_close(got.baseline, metric(target(corrupted)), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("family", "mode"), [("gpt2", "raw"), ("llama", "compatibility"), ("gemma2", "raw")])
def test_batched_patching_on_bridges_equals_one_hook_at_a_time(family: str, mode: str) -> None:
    decomposition = bridge_models.swapped(family, mode)
    clean, corrupted = bridge_models.random_tokens(2), bridge_models.random_tokens(2, seed=3)
    ids = {site: [1] for site in decomposition}
    got = activation_patching(decomposition, corrupted, clean, metric, ids, positions=[0, 4])
    cache = clean_cache(decomposition, clean)
    for u, site in enumerate(ids):
        name = decomposition[site].site.point_names()[0]
        for k, p in enumerate((0, 4)):

            def patch(acts: Tensor, hook: Any, name: str = name, p: int = p) -> Tensor:
                acts[:, p, 1] = cache[name][:, p, 1]
                return acts

            expected = metric(bridge_models.run(decomposition.model, corrupted, [(name, patch)]))
            torch.testing.assert_close(got.values[u, k], expected, rtol=1e-4, atol=1e-4)


def test_a_cache_and_clean_tokens_are_the_same_and_tokens_know_the_target(decomposition: Decomposition) -> None:
    by_tokens = activation_patching(decomposition, CORRUPTED, CLEAN, metric, {IN: [1], OUT: [2]})
    by_cache = activation_patching(decomposition, CORRUPTED, clean_cache(decomposition), metric, {IN: [1], OUT: [2]})
    torch.testing.assert_close(by_tokens.values, by_cache.values)
    with torch.no_grad():
        torch.testing.assert_close(by_tokens.clean_metric, metric(decomposition.model(CLEAN)))
    span = float((by_tokens.clean_metric - by_tokens.baseline).mean())  # pyright: ignore
    torch.testing.assert_close(by_tokens.recovered, by_tokens.effects / span)
    with pytest.raises(ValueError, match="give clean tokens instead of a cache"):
        _ = by_cache.recovered


def test_patching_all_of_a_complete_embedding_recovers_everything() -> None:
    decomposition = decompose(tiny_transformer(), {"embed.W_E": 40}, init="exact")
    everything = {"embed.W_E": [range(40)]}
    got = activation_patching(decomposition, CORRUPTED, CLEAN, metric, everything, positions=None)
    torch.testing.assert_close(got.recovered, torch.ones(1, 1), rtol=0, atol=1e-3)
    nothing = activation_patching(decomposition, CORRUPTED, CORRUPTED, metric, everything, positions=None)
    assert float(nothing.effects.abs().max()) < 1e-6


# -- attribution patching ----------------------------------------------------------------------------------------


def test_attributions_are_the_slope_of_patching() -> None:
    """Central differences in float64: patch a small part of the way, both ways."""
    decomposition = decompose(
        tiny_transformer(dtype=torch.float64), {"blocks.*.mlp.W_*": 4, "blocks.*.attn.W_[VO]": 4, "embed.W_E": 4}
    )
    got = attribution_patching(decomposition, CORRUPTED, CLEAN, metric, positions=[5, 11], n_checked=0)
    clean, corrupted = clean_cache(decomposition), clean_cache(decomposition, CORRUPTED)
    eps = 1e-5
    for u, unit in enumerate(got.effects.units):
        ((site, c),) = unit.members
        name = decomposition[site].site.point_names()[0]
        for k, p in enumerate((5, 11)):
            values = []
            for sign in (eps, -eps):
                cache = {name: corrupted[name] + sign * (clean[name] - corrupted[name])}
                one = activation_patching(decomposition, CORRUPTED, cache, metric, {site: [c]}, positions=[p])
                values.append(one.values[0, 0])
            slope = (values[0] - values[1]) / (2 * eps)
            estimate = got.effects.values[u, k] - got.effects.baseline
            torch.testing.assert_close(estimate, slope, rtol=1e-5, atol=1e-8)
    assert float(got.effects.effects.abs().max()) > 1e-3


def test_attributions_are_exact_where_the_metric_is_linear(decomposition: Decomposition) -> None:
    def linear(logits: Tensor) -> Tensor:
        return logits[:, -1, 3] - logits[:, -1, 5]

    for positions in (None, "each"):
        arguments = (decomposition, CORRUPTED, CLEAN, linear, {"unembed.W_U": [[0, 1], 2]})
        exact = activation_patching(*arguments, positions=positions)
        estimate = attribution_patching(*arguments, positions=positions)
        torch.testing.assert_close(estimate.effects.effects.float(), exact.effects, rtol=0, atol=1e-4)
        assert estimate.agreement is not None
        assert estimate.agreement.correlation == pytest.approx(1.0, abs=1e-4)


def test_a_scalar_metric_gives_the_same_attributions(decomposition: Decomposition) -> None:
    per_row = attribution_patching(decomposition, CORRUPTED, CLEAN, metric, {IN: None}, n_checked=0)
    scalar = attribution_patching(
        decomposition, CORRUPTED, CLEAN, lambda logits: metric(logits).mean(), {IN: None}, n_checked=0
    )
    assert scalar.effects.values.shape == (6, 12, 1)
    torch.testing.assert_close(scalar.effects.effects, per_row.effects.effects, rtol=0, atol=1e-6)


def test_the_agreement_is_measured_on_the_strongest_and_on_random_cells(decomposition: Decomposition) -> None:
    got = attribution_patching(decomposition, CORRUPTED, CLEAN, metric, {IN: None, OUT: None}, n_checked=20)
    exact = activation_patching(decomposition, CORRUPTED, CLEAN, metric, {IN: None, OUT: None})
    agreement = got.agreement
    assert agreement is not None
    assert len(agreement.measured) == 20
    flat = {round(float(e), 9): float(x) for e, x in zip(got.effects.effects.flatten(), exact.effects.flatten())}  # noqa: B905
    for estimate, measured in zip(agreement.predicted, agreement.measured, strict=True):
        assert flat[round(float(estimate), 9)] == pytest.approx(float(measured), abs=1e-5)
    largest = got.effects.effects.flatten().abs().sort(descending=True).values[:10]
    torch.testing.assert_close(torch.tensor(agreement.predicted[:10], dtype=largest.dtype).abs(), largest)
    expected = np.corrcoef(agreement.predicted, agreement.measured)[0, 1]
    assert agreement.correlation == pytest.approx(expected, abs=1e-6)
    assert 0.5 < agreement.correlation < 1
    assert f"correlation with exact patching {agreement.correlation:.3f} on 20 cells" in str(got)
    assert "not compared" in str(attribution_patching(decomposition, CORRUPTED, CLEAN, metric, {IN: [0]}, n_checked=0))


def test_gradients_do_not_reach_the_model(decomposition: Decomposition) -> None:
    with torch.no_grad():  # as after torch.set_grad_enabled(False), which notebooks like
        attribution_patching(decomposition, CORRUPTED, CLEAN, metric, {IN: [0]}, n_checked=2)
    assert all(p.grad is None for p in decomposition.model.parameters())


# -- path patching: arithmetic by hand ---------------------------------------------------------------------------

LINEAR = {"attn_only": True, "normalization_type": None}


def factors(decomposition: Decomposition, site: str, c: int) -> tuple[Tensor, Tensor]:
    return decomposition[site].V.detach()[:, c], decomposition[site].U.detach()[c]


def cached(model: Any, rows: Tensor) -> Any:
    with torch.no_grad():
        return model.run_with_cache(rows)[1]


@needs_hooked
def test_direct_paths_of_a_linear_model_are_products_of_matrices() -> None:
    target = oracle.tiny_model(dtype=torch.float64, **LINEAR)
    sites = [s for s in oracle.all_sites(target) if "attn" in s]
    decomposition = decompose(copy.deepcopy(target), dict.fromkeys(sites, 5))
    clean, corrupted = oracle.tokens_for(target, seed=3), oracle.tokens_for(target, seed=4)
    o, v, v1 = "blocks.0.attn.W_O", "blocks.0.attn.W_V", "blocks.1.attn.W_V"
    got = path_patching(decomposition, corrupted, clean, metric, senders={o: [1], v: [2]}, receivers={v1: [3, 0]})
    inputs = [oracle.site_inputs(target, t) for t in (clean, corrupted)]
    (V_s, U_s) = factors(decomposition, o, 1)
    moved = (inputs[0][o] - inputs[1][o]) @ V_s
    for r, c in enumerate((3, 0)):
        # Through the residual stream alone; block 1 reads at the position where block 0 wrote.
        torch.testing.assert_close(got.direct_change[0, r], moved * (U_s @ factors(decomposition, v1, c)[0]))
    # Everything that W_V does passes W_O, which is held.
    assert float(got.direct_change[1].abs().max()) < 1e-12
    assert float(got.effects[1].abs().max()) < 1e-9
    assert float(got.total.effects[1].abs().max()) > 1e-3

    # Step 2: the receiver moved by hand in a corrupted run.
    V, U = decomposition[v1].V.detach(), decomposition[v1].U.detach()
    for r, c in enumerate((3, 0)):
        change = torch.zeros(*corrupted.shape, 5, dtype=torch.float64)
        change[..., c] = got.direct_change[0, r]
        ones = torch.ones(5, dtype=torch.float64)
        hand = copy.deepcopy(target)
        hooks = oracle.hand_hooks(hand, {v1: oracle.Masks(V, U, ones, ones[0])}, {v1: change})
        with torch.no_grad(), hand.hooks(fwd_hooks=hooks):
            torch.testing.assert_close(got.values[0, r], metric(hand(corrupted)), rtol=0, atol=1e-9)
    assert float(got.effects[0].abs().max()) > 1e-3
    assert "frozen: attention, norms, delta; live: nothing" in str(got)


@needs_hooked
def test_direct_paths_cross_positions_through_frozen_or_live_attention() -> None:
    target = oracle.tiny_model(dtype=torch.float64, **LINEAR)
    q, v, o = (f"blocks.0.attn.W_{kind}" for kind in "QVO")
    decomposition = decompose(copy.deepcopy(target), dict.fromkeys((q, v, o), 5))
    clean, corrupted = oracle.tokens_for(target, seed=3), oracle.tokens_for(target, seed=4)
    inputs = [oracle.site_inputs(target, t) for t in (clean, corrupted)]
    cache = cached(target, corrupted)
    arguments = (decomposition, corrupted, clean, metric)
    V_r = factors(decomposition, o, 4)[0]

    got = path_patching(*arguments, senders={v: [2], q: [1]}, receivers={o: [4]}, sender_position=1)
    V_s, U_s = factors(decomposition, v, 2)
    moved = torch.zeros(corrupted.shape, dtype=torch.float64)
    moved[:, 1] = ((inputs[0][v] - inputs[1][v]) @ V_s)[:, 1]
    per_head = U_s.unflatten(0, (4, 6))
    pattern = cache["blocks.0.attn.hook_pattern"]
    z = torch.einsum("bhqk,bk,hd->bqhd", pattern, moved, per_head)
    torch.testing.assert_close(got.direct_change[0, 0], z.flatten(2) @ V_r)
    assert float(got.direct_change[0, 0, :, 2:].abs().max()) > 1e-3  # later positions than the sender's
    # A query changes nothing but the pattern.
    assert float(got.direct_change[1].abs().max()) < 1e-12

    live = path_patching(*arguments, senders={q: [1]}, receivers={o: [4]}, frozen=Frozen(attention=False))
    V_s, U_s = factors(decomposition, q, 1)
    query = cache["blocks.0.attn.hook_q"] + (((inputs[0][q] - inputs[1][q]) @ V_s)[..., None] * U_s).unflatten(
        -1, (4, 6)
    )
    scores = torch.einsum("bqhd,bkhd->bhqk", query, cache["blocks.0.attn.hook_k"]) / 6**0.5
    allowed = torch.ones(scores.shape[-2:]).tril().bool()
    changed = scores.masked_fill(~allowed, -torch.inf).softmax(-1) - pattern
    z = torch.einsum("bhqk,bkhd->bqhd", changed, cache["blocks.0.attn.hook_v"])
    torch.testing.assert_close(live.direct_change[0, 0], z.flatten(2) @ V_r)
    assert float(live.direct_change.abs().max()) > 1e-3


@needs_hooked
def test_the_delta_of_held_sites_is_frozen_or_passes() -> None:
    target = oracle.tiny_model(dtype=torch.float64, **LINEAR)
    v, o, v1 = "blocks.0.attn.W_V", "blocks.0.attn.W_O", "blocks.1.attn.W_V"
    decomposition = decompose(copy.deepcopy(target), dict.fromkeys((v, o, v1), 5))
    clean, corrupted = oracle.tokens_for(target, seed=3), oracle.tokens_for(target, seed=4)
    inputs = [oracle.site_inputs(target, t) for t in (clean, corrupted)]
    arguments = (decomposition, corrupted, clean, metric)
    frozen = path_patching(*arguments, senders={v: [2]}, receivers={v1: [3]})
    live = path_patching(*arguments, senders={v: [2]}, receivers={v1: [3]}, frozen=Frozen(delta=False))
    assert float(frozen.direct_change.abs().max()) < 1e-12
    V_s, U_s = factors(decomposition, v, 2)
    moved = (inputs[0][v] - inputs[1][v]) @ V_s
    pattern = cached(target, corrupted)["blocks.0.attn.hook_pattern"]
    z = torch.einsum("bhqk,bk,hd->bqhd", pattern, moved, U_s.unflatten(0, (4, 6))).flatten(2)
    weight = decomposition[o]
    unexplained = oracle.weight_of(target, o) - weight.weight.detach()
    torch.testing.assert_close(live.direct_change[0, 0], z @ unexplained @ factors(decomposition, v1, 3)[0])
    # With W_O not decomposed, the path through all of it is direct.
    other = decompose(copy.deepcopy(target), dict.fromkeys((v, v1), 5))
    other.load_tensors({name: t.detach().clone() for name, t in decomposition.tensors().items() if f"{o}." not in name})
    through = path_patching(other, corrupted, clean, metric, senders={v: [2]}, receivers={v1: [3]})
    expected = z @ oracle.weight_of(target, o) @ factors(decomposition, v1, 3)[0]
    torch.testing.assert_close(through.direct_change[0, 0], expected)


@needs_hooked
def test_normalisation_scales_are_frozen_or_live_and_the_mlp_is_not_linear() -> None:
    target = oracle.CASES["ln"].build(dtype=torch.float64)
    decomposition = decompose(copy.deepcopy(target), dict.fromkeys(oracle.all_sites(target), 5))
    clean, corrupted = oracle.tokens_for(target, seed=3), oracle.tokens_for(target, seed=4)
    inputs = [oracle.site_inputs(target, t) for t in (clean, corrupted)]
    cache = cached(target, corrupted)
    arguments = (decomposition, corrupted, clean, metric)
    out, into = "blocks.0.mlp.W_out", "blocks.1.mlp.W_in"
    V_s, U_s = factors(decomposition, out, 2)
    V_r = factors(decomposition, into, 3)[0]
    stream = ((inputs[0][out] - inputs[1][out]) @ V_s)[..., None] * U_s
    ln = target.blocks[1].ln2
    got = path_patching(*arguments, senders={out: [2]}, receivers={into: [3]})
    centred = stream - stream.mean(-1, keepdim=True)
    expected = (centred / cache["blocks.1.ln2.hook_scale"] * ln.w) @ V_r
    torch.testing.assert_close(got.direct_change[0, 0], expected.detach())
    live = path_patching(*arguments, senders={out: [2]}, receivers={into: [3]}, frozen=Frozen(norms=False))
    expected = (ln(cache["blocks.1.hook_resid_mid"] + stream) - ln(cache["blocks.1.hook_resid_mid"])) @ V_r
    torch.testing.assert_close(live.direct_change[0, 0], expected.detach())
    assert float((live.direct_change - got.direct_change).abs().max()) > 1e-3

    V_s, U_s = factors(decomposition, into, 1)
    pre = cache["blocks.1.mlp.hook_pre"]
    after = torch.nn.functional.gelu(pre + ((inputs[0][into] - inputs[1][into]) @ V_s)[..., None] * U_s)
    expected = (after - torch.nn.functional.gelu(pre)) @ factors(decomposition, OUT, 0)[0]
    got = path_patching(*arguments, senders={into: [1]}, receivers={OUT: [0]})
    torch.testing.assert_close(got.direct_change[0, 0], expected)


@needs_hooked
def test_inputs_split_by_head_give_the_same_paths_for_every_head() -> None:
    target = oracle.CASES["ln"].build(dtype=torch.float64)
    decomposition = decompose(copy.deepcopy(target), dict.fromkeys(oracle.all_sites(target), 5))
    arguments: Any = (decomposition, oracle.tokens_for(target, seed=4), oracle.tokens_for(target, seed=3), metric)
    senders = {"blocks.0.attn.W_V": [2], "blocks.0.attn.W_O": [1]}
    receivers = {"blocks.1.attn.W_V": [3], "blocks.1.mlp.W_in": [0]}
    whole = path_patching(*arguments, senders=senders, receivers=receivers)
    output = path_patching(*arguments, senders={"blocks.0.attn.W_V": [2]}, receivers={"blocks.0.attn.W_O": [3]})
    decomposition.model.set_use_split_qkv_input(True)
    split = path_patching(*arguments, senders=senders, receivers={"blocks.1.attn.W_V": [3]})
    torch.testing.assert_close(split.direct_change, whole.direct_change[:, :1, ..., None].expand(-1, -1, -1, -1, 4))
    torch.testing.assert_close(split.values, whole.values[:, :1])
    split = path_patching(*arguments, senders={"blocks.0.attn.W_V": [2]}, receivers={"blocks.0.attn.W_O": [3]})
    torch.testing.assert_close(split.direct_change, output.direct_change)
    assert float(output.direct_change.abs().max()) > 1e-3


@pytest.mark.parametrize("mode", ["raw", "compatibility"])
def test_direct_paths_on_a_bridge_are_the_arithmetic_of_its_weights(mode: str) -> None:
    decomposition = bridge_models.swapped("gpt2", mode)
    clean, corrupted = bridge_models.random_tokens(2), bridge_models.random_tokens(2, seed=3)
    out, into = "blocks.0.mlp.W_out", "blocks.1.mlp.W_in"
    got = path_patching(decomposition, corrupted, clean, metric, senders={out: None}, receivers={into: [3, 1]})
    a, a_clean = (clean_cache(decomposition, t)["blocks.0.hook_W_out_acts"] for t in (corrupted, clean))
    cache = clean_cache(decomposition, corrupted)
    # Folded norms have no weight left.
    weight = bridge_models.pristine("gpt2").transformer.h[1].ln_2.weight if mode == "raw" else 1.0  # pyright: ignore
    resid = cache["blocks.1.hook_resid_mid"]
    scale = (resid.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    for s in range(bridge_models.N):
        V_r = decomposition[into].V.detach()
        stream = (a_clean - a)[..., s : s + 1] * decomposition[out].U.detach()[s]
        expected = ((stream - stream.mean(-1, keepdim=True)) / scale * weight) @ V_r
        for r, c in enumerate((3, 1)):
            bridge_models.assert_close(got.direct_change[s, r], expected[..., c], 1e-4)


def test_senders_together_equal_senders_alone_and_keep_their_order(decomposition: Decomposition) -> None:
    # The second starts at block 1, the others at the beginning.
    senders: Any = {
        "blocks.0.mlp.W_out": [2, 0],
        "blocks.1.attn.W_V": [4],
        "embed.W_E": [1],
        "blocks.0.attn.W_O": [[0, 3]],
    }
    receivers = {"blocks.1.mlp.W_in": [1], "unembed.W_U": [0]}
    arguments = (decomposition, CORRUPTED, CLEAN, metric)
    for frozen in (Frozen(), Frozen(delta=False), Frozen(attention=False, norms=False)):
        together = path_patching(*arguments, senders=senders, receivers=receivers, frozen=frozen)
        alone = path_patching(*arguments, senders=senders, receivers=receivers, frozen=frozen, per_pass=1)
        torch.testing.assert_close(together.direct_change, alone.direct_change, rtol=0, atol=1e-5)
        torch.testing.assert_close(together.values, alone.values, rtol=0, atol=1e-5)
        assert float(together.effects.abs().max()) > 1e-5
        for s, unit in enumerate(together.senders):
            site = unit.sites[0]
            one = path_patching(*arguments, senders=[{site: unit.ids_at(site)}], receivers=receivers, frozen=frozen)
            torch.testing.assert_close(together.direct_change[s], one.direct_change[0], rtol=0, atol=1e-5)
    exact = activation_patching(
        *arguments, [{u.sites[0]: u.ids_at(u.sites[0])} for u in together.senders], positions=None
    )
    torch.testing.assert_close(together.total.effects, exact.effects)


def test_positions_restrict_the_sender_and_the_receiver(decomposition: Decomposition) -> None:
    senders, receivers = {"blocks.0.mlp.W_out": [2]}, {"blocks.1.mlp.W_in": [1]}
    arguments = (decomposition, CORRUPTED, CLEAN, metric)
    got = path_patching(*arguments, senders=senders, receivers=receivers, sender_position=4)
    elsewhere = got.direct_change.clone()
    elsewhere[..., 4] = 0
    assert float(elsewhere.abs().max()) < 1e-6  # no attention between the two
    assert float(got.direct_change[..., 4].abs().max()) > 1e-4
    total = activation_patching(*arguments, {"blocks.0.mlp.W_out": [2]}, positions=[4])
    torch.testing.assert_close(got.total.values, total.values)
    everywhere = path_patching(*arguments, senders=senders, receivers=receivers)
    read = path_patching(*arguments, senders=senders, receivers=receivers, receiver_position=-8)
    torch.testing.assert_close(read.direct_change[..., 4], everywhere.direct_change[..., 4])
    torch.testing.assert_close(read.values, got.values, rtol=0, atol=1e-6)


def test_a_receiver_is_read_at_the_positions_that_it_names_itself(decomposition: Decomposition) -> None:
    arguments: Any = (decomposition, CORRUPTED, CLEAN, metric)
    site, senders = "blocks.1.mlp.W_in", {"blocks.0.mlp.W_out": [2]}
    named = [Unit(((site, 1),), (4,)), Unit(((site, 1),), (6, -1)), Unit(((site, 1),))]
    got = path_patching(*arguments, senders=senders, receivers=named)
    alone = path_patching(*arguments, senders=senders, receivers={site: [1]}, receiver_position=4)
    torch.testing.assert_close(got.direct_change[:, 0], alone.direct_change[:, 0])
    torch.testing.assert_close(got.values[:, 0], alone.values[:, 0])
    length = CORRUPTED.shape[1]
    moved = got.direct_change[0].abs().amax(1) > 0
    assert [row.nonzero().squeeze(1).tolist() for row in moved] == [[4], [6, length - 1], list(range(length))]
    with pytest.raises(ValueError, match=r"W_in\[1\] @4 has positions of its own, and positions=\[3\] is given"):
        path_patching(*arguments, senders=senders, receivers=named[:1], receiver_position=3)


def test_ablating_a_sender_is_a_direct_change_too(decomposition: Decomposition) -> None:
    """C2's intervention: the change is minus what the sender's activation contributes."""
    site, into = "blocks.0.mlp.W_out", "blocks.1.mlp.W_in"
    arguments = (units_of(decomposition, {site: [2]}), units_of(decomposition, {into: [1]}))
    zero = direct_changes(decomposition, CORRUPTED, {site: torch.zeros(())}, *arguments)
    double = direct_changes(
        decomposition,
        CORRUPTED,
        {site: 2 * clean_cache(decomposition, CORRUPTED)["blocks.0.hook_W_out_acts"]},
        *arguments,
    )
    torch.testing.assert_close(zero, -double, rtol=0, atol=1e-5)
    assert float(zero.abs().max()) > 1e-4


# -- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clean", "text"),
    [
        (tokens(3)[:, :9], r"clean tokens have shape \(3, 9\), corrupted ones \(3, 12\); patching needs"),
        (tokens(3) + 40, "clean tokens: token ids run from"),
        ({"blocks.0.hook_W_in_act": 1}, r"no 'blocks.0.hook_W_in_acts' \(near: 'blocks.0.hook_W_in_act'\); make"),
        ({"blocks.0.hook_W_in_acts": torch.zeros(12, 6)}, "and a cache with its batch axis"),
    ],
)  # fmt: skip
def test_clean_runs_that_do_not_fit_are_named(
    decomposition: Decomposition, without_type_checks: None, clean: Any, text: str
) -> None:
    for function in (activation_patching, attribution_patching):
        with pytest.raises(ValueError, match=text):
            function(decomposition, CORRUPTED, clean, metric, {IN: [1]})
    with pytest.raises(ValueError, match=text):
        path_patching(decomposition, CORRUPTED, clean, metric, senders={IN: [1]}, receivers={OUT: [1]})


def test_other_mistakes_are_named(decomposition: Decomposition, without_type_checks: None) -> None:
    with pytest.raises(TypeError, match="clean is a int; expected clean tokens"):
        activation_patching(decomposition, CORRUPTED, 3, metric, {IN: [1]})
    with pytest.raises(ValueError, match="the metric gives no gradient"):
        attribution_patching(decomposition, CORRUPTED, CLEAN, lambda logits: metric(logits).detach(), {IN: [1]})
    with pytest.raises(ValueError, match=r"there is no path .*W_out\[1\] -> .*W_in\[1\]: .*W_in does not run after"):
        path_patching(decomposition, CORRUPTED, CLEAN, metric, senders={OUT: [1]}, receivers={IN: [1]})
    with pytest.raises(ValueError, match=r"there is no path .*W_in\[1\] -> .*W_in\[2\]: .*W_in does not run after"):
        path_patching(decomposition, CORRUPTED, CLEAN, metric, senders={IN: [1]}, receivers={IN: [2]})
    with pytest.raises(ValueError, match="a sender is at one site"):
        path_patching(decomposition, CORRUPTED, CLEAN, metric, senders=[{IN: [1], OUT: [1]}], receivers={OUT: [0]})
    with pytest.raises(ValueError, match="a receiver is a single subcomponent"):
        path_patching(decomposition, CORRUPTED, CLEAN, metric, senders={IN: [1]}, receivers={OUT: [[0, 1]]})
    with pytest.raises(ValueError, match=r"positions \[12\]: expected some of 0..11"):
        path_patching(
            decomposition, CORRUPTED, CLEAN, metric, senders={IN: [1]}, receivers={OUT: [0]}, receiver_position=12
        )
