"""What a text domain asks of every matrix: the second moments of its inputs, and what directions in it are worth.

    effect_c = E over rows of (d log p(y) / d m_c)^2,  y drawn from the model itself

is the Fisher information of a mask m_c that is 1: half of it is, to second order, the KL divergence that taking the
direction away costs. Next tokens are drawn independently, so that positions of a row may be summed first.

Cost: two passes and one backward pass over the rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.inputs import checked_decomposition, checked_tokens
from spd_lens.data.batches import as_batch, is_one_batch
from spd_lens.support.given import given_seed, shown
from spd_lens.support.shown import short_repr

_ROWS_PER_PASS = 16


@dataclass(frozen=True, eq=False)
class Domain:
    """A sample of a domain, and what every shrinkable matrix sees of it.

    - `inputs[site]`, `gradients[site]`: `x` and `d log p / d y` of each chunk of rows, `[row pos d]`.
    - `moments[site] [d_in, d_in]`: mean of `x x^T`, float64; `gradient_moments[site] [d_out, d_out]`: of the gradients.
    """

    rows: Int[Tensor, "row pos"]
    inputs: Mapping[str, list[Tensor]]
    gradients: Mapping[str, list[Tensor]]
    moments: Mapping[str, Tensor]
    gradient_moments: Mapping[str, Tensor]

    __repr__ = short_repr

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites whose matrices can be made smaller."""
        return tuple(self.moments)

    def effects(self, site: str, V: Float[Tensor, "d_in n"], U: Float[Tensor, "n d_out"]) -> Float[Tensor, " n"]:
        """What each direction `V_c U_c` is worth, in nats a row."""
        total, count = torch.zeros(V.shape[1], dtype=torch.float64, device=V.device), 0
        V, U = V.to(self.inputs[site][0]), U.to(self.inputs[site][0])
        for x, gradient in zip(self.inputs[site], self.gradients[site], strict=True):
            by_row = einsum(x @ V, gradient @ U.T, "row pos n, row pos n -> row n")
            total, count = total + by_row.double().square().sum(0), count + len(x)
        return 0.5 * total / count


def rows_of(decomposition: Decomposition, batches: Any) -> Int[Tensor, "row pos"]:
    """The tokens of one batch, or of an iterable of batches, in one tensor. Raises ValueError for padding and none."""
    if is_one_batch(batches):
        batches = [batches]
    elif hasattr(batches, "once"):
        batches = batches.once()
    if isinstance(batches, (str, bytes)) or not isinstance(batches, Iterable):
        raise TypeError(f"domain_batches={shown(batches)}; expected tokens [batch pos], or a list of such batches")
    found = []
    for item in batches:
        if isinstance(item, Tensor) and not item.is_floating_point():
            checked_tokens(item, decomposition.host, name="domain_batches")
        batch = as_batch(item)
        if batch.tokens is None or batch.attention_mask is not None:
            raise ValueError(
                "domain_batches holds padding or residual streams; expected whole rows of tokens [batch pos]"
            )
        found.append(checked_tokens(batch.tokens, decomposition.host, name="domain_batches"))
    if not found:
        raise ValueError("domain_batches is empty; expected tokens [batch pos], or a list of such batches")
    if min(part.shape[1] for part in found) < 2:
        raise ValueError("domain_batches has rows of one token, which predict nothing; expected longer rows")
    if len({part.shape[1] for part in found}) > 1:
        raise ValueError(
            f"domain_batches has rows of {sorted({p.shape[1] for p in found})} tokens; expected one length"
        )
    return torch.cat(found).to(decomposition.device)


def domain_of(decomposition: Decomposition, batches: Any, *, seed: int = 0) -> Domain:
    """Run the model on a domain's text and keep what its matrices see. Raises ValueError if it gives NaN there."""
    checked_decomposition(decomposition, "domain_of")
    rows, seed = rows_of(decomposition, batches), given_seed(seed)
    sites = [name for name in decomposition if not decomposition[name].site.is_lookup and name.startswith("blocks.")]
    if not sites:
        raise ValueError(f"none of {list(decomposition)} is a matrix of a block; only those are made smaller")
    inputs: dict[str, list[Tensor]] = {name: [] for name in sites}
    gradients: dict[str, list[Tensor]] = {name: [] for name in sites}
    generator = torch.Generator(device=rows.device).manual_seed(seed)
    for part in rows.split(_ROWS_PER_PASS):
        seen = decomposition.clean_pass(part).inputs
        moved = _output_gradients(decomposition, part, sites, generator)
        for name in sites:
            inputs[name].append(_flat(decomposition, name, seen[name]))
            gradients[name].append(moved[name])
    moments, gradient_moments = (
        {name: _second_moment(parts) for name, parts in seen.items()} for seen in (inputs, gradients)
    )
    return Domain(rows, inputs, gradients, moments, gradient_moments)


def _flat(decomposition: Decomposition, name: str, x: Tensor) -> Tensor:
    if x.ndim == 4 and not decomposition[name].site.flatten_input:
        raise ValueError(f"{name} has an input for each head (use_split_qkv_input); switch that off first")
    return x.flatten(2)


def _second_moment(parts: list[Tensor]) -> Tensor:
    x = torch.cat([part.flatten(0, 1) for part in parts]).double()
    return x.T @ x / len(x)


def _output_gradients(
    decomposition: Decomposition, rows: Tensor, sites: list[str], generator: torch.Generator
) -> dict[str, Tensor]:
    """`d log p(y) / d y_site` for next tokens y drawn from the model at every position."""
    added: dict[str, Tensor] = {}
    hooks = [(decomposition[name].site.output.name, partial(_add_zero, added=added, name=name)) for name in sites]
    with torch.enable_grad(), decomposition.model.hooks(fwd_hooks=hooks):
        logp = decomposition.host.forward(rows).log_softmax(-1)
        if bool(logp.isnan().any()):
            raise ValueError("the model gives NaN on domain_batches; nothing can be learned from that")
        drawn = torch.multinomial(logp.detach().exp().flatten(0, 1), 1, generator=generator).view(*rows.shape, 1)
        gradients = torch.autograd.grad(logp.gather(-1, drawn).sum(), [added[name] for name in sites])
    return {name: gradient.flatten(2) for name, gradient in zip(sites, gradients, strict=True)}


def _add_zero(value: Tensor, hook: Any, *, added: dict[str, Tensor], name: str) -> Tensor:
    added[name] = torch.zeros_like(value, requires_grad=True)
    return value + added[name]
