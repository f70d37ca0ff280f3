"""What a target is, in a few hashes: files made from one model are refused for another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.units import subcomponent_hash
from spd_lens.support.files import tensor_hash

# Entries of a parameter that enter the hash of all, evenly spaced; fine-tuning changes nearly every entry.
_SAMPLED = 4096


def target_fingerprint(decomposition: Decomposition) -> dict[str, Any]:
    """Name and kind of the target, the hash of every decomposed matrix, and one of all its parameters together.

    Cost: one pass over the decomposed matrices on the CPU; for the last one at most 4,096 entries of each are read.
    """
    made_from = decomposition.host.provenance()
    return {
        "model": made_from.model_name,
        "host": made_from.host,
        "weight_processing": made_from.weight_processing,
        "weights": _parameters_hash(decomposition),
        "sites": {name: tensor_hash(weight.target_weight) for name, weight in decomposition.items()},
    }


def _parameters_hash(decomposition: Decomposition) -> str:
    """One hash of all the target's parameters; those of the decomposition do not count."""
    own = {id(p) for p in decomposition.subcomponent_parameters() + decomposition.gate_parameters()}
    return sampled_hash({name: p for name, p in decomposition.model.named_parameters() if id(p) not in own})


def sampled_hash(tensors: Mapping[str, Tensor]) -> str:
    """One hash of tensors by name, of which at most 4,096 entries each are read, evenly spaced."""
    digest = hashlib.sha256()
    for name, p in sorted(tensors.items()):
        flat = p.detach().reshape(-1)
        chosen = torch.linspace(0, max(flat.numel() - 1, 0), min(flat.numel(), _SAMPLED), dtype=torch.float64)
        values = flat[chosen.long().to(flat.device)]
        digest.update(f"{name} {tuple(p.shape)} {p.dtype} {tensor_hash(values)}".encode())
    return digest.hexdigest()


def subcomponent_hashes(decomposition: Decomposition) -> dict[str, str]:
    """What every site's subcomponents are: one hash of V and U each. Gates do not count."""
    return {name: subcomponent_hash(weight) for name, weight in decomposition.items()}


def difference(saved: Mapping[str, Any], now: Mapping[str, Any], *, ignore: Iterable[str] = ()) -> str | None:
    """The first thing in which two fingerprints differ, in words, or None; what only one of them has counts too."""
    ignored = set(ignore)
    for key in [*saved, *(k for k in now if k not in saved)]:
        if key in ignored:
            continue
        then, here = saved.get(key), now.get(key)
        if isinstance(then, Mapping) and isinstance(here, Mapping):
            if (found := difference(then, here)) is not None:
                return f"{key}: {found}"
        elif then != here:
            return f"{key} was {_short(then)} and is {_short(here)}"
    return None


def _short(value: Any) -> str:
    text = repr(value)
    is_hash = isinstance(value, str) and len(value) == 64
    return f"{value[:12]}..." if is_hash else text if len(text) <= 80 else f"{text[:77]}..."
