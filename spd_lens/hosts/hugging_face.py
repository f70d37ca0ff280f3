"""The Hugging Face model that a bridge wraps, made anew with other matrices: it needs neither TransformerLens nor us.

A bridge puts its own modules into the Hugging Face model and may fold, centre or split its weights, so that
`save_pretrained` of the wrapped model raises and its tensors are not all in use. Here a fresh model of the same class
and configuration gets, by Hugging Face's names, what the bridge multiplies with. Folded weights fit into it: norms have
then weights of 1, and a bias that folding has put behind W_U goes back before it. Fused projections are put together
again with the bridge's own splitting function, which is asked where it takes each number from. Embeddings that are tied
and no longer equal become two parameters.

What has no place (a bias that folding has made where the architecture has none) is refused by name.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

if TYPE_CHECKING:
    from spd_lens.hosts.host import Host
    from spd_lens.hosts.site import Site

# What the bridge inserts into the names of the modules that it wraps.
_WRAPPED = "_original_component"


def hugging_face_copy(host: Host, new: Mapping[str, Float[Tensor, "_in _out"]]) -> nn.Module:
    """A fresh Hugging Face model with the bridge's weights, and `new[site]` in place of its matrices.

    Raises ValueError, naming the site, for what Hugging Face's model has no place for.
    """
    original = host.model.original_model
    config = copy.deepcopy(original.config)
    fresh = _built(type(original), config)
    state = _state_of(original, fresh)
    for name in host.site_names():
        try:
            site = host.site(name)
        except ValueError:
            if name in new:
                raise
            continue  # what cannot be decomposed is as Hugging Face has it
        _put(host, fresh, state, site, new.get(name))
    if _is_untied(fresh, state):
        config.tie_word_embeddings = False
        fresh = _built(type(original), config)
        if _is_untied(fresh, state):
            raise ValueError(
                f"a {type(original).__name__} shares weights that would have to differ now; edit them alike"
            )
    dtype, device = next(iter(state.values())).dtype, next(iter(state.values())).device
    fresh = fresh.to(device=device, dtype=dtype)
    fresh.load_state_dict(state, strict=True)
    if getattr(original, "generation_config", None) is not None:
        fresh.generation_config = copy.deepcopy(original.generation_config)
    return fresh.train(original.training)


def _built(cls: Any, config: Any) -> Any:
    """A model with random weights; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        return cls._from_config(config, attn_implementation=getattr(config, "_attn_implementation", None))


def _plain_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != _WRAPPED)


def _state_of(original: nn.Module, fresh: nn.Module) -> dict[str, Tensor]:
    """Hugging Face's names with the tensors that stand there in the bridge, copied."""
    found: dict[str, Tensor] = {}
    for name, value in original.state_dict().items():
        found.setdefault(_plain_name(name), value)
    missing = [name for name in fresh.state_dict() if name not in found]
    if missing:
        raise ValueError(f"this bridge no longer has {missing[0]}, so no {type(fresh).__name__} can be made of it")
    return {name: found[name].detach().clone() for name in fresh.state_dict()}


def _put(host: Host, fresh: nn.Module, state: dict[str, Tensor], site: Site, matrix: Tensor | None) -> None:
    """Put a site's matrix (its own, if None is given) and its bias where Hugging Face has them."""
    weight = site.matrix.stored() if matrix is None else site.matrix.as_stored(matrix)
    bias = site.read_bias()
    name = _module_name(host, _bridge_of(host, site).original_component, state)
    if f"{name}.weight" in state:
        _write(state, f"{name}.weight", weight)
        if bias is None:
            return
        if f"{name}.bias" in state:
            _write(state, f"{name}.bias", bias)
        elif bool(bias.any()) and not _moved_before_the_unembedding(host, state, site, f"{name}.weight", bias):
            raise ValueError(
                f"{site.name} has a bias here, made by folding, and a {type(fresh).__name__} has no place for it; make "
                f"the bridge without compatibility mode, or with {_unfolded(site)}=False, and decompose that"
            )
        return
    parts = _fused_places(host, fresh, site)
    for value, part in ((weight, "weight"), (bias, "bias")):
        if value is not None:
            key, where = parts[part]
            state[key].view(-1)[where.flatten()] = value.detach().flatten().to(state[key])


def _unfolded(site: Site) -> str:
    return "fold_ln" if site.name == "unembed.W_U" else "fold_value_biases"


def _moved_before_the_unembedding(host: Host, state: dict[str, Tensor], site: Site, key: str, bias: Tensor) -> bool:
    """Whether W_U's bias could be put into the final LayerNorm and W_U, where folding has taken it from.

    What the folded norm gives sums to 0, so `W_U + 1 c^T` does the same; with a norm's bias of ones it adds
    `1 @ W_U + d_model c`, and that is the bias for the right c.
    """
    norm = host.model._modules.get("ln_final")
    if site.name != "unembed.W_U" or norm is None or type(norm.original_component) is not nn.LayerNorm:
        return False
    name = _module_name(host, norm.original_component, state)
    weight, shift = state[f"{name}.weight"], state[f"{name}.bias"]
    if not bool((weight == 1).all()) or bool(shift.any()):
        return False
    W = state[key].double()  # [d_vocab d_model]
    c = (bias.detach().double() - W.sum(1)) / W.shape[1]
    state[key].copy_(W + c.unsqueeze(1))
    shift.fill_(1)
    return True


def _write(state: Mapping[str, Tensor], key: str, value: Tensor) -> None:
    if value.shape != state[key].shape:
        raise ValueError(f"{key} is {tuple(state[key].shape)} in the Hugging Face model and {tuple(value.shape)} here")
    state[key].copy_(value.detach())


def _bridge_of(host: Host, site: Site) -> Any:
    """The bridge's component around a site's matrix."""
    # Its hook_out is the site's output, whatever it multiplies with.
    return next(m for m in host.model.modules() if getattr(m, "_modules", {}).get("hook_out") is site.output)


def _module_name(host: Host, module: nn.Module, known: Mapping[str, Tensor]) -> str | None:
    """Hugging Face's name of a module with parameters in `known`; None for one that the bridge has made.

    The bridge's own attributes (`attn.q`) and Hugging Face's (`self_attn.q_proj`) lead to the same modules.
    """
    named = host.model.original_model.named_modules(remove_duplicate=False)
    names = {_plain_name(name) for name, m in named if m is module}
    return next((name for name in sorted(names) if any(key.startswith(f"{name}.") for key in known)), None)


def _fused_places(host: Host, fresh: nn.Module, site: Site) -> dict[str, tuple[str, Tensor]]:
    """Where a fused parameter holds a site's weight and bias: name and flat positions, `{"weight": ..., "bias": ...}`.

    The fused module is filled with the numbers of its own entries, and the bridge splits that.
    """
    part, short = site.name.split(".")[2:]
    component = host.model.blocks[site.layer]._modules[part]
    split = getattr(component, "split_qkv_matrix" if part == "attn" else "split_gate_up_matrix", None)
    order = ("W_Q", "W_K", "W_V") if part == "attn" else ("W_gate", "W_in")
    owner = _module_name(host, component.original_component, fresh.state_dict())
    if split is None or short not in order or owner is None:
        raise ValueError(
            f"{site.name} is stored in a way that this library cannot write into a {type(fresh).__name__}; decompose "
            "this model without it"
        )
    numbered, starts, count = copy.deepcopy(fresh.get_submodule(owner)).double(), {}, 0
    with torch.no_grad():
        for name, parameter in numbered.named_parameters():
            starts[name] = (count, parameter.numel())
            parameter.copy_(torch.arange(count, count + parameter.numel()).view_as(parameter))
            count += parameter.numel()
        module = split(numbered)[order.index(short)]
    places = {}
    for kind in ("weight", "bias"):
        value = getattr(module, kind, None)
        if value is None:
            continue
        flat = value.detach().double().flatten().long()
        for name, (start, size) in starts.items():
            if bool(((flat >= start) & (flat < start + size)).all()):
                places[kind] = (f"{owner}.{name}", flat - start)
        if kind not in places or len(flat.unique()) != len(flat):
            raise ValueError(f"{site.name} is not a part of one parameter of a {type(fresh).__name__}")
    return places


def _is_untied(fresh: nn.Module, state: Mapping[str, Tensor]) -> bool:
    """Whether parameters that the fresh model shares are to hold different numbers."""
    first: dict[int, str] = {}
    for name, parameter in fresh.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        if not torch.equal(state[other], state[name]):
            return True
    return False
