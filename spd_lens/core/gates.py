"""Gates: networks that predict from a site's clean input how much each subcomponent matters (importance).

A gate (the literature's "causal importance function") returns a pre-activation `p [batch pos C]`. Three
squashings of the same `p` are used: `lower_squash` feeds masks (S1), `upper_squash` feeds the minimality loss (S2),
`importance_of` is for reports and analysis (S3).

Cost per token and site, in multiply-adds: scalar `2 C h`; vector `C h (d_in + 1)`; shared `hidden (d_in + C)`;
attention the same plus `4 d_in d_attn`; global depends on all sites. Source: Bushnaq, Braun and Sharkey 2025
(arXiv 2506.20790), section 3 and appendix A; the vector, shared, attention and global kinds follow the authors'
later work.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from spd_lens.core.pointwise_mlp import pointwise_mlp
from spd_lens.support.compiling import compilable, region

aten = torch.ops.aten


GateKind = Literal["scalar", "vector", "shared", "attention", "global"]


def matmul_or_lookup(x: Shaped[Tensor, ...], weight: Float[Tensor, "d_in d_out"]) -> Float[Tensor, "*batch d_out"]:
    """`x @ weight`; for integer `x` the rows `weight[x]`, with index -1 standing for the zero vector (M4)."""
    if x.is_floating_point():
        return x.to(weight.dtype) @ weight
    rows = F.embedding(x.clamp_min(0), weight)
    return rows * (x >= 0).unsqueeze(-1)


def _affine(x: Shaped[Tensor, ...], weight: Float[Tensor, "d_in d_out"], bias: Float[Tensor, " d_out"]) -> Tensor:
    """`x @ weight + bias` in one call where `x` is not a look-up."""
    return (
        F.linear(x.to(weight.dtype), weight.t(), bias) if x.is_floating_point() else matmul_or_lookup(x, weight) + bias
    )


class _GeluMatmul(torch.autograd.Function):
    """`gelu(pre) @ weight`; the backward pass computes the activated layer again rather than keep it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(pre: Tensor, weight: Tensor) -> Tensor:
        return F.gelu(pre) @ weight

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        pre, weight = ctx.saved_tensors
        # Under autocast the gradient comes in half precision, as the product was.
        grad = grads[0]
        by_pre = aten.gelu_backward((grad @ weight.t().to(grad.dtype)).to(pre.dtype), pre)
        hidden = F.gelu(pre).to(grad.dtype)
        return by_pre, (hidden.flatten(0, -2).t() @ grad.flatten(0, -2)).to(weight.dtype)


def _gelu_matmul_by_hand(pre: Tensor, weight: Tensor) -> Tensor:
    return _GeluMatmul.apply(pre, weight)  # pyright: ignore[reportReturnType]


@region(_gelu_matmul_by_hand)
def _gelu_matmul(pre: Tensor, weight: Tensor) -> Tensor:
    return F.gelu(pre) @ weight


def _he(shape: tuple[int, ...], fan_in: int, generator: torch.Generator) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=generator) * math.sqrt(2 / fan_in))


def _check_width(width: int) -> None:
    if width < 1:
        raise ValueError(f"gate_width={width}; expected at least 1")


class Gate(nn.Module):
    """One gate: `forward(x, a)` gives the pre-activation `p [... C]` from the site's clean input and activations.

    `x` is `[... d_in]`, or integer indices `[...]` at look-up sites; `a = x @ V` is `[... C]`, and may be None for
    gates that do not read it.
    """

    looks_across_positions: bool = False
    reads_activations: bool = False
    kind: GateKind

    def forward(self, x: Tensor, a: Float[Tensor, "*batch C"] | None = None) -> Float[Tensor, "*batch C"]:
        raise NotImplementedError


class ScalarGate(Gate):
    """Per subcomponent an MLP `1 -> h -> 1` with GELU on its own activation `a_c` (the paper's gate)."""

    kind: GateKind = "scalar"
    reads_activations = True

    def __init__(self, n_subcomponents: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.w_in = _he((n_subcomponents, width), 1, generator)
        self.b_in = nn.Parameter(torch.zeros(n_subcomponents, width))
        self.w_out = _he((n_subcomponents, width), width, generator)
        self.b_out = nn.Parameter(torch.zeros(n_subcomponents))

    def forward(self, x: Tensor, a: Float[Tensor, "*batch C"] | None = None) -> Float[Tensor, "*batch C"]:
        assert a is not None
        return pointwise_mlp(a, self.w_in, self.b_in, self.w_out, self.b_out)


class VectorGate(Gate):
    """Per subcomponent an MLP `d_in -> h -> 1` with GELU on the whole input `x`."""

    kind: GateKind = "vector"

    def __init__(self, d_in: int, n_subcomponents: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.n_subcomponents = n_subcomponents
        self.w_in = _he((d_in, n_subcomponents * width), d_in, generator)
        self.b_in = nn.Parameter(torch.zeros(n_subcomponents * width))
        self.w_out = _he((n_subcomponents, width), width, generator)
        self.b_out = nn.Parameter(torch.zeros(n_subcomponents))

    def forward(self, x: Tensor, a: Float[Tensor, "*batch C"] | None = None) -> Float[Tensor, "*batch C"]:
        return self._forward(x)

    @compilable
    def _forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(matmul_or_lookup(x, self.w_in) + self.b_in)
        hidden = rearrange(hidden, "... (C h) -> ... C h", C=self.n_subcomponents)
        return (hidden * self.w_out).sum(-1) + self.b_out


class SharedGate(Gate):
    """One MLP `d_in -> hidden -> C` with GELU for the whole site."""

    kind: GateKind = "shared"

    def __init__(self, d_in: int, n_subcomponents: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.w_in = _he((d_in, width), d_in, generator)
        self.b_in = nn.Parameter(torch.zeros(width))
        self.w_out = _he((width, n_subcomponents), width, generator)
        self.b_out = nn.Parameter(torch.zeros(n_subcomponents))

    def forward(self, x: Tensor, a: Float[Tensor, "*batch C"] | None = None) -> Float[Tensor, "*batch C"]:
        return _gelu_matmul(_affine(x, self.w_in, self.b_in), self.w_out) + self.b_out


MAX_OFFSET = 128


def _causal_bias(offset_bias: Float[Tensor, " offsets"], q: Float[Tensor, "batch pos _"]) -> Float[Tensor, "pos pos"]:
    """`offset_bias` of every pair's distance back, minus infinity ahead, in the dtype of `q`."""
    position = torch.arange(q.shape[1], device=q.device)
    offset = position[:, None] - position[None, :]
    bias = offset_bias[offset.clamp(0, MAX_OFFSET)].masked_fill(offset < 0, -torch.inf)
    return bias.to(q.dtype)


class AttentionGate(Gate):
    """A one-layer, one-head causal attention over positions, then an MLP on `[x, attended]`.

    Scores are `q k / sqrt(d) + b[offset]`, with one learned bias for every distance up to `MAX_OFFSET` (farther
    positions share the last): what a head that looks back by a fixed offset, or for an earlier copy, needs.
    Expects `x [batch pos d_in]` (or `[batch pos]` at look-up sites).
    """

    looks_across_positions = True
    kind: GateKind = "attention"

    def __init__(self, d_in: int, n_subcomponents: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        d_attn = min(d_in, 64)
        self.w_qkv = nn.Parameter(torch.randn(d_in, 3 * d_attn, generator=generator) / math.sqrt(d_in))
        self.offset_bias = nn.Parameter(torch.zeros(MAX_OFFSET + 1))
        self.w_x = _he((d_in, width), d_in + d_attn, generator)
        self.w_attended = _he((d_attn, width), d_in + d_attn, generator)
        self.b_in = nn.Parameter(torch.zeros(width))
        self.w_out = _he((width, n_subcomponents), width, generator)
        self.b_out = nn.Parameter(torch.zeros(n_subcomponents))

    def forward(self, x: Tensor, a: Float[Tensor, "*batch C"] | None = None) -> Float[Tensor, "*batch C"]:
        positions = x.shape[:-1] if x.is_floating_point() else x.shape
        if len(positions) == 3:  # a head axis: every head is a sequence of its own
            pre = self.forward(rearrange(x, "batch pos head d -> (batch head) pos d"))
            return rearrange(pre, "(batch head) pos C -> batch pos head C", head=positions[2])
        if len(positions) != 2:
            raise ValueError(
                f"the attention gate needs inputs with batch and position, got {tuple(x.shape)}; "
                "use a scalar, vector or shared gate for models without positions"
            )
        q, k, v = matmul_or_lookup(x, self.w_qkv).chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=_causal_bias(self.offset_bias, q))
        pre = _affine(x, self.w_x, self.b_in) + attended @ self.w_attended
        return _gelu_matmul(pre, self.w_out) + self.b_out


class GateBlock(nn.Module):
    """One block of the global gate: self-attention with learned offset biases, then an MLP of four times the width."""

    def __init__(self, width: int, n_heads: int, causal: bool, generator: torch.Generator) -> None:
        super().__init__()
        self.n_heads, self.causal = n_heads, causal
        self.w_qkv = nn.Parameter(torch.randn(width, 3 * width, generator=generator) / math.sqrt(width))
        self.w_attended = nn.Parameter(torch.randn(width, width, generator=generator) / math.sqrt(width))
        # One bias for every distance back, and where the gate may look ahead, for every distance ahead.
        self.offset_bias = nn.Parameter(torch.zeros(n_heads, MAX_OFFSET + 1))
        if not causal:
            self.ahead_bias = nn.Parameter(torch.zeros(n_heads, MAX_OFFSET + 1))
        self.w_in = _he((width, 4 * width), width, generator)
        self.b_in = nn.Parameter(torch.zeros(4 * width))
        self.w_mlp = _he((4 * width, width), 4 * width, generator)

    def forward(self, stream: Float[Tensor, "batch pos width"]) -> Float[Tensor, "batch pos width"]:
        """The stream after attention and MLP, both added to it."""
        return self._forward(stream)

    @compilable
    def _forward(self, stream: Tensor) -> Tensor:
        stream = stream + self._attend(F.rms_norm(stream, stream.shape[-1:])) @ self.w_attended
        return stream + F.gelu(F.rms_norm(stream, stream.shape[-1:]) @ self.w_in + self.b_in) @ self.w_mlp

    def _attend(self, stream: Float[Tensor, "batch pos width"]) -> Float[Tensor, "batch pos width"]:
        q, k, v = (
            rearrange(x, "batch pos (head d) -> batch head pos d", head=self.n_heads)
            for x in (stream @ self.w_qkv).chunk(3, dim=-1)
        )
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=self._bias(stream.shape[1]).to(q.dtype))
        return rearrange(z, "batch head pos d -> batch pos (head d)")

    def _bias(self, length: int) -> Float[Tensor, "head pos pos"]:
        position = torch.arange(length, device=self.offset_bias.device)
        offset = position[:, None] - position[None, :]
        back = self.offset_bias[:, offset.clamp(0, MAX_OFFSET)]
        if self.causal:
            return back.masked_fill(offset < 0, -torch.inf)
        return torch.where(offset < 0, self.ahead_bias[:, (-offset).clamp(0, MAX_OFFSET)], back)


class GlobalGate(nn.Module):
    """One transformer over the concatenated, RMS-normed inputs of all sites; gives every site's pre-activation.

    `d_ins` are the widths of what it reads, by name: the sites' inputs, or others, such as residual streams.
    `n_blocks` blocks of width `width` with `n_heads` heads, `causal` or looking both ways (published for language
    models: as wide as or wider than the target, half to twice its depth, both ways). Look-up sites enter by the row of
    the target's matrix that they read. Inputs without a position axis are a sequence of length one.
    """

    kind: GateKind = "global"

    def __init__(
        self,
        d_ins: dict[str, int],
        n_subcomponents: dict[str, int],
        width: int,
        generator: torch.Generator,
        *,
        n_blocks: int = 1,
        n_heads: int = 1,
        causal: bool = True,
    ) -> None:
        super().__init__()
        _check_width(width)
        if n_blocks < 1 or n_heads < 1 or width % n_heads:
            raise ValueError(
                f"gate_blocks={n_blocks}, gate_heads={n_heads}, gate_width={width}; expected at least one block and a "
                "number of heads that divides the width"
            )
        self.sizes, self.reads = dict(n_subcomponents), tuple(d_ins)
        total = sum(d_ins.values())
        self.w_embed = nn.Parameter(torch.randn(total, width, generator=generator) / math.sqrt(total))
        self.blocks = nn.ModuleList(GateBlock(width, n_heads, causal, generator) for _ in range(n_blocks))
        self.w_out = nn.Parameter(
            torch.randn(width, sum(self.sizes.values()), generator=generator) * math.sqrt(2 / width)
        )
        self.b_out = nn.Parameter(torch.zeros(sum(self.sizes.values())))

    def forward(self, inputs: dict[str, Float[Tensor, "*batch _"]]) -> dict[str, Float[Tensor, "*batch _"]]:
        """`inputs[name] [batch pos d_in]` of all that is read, in its fixed order, to `p[site] [batch pos C]`."""
        normed = [F.rms_norm(inputs[name].to(self.w_embed.dtype), inputs[name].shape[-1:]) for name in self.reads]
        stream = torch.cat(normed, dim=-1) @ self.w_embed
        flat = stream.ndim == 2
        if flat:
            stream = stream.unsqueeze(1)
        for block in self.blocks:
            stream = block(stream)
        pre = F.rms_norm(stream, stream.shape[-1:]) @ self.w_out + self.b_out
        if flat:
            pre = pre.squeeze(1)
        return dict(zip(self.sizes, pre.split(list(self.sizes.values()), dim=-1), strict=True))


# Width of a gate's hidden layer unless told otherwise: the paper's h = 16 for scalar gates, the authors' later
# choices for the others.
DEFAULT_WIDTH: dict[GateKind, int] = {"scalar": 16, "vector": 8, "shared": 256, "attention": 256, "global": 128}


def make_gate(
    kind: GateKind, *, d_in: int, n_subcomponents: int, width: int | None = None, generator: torch.Generator
) -> Gate:
    """A gate of the given kind for one site, initialised from `generator` (He for GELU layers, zero biases).

    Raises ValueError for an unknown kind; the global kind is one per decomposition, see `GlobalGate`.
    """
    if kind not in DEFAULT_WIDTH:
        raise ValueError(f"gate={kind!r}; expected one of {sorted(DEFAULT_WIDTH)}")
    width = DEFAULT_WIDTH[kind] if width is None else width
    _check_width(width)
    match kind:
        case "scalar":
            return ScalarGate(n_subcomponents, width, generator)
        case "vector":
            return VectorGate(d_in, n_subcomponents, width, generator)
        case "shared":
            return SharedGate(d_in, n_subcomponents, width, generator)
        case "attention":
            return AttentionGate(d_in, n_subcomponents, width, generator)
        case "global":
            raise ValueError("the global gate spans all sites; it is made by decompose(), not per site")
