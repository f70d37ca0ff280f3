"""A decomposed model's blocks with smaller matrices, written into a `PlainTransformer`.

Heads and neurons that nothing of the new matrices reads or writes are left out, exactly: what a head without values, or
a neuron without inputs, still gives is a constant, and goes into a bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.inputs import checked_decomposition
from spd_lens.core.units import check_site
from spd_lens.hosts.architecture import Architecture, architecture_of
from spd_lens.hosts.host import Host
from spd_lens.specialists.matrices import SmallMatrix, is_small
from spd_lens.specialists.plain_transformer import ACTIVATIONS, PlainTransformer

_PARTS = {
    "q": "attn.W_Q", "k": "attn.W_K", "v": "attn.W_V", "o": "attn.W_O",
    "gate": "mlp.W_gate", "in": "mlp.W_in", "out": "mlp.W_out",
}  # fmt: skip


@dataclass
class Linear:
    """A matrix of a block and its bias, zeros where the model has none."""

    matrix: SmallMatrix
    bias: Tensor
    has_bias: bool

    def spec(self) -> list[Any]:
        """What `PlainTransformer`'s configuration says of it."""
        return [*self.matrix.shape, self.matrix.rank, self.has_bias]


def plain_copy(
    decomposition: Decomposition,
    matrices: Mapping[str, SmallMatrix] | None = None,
    *,
    tokens: Tensor | None = None,
    cut_below: float | None = 0.0,
) -> PlainTransformer:
    """The decomposed model, written anew in plain PyTorch, with `matrices[site]` in place of the sites' own.

    - `tokens`: the token ids that keep their rows of the embedding; None: all do.
    - `cut_below`: heads and neurons with weights below this share of the largest are left out, too; None: all stay,
      even those that nothing reads or writes, so that every matrix has the shape of the site's.

    Raises ValueError, naming it, for what a plain transformer has no place for.
    """
    checked_decomposition(decomposition, "plain_copy")
    host = decomposition.host
    architecture = architecture_of(host)
    matrices = matrices or {}
    for site in matrices:
        check_site(decomposition, site)
        if not site.startswith("blocks."):
            raise ValueError(f"matrices has {site}; only the matrices of blocks can be written smaller")
    W_E, W_U, b_U = *(_matrix(decomposition, s) for s in ("embed.W_E", "unembed.W_U")), _bias(host, "unembed.W_U")
    tied = torch.equal(W_E, W_U.T)
    state: dict[str, Tensor] = {}
    blocks = []
    for layer in range(architecture.n_layers):
        linears = {name: _linear(decomposition, f"blocks.{layer}.{part}", matrices) for name, part in _PARTS.items()
                  if _has(host, f"blocks.{layer}.{part}")}  # fmt: skip
        if (late := architecture.neuron_biases.get(layer)) is not None:
            out = linears["out"]
            out.bias = out.bias + late @ out.matrix.product()
            out.has_bias = out.has_bias or bool(late.any())
        kv_of_head = cut_heads(linears, architecture, cut_below)
        if not architecture.attention_only and cut_below is not None:
            cut_neurons(linears, architecture, cut_below)
        blocks.append({"kv_of_head": kv_of_head, "matrices": {n: p.spec() for n, p in linears.items()}})
        for name, linear in linears.items():
            where = "attn" if name in "qkvo" else "mlp"
            state |= _stored(f"blocks.{layer}.{where}.{name}", linear)
    kept = None if tokens is None else tokens.unique()
    if kept is not None:
        # What has no row of its own shares one: the mean of theirs.
        others = torch.ones(len(W_E), dtype=torch.bool).index_fill(0, kept.cpu(), False).to(W_E.device)
        shared = W_E[others].mean(0, keepdim=True) if bool(others.any()) else W_E.mean(0, keepdim=True)
        row_of_token = torch.full((len(W_E),), len(kept), device=W_E.device)
        row_of_token[kept] = torch.arange(len(kept), device=W_E.device)
        state |= {"token_of_row": kept.to(W_E.device), "row_of_token": row_of_token}
        W_E, W_U, tied = torch.cat([W_E[kept], shared]), W_U[:, kept], False
        b_U = None if b_U is None else b_U[kept]
    b_U = b_U if b_U is not None and bool(b_U.any()) else None
    config = _config(architecture, blocks, W_E) | {
        "kept_tokens": None if kept is None else len(kept), "tied": tied, "unembed_bias": b_U is not None
    }  # fmt: skip
    state |= {"embed.weight": W_E, "unembed.weight": W_U.T}
    if b_U is not None:
        state["unembed.bias"] = b_U
    if architecture.positions == "learned":
        state["positions.weight"] = _matrix(decomposition, "pos_embed.W_pos")
    for name, (weight, bias) in architecture.norms.items():
        state[f"{name}.weight"] = weight
        if architecture.norm == "layer":
            state[f"{name}.bias"] = bias
        elif bool(bias.any()):
            raise ValueError(f"{name} has a bias, and a plain transformer's RMS norm has none")
    for layer, block in enumerate(blocks):
        if "out" not in block["matrices"]:
            state = {n: v for n, v in state.items() if not n.startswith(f"blocks.{layer}.ln2")}
    return _filled(config, state, W_E)


def _filled(config: Mapping[str, Any], state: Mapping[str, Tensor], like: Tensor) -> PlainTransformer:
    # On no device: large embeddings would be filled with random numbers first.
    with torch.device("meta"):
        model = PlainTransformer(config)
    copied = {name: _copied(value, like) for name, value in state.items()}
    model.load_state_dict(copied, strict=True, assign=True)
    if config["tied"]:
        model.unembed.weight = model.embed.weight
    return model.eval()


def _copied(value: Tensor, like: Tensor) -> Tensor:
    dtype = like.dtype if value.is_floating_point() else value.dtype
    return value.detach().to(device=like.device, dtype=dtype).clone(memory_format=torch.contiguous_format)


def _config(architecture: Architecture, blocks: list[dict[str, Any]], W_E: Tensor) -> dict[str, Any]:
    names = ("d_model", "d_vocab", "n_ctx", "d_head", "attention_scale", "norm", "eps", "positions", "rotary_base",
             "activation", "gated")  # fmt: skip
    fields = {name: getattr(architecture, name) for name in names}
    return fields | {"blocks": blocks, "embedding_rows": len(W_E), "dtype": str(W_E.dtype).removeprefix("torch.")}


# -- reading ---------------------------------------------------------------------------------------------------------


def _has(host: Host, site: str) -> bool:
    return site in host.site_names()


def _site(decomposition: Decomposition, name: str) -> Any:
    return decomposition[name].site if name in decomposition else decomposition.host.site(name)


def _matrix(decomposition: Decomposition, name: str) -> Tensor:
    return _site(decomposition, name).matrix.read().detach()


def _bias(host: Host, name: str) -> Tensor | None:
    bias = host.site(name).read_bias()
    return None if bias is None else bias.detach().flatten()


def _linear(decomposition: Decomposition, name: str, matrices: Mapping[str, SmallMatrix]) -> Linear:
    site = _site(decomposition, name)
    matrix = matrices.get(name) or SmallMatrix(site.matrix.read().detach())
    bias = site.read_bias()
    given = torch.zeros(matrix.shape[1]).to(matrix.A) if bias is None else bias.detach().flatten()
    return Linear(matrix, given.clone(), bool(given.any()))


def _stored(name: str, linear: Linear) -> dict[str, Tensor]:
    matrix = linear.matrix
    if matrix.rank == 0:
        return {f"{name}.bias": linear.bias} if linear.has_bias else {}
    if matrix.B is None:
        found = {f"{name}.weight": matrix.A.T}
    else:
        found = {f"{name}.0.weight": matrix.A.T, f"{name}.1.weight": matrix.B.T}
    where = name if matrix.B is None else f"{name}.1"
    return found | ({f"{where}.bias": linear.bias} if linear.has_bias else {})


# -- cutting ---------------------------------------------------------------------------------------------------------


def cut_heads(linears: dict[str, Linear], architecture: Architecture, below: float | None) -> list[int]:
    """Leave out heads that write nothing or the same everywhere; which keys and values each remaining head reads.

    A head's values are averaged over positions with weights that sum to 1, so values that are all `b_V` come out as
    `b_V`, and add `b_V @ W_O` to the block's output.
    """
    H, K, d = architecture.n_heads, architecture.n_kv_heads, architecture.d_head
    kv_of_head = [h * K // H for h in range(H)]
    if below is None:
        return kv_of_head
    o, v = linears["o"], linears["v"]
    no_values = is_small(v.matrix.column_sizes().view(K, d).norm(dim=1), below)[kv_of_head]
    no_output = is_small(o.matrix.row_sizes().view(H, d).norm(dim=1), below)
    constant = (no_values & ~no_output).nonzero().flatten().tolist()
    if constant:
        W_O = o.matrix.product().view(H, d, -1)
        b_V = v.bias.view(K, d)
        o.bias = o.bias + sum(b_V[kv_of_head[h]] @ W_O[h] for h in constant)
        o.has_bias = o.has_bias or bool(o.bias.any())
    kept = (~(no_values | no_output)).nonzero().flatten().tolist()
    if len(kept) == H:
        return kv_of_head
    if not kept:
        for name in "qkv":
            del linears[name]
        o.matrix = SmallMatrix(o.matrix.A[:, :0], o.matrix.product()[:0])
        return []
    kv_kept = sorted({kv_of_head[h] for h in kept})
    of_head, of_kv = (_numbers(heads, d, o.bias.device) for heads in (kept, kv_kept))
    o.matrix = o.matrix.rows(of_head)
    for name, numbers in (("q", of_head), ("k", of_kv), ("v", of_kv)):
        linear = linears[name]
        linear.matrix, linear.bias = linear.matrix.columns(numbers), linear.bias[numbers]
    return [kv_kept.index(kv_of_head[h]) for h in kept]


def _numbers(heads: list[int], d_head: int, device: torch.device) -> Tensor:
    return (torch.tensor(heads)[:, None] * d_head + torch.arange(d_head)).flatten().to(device)


def cut_neurons(linears: dict[str, Linear], architecture: Architecture, below: float) -> None:
    """Leave out neurons that write nothing, and those with the same value everywhere, which goes into the bias."""
    out, act = linears["out"], ACTIVATIONS[architecture.activation]
    unread = {n: is_small(linears[n].matrix.column_sizes(), below) for n in ("in", "gate") if n in linears}
    no_output = is_small(out.matrix.row_sizes(), below)
    if architecture.gated:
        gate, pre = act(linears["gate"].bias), linears["in"].bias
        silent = (unread["in"] & (pre == 0)) | (unread["gate"] & (gate == 0))
        constant, value = (unread["in"] & unread["gate"]) | silent, gate * pre
        value = torch.where(silent, 0.0, value)
    else:
        constant, value = unread["in"], act(linears["in"].bias)
    cut = constant | no_output
    if not bool(cut.any()):
        return
    added = constant & ~no_output
    if bool(added.any()):
        out.bias = out.bias + value[added] @ out.matrix.product()[added]
        out.has_bias = out.has_bias or bool(out.bias.any())
    if bool(cut.all()):
        for name in unread:
            del linears[name]
        out.matrix = SmallMatrix(out.matrix.A[:, :0], out.matrix.product()[:0])
        return
    out.matrix = out.matrix.rows(~cut)
    for name in unread:
        linear = linears[name]
        linear.matrix, linear.bias = linear.matrix.columns(~cut), linear.bias[~cut]
