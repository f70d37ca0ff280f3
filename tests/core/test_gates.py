"""Gates and squashings: S1 to S3 region by region, every kind against per-token loops, causality, seeds, learning."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from spd_lens import Decomposition, decompose, train
from spd_lens.core import (
    DEFAULT_WIDTH,
    MAX_OFFSET,
    Gate,
    GateKind,
    GlobalGate,
    importance_of,
    lower_squash,
    make_gate,
    matmul_or_lookup,
    upper_squash,
)
from tests.conftest import needs_hooked
from tests.small_models import generator, randn, tiny_transformer, tokens

PROPERTY = settings(deadline=None, max_examples=50, derandomize=True, database=None)
SiteKind = Literal["scalar", "vector", "shared", "attention"]
SITE_KINDS = get_args(SiteKind)
Row = list[float]


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Float64 and no parameter zero, biases included: an initial zero would hide what is added in a wrong place."""
    module.double()
    source = generator(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=source, dtype=torch.float64) * 0.7)
    return module


def random_gate(kind: GateKind, *, d_in: int, C: int, width: int, seed: int = 0) -> Gate:
    gate = make_gate(kind, d_in=d_in, n_subcomponents=C, width=width, generator=generator(seed))
    randomised(gate, seed)
    return gate


def assert_equal(actual: Tensor, expected: Tensor | list, atol: float = 1e-11) -> None:
    expected = expected if isinstance(expected, Tensor) else torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.detach(), expected, rtol=0, atol=atol)


# -- S1, S2, S3 ----------------------------------------------------------------------------

BOUNDARY_POINTS = [-3.0, -1e-9, -0.0, 0.0, 1e-9, 0.25, 1.0 - 1e-12, 1.0, 1.0 + 1e-12, 2.5]


def backward_at(squash: Callable[[Tensor], Tensor], points: list[float], upstream: float) -> tuple[Tensor, Tensor]:
    pre = torch.tensor(points, dtype=torch.float64, requires_grad=True)
    out = squash(pre)
    out.backward(torch.full_like(pre, upstream))
    assert pre.grad is not None
    return out.detach(), pre.grad


@pytest.mark.parametrize("upstream", [2.0, -2.0, 0.0])
def test_s1_straight_clamps_forward_and_leaks_backward_only_where_descent_wants_p_up(upstream: float) -> None:
    out, grad = backward_at(lower_squash, BOUNDARY_POINTS, upstream)
    for i, p in enumerate(BOUNDARY_POINTS):
        if p <= 0:
            expected_out, expected_grad = 0.0, (0.01 * upstream if upstream < 0 else 0.0)
        elif p <= 1:
            expected_out, expected_grad = p, upstream
        else:
            expected_out, expected_grad = 1.0, 0.0
        assert out[i].item() == expected_out, p
        assert grad[i].item() == pytest.approx(expected_grad, abs=1e-15), p


@pytest.mark.parametrize("upstream", [2.0, -2.0])
def test_s1_leaky_leaks_forward_and_backward_below_zero(upstream: float) -> None:
    out, grad = backward_at(lambda p: lower_squash(p, variant="leaky"), BOUNDARY_POINTS, upstream)
    for i, p in enumerate(BOUNDARY_POINTS):
        expected_out = 0.01 * p if p <= 0 else min(p, 1.0)
        expected_grad = 0.01 * upstream if p <= 0 else upstream if p <= 1 else 0.0
        assert out[i].item() == pytest.approx(expected_out, abs=1e-15), p
        assert grad[i].item() == pytest.approx(expected_grad, abs=1e-15), p


def test_s1_mixed_gradient_signs_are_judged_entry_by_entry() -> None:
    pre = torch.tensor([[-1.0, -1.0, 0.5], [0.0, 0.0, 4.0]], dtype=torch.float64, requires_grad=True)
    lower_squash(pre).backward(torch.tensor([[3.0, -3.0, -3.0], [5.0, -5.0, -5.0]], dtype=torch.float64))
    assert_equal(pre.grad, [[0.0, -0.03, -3.0], [0.0, -0.05, 0.0]], atol=1e-15)


@pytest.mark.parametrize("upstream", [2.0, -2.0])
def test_s2_upper_is_zero_below_zero_and_leaks_above_one(upstream: float) -> None:
    out, grad = backward_at(upper_squash, BOUNDARY_POINTS, upstream)
    for i, p in enumerate(BOUNDARY_POINTS):
        if p < 0:
            expected_out, slope = 0.0, 0.0
        elif p <= 1:
            expected_out, slope = p, 1.0
        else:
            expected_out, slope = 1 + 0.01 * (p - 1), 0.01
        assert out[i].item() == pytest.approx(expected_out, abs=1e-15), p
        assert grad[i].item() == pytest.approx(slope * upstream, abs=1e-15), p


@PROPERTY
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8))
def test_s3_importance_is_the_clamp_and_agrees_with_the_straight_lower_squash(values: list[float]) -> None:
    pre = torch.tensor(values, dtype=torch.float64)
    expected = torch.tensor([min(max(p, 0.0), 1.0) for p in values], dtype=torch.float64)
    assert_equal(importance_of(pre), expected, atol=0)
    assert_equal(lower_squash(pre), expected, atol=0)
    assert bool((upper_squash(pre) >= expected).all())
    assert bool((lower_squash(pre, variant="leaky") <= expected).all())


@PROPERTY
@given(
    st.lists(st.integers(1, 3), max_size=3).map(tuple),
    st.integers(1, 4),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_squashings_keep_shape_and_dtype(lead: tuple[int, ...], C: int, dtype: torch.dtype) -> None:
    pre = randn(*lead, C).to(dtype)
    for out in (importance_of(pre), lower_squash(pre), lower_squash(pre, variant="leaky"), upper_squash(pre)):
        assert out.shape == pre.shape
        assert out.dtype == dtype


def test_unknown_squashing_is_an_error(without_type_checks: None) -> None:
    with pytest.raises(ValueError, match=r"variant='hard'; expected 'straight' or 'leaky'"):
        lower_squash(torch.zeros(2), variant="hard")  # pyright: ignore[reportArgumentType]


# -- look-ups (M4) ----------------------------------------------------------------------------


def one_hot(indices: Tensor, size: int) -> Tensor:
    """Rows of the identity; -1 is the zero vector."""
    rows = torch.zeros(*indices.shape, size, dtype=torch.float64)
    for where in torch.cartesian_prod(*[torch.arange(n) for n in indices.shape]).reshape(-1, indices.ndim).tolist():
        if indices[tuple(where)] >= 0:
            rows[(*where, int(indices[tuple(where)]))] = 1.0
    return rows


def test_m4_lookup_reads_rows_and_minus_one_is_the_zero_vector() -> None:
    weight = randn(3, 2).requires_grad_(True)
    out = matmul_or_lookup(torch.tensor([[0, 2], [-1, 2]]), weight)
    zero = torch.zeros(2, dtype=torch.float64)
    assert_equal(out, torch.stack([torch.stack([weight[0], weight[2]]), torch.stack([zero, weight[2]])]).detach())
    out.sum().backward()
    # Index -1 must not train row 0, which it is clamped to.
    assert_equal(weight.grad, [[1.0, 1.0], [0.0, 0.0], [2.0, 2.0]])


@PROPERTY
@given(st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple), st.integers(1, 4), st.integers(0, 99))
def test_m4_lookup_equals_the_one_hot_product(shape: tuple[int, ...], d_in: int, seed: int) -> None:
    indices = torch.randint(-1, d_in, shape, generator=generator(seed))
    weight = randn(d_in, 3, seed=seed)
    assert_equal(matmul_or_lookup(indices, weight), matmul_or_lookup(one_hot(indices, d_in), weight))


@pytest.mark.parametrize("kind", SITE_KINDS)
def test_m4_gates_of_lookup_sites_equal_gates_of_one_hot_inputs(kind: SiteKind) -> None:
    d_in, C = 5, 3
    gate = random_gate(kind, d_in=d_in, C=C, width=4)
    indices = torch.tensor([[0, 4, -1, 2], [-1, -1, 3, 0]])
    dense = one_hot(indices, d_in)
    a = dense @ randn(d_in, C, seed=1)
    assert_equal(gate(indices, a), gate(dense, a))


# -- the five kinds against loops ----------------------------------------------------------------------------


def gelu(z: float) -> float:
    return 0.5 * z * (1 + math.erf(z / math.sqrt(2)))


def product(row: Row, matrix: list[Row]) -> Row:
    return [sum(row[i] * matrix[i][j] for i in range(len(row))) for j in range(len(matrix[0]))]


def dot(left: Row, right: Row) -> float:
    return sum(x * y for x, y in zip(left, right, strict=True))


def rms_normed(row: Row) -> Row:
    scale = math.sqrt(dot(row, row) / len(row))
    return [x / scale for x in row]


def parameters_of(module: nn.Module) -> dict[str, list]:
    return {name: parameter.detach().tolist() for name, parameter in module.named_parameters()}


def scalar_oracle(w: dict[str, list], x: Row, a: Row) -> Row:
    return [
        sum(w["w_out"][c][h] * gelu(a[c] * w["w_in"][c][h] + w["b_in"][c][h]) for h in range(len(w["w_out"][c])))
        + w["b_out"][c]
        for c in range(len(a))
    ]


def vector_oracle(w: dict[str, list], x: Row, a: Row) -> Row:
    width, out = len(w["w_out"][0]), []
    for c in range(len(a)):
        total = w["b_out"][c]
        for h in range(width):
            column = c * width + h
            total += w["w_out"][c][h] * gelu(
                sum(x[i] * w["w_in"][i][column] for i in range(len(x))) + w["b_in"][column]
            )
        out.append(total)
    return out


def shared_oracle(w: dict[str, list], x: Row, a: Row) -> Row:
    hidden = [gelu(z + b) for z, b in zip(product(x, w["w_in"]), w["b_in"], strict=True)]
    return [z + b for z, b in zip(product(hidden, w["w_out"]), w["b_out"], strict=True)]


def attended_oracle(
    rows: list[Row], w_qkv: list[Row], back: Row, ahead: Row | None = None, head: int = 0, n_heads: int = 1
) -> list[Row]:
    """One head; the score of position i for j is `q_i k_j / sqrt(d) + b[min(|i - j|, last)]`, b by direction.

    Without biases for what is ahead, positions after i are not seen.
    """
    triples = [product(row, w_qkv) for row in rows]
    width = len(triples[0]) // 3
    d = width // n_heads
    q, k, v = (slice(part * width + head * d, part * width + (head + 1) * d) for part in range(3))
    out = []
    for i, triple in enumerate(triples):
        seen = range(i + 1) if ahead is None else range(len(rows))
        biases = {j: back[min(i - j, len(back) - 1)] if j <= i else ahead[min(j - i, len(back) - 1)] for j in seen}  # pyright: ignore
        scores = {j: dot(triple[q], triples[j][k]) / math.sqrt(d) + biases[j] for j in seen}
        weights = {j: math.exp(score - max(scores.values())) for j, score in scores.items()}
        total = sum(weights.values())
        out.append([sum(weights[j] * triples[j][v][e] for j in seen) / total for e in range(d)])
    return out


def attention_oracle(w: dict[str, list], rows: list[Row]) -> list[Row]:
    attended = attended_oracle(rows, w["w_qkv"], w["offset_bias"])
    out = []
    for row, seen in zip(rows, attended, strict=True):
        parts = zip(product(row, w["w_x"]), product(seen, w["w_attended"]), w["b_in"], strict=True)
        hidden = [gelu(sum(part)) for part in parts]
        out.append([z + b for z, b in zip(product(hidden, w["w_out"]), w["b_out"], strict=True)])
    return out


def global_oracle(w: dict[str, list], rows: list[Row], n_heads: int = 1) -> list[Row]:
    """`rows` are every position's inputs, each site's RMS-normed, side by side."""
    stream = [product(row, w["w_embed"]) for row in rows]
    for block in range(sum(name.endswith("w_qkv") for name in w)):
        own = {name.removeprefix(f"blocks.{block}."): value for name, value in w.items()}
        normed = [rms_normed(row) for row in stream]
        heads = []
        for h in range(n_heads):
            ahead = own["ahead_bias"][h] if "ahead_bias" in own else None
            heads.append(attended_oracle(normed, own["w_qkv"], own["offset_bias"][h], ahead, h, n_heads))
        attended = [[x for head in heads for x in head[i]] for i in range(len(rows))]
        after = []
        for row, seen in zip(stream, attended, strict=True):
            row = [x + y for x, y in zip(row, product(seen, own["w_attended"]), strict=True)]
            hidden = [gelu(z + b) for z, b in zip(product(rms_normed(row), own["w_in"]), own["b_in"], strict=True)]
            after.append([x + y for x, y in zip(row, product(hidden, own["w_mlp"]), strict=True)])
        stream = after
    return [[z + b for z, b in zip(product(rms_normed(row), w["w_out"]), w["b_out"], strict=True)] for row in stream]


@pytest.mark.parametrize(
    ("kind", "oracle"), [("scalar", scalar_oracle), ("vector", vector_oracle), ("shared", shared_oracle)]
)
@pytest.mark.parametrize("lead", [(3,), (2, 3), (2, 2, 2)], ids=["batch", "batch-pos", "batch-pos-head"])
def test_token_wise_gates_equal_their_mlp_token_by_token(
    kind: SiteKind, oracle: Callable[[dict, Row, Row], Row], lead: tuple[int, ...]
) -> None:
    d_in, C = 3, 4
    gate = random_gate(kind, d_in=d_in, C=C, width=5)
    x, a = randn(*lead, d_in, seed=1), randn(*lead, C, seed=2)
    w = parameters_of(gate)
    tokens = zip(x.reshape(-1, d_in).tolist(), a.reshape(-1, C).tolist(), strict=True)
    expected = torch.tensor([oracle(w, x_row, a_row) for x_row, a_row in tokens], dtype=torch.float64)
    assert_equal(gate(x, a), expected.reshape(*lead, C))


def test_scalar_gate_reads_only_its_own_activation_and_never_the_input() -> None:
    gate = random_gate("scalar", d_in=3, C=4, width=5)
    x, a = randn(2, 3), randn(2, 4, seed=1)
    changed = a.clone()
    changed[:, 2] += 1
    moved = gate(x, changed) != gate(x + 1, a)
    assert moved.tolist() == [[False, False, True, False]] * 2


@pytest.mark.parametrize("kind", ["vector", "shared", "attention"])
def test_input_gates_do_not_read_the_activations(kind: SiteKind) -> None:
    gate = random_gate(kind, d_in=3, C=4, width=5)
    x, a = randn(2, 3, 3), randn(2, 3, 4, seed=1)
    assert torch.equal(gate(x, a), gate(x, a + 1))


@PROPERTY
@given(
    st.sampled_from(SITE_KINDS),
    st.lists(st.integers(1, 3), min_size=2, max_size=3).map(tuple),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_a_gate_gives_one_number_per_activation_in_its_own_dtype(
    kind: SiteKind, lead: tuple[int, ...], d_in: int, C: int, width: int, dtype: torch.dtype
) -> None:
    gate = make_gate(kind, d_in=d_in, n_subcomponents=C, width=width, generator=generator()).to(dtype)
    # Inputs of a half-precision model are cast to the gate's dtype, never the other way round.
    x, a = randn(*lead, d_in).bfloat16(), randn(*lead, C, seed=1).to(dtype)
    pre = gate(x, a)
    assert pre.shape == a.shape
    assert pre.dtype == dtype
    assert bool(pre.isfinite().all())


@pytest.mark.parametrize("d_in", [1, 3])
def test_attention_gate_equals_a_loop_over_positions(d_in: int) -> None:
    batch, pos, C = 2, 5, 3
    gate = random_gate("attention", d_in=d_in, C=C, width=4)
    x = randn(batch, pos, d_in, seed=1)
    w = parameters_of(gate)
    expected = [attention_oracle(w, sequence) for sequence in x.tolist()]
    assert_equal(gate(x, torch.zeros(batch, pos, C, dtype=torch.float64)), expected)


def test_attention_gate_shares_the_last_offset_bias_among_farther_positions() -> None:
    pos = MAX_OFFSET + 4
    gate = random_gate("attention", d_in=2, C=1, width=2)
    x = randn(1, pos, 2, seed=1)
    expected = [attention_oracle(parameters_of(gate), x[0].tolist())]
    assert_equal(gate(x, torch.zeros(1, pos, 1, dtype=torch.float64)), expected)


def test_attention_gate_treats_every_head_as_a_sequence_of_its_own() -> None:
    batch, pos, heads, d_in, C = 2, 3, 2, 3, 4
    gate = random_gate("attention", d_in=d_in, C=C, width=5)
    x, a = randn(batch, pos, heads, d_in, seed=1), randn(batch, pos, heads, C, seed=2)
    out = gate(x, a)
    assert out.shape == (batch, pos, heads, C)
    w = parameters_of(gate)
    for b in range(batch):
        for head in range(heads):
            assert_equal(out[b, :, head], attention_oracle(w, x[b, :, head].tolist()))


SITES = {"first": (3, 2), "second": (2, 4)}


def random_global_gate(width: int = 4, seed: int = 0, **options: Any) -> GlobalGate:
    d_ins, counts = ({name: size[i] for name, size in SITES.items()} for i in (0, 1))
    gate = GlobalGate(d_ins, counts, width, generator(seed), **options)
    randomised(gate, seed)
    return gate


def global_inputs(*lead: int, seed: int = 1) -> dict[str, Tensor]:
    return {name: randn(*lead, d_in, seed=seed + i) for i, (name, (d_in, _)) in enumerate(SITES.items())}


@pytest.mark.parametrize("n_heads", [1, 2])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n_blocks", [1, 3])
def test_global_gate_equals_a_loop_over_positions(n_blocks: int, causal: bool, n_heads: int) -> None:
    batch, pos = 2, 4
    gate = random_global_gate(n_blocks=n_blocks, causal=causal, n_heads=n_heads)
    inputs = global_inputs(batch, pos)
    out = gate(inputs)
    assert {name: tuple(p.shape) for name, p in out.items()} == {"first": (2, 4, 2), "second": (2, 4, 4)}
    w = parameters_of(gate)
    for b in range(batch):
        rows = [
            rms_normed(inputs["first"][b, i].tolist()) + rms_normed(inputs["second"][b, i].tolist()) for i in range(pos)
        ]
        expected = torch.tensor(global_oracle(w, rows, n_heads), dtype=torch.float64)
        # Looser than elsewhere: RMS norm adds an epsilon to the mean square.
        assert_equal(out["first"][b], expected[:, :2], atol=1e-9)
        assert_equal(out["second"][b], expected[:, 2:], atol=1e-9)


def test_global_gate_does_not_depend_on_the_order_of_the_inputs_or_on_their_scale() -> None:
    gate, inputs = random_global_gate(), global_inputs(2, 3)
    expected = gate(inputs)
    reordered = gate({"second": inputs["second"] * 1e3, "first": inputs["first"] / 7})
    for name in SITES:
        assert_equal(reordered[name], expected[name].detach(), atol=1e-9)


def test_global_gate_reads_inputs_without_positions_as_sequences_of_length_one() -> None:
    gate, inputs = random_global_gate(), global_inputs(3)
    out = gate(inputs)
    as_sequences = gate({name: x.unsqueeze(1) for name, x in inputs.items()})
    for name, (_, C) in SITES.items():
        assert out[name].shape == (3, C)
        assert_equal(out[name], as_sequences[name].squeeze(1).detach())


@needs_hooked
@pytest.mark.parametrize("causal", [True, False])
def test_a_global_gate_that_reads_residual_streams_equals_a_loop_over_positions(causal: bool) -> None:
    model = tiny_transformer(0, dtype=torch.float64)
    batch = tokens(2, seed=3)
    # By a hook of our own on the target, before anything is swapped.
    streams: dict[str, Tensor] = {}
    names = [f"blocks.{layer}.hook_resid_pre" for layer in (0, 1)]
    with (
        torch.no_grad(),
        model.hooks(fwd_hooks=[(n, lambda x, hook: streams.__setitem__(hook.name, x)) for n in names]),
    ):
        model(batch)
    counts = {"blocks.1.mlp.W_in": 3, "blocks.0.attn.W_V": 2, "blocks.1.attn.W_O": 4}
    options = {"n_blocks": 2, "n_heads": 2, "causal": causal, "reads": "residuals"}
    decomposition = decompose(model, counts, gate="global", gate_width=4, gate_options=options).to(torch.float64)
    gate = decomposition.global_gate
    assert gate is not None
    assert gate.w_embed.shape[0] == 2 * streams[names[0]].shape[-1]
    randomised(gate, 5)
    clean = decomposition.clean_pass(batch)
    found = decomposition.pre_importances(clean.inputs)
    w, sizes = parameters_of(gate), list(gate.sizes.values())
    for b in range(2):
        rows = [[x for n in names for x in rms_normed(streams[n][b, i].tolist())] for i in range(batch.shape[1])]
        expected = torch.tensor(global_oracle(w, rows, 2), dtype=torch.float64).split(sizes, dim=-1)
        for name, part in zip(gate.sizes, expected, strict=True):
            assert_equal(found[name][b], part, atol=1e-9)
    with pytest.raises(ValueError, match="reads residual streams, which these inputs do not hold"):
        decomposition.pre_importances(dict(clean.inputs))


def test_residual_streams_are_read_only_where_there_are_blocks() -> None:
    model, options = tiny_transformer(0), {"reads": "residuals"}
    with pytest.raises(ValueError, match=r"reads='residuals' with unembed\.W_U; expected sites in blocks alone"):
        decompose(model, {"unembed.W_U": 3}, gate="global", gate_options=options)


def test_a_decomposition_with_such_a_gate_trains_and_is_saved(tmp_path: Path) -> None:
    decomposition = decompose(
        tiny_transformer(0), {"blocks.*.mlp.W_in": 5}, gate="global", gate_width=8, gate_options={"reads": "residuals"}
    )
    before = decomposition.importance(tokens(2, seed=3))
    train(decomposition, [tokens(2, seed=1)], steps=2, lr=1e-2, out_dir=tmp_path / "run")
    after = decomposition.importance(tokens(2, seed=3))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    decomposition.save_pretrained(tmp_path / "saved")
    again = Decomposition.from_pretrained(tmp_path / "saved", tiny_transformer(0)).importance(tokens(2, seed=3))
    assert all(torch.equal(again[name], after[name]) for name in after)


# -- causality ----------------------------------------------------------------------------


@PROPERTY
@given(st.integers(2, 6), st.integers(0, 5), st.integers(0, 99), st.booleans())
def test_attention_gate_never_looks_ahead(pos: int, cut: int, seed: int, lookup: bool) -> None:
    cut = min(cut, pos - 1)
    d_in, C = 3, 2
    gate = random_gate("attention", d_in=d_in, C=C, width=4)
    a = torch.zeros(2, pos, C, dtype=torch.float64)
    if lookup:
        x = torch.randint(0, d_in, (2, pos), generator=generator(seed))
        changed = x.clone()
        changed[0, cut] = (changed[0, cut] + 1) % d_in
    else:
        x = randn(2, pos, d_in, seed=seed)
        changed = x.clone()
        changed[0, cut] += 1
    before, after = gate(x, a), gate(changed, a)
    assert torch.equal(after[0, :cut], before[0, :cut])
    assert torch.equal(after[1], before[1])
    # And it does look back: the changed position reaches itself and all later ones.
    assert bool((after[0, cut:] != before[0, cut:]).all())


@PROPERTY
@given(st.integers(2, 6), st.integers(0, 5), st.integers(0, 99), st.sampled_from(sorted(SITES)))
def test_global_gate_never_looks_ahead(pos: int, cut: int, seed: int, site: str) -> None:
    cut = min(cut, pos - 1)
    gate, inputs = random_global_gate(), global_inputs(2, pos, seed=seed)
    changed = {name: x.clone() for name, x in inputs.items()}
    changed[site][0, cut] += torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)[: SITES[site][0]]
    before, after = gate(inputs), gate(changed)
    for name in SITES:
        assert torch.equal(after[name][0, :cut], before[name][0, :cut])
        assert torch.equal(after[name][1], before[name][1])
        assert bool((after[name][0, cut:] != before[name][0, cut:]).all())


# -- seeds, initialisation, errors ----------------------------------------------------------------------------


def any_gate(kind: GateKind, source: torch.Generator, *, d_in: int = 3, C: int = 4, width: int = 5) -> nn.Module:
    if kind == "global":
        return GlobalGate({"only": d_in}, {"only": C}, width, source)
    return make_gate(kind, d_in=d_in, n_subcomponents=C, width=width, generator=source)


@pytest.mark.parametrize("kind", get_args(GateKind))
def test_the_generator_alone_decides_the_parameters(kind: GateKind) -> None:
    state = torch.get_rng_state()
    first, same, other = (dict(any_gate(kind, generator(seed)).named_parameters()) for seed in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert all(torch.equal(first[name], other[name]) == bool((first[name] == 0).all()) for name in first)


@pytest.mark.parametrize(
    ("kind", "fan_ins"),
    [
        ("scalar", {"w_in": 1, "w_out": 60}),
        ("vector", {"w_in": 50, "w_out": 60}),
        ("shared", {"w_in": 50, "w_out": 60}),
        ("attention", {"w_x": 100, "w_attended": 100, "w_out": 60}),
        ("global", {"blocks.0.w_in": 60, "blocks.0.w_mlp": 240, "w_out": 60}),
    ],
)
def test_initial_weights_have_he_variance_and_biases_are_zero(kind: GateKind, fan_ins: dict[str, int]) -> None:
    parameters = dict(any_gate(kind, generator(), d_in=50, C=40, width=60).named_parameters())
    for name, fan_in in fan_ins.items():
        assert parameters[name].detach().std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.07), name
    biases = [name for name in parameters if name.split(".")[-1].startswith("b_") or name.endswith("bias")]
    assert biases
    assert all(not parameters[name].any() for name in biases)


@pytest.mark.parametrize("kind", SITE_KINDS)
def test_make_gate_gives_the_kind_with_its_default_width(kind: SiteKind) -> None:
    gate = make_gate(kind, d_in=3, n_subcomponents=2, generator=generator())
    assert gate.kind == kind
    assert gate.looks_across_positions == (kind == "attention")
    widths = {"scalar": 16, "vector": 8, "shared": 256, "attention": 256}
    w_out = dict(gate.named_parameters())["w_out"]
    assert widths[kind] == DEFAULT_WIDTH[kind]
    assert widths[kind] in w_out.shape


def test_an_unknown_kind_is_named_beside_the_known_ones(without_type_checks: None) -> None:
    expected = r"gate='mlp'; expected one of \['attention', 'global', 'scalar', 'shared', 'vector'\]"
    with pytest.raises(ValueError, match=expected):
        make_gate("mlp", d_in=2, n_subcomponents=2, generator=generator())  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("width", [0, -3])
def test_a_width_below_one_is_an_error(width: int) -> None:
    with pytest.raises(ValueError, match=rf"gate_width={width}; expected at least 1"):
        make_gate("scalar", d_in=2, n_subcomponents=2, width=width, generator=generator())


def test_a_width_below_one_is_an_error_for_the_global_gate_too() -> None:
    with pytest.raises(ValueError, match=r"gate_width=0; expected at least 1"):
        GlobalGate({"only": 2}, {"only": 2}, 0, generator())


def test_heads_that_do_not_divide_the_width_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"gate_heads=3, gate_width=4; expected .* divides the width"):
        random_global_gate(n_heads=3)


def test_make_gate_refers_the_global_kind_to_decompose() -> None:
    with pytest.raises(ValueError, match=r"the global gate spans all sites; it is made by decompose"):
        make_gate("global", d_in=2, n_subcomponents=2, generator=generator())


def test_attention_gate_without_positions_is_an_error_that_names_other_kinds() -> None:
    gate = random_gate("attention", d_in=3, C=2, width=4)
    expected = r"needs inputs with batch and position, got \(5, 3\); use a scalar, vector or shared gate"
    with pytest.raises(ValueError, match=expected):
        gate(randn(5, 3), randn(5, 2))


# -- every kind can learn ----------------------------------------------------------------------------

Batch = tuple[Tensor, Tensor]


def balanced_accuracy(pre: Tensor, on: Tensor) -> float:
    """Mean of the share of on entries that are found on and of off entries found off; 0.5 is a blind guess."""
    found = importance_of(pre) > 0.5
    return float((found[on].double().mean() + (~found[~on]).double().mean()) / 2)


def learned_accuracy(
    module: nn.Module,
    pre_of: Callable[[Tensor], Tensor],
    sample: Callable[[torch.Generator], Batch],
    *,
    steps: int,
    lr: float,
) -> float:
    """Train as SPD does: masks ask for importance 1 through S1, minimality for 0 through S2; then judge fresh data."""
    source = generator(1)
    adam = torch.optim.Adam(module.parameters(), lr=lr)
    for _ in range(steps):
        x, on = sample(source)
        pre = pre_of(x)
        up, down = (1 - lower_squash(pre)).square(), upper_squash(pre).square()
        loss = torch.where(on, up, down).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    with torch.no_grad():
        x, on = sample(source)
        return balanced_accuracy(pre_of(x), on)


def test_scalar_gate_learns_to_switch_on_far_from_zero() -> None:
    def sample(source: torch.Generator) -> Batch:
        a = torch.randn(256, 3, generator=source)
        return a, a.abs() > 0.7

    gate = make_gate("scalar", d_in=1, n_subcomponents=3, generator=generator())
    assert learned_accuracy(gate, lambda a: gate(a, a), sample, steps=300, lr=0.02) > 0.95


@pytest.mark.parametrize(
    ("kind", "width", "learns"), [("vector", 8, True), ("shared", 32, True), ("scalar", 16, False)]
)
def test_only_gates_that_read_the_whole_input_learn_an_exclusive_or(kind: SiteKind, width: int, learns: bool) -> None:
    def sample(source: torch.Generator) -> Batch:
        x = torch.randn(256, 4, generator=source)
        return x, torch.stack([(x[:, 0] > 0) ^ (x[:, 1] > 0), (x[:, 2] > 0) ^ (x[:, 3] > 0)], dim=-1)

    gate = make_gate(kind, d_in=4, n_subcomponents=2, width=width, generator=generator())
    accuracy = learned_accuracy(gate, lambda x: gate(x, x[:, ::2]), sample, steps=300, lr=0.02)
    # The control: a gate that reads one coordinate can only guess.
    assert accuracy > 0.9 if learns else accuracy < 0.65


def test_attention_gate_learns_what_the_previous_token_was() -> None:
    vocab, C = 6, 3
    unread = torch.zeros(32, 10, C)

    def sample(source: torch.Generator) -> Batch:
        tokens = torch.randint(0, vocab, (32, 10), generator=source)
        previous = F.pad(tokens[:, :-1], (1, 0), value=-1)
        return tokens, previous.unsqueeze(-1) == torch.arange(C)

    reached = {}
    for kind in ("attention", "shared"):
        gate = make_gate(kind, d_in=vocab, n_subcomponents=C, width=24, generator=generator())
        reached[kind] = learned_accuracy(gate, lambda x, g=gate: g(x, unread), sample, steps=300, lr=0.03)
    assert reached["attention"] > 0.95
    assert reached["shared"] < 0.6


def test_global_gate_learns_from_another_site_here_and_one_position_back() -> None:
    d_ins, counts = {"reader": 2, "source": 3}, {"reader": 2, "source": 1}
    gate = GlobalGate(d_ins, counts, 32, generator())

    def sample(source: torch.Generator) -> Batch:
        x = torch.randn(32, 8, 5, generator=source)
        x[..., 2:4] = torch.where(x[..., 2:4] > 0, 1.0, -1.0)
        back = F.pad(x[:, :-1, 3], (1, 0), value=-1.0)
        return x, torch.stack([x[..., 2] > 0, back > 0], dim=-1)

    def pre_of(x: Tensor) -> Tensor:
        return gate({"reader": x[..., :2], "source": x[..., 2:]})["reader"]

    assert learned_accuracy(gate, pre_of, sample, steps=250, lr=0.01) > 0.95
