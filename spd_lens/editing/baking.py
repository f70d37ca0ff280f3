"""Baking: an edit written into the weights of a plain model, which runs and saves without this library.

The decomposed model is copied, the copy's decomposition is removed, and every edited matrix is written there in the
host's own layout: a HookedTransformer stays one, a bridge becomes the Hugging Face model that it wraps. The edited and
the baked model are then run on the same random tokens, and a difference beyond rounding is an error.

Cost: one more copy of the model in memory, and two passes over a few tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spd_lens.core.decomposed_weight import DecomposedWeight
from spd_lens.core.decomposition import Decomposition
from spd_lens.support.given import given_instance

# The largest difference between hooked and baked logits, in units of the dtype's rounding at the logits' scale; and the
# share of that scale that no dtype's rounding explains: 2,000 roundings of 16 bits would explain everything.
_ROUNDINGS, _AT_MOST = 2_000, 0.1


def plain_model(decomposition: Decomposition, factors: Mapping[str, tuple[Tensor, Tensor]]) -> nn.Module:
    """A model without a decomposition and without hooks whose matrices are `W + A @ B` at the sites in `factors`.

    The decomposed model stays as it is. Raises ValueError for one stored matrix that would need two values, for weights
    that the plain model has no place for, and if rounding to the model's dtype leaves nothing of the change.
    """
    new, changed = {}, False
    for site, (A, B) in factors.items():
        W = decomposition[site].target_weight.detach()
        new[site] = W.double() + A @ B
        changed |= not torch.equal(new[site].to(W.dtype), W)
    if not changed:
        dtype = decomposition[next(iter(factors))].target_weight.dtype
        raise ValueError(f"this edit changes nothing in {dtype}: it is smaller than the rounding of every entry")
    copied = copy.deepcopy(decomposition)
    copied.remove()
    plain: Any = copied.host.with_matrices(new)
    if hasattr(plain, "reset_hooks"):
        plain.reset_hooks(including_permanent=True)
    return plain


def some_tokens(decomposition: Decomposition) -> Tensor | None:
    """A few random tokens; None for models without a vocabulary."""
    size, length = decomposition.host.vocabulary_size(), decomposition.host.context_length()
    if size is None:
        return None
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, size, (2, min(length or 8, 8)), generator=generator).to(decomposition.device)


def explained_by_rounding(outputs: Tensor) -> float:
    """How far two computations of these outputs may differ."""
    return min(_ROUNDINGS * torch.finfo(outputs.dtype).eps, _AT_MOST) * float(outputs.double().abs().max())


def given_plain(name: str, model: Any) -> nn.Module:
    """`model`, if it is one without a decomposition; TypeError or ValueError otherwise."""
    given_instance(name, model, nn.Module, "edit(decomposition, ...).bake() makes one")
    if any(isinstance(module, DecomposedWeight) for module in model.modules()):
        raise ValueError(f"{name} is decomposed; expected a plain model: edit(decomposition, ...).bake() makes one")
    return model


def outputs_of(model: Any, inputs: Tensor) -> Tensor:
    """Logits (outputs) of a plain model of either kind."""
    out = model(inputs)
    return out if isinstance(out, Tensor) else out.logits
