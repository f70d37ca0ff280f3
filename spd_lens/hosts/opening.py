"""`open_host`: which kind of host a model is, by what it offers."""

from __future__ import annotations

from torch import nn

from spd_lens.hosts.bridge import BridgeHost
from spd_lens.hosts.declared import DeclaredHost
from spd_lens.hosts.hooked import HookedHost
from spd_lens.hosts.host import Host


def open_host(model: nn.Module) -> Host:
    """The `Host` of `model`.

    Raises TypeError for anything that is not a TransformerLens model, or a `HookedRootModule` that does not
    declare its sites.
    """
    if not (hasattr(model, "hook_dict") and hasattr(model, "run_with_cache")):
        raise TypeError(
            f"given a {type(model).__name__}; expected a TransformerLens model (HookedTransformer, "
            "TransformerBridge, or a HookedRootModule with a method spd_sites()). For a Hugging Face model: "
            "TransformerBridge.boot_transformers(name, hf_model=model)"
        )
    if hasattr(model, "spd_sites"):
        return DeclaredHost(model)
    if hasattr(model, "original_model"):
        return BridgeHost(model)
    if hasattr(model, "blocks") and hasattr(model, "unembed") and hasattr(model, "cfg"):
        return HookedHost(model)
    raise TypeError(
        f"given a {type(model).__name__}, a HookedRootModule that does not say which weights it has; add a method "
        "spd_sites() -> list[spd_lens.DeclaredSite] to it"
    )
