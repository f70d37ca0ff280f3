"""Dtypes and modes at the border: masks from numpy, models cast after the swap, torch.func, inference mode, compile."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spd_lens import Decomposition, decompose
from spd_lens.core import GateOfAll, SiteMask, relative_faithfulness
from spd_lens.models import load_tiny_lm
from tests.bridge_models import boot
from tests.conftest import needs_hooked
from tests.small_models import tiny_transformer, tokens

SITE = "blocks.0.mlp.W_in"


def decomposed(dtype: torch.dtype = torch.float32, **kwargs: Any) -> Decomposition:
    return decompose(tiny_transformer(dtype=dtype), {"blocks.*.mlp.W_in": 6}, **kwargs)


def logits(decomposition: Decomposition, hooks: list[tuple[str, Any]]) -> Tensor:
    return decomposition.model.run_with_hooks(tokens(2), fwd_hooks=hooks)


@pytest.mark.parametrize("kind", ["float64", "float16", "bool", "int", "numpy", "numpy bool"])
def test_masks_of_any_dtype_act_as_the_same_numbers_in_float32(kind: str) -> None:
    decomposition = decomposed()
    plain = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    given: Any = {
        "float64": plain.double(), "float16": plain.half(), "bool": plain.bool(), "int": plain.long(),
        "numpy": plain.double().numpy(), "numpy bool": plain.bool().numpy(),
    }[kind]  # fmt: skip
    expected = logits(decomposition, decomposition.mask({SITE: plain}))
    assert torch.equal(logits(decomposition, decomposition.mask({SITE: given})), expected)
    returned = torch.as_tensor(given)
    hook = [("blocks.0.hook_W_in_mask", lambda value, hook: returned)]
    assert torch.equal(logits(decomposition, hook), expected)
    with torch.no_grad():
        masked = decomposition.masked_forward(tokens(2), {SITE: SiteMask(plain)})
        if returned.is_floating_point():
            assert torch.equal(decomposition.masked_forward(tokens(2), {SITE: SiteMask(returned)}), masked)


def test_deltas_and_activations_of_other_dtypes_act_as_float32() -> None:
    decomposition = decomposed()
    delta = np.random.default_rng(0).random((2, 12))
    expected = logits(decomposition, decomposition.mask({}, {SITE: torch.tensor(delta, dtype=torch.float32)}))
    assert torch.allclose(logits(decomposition, decomposition.mask({}, {SITE: delta})), expected)
    for change in (lambda a: a.double() * 2, lambda a: a * 2):
        doubled = logits(decomposition, [("blocks.0.hook_W_in_acts", lambda a, hook, change=change: change(a))])
    assert doubled.dtype == torch.float32


def test_a_default_dtype_of_float64_changes_nothing() -> None:
    expected = logits(decomposed(), decomposed().ablate({SITE: [1]}))
    before = decomposed().tensors()
    target = tiny_transformer()
    torch.set_default_dtype(torch.float64)
    try:
        decomposition = decompose(target, {"blocks.*.mlp.W_in": 6})
        assert torch.get_default_dtype() == torch.float64
        assert all(torch.equal(tensor, before[name]) for name, tensor in decomposition.tensors().items())
        assert torch.equal(logits(decomposition, decomposition.ablate({SITE: [1]})), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_subcomponents_stay_in_float32_when_the_model_is_cast(dtype: torch.dtype) -> None:
    decomposition = decomposed(gate="global")
    before = {name: tensor.detach().clone() for name, tensor in decomposition.tensors().items()}
    hooks = decomposition.mask({SITE: torch.rand(6)})
    decomposition.to(dtype)
    assert decomposition[SITE].target_weight.dtype == dtype
    assert all(torch.equal(tensor, before[name]) for name, tensor in decomposition.tensors().items())
    assert logits(decomposition, hooks).dtype == dtype
    assert set(decomposition.importance(tokens(2))) == set(decomposition)
    decomposition.to(torch.float64)
    assert decomposition[SITE].V.dtype == torch.float64


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # PyTorch's own, in jvp
def test_derivatives_by_masks_are_those_of_differences() -> None:
    decomposition, batch = decomposed(torch.float64), tokens(2)

    def loss(mask: Tensor) -> Tensor:
        hooks = decomposition.mask({SITE: mask}, 0.3)
        return decomposition.model.run_with_hooks(batch, fwd_hooks=hooks).square().mean()

    at, step = torch.rand(6, dtype=torch.float64), 1e-5
    units = step * torch.eye(6, dtype=torch.float64)
    with torch.no_grad():
        slopes = torch.stack([(loss(at + unit) - loss(at - unit)) / (2 * step) for unit in units])
        many = torch.stack([loss(at + unit) for unit in units])
    assert torch.allclose(torch.func.grad(loss)(at), slopes, atol=1e-7)
    assert torch.allclose(torch.func.jvp(loss, (at,), (torch.ones_like(at),))[1], slopes.sum(), atol=1e-7)
    assert torch.allclose(torch.func.vmap(loss)(at + units), many)
    gradients = [torch.func.grad(loss)(at + sign * units[0]) for sign in (1, -1)]
    curvature = (gradients[0] - gradients[1]) / (2 * step)
    assert torch.allclose(torch.func.hessian(loss)(at)[0], curvature, atol=1e-6)


@pytest.mark.parametrize("gate", ["scalar", "shared"])
def test_a_first_pass_in_inference_mode_leaves_later_passes_free(gate: Any) -> None:
    from spd_lens.support import workspace

    workspace._kept.rooms.clear()
    decomposition = decomposed(gate=gate)
    with torch.inference_mode():
        inside = decomposition.importance(tokens(2))
    outside = decomposition.importance(tokens(2))
    assert all(torch.equal(outside[site], inside[site]) for site in outside)
    inputs = decomposition.clean_pass(tokens(2)).inputs
    total = torch.stack([p.sum() for p in decomposition.pre_importances(inputs).values()]).sum()
    total.backward()
    assert all(p.grad is not None for p in decomposition.gate_parameters())


@needs_hooked
def test_hooks_that_are_added_after_compiling_act() -> None:
    torch._dynamo.reset()
    decomposition = decomposed()
    compiled = torch.compile(decomposition.model, backend="eager")
    with torch.no_grad():
        clean = compiled(tokens(2))
        assert torch.allclose(clean, decomposition.model(tokens(2)), atol=1e-5)
        with decomposition.model.hooks(fwd_hooks=decomposition.keep({SITE: []})):
            late, right = compiled(tokens(2)), decomposition.model(tokens(2))
    assert torch.allclose(late, right, atol=1e-5)
    assert not torch.allclose(late, clean, atol=1e-2)


def test_a_matrix_of_zeros_has_numbers() -> None:
    model: Any = tiny_transformer()
    decomposition = decompose(model, {SITE: 6})
    weight = decomposition[SITE]
    with torch.no_grad():
        weight.site.matrix.write(torch.zeros_like(weight.target_weight))
    assert "nan" not in str(decomposition.summary())
    assert "inf" not in str(decomposition.summary())
    V, U = weight.V.detach(), weight.U.detach()
    assert float(relative_faithfulness(torch.zeros(16, 32), V, U)) == pytest.approx(float((V @ U).square().sum()))
    assert float(relative_faithfulness(torch.zeros(16, 32), 0 * V, U)) == 0


def test_a_weight_introduces_itself() -> None:
    weight = decomposed()[SITE]
    assert repr(weight) == "DecomposedWeight(blocks.0.mlp.W_in: 16 x 32, C=6, scalar gate)"
    assert repr(weight) in weight._repr_html_()


# -- what TransformerLens caches and copies ---------------------------------------------------------------------------


@needs_hooked
@pytest.mark.parametrize(
    "how", [{"remove_batch_dim": True}, {"pos_slice": 3}, {"pos_slice": [1, 4]}, {"pos_slice": (1, 5)}]
)
def test_caches_are_sliced_as_those_of_the_whole_batch(how: dict[str, Any]) -> None:
    decomposition = decomposed()
    row = tokens(1)
    _, whole = decomposition.model.run_with_cache(row)
    _, cache = decomposition.model.run_with_cache(row, **how)
    where = how.get("pos_slice", slice(None))
    where = slice(where, where + 1) if isinstance(where, int) else slice(*where) if isinstance(where, tuple) else where
    for name in decomposition[SITE].site.point_names():
        expected = whole[name][:, where]
        if "remove_batch_dim" in how:
            expected = expected[0]
        assert torch.equal(cache[name], expected)


@pytest.mark.parametrize("host", ["transformer", "bridge"])
def test_a_global_gate_is_a_module_of_the_model_and_its_importance_is_silent(host: str) -> None:
    model: Any = tiny_transformer() if host == "transformer" else boot("llama")
    decomposition = decompose(model, {"blocks.*.mlp.W_in": 6}, gate="global")
    row = tokens(1) % 30
    with torch.no_grad():
        _, cache = model.run_with_cache(row)
    acts, importance, mask, delta = decomposition[SITE].site.point_names()
    assert importance not in cache
    assert {acts, mask, delta} <= set(cache)
    with pytest.raises(ValueError, match=r"never fires: .* use decomposition.importance\(tokens\)"):
        model.run_with_hooks(row, fwd_hooks=[(importance, lambda value, hook: None)])
    assert isinstance(decomposition.gates, GateOfAll)
    own = {id(p) for p in model.parameters()}
    assert all(id(p) in own for p in decomposition.gates.gate.parameters())
    assert any(key.endswith("global_gate.w_embed") for key in model.state_dict())
    names = {name for name, _ in model.named_modules()}
    decomposition.remove()
    assert not any("global_gate" in name for name, _ in model.named_modules())
    assert any("global_gate" in name for name in names)


@pytest.mark.parametrize("host", ["transformer", "bridge"])
def test_a_state_dict_carries_the_training_to_another_model(host: str) -> None:
    first, second = ((tiny_transformer() if host == "transformer" else boot("llama")) for _ in range(2))
    trained = decompose(first, {"blocks.*.mlp.W_in": 6}, seed=1)
    other = decompose(second, {"blocks.*.mlp.W_in": 6}, seed=2)
    state = first.state_dict()
    second.load_state_dict(state)
    assert all(torch.equal(tensor, other.tensors()[name]) for name, tensor in trained.tensors().items())
    with pytest.raises(RuntimeError, match=r"subcomponents\.V"):
        second.load_state_dict({key: value for key, value in state.items() if "subcomponents.V" not in key})
    trained.remove()
    assert not any("subcomponents" in key for key in first.state_dict())


@needs_hooked
def test_heads_are_detected_as_on_the_plain_model() -> None:
    from transformer_lens.head_detector import detect_head

    model: Any = load_tiny_lm()
    text, kinds = "the whale and the whale and the sea", ("previous_token_head", "induction_head")
    expected = {kind: detect_head(model, text, kind) for kind in kinds}
    decomposition = decompose(model, {"blocks.*.attn.W_[QKVO]": 4, "blocks.*.mlp.W_*": 4}, gate="global")
    for kind in kinds:
        assert torch.equal(detect_head(model, text, kind), expected[kind])
    with model.hooks(fwd_hooks=decomposition.keep({"blocks.0.attn.W_Q": []})):
        assert not torch.equal(detect_head(model, text, kinds[0]), expected[kinds[0]])
