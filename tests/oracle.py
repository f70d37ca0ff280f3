"""An oracle for the swap that shares no code with it.

Two independent ways to say what a masked model must compute:

- `written_copy` and `run_written`: `V @ diag(m) @ U + d * (W - V @ U)` is written *into the weights* of an unswapped
  model, with this file's own knowledge of how TransformerLens lays every weight out.
- `hand_hooks`: hooks for an unswapped copy that put `b + ((m * (x @ V)) @ U) + d * (x @ (W - V @ U))` at a weight's
  output, for masks that differ by position.

Copies are made before the swap. Nothing here imports spd_lens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

VOCAB, N_CTX = 29, 12
Hooks = list[tuple[str, Callable[..., Any]]]


@dataclass(frozen=True)
class Masks:
    """What one site is masked with: `V [d_in, C]`, `U [C, d_out]`, a mask and a delta."""

    V: Tensor
    U: Tensor
    mask: Tensor
    delta: Tensor


# -- tiny models -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One configuration of a tiny HookedTransformer; `process` are arguments of `process_weights_`, if called."""

    name: str
    cfg: Mapping[str, Any] = field(default_factory=dict)
    process: Mapping[str, Any] | None = None

    def build(self, dtype: torch.dtype = torch.float32, seed: int = 0, **more: Any) -> Any:
        """A fresh model of this configuration; the same arguments give the same weights."""
        return tiny_model(seed=seed, dtype=dtype, process=self.process, **{**self.cfg, **more})


def tiny_model(
    *, seed: int = 0, dtype: torch.dtype = torch.float32, process: Mapping[str, Any] | None = None, **cfg: Any
) -> Any:
    """A HookedTransformer of two blocks whose weights, biases and norm weights are all random."""
    from transformer_lens import HookedTransformer

    settings: dict[str, Any] = {
        "n_layers": 2, "d_model": 24, "n_heads": 4, "d_head": 6, "d_mlp": 40, "d_vocab": VOCAB, "n_ctx": N_CTX,
        "act_fn": "gelu", "normalization_type": "LN", "device": "cpu", "init_weights": False, "dtype": dtype,
    }  # fmt: skip
    settings.update(cfg)
    model = HookedTransformer(settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            short = name.rsplit(".", 1)[-1]
            if short.lstrip("_")[0] == "W" or "weight" in name:  # matrices
                fan_in = parameter.shape[-1] if short == "W_E" or short == "W_pos" else parameter.shape[-2]
                parameter.copy_(noise * (1.5 if short == "W_U" else 1.0) / fan_in**0.5)
            elif short == "w":  # norm weights
                parameter.copy_(1 + 0.4 * noise)
            else:  # biases
                parameter.copy_(0.4 * noise)
    if process is not None:
        model.process_weights_(**process)
    return model


def tokens_for(model: Any, batch: int = 2, pos: int = 5, seed: int = 1) -> Tensor:
    """Random tokens `[batch pos]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.cfg.d_vocab, (batch, pos), generator=generator)


_LLAMA = {
    "normalization_type": "RMS",
    "gated_mlp": True,
    "act_fn": "silu",
    "positional_embedding_type": "rotary",
    "rotary_dim": 6,
}

CASES = {
    case.name: case
    for case in [
        Case("ln"),
        Case("ln_folded", process={"fold_ln": True}),
        Case("ln_factored", {"positional_embedding_type": "standard"}, {"refactor_factored_attn_matrices": True}),
        Case("ln_pre", {"normalization_type": "LNPre"}),
        Case("rms", {"normalization_type": "RMS"}),
        Case("rms_folded", {"normalization_type": "RMS"}, {"fold_ln": True, "center_writing_weights": False}),
        Case("rms_pre", {"normalization_type": "RMSPre"}),
        Case("final_rms", {"final_rms": True}),
        Case("no_norm", {"normalization_type": None}),
        Case("gated", {"gated_mlp": True, "act_fn": "silu"}),
        Case("solu_ln", {"act_fn": "solu_ln"}),
        Case("solu_ln_folded", {"act_fn": "solu_ln"}, {"fold_ln": True}),
        Case("gqa", {"n_key_value_heads": 2}),
        Case("gqa_ungrouped", {"n_key_value_heads": 2, "ungroup_grouped_query_attention": True}),
        Case("mqa", {"n_key_value_heads": 1}),
        Case("mqa_ungrouped", {"n_key_value_heads": 1, "ungroup_grouped_query_attention": True}),
        Case("one_head", {"n_heads": 1, "d_head": 8}),
        Case("one_head_full_width", {"n_heads": 1, "d_head": 24}),
        Case("rotary", {"positional_embedding_type": "rotary", "rotary_dim": 4}),
        Case("shortformer", {"positional_embedding_type": "shortformer"}),
        Case("alibi", {"positional_embedding_type": "alibi"}),
        Case("parallel", {"parallel_attn_mlp": True}),
        Case("attn_only", {"attn_only": True}),
        Case("split_qkv", {"use_split_qkv_input": True}),
        Case("split_qkv_one_head", {"use_split_qkv_input": True, "n_heads": 1, "d_head": 8}),
        Case("split_qkv_shortformer", {"use_split_qkv_input": True, "positional_embedding_type": "shortformer"}),
        Case("split_qkv_gqa", {"use_split_qkv_input": True, "n_key_value_heads": 2}),
        Case("split_qkv_mqa", {"use_split_qkv_input": True, "n_key_value_heads": 1}),
        Case(
            "split_qkv_gqa_ungrouped",
            {"use_split_qkv_input": True, "n_key_value_heads": 2, "ungroup_grouped_query_attention": True},
        ),
        Case("attn_result", {"use_attn_result": True}),
        Case("attn_result_one_head", {"use_attn_result": True, "n_heads": 1, "d_head": 8}),
        Case("attn_in", {"use_attn_in": True}),
        Case("hook_mlp_in", {"use_hook_mlp_in": True}),
        Case("hook_mlp_in_parallel", {"use_hook_mlp_in": True, "parallel_attn_mlp": True}),
        Case("hook_tokens", {"use_hook_tokens": True}),
        Case("qk_norm", {"use_qk_norm": True}),
        Case("olmoe_qk_norm", {"original_architecture": "OlmoeForCausalLM", "clip_qkv": 1.5}),
        Case("local_attention", {"use_local_attn": True, "window_size": 2, "attn_types": ["global", "local"]}),
        Case("bidirectional", {"attention_dir": "bidirectional"}),
        Case("soft_caps", {"attn_scores_soft_cap": 2.0, "output_logits_soft_cap": 3.0}),
        Case("attention_sinks", {"use_attention_sinks": True}),
        Case("other_output_vocab", {"d_vocab_out": 7}),
        Case("llama", _LLAMA),
        Case("llama_gqa", {**_LLAMA, "n_key_value_heads": 2}),
        Case(
            "llama_gqa_folded", {**_LLAMA, "n_key_value_heads": 2}, {"fold_ln": True, "center_writing_weights": False}
        ),
        Case("neox", {"parallel_attn_mlp": True, "positional_embedding_type": "rotary", "rotary_dim": 2}),
    ]
}

# Switches that a user may flip after the swap: name, setter, and the configuration that the switch needs.
SWITCHES = {
    "attn_result": ("set_use_attn_result", {}),
    "split_qkv": ("set_use_split_qkv_input", {}),
    "split_qkv_gqa": ("set_use_split_qkv_input", {"n_key_value_heads": 2}),
    "attn_in": ("set_use_attn_in", {}),
    "hook_mlp_in": ("set_use_hook_mlp_in", {}),
    "ungroup": ("set_ungroup_grouped_query_attention", {"n_key_value_heads": 2}),
}


# -- weights, in TransformerLens's layouts ---------------------------------------------------------------------


def all_sites(model: Any) -> list[str]:
    """Every weight matrix that the forward pass of `model` uses, by TransformerLens's parameter names."""
    cfg = model.cfg
    names = ["embed.W_E"]
    if cfg.positional_embedding_type in ("standard", "shortformer"):
        names.append("pos_embed.W_pos")
    for layer in range(cfg.n_layers):
        names += [f"blocks.{layer}.attn.{w}" for w in ("W_Q", "W_K", "W_V", "W_O")]
        if not cfg.attn_only:
            kinds = ("W_gate", "W_in", "W_out") if cfg.gated_mlp else ("W_in", "W_out")
            names += [f"blocks.{layer}.mlp.{w}" for w in kinds]
    return [*names, "unembed.W_U"]


def _holder(model: Any, site: str) -> tuple[nn.Module, str]:
    path, short = site.rsplit(".", 1)
    module = model.get_submodule(path)
    return (module, "_" + short) if "_" + short in module._parameters else (module, short)


def parameter_name(model: Any, site: str) -> str:
    """The key of a site's weight among `model.named_parameters()`."""
    return site.rsplit(".", 1)[0] + "." + _holder(model, site)[1]


def as_matrix(site: str, stored: Tensor) -> Tensor:
    """`[d_in, d_out]` of a weight as TransformerLens stores it; heads are the slow index of the flat axis."""
    match site.rsplit(".", 1)[-1]:
        case "W_Q" | "W_K" | "W_V":  # [head d_model d_head]
            return torch.cat(list(stored), dim=1)
        case "W_O":  # [head d_head d_model]
            return torch.cat(list(stored), dim=0)
    return stored


def as_stored(site: str, matrix: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `as_matrix`."""
    match site.rsplit(".", 1)[-1]:
        case "W_Q" | "W_K" | "W_V":
            return torch.stack(matrix.split(shape[2], dim=1))
        case "W_O":
            return torch.stack(matrix.split(shape[1], dim=0))
    return matrix


def weight_of(model: Any, site: str) -> Tensor:
    """`W [d_in, d_out]` of `model`."""
    return as_matrix(site, getattr(*_holder(model, site)))


def masked_matrix(W: Tensor, masks: Masks) -> Tensor:
    """`V diag(m) U + d (W - V U)` for a mask `[C]` and one number d."""
    V, U = masks.V, masks.U
    return V @ torch.diag(masks.mask) @ U + masks.delta * (W - V @ U)


def written_copy(target: Any, masks: Mapping[str, Masks]) -> Any:
    """A deep copy of the unswapped `target` with every named site's masked matrix in place of its weight."""
    model = copy.deepcopy(target)
    _write(model, masks)
    return model


def run_written(
    target: Any, masks: Mapping[str, Masks], tokens: Tensor, hooks: Hooks | None = None, **kw: Any
) -> Tensor:
    """Logits of `written_copy(target, masks)`, without the copy: the weights are put back afterwards."""
    with torch.no_grad():
        holders = {site: getattr(*_holder(target, site)) for site in masks}
        before = {site: stored.clone() for site, stored in holders.items()}
        try:
            _write(target, masks)
            with target.hooks(fwd_hooks=hooks or []):
                return target(tokens, **kw)
        finally:
            for site, stored in holders.items():
                stored.copy_(before[site])


def _write(model: Any, masks: Mapping[str, Masks]) -> None:
    with torch.no_grad():
        for site, these in masks.items():
            stored = getattr(*_holder(model, site))
            wide = torch.promote_types(these.V.dtype, stored.dtype)
            matrix = masked_matrix(as_matrix(site, stored).to(wide), these)
            stored.copy_(as_stored(site, matrix, stored.shape))


# -- masks that differ by position: hooks for an unswapped copy ------------------------------------------------


def output_name(model: Any, site: str) -> str:
    """The old hook name that `x @ W + b` of a site passes."""
    parts = site.split(".")
    if parts[0] != "blocks":
        names = {"embed.W_E": "hook_embed", "pos_embed.W_pos": "hook_pos_embed", "unembed.W_U": "unembed.hook_out"}
        return names[site]
    block = f"blocks.{parts[1]}."
    gated = model.cfg.gated_mlp
    return (
        block
        + {
            "W_Q": "attn.hook_q",
            "W_K": "attn.hook_k",
            "W_V": "attn.hook_v",
            "W_O": "hook_attn_out",
            "W_gate": "mlp.hook_pre",
            "W_in": "mlp.hook_pre_linear" if gated else "mlp.hook_pre",
            "W_out": "hook_mlp_out",
        }[parts[3]]
    )


def bias_of(model: Any, site: str) -> Tensor:
    """The bias that a site's output carries, flat `[d_out]`; zeros where TransformerLens adds none there."""
    *path, short = site.split(".")
    module = model.get_submodule(".".join(path))
    if short in ("W_E", "W_pos", "W_gate") or (short == "W_in" and model.cfg.gated_mlp):
        return torch.zeros(weight_of(model, site).shape[1], dtype=weight_of(model, site).dtype)
    name = "b" + short[1:]
    stored = module._parameters.get("_" + name, module._parameters.get(name))
    assert stored is not None
    return stored.reshape(-1)


def site_inputs(model: Any, tokens: Tensor, hooks: Hooks | None = None, **kwargs: Any) -> dict[str, Tensor]:
    """What every site of the *unswapped* `model` reads, rebuilt from the cache of a run of its own.

    Attention and MLP inputs are recomputed from the residual stream with the model's own norms, so nothing is
    captured on the way in.
    """
    with torch.no_grad(), model.hooks(fwd_hooks=hooks or []):
        _, cache = model.run_with_cache(tokens, **kwargs)
        return _inputs_from(model, tokens, cache)


def _inputs_from(model: Any, tokens: Tensor, cache: Any) -> dict[str, Tensor]:
    cfg = model.cfg
    inputs = {"embed.W_E": nn.functional.one_hot(tokens, cfg.d_vocab).to(cfg.dtype)}
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    if cfg.positional_embedding_type in ("standard", "shortformer"):
        inputs["pos_embed.W_pos"] = nn.functional.one_hot(positions, cfg.n_ctx).to(cfg.dtype)
    short = cache["hook_pos_embed"] if cfg.positional_embedding_type == "shortformer" else 0.0
    for layer, block in enumerate(model.blocks):
        pre = f"blocks.{layer}."
        ln1 = nn.Identity() if cfg.normalization_type is None else block.ln1
        for kind, letter in (("W_Q", "q"), ("W_K", "k"), ("W_V", "v")):
            if cfg.use_split_qkv_input:
                stream = cache[f"{pre}hook_{letter}_input"]
            elif cfg.use_attn_in:
                stream = cache[f"{pre}hook_attn_in"]
            else:
                stream = cache[f"{pre}hook_resid_pre"]
            add = short if kind != "W_V" else 0.0
            if isinstance(add, Tensor) and stream.ndim == 4:
                add = add.unsqueeze(2)
            inputs[f"{pre}attn.{kind}"] = ln1(stream) + add
        inputs[f"{pre}attn.W_O"] = cache[f"{pre}attn.hook_z"].flatten(-2)
        if cfg.attn_only:
            continue
        if cfg.use_hook_mlp_in:
            stream = cache[f"{pre}hook_mlp_in"]
        else:
            stream = cache[f"{pre}hook_resid_pre" if cfg.parallel_attn_mlp else f"{pre}hook_resid_mid"]
        normed = stream if cfg.normalization_type is None else block.ln2(stream)
        for kind in ("W_gate", "W_in") if cfg.gated_mlp else ("W_in",):
            inputs[f"{pre}mlp.{kind}"] = normed
        inputs[f"{pre}mlp.W_out"] = cache[f"{pre}mlp.hook_post"]
    last = cache[f"blocks.{cfg.n_layers - 1}.hook_resid_post"]
    inputs["unembed.W_U"] = last if cfg.normalization_type is None else model.ln_final(last)
    return inputs


def output_by_hand(model: Any, site: str, x: Tensor, masks: Masks, acts_change: Tensor | None = None) -> Tensor:
    """`b + ((m * (a + change)) @ U) + d * (x @ (W - V @ U))`, `a = x @ V`, shaped as the site's output.

    The mask is `[C]` or `[batch pos C]`, the delta a number or `[batch pos]`; with an input per head, each head
    uses its own columns of `U` and of `W - V @ U`.
    """
    W, b, V, U = weight_of(model, site), bias_of(model, site), masks.V, masks.U
    delta = masks.delta[..., None] if masks.delta.ndim else masks.delta
    short = site.rsplit(".", 1)[-1]
    if short not in ("W_Q", "W_K", "W_V"):
        a = x @ V if acts_change is None else x @ V + acts_change
        return b + (masks.mask * a) @ U + delta * (x @ (W - V @ U))
    d_head = model.cfg.d_head
    stored_heads = W.shape[1] // d_head
    ungrouped = stored_heads < model.cfg.n_heads and model.cfg.ungroup_grouped_query_attention and short != "W_Q"
    heads = []
    for head in range(model.cfg.n_heads if ungrouped else stored_heads):
        stored = head // (model.cfg.n_heads // stored_heads) if ungrouped else head
        columns = slice(stored * d_head, (stored + 1) * d_head)
        x_head = x[:, :, head] if x.ndim == 4 else x
        a = x_head @ V
        if acts_change is not None:
            a = a + (acts_change[:, :, head] if x.ndim == 4 else acts_change)
        dense = x_head @ (W - V @ U)[:, columns]
        heads.append(b[columns] + (masks.mask * a) @ U[:, columns] + delta * dense)
    return torch.stack(heads, dim=2)


def hand_hooks(model: Any, masks: Mapping[str, Masks], acts_change: Mapping[str, Tensor] | None = None) -> Hooks:
    """Hooks for the unswapped `model` that put `output_by_hand` at every named site's output, with the live input.

    The input comes from plain PyTorch hooks on the module that holds the weight, which stay on the model: use a
    copy that serves nothing else, and put patches on `hook_z` or `hook_post` before calling this.
    """
    live: dict[str, Tensor] = {}
    hooks: Hooks = []
    for site in masks:
        owner = model.get_submodule(site.rsplit(".", 1)[0])
        short = site.rsplit(".", 1)[-1]

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, site: str = site) -> None:
            short = site.rsplit(".", 1)[-1]
            if short in ("W_E", "W_pos"):
                offset = 0 if short == "W_E" else args[1]
                rows = args[0] if short == "W_E" else torch.arange(args[0].shape[1]).expand(args[0].shape) + offset
                W = weight_of(model, site)
                live[site] = nn.functional.one_hot(rows, W.shape[0]).to(W.dtype)
            else:
                names = {"W_Q": "query_input", "W_K": "key_input", "W_V": "value_input"}
                live[site] = kwargs[names[short]] if short in names else args[0]

        def note_output(_: nn.Module, __: Any, out: Tensor, *, site: str = site) -> None:
            live[site] = out.flatten(-2) if site.endswith("W_O") else out

        def replace(y: Tensor, hook: Any, *, site: str = site) -> Tensor:
            change = None if acts_change is None else acts_change.get(site)
            out = output_by_hand(model, site, live[site], masks[site], change)
            assert out.shape == y.shape
            return out

        if short == "W_O":
            owner.hook_z.register_forward_hook(note_output)
        elif short == "W_out":
            owner.hook_post.register_forward_hook(note_output)
        else:
            owner.register_forward_pre_hook(note, with_kwargs=True)
        hooks.append((output_name(model, site), replace))
    return hooks


# -- comparing -------------------------------------------------------------------------------------------------


def assert_close(got: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """`|got - expected| <= tolerance * scale`, scale the largest entry of `expected`; NaN fails."""
    assert got.shape == expected.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    got, expected = got.detach(), expected.detach()
    scale = float(expected[expected.isfinite()].abs().max())  # attention scores are -inf where they are masked
    error = float(torch.where(got == expected, 0, got - expected).abs().max())
    assert error <= tolerance * max(scale, 1e-12), f"{what}: off by {error:.3g} at scale {scale:.3g}"


def assert_differs(got: Tensor, other: Tensor, at_least: float, what: str = "") -> None:
    """The largest difference is at least `at_least` times the scale of `other`: the comparison could fail."""
    difference = float((got.detach() - other.detach()).abs().max())
    assert difference >= at_least * float(other.detach().abs().max()), f"{what}: differs by only {difference:.3g}"
