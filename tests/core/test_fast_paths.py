"""Every path that saves work gives what the plain path gives: values and gradients (float64, 1e-10)."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spd_lens import decompose
from spd_lens.core import SiteMask, pointwise_mlp
from tests.bridge_models import boot, random_tokens
from tests.conftest import DEVICES, needs_hooked
from tests.small_models import N_CTX, generator, rand, randn, tiny_transformer, tokens

CLOSE = 1e-10


def gradients(output: Tensor, wanted: list[Tensor], weights: Tensor) -> list[Tensor]:
    found = torch.autograd.grad((output * weights).sum(), wanted, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for g, w in zip(found, wanted, strict=True)]


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    got, expected = got.detach(), expected.detach()
    assert float((got - expected).abs().max()) <= CLOSE * max(1.0, float(expected.abs().max()))


# -- scalar gates ----------------------------------------------------------------------------------------------------


def by_the_formula(a: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor) -> Tensor:
    return (F.gelu(a.unsqueeze(-1) * w_in + b_in) * w_out).sum(-1) + b_out


def mlp_arguments(lead: tuple[int, ...], n_columns: int, width: int, device: str) -> list[Tensor]:
    shapes = [(*lead, n_columns), *[(n_columns, width)] * 3, (n_columns,)]
    return [randn(*shape, seed=i).double().to(device).requires_grad_() for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("entries", [1, 12, 100, 10**6])
@pytest.mark.parametrize("lead", [(7,), (2, 5), (3, 2, 4)])
def test_pointwise_mlps_in_blocks_equal_the_formula(
    device: str, entries: int, lead: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pointwise_mlp, "block_entries", lambda device: entries)
    arguments = mlp_arguments(lead, 5, 3, device)
    weights = randn(*lead, 5, seed=9).double().to(device)
    got, expected = pointwise_mlp.pointwise_mlp(*arguments), by_the_formula(*arguments)
    assert_close(got, expected)
    for ours, plain in zip(gradients(got, arguments, weights), gradients(expected, arguments, weights), strict=True):
        assert_close(ours, plain)


def test_pointwise_mlps_of_many_members_are_those_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pointwise_mlp, "block_entries", lambda device: 40)
    members = [[t + i for t in mlp_arguments((6,), 4, 3, "cpu")] for i in range(3)]
    stacked = [torch.stack([m[i] for m in members]).detach().requires_grad_() for i in range(5)]
    weights = randn(3, 6, 4, seed=9).double()
    got = torch.vmap(pointwise_mlp.pointwise_mlp)(*stacked)
    expected = torch.stack([by_the_formula(*[t[i] for t in stacked]) for i in range(3)])
    assert_close(got, expected)
    for ours, plain in zip(gradients(got, stacked, weights), gradients(expected, stacked, weights), strict=True):
        assert_close(ours, plain)


def test_pointwise_mlps_under_autocast_stay_in_the_dtype_of_the_weights() -> None:
    arguments = [t.detach().float() for t in mlp_arguments((6,), 4, 3, "cpu")]
    expected = by_the_formula(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = pointwise_mlp.pointwise_mlp(*arguments)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


# -- routed rows -----------------------------------------------------------------------------------------------------


def random_masks(decomposition: Any, lead: tuple[int, ...]) -> dict[str, SiteMask]:
    masks = {}
    for i, (name, weight) in enumerate(decomposition.items()):
        mask = rand(*lead, weight.n_subcomponents, seed=10 + i).double().requires_grad_()
        masks[name] = SiteMask(mask, rand(*lead, seed=50 + i).double().requires_grad_())
    return masks


def routings(lead: tuple[int, ...]) -> list[Tensor]:
    some = rand(*lead, seed=3) < 0.5
    return [some, torch.ones(lead, dtype=torch.bool), torch.zeros(lead, dtype=torch.bool)]


def both_ways(decomposition: Any, batch: Tensor, masks: dict[str, SiteMask], routed: dict[str, Tensor]) -> None:
    """Rows alone against all rows with masks of one where a site is not routed."""
    leaves = [t for m in masks.values() for t in (m.mask, m.delta) if t is not None]
    leaves += decomposition.subcomponent_parameters()
    narrow = {name: SiteMask(m.mask, m.delta, routed[name]) for name, m in masks.items()}
    full = {
        name: SiteMask(torch.where(routed[name].unsqueeze(-1), m.mask, 1.0), torch.where(routed[name], m.delta, 1.0))
        for name, m in masks.items()
    }
    got, expected = decomposition.masked_forward(batch, narrow), decomposition.masked_forward(batch, full)
    assert_close(got, expected)
    weights = torch.randn(got.shape, generator=generator(1), dtype=torch.float64)
    for ours, plain in zip(gradients(got, leaves, weights), gradients(expected, leaves, weights), strict=True):
        assert_close(ours, plain)


@pytest.mark.parametrize("which", range(3))
def test_k5_unrouted_rows_that_are_never_computed_equal_masks_of_one(which: int) -> None:
    decomposition = decompose(tiny_transformer().double(), {"*": 6})
    decomposition.to(torch.float64)
    batch, masks = tokens(2), random_masks(decomposition, (2, N_CTX))
    routed = {name: routings((2, N_CTX))[(which + i * (which == 0)) % 3] for i, name in enumerate(decomposition)}
    both_ways(decomposition, batch, masks, routed)


def test_k5_masks_that_all_positions_share_may_leave_out_their_axes() -> None:
    decomposition = decompose(tiny_transformer(), {"blocks.0.mlp.W_in": 6})
    words, mask = tokens(2), rand(6)
    routed = rand(*words.shape, seed=4) < 0.5
    shared = SiteMask(mask, torch.tensor(0.25), routed)
    whole = SiteMask(mask.expand(*words.shape, 6), torch.full(words.shape, 0.25), routed)
    got, expected = (decomposition.masked_forward(words, {"blocks.0.mlp.W_in": one}) for one in (shared, whole))
    assert torch.equal(got, expected)


def test_the_global_gate_names_a_site_that_it_misses() -> None:
    decomposition = decompose(tiny_transformer(), {"blocks.*.mlp.W_in": 6}, gate="global", gate_width=8)
    inputs = decomposition.clean_pass(tokens(2)).inputs
    del inputs["blocks.1.mlp.W_in"]
    with pytest.raises(ValueError, match=r"reads the inputs of all sites, and blocks\.1\.mlp\.W_in is not among"):
        decomposition.pre_importances(inputs)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_k5_on_a_bridge(family: str) -> None:
    model = boot(family).double()
    decomposition = decompose(model, {"blocks.*.mlp.W_*": 6, "blocks.*.attn.W_O": 4})
    decomposition.to(torch.float64)
    masks = random_masks(decomposition, (2, 5))
    both_ways(decomposition, random_tokens(2, 5), masks, dict.fromkeys(decomposition, routings((2, 5))[0]))


# -- passes that start at the first masked block -----------------------------------------------------------------------


def each_site_masked_alone(decomposition: Any, batch: Tensor) -> None:
    clean = decomposition.clean_pass(batch)
    later = {w.site.layer for w in decomposition.values() if w.site.layer} | {decomposition.host.n_layers() - 1}
    assert set(clean.residuals) == later
    masks = random_masks(decomposition, tuple(batch.shape))
    for names in itertools.chain([[name] for name in decomposition], [list(decomposition)[-2:]]):
        chosen = {name: SiteMask(masks[name].mask.float(), masks[name].delta.float()) for name in names}
        whole = decomposition.masked_forward(batch, chosen)
        assert torch.equal(decomposition.masked_forward(batch, chosen, residuals=clean.residuals), whole)


def test_a_pass_from_the_first_masked_block_equals_the_whole_pass() -> None:
    each_site_masked_alone(decompose(tiny_transformer(), {"*": 6}), tokens(2))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_pass_from_the_first_masked_block_equals_the_whole_pass_on_a_bridge(family: str) -> None:
    patterns = {"blocks.*.mlp.W_*": 6, "blocks.*.attn.W_O": 4, "unembed.W_U": 4}
    each_site_masked_alone(decompose(boot(family), patterns), random_tokens(2, 5))


@needs_hooked
def test_blocks_before_the_first_masked_one_run_once_a_step() -> None:
    decomposition = decompose(tiny_transformer(), {"blocks.1.mlp.W_*": 6})
    calls: list[int] = []
    for layer, block in enumerate(decomposition.model.blocks):
        block.register_forward_hook(lambda *_, layer=layer: calls.append(layer))
    clean = decomposition.clean_pass(tokens(2))
    assert calls == [0, 1]
    for _ in range(2):
        decomposition.masked_forward(tokens(2), {}, residuals=clean.residuals)
        masks = {name: SiteMask(torch.zeros(6)) for name in decomposition}
        decomposition.masked_forward(tokens(2), masks, residuals=clean.residuals)
    tried = [0, 1, 1]  # once, whether a pass from block 1 gives what the whole pass gives
    assert calls == [0, 1, 0, 1, *tried, 1, 0, 1, 1]


@needs_hooked
def test_models_that_carry_more_than_the_residual_stream_run_whole_passes() -> None:
    model: Any = tiny_transformer()
    model.cfg.positional_embedding_type = "shortformer"
    decomposition = decompose(model, {"blocks.1.mlp.W_*": 6})
    assert decomposition.clean_pass(tokens(2)).residuals == {}
