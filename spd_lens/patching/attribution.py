"""Attribution patching: activation patching of all units at once, approximated by gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.units import Ids, Unit
from spd_lens.patching.activation import Clean, prepared
from spd_lens.patching.agreement import Agreement, sampled
from spd_lens.patching.arguments import Metric, Positions, checked_input, metric_values, unit_positions
from spd_lens.patching.effects import Effects
from spd_lens.patching.hooks import probe
from spd_lens.patching.runner import Replacement, effects_of
from spd_lens.support.pages import table_html


@dataclass(frozen=True, repr=False)
class AttributionPatching:
    """Estimated effects, with their measured agreement with exact ones (None if none were measured)."""

    effects: Effects
    agreement: Agreement | None

    def __str__(self) -> str:
        return f"{self.effects}\n{self._note()}"

    def _note(self) -> str:
        return "not compared with exact patching" if self.agreement is None else str(self.agreement)

    def __repr__(self) -> str:
        return f"AttributionPatching({self.effects!r}, {self._note()})"

    def _repr_html_(self) -> str:
        return table_html(*self.effects._table(), notes=[self._note()])


@torch.inference_mode(False)
def attribution_patching(
    decomposition: Decomposition,
    corrupted_tokens: Tensor,
    clean: Clean,
    metric: Metric,
    ids: Ids = None,
    *,
    positions: Positions = "each",
    n_checked: int = 64,
    per_pass: int | None = None,
    generator: torch.Generator | None = None,
) -> AttributionPatching:
    """First-order estimate of `activation_patching` for all units at once: gradient times (clean - corrupted).

    `effect[pos, c] ~ sum over rows (d metric / d a'[pos, c]) * (a_clean - a_corrupted)[pos, c]`, the gradient taken on
    the corrupted run, with everything downstream live. One clean pass and one forward and backward pass, whatever the
    number of units; the gradient of `n sites * batch * pos * C` activations is kept in memory.

    The estimate is exact where the metric is linear in the activation, and can have the wrong sign where it is not
    (softmax, saturated non-linearities). So `n_checked` cells are also patched exactly: half those with the largest
    estimates, half at random (from `generator`; seed 0 if None), and the correlation stands beside the result.

    With a metric that returns `[batch]`, row i's number must depend on row i alone.
    """
    corrupted_tokens = checked_input(decomposition, corrupted_tokens, "corrupted_tokens")
    units, values, clean_metric = prepared(decomposition, corrupted_tokens, clean, metric, ids)
    chosen = unit_positions(units, positions, corrupted_tokens)
    output, gradients, corrupted = _gradients(decomposition, corrupted_tokens, metric, list(values))
    baseline = metric_values(metric, output, len(corrupted_tokens))
    products = {}
    for site, gradient in gradients.items():
        product = gradient * (values[site].to(gradient) - corrupted[site])
        products[site] = (product.sum(2) if product.ndim == 4 else product).cpu()
    rows = [_over_members(products, unit) for unit in units]
    estimate = torch.stack(rows)  # [unit batch pos]
    if chosen is not None:
        estimate = estimate[..., chosen]
    elif estimate.ndim == 3:
        estimate = estimate.sum(-1, keepdim=True)
    else:
        estimate = estimate.unsqueeze(-1)
    estimate = estimate.transpose(1, 2)  # [unit position batch]
    if len(baseline) == 1:
        estimate = estimate.sum(-1, keepdim=True)
    # In double: small estimates would be rounded away beside the baseline.
    estimate, baseline = estimate.double(), baseline.double()
    where = None if chosen is None else tuple(chosen)
    effects = Effects("attribution patching", units, where, estimate + baseline, baseline, clean_metric)
    agreement = None
    if n_checked:
        cells, n_strongest = sampled(effects.effects, n_checked, generator)
        exact = _exact(decomposition, corrupted_tokens, metric, effects, values, cells, per_pass)
        predicted = effects.effects.flatten()[cells].tolist()
        agreement = Agreement(predicted=tuple(predicted), measured=tuple(exact), n_strongest=n_strongest)
    return AttributionPatching(effects, agreement)


def _over_members(products: Mapping[str, Tensor], unit: Unit) -> Float[Tensor, "*batch"]:
    """The sum over a unit's members, `[batch pos]`, 0 where the unit is not."""
    total = torch.stack([products[site][..., c] for site, c in unit.members]).sum(0)
    if unit.positions is None:
        return total
    own = torch.zeros_like(total)
    own[:, list(unit.positions)] = total[:, list(unit.positions)]
    return own


def _gradients(
    decomposition: Decomposition, tokens: Tensor, metric: Metric, sites: Sequence[str]
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The output on `tokens`, and for every site the gradient of the (summed) metric by `a'`, and `a` itself."""
    probes: dict[str, Tensor] = {}
    acts: dict[str, Tensor] = {}
    hooks = [(decomposition[site].site.point_names()[0], probe(probes, site, acts)) for site in sites]
    with torch.enable_grad(), decomposition.model.hooks(fwd_hooks=hooks):
        output = decomposition.host.forward(tokens)
        value = metric(output)
        if not isinstance(value, Tensor) or not value.requires_grad:
            raise ValueError(
                "the metric gives no gradient (it detaches, rounds, or returns a Python number); attribution patching "
                "needs one. Use activation_patching for such a metric"
            )
        gradients = torch.autograd.grad(value.sum(), [probes[site] for site in sites])
    return output.detach(), dict(zip(sites, gradients, strict=True)), acts


def _exact(
    decomposition: Decomposition,
    tokens: Tensor,
    metric: Metric,
    effects: Effects,
    values: Mapping[str, Tensor],
    cells: Sequence[int],
    per_pass: int | None,
) -> list[float]:
    """The effects of the cells, patched exactly, those of the same position together."""
    n_positions = effects.values.shape[1]
    exact: dict[int, float] = {}
    for column in sorted({cell % n_positions for cell in cells}):
        here = [cell for cell in cells if cell % n_positions == column]
        measured = effects_of(
            decomposition,
            tokens,
            metric,
            [effects.units[cell // n_positions] for cell in here],
            Replacement(values),
            what="exact patching of a sample",
            positions=None if effects.positions is None else [effects.positions[column]],
            per_pass=per_pass,
        )
        exact |= dict(zip(here, measured.effects[:, 0].tolist(), strict=True))
    return [exact[cell] for cell in cells]
