"""Methods of a `TransformerBridge` that are shadowed while it is decomposed: what would break its sites is refused."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor
from transformer_lens.hook_points import HookPoint

_BY_HEAD = (("W_Q", "W_K", "W_V"), "no HookPoint sees the normalised input of a single head")

# Methods of the bridge that would break a decomposition: the sites that each would break (None: all), and why.
FORBIDDEN: Mapping[str, tuple[tuple[str, ...] | None, str]] = {
    "enable_compatibility_mode": (None, "it rewrites the weights and rebuilds the hook registry"),
    "process_weights": (None, "it rewrites the weights"),
    "set_use_attn_result": (("W_O",), "heads are then multiplied one by one and attn.o.hook_out is never called"),
    "set_use_split_qkv_input": _BY_HEAD,
    "set_use_attn_in": _BY_HEAD,
}


def _refuse(*args: Any, method: str, **kwargs: Any) -> None:
    """Stands in for a method of the bridge while the model is decomposed; switching something off stays allowed."""
    if method.startswith("set_") and not any((*args, *kwargs.values())):
        return
    weights, reason = FORBIDDEN[method]
    without = "" if weights is None else f" without {', '.join(weights)}"
    raise ValueError(
        f"{method}() cannot be called on a decomposed model: {reason}. Call decomposition.remove(), then "
        f"{method}(), then decompose again{without}"
    )


def _own_keys(bridge: Any) -> list[str]:
    """Names in the Hugging Face model of the parameters that decomposed HookPoints hold."""
    keys = []
    for name, module in bridge.original_model.named_modules():
        if isinstance(module, HookPoint):
            keys += [f"{name}.{key}" for key, _ in module.named_parameters()]
    # A module reached on two ways counts once.
    return list(dict.fromkeys(keys))


def _state_dict(*args: Any, bridge: Any, **kwargs: Any) -> dict[str, Tensor]:
    """Stands in for `bridge.state_dict`, which leaves out what is not Hugging Face's: V, U and gates are in it."""
    state = type(bridge).state_dict(bridge, *args, **kwargs)
    if args or kwargs.get("destination") is not None or kwargs.get("prefix"):
        return state  # the whole module tree, with ours in it
    whole = bridge.original_model.state_dict(keep_vars=kwargs.get("keep_vars", False))
    return {**state, **{key: whole[key] for key in _own_keys(bridge)}}


def _load_state_dict(
    state_dict: Mapping[str, Tensor], strict: bool = True, *args: Any, bridge: Any, **kwargs: Any
) -> Any:
    """Stands in for `bridge.load_state_dict`: V, U and gates that are missing are named."""
    missing = [key for key in _own_keys(bridge) if key not in state_dict]
    if strict and missing:
        raise RuntimeError(
            f"this state_dict has no {missing[0]!r} (and {len(missing) - 1} more): it comes from a model that is not "
            "decomposed like this one; decompose that one alike before saving, or load with strict=False"
        )
    return type(bridge).load_state_dict(bridge, state_dict, strict, *args, **kwargs)


def added_points(bridge: Any) -> frozenset[str]:
    """Names of the HookPoints that decompositions have put into the model."""
    return bridge.__dict__.get("spd_points", frozenset())


def guard(bridge: Any, points: frozenset[str]) -> None:
    """Remember the points that are in the model, and shadow the methods that would break their sites."""
    state = bridge.__dict__
    state.pop("spd_points", None)
    if points:
        state["spd_points"] = points
    for name, stands_in in (("state_dict", _state_dict), ("load_state_dict", _load_state_dict)):
        if points:
            state[name] = partial(stands_in, bridge=bridge)
        else:
            state.pop(name, None)
    attributes = {name.rsplit(".", 1)[-1] for name in points}
    for method, (weights, _) in FORBIDDEN.items():
        if points and (weights is None or any(f"hook_{weight}_acts" in attributes for weight in weights)):
            # A function of this module, not a closure: a deep copy of the model refuses for itself.
            state[method] = partial(_refuse, method=method)
        else:
            state.pop(method, None)
