"""Activation patching over subcomponents, exact and approximated by gradients.

The corrupted run is given, in turn, the clean run's activation of each subcomponent at each position; how much of
the metric comes back says where the difference between the prompts is carried. The shape is that of
`transformer_lens.patching`: decomposition, corrupted tokens, clean cache, metric.

Deliberately left out: patching the delta. What the subcomponents do not explain stays the corrupted run's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens.decomposition import Decomposition
from spd_lens.effects import Effects, Ids, Unit, units_of
from spd_lens.hosts import near_names
from spd_lens.replacement import (
    Metric,
    Positions,
    Replacement,
    activations_of,
    check_input,
    checked_positions,
    effects_of,
    metric_values,
)

# A cache of the clean run (`run_with_cache` on the decomposed model), or the clean tokens themselves.
Clean: TypeAlias = Any


def activation_patching(
    decomposition: Decomposition,
    corrupted_tokens: Tensor,
    clean: Clean,
    metric: Metric,
    ids: Ids = None,
    *,
    positions: Positions = "each",
    per_pass: int | None = None,
) -> Effects:
    """The metric of the corrupted run with each unit's clean activations patched in, `[unit position]`.

    In the patched pass `a'[pos, c]` is the clean run's `a[pos, c]` for one unit and position, so the site's output
    moves by `(a_clean - a_corrupted)[pos, c] U[c]`, and all that follows is computed live.

    `clean` is the clean tokens, of the shape of the corrupted ones, or a cache of the clean run that holds
    `hook_*_acts` of the sites (`_, cache = model.run_with_cache(clean_tokens)` on the decomposed model). With tokens
    the result also knows the clean metric, and `recovered` is 1 where a patch restores all of it. `ids`, `positions`,
    `metric` and cost are as in `ablation_effects`; `positions=None` patches all positions at once.

    Raises ValueError for prompts of different shapes, a cache without the activations, unknown sites, ids, positions.

    >>> from spd_lens import decompose
    >>> from spd_lens.tasks import agreement_task
    >>> from spd_lens.toys import load_tiny_lm
    >>> model = load_tiny_lm()
    >>> task = agreement_task(model.tokenizer, 8, prepend_bos=True)
    >>> decomposition = decompose(model, {"blocks.1.mlp.W_out": 8})
    >>> metric = task.metric(decomposition).per_row
    >>> effects = activation_patching(decomposition, task.corrupted, task.clean, metric)
    >>> effects.recovered.shape == (8, task.clean.shape[1])
    True
    """
    units, values, target = _prepared(decomposition, corrupted_tokens, clean, metric, ids)
    return effects_of(
        decomposition,
        corrupted_tokens,
        metric,
        units,
        Replacement(values),
        what="activation patching",
        positions=positions,
        per_pass=per_pass,
        target=target,
    )


@dataclass(frozen=True)
class Agreement:
    """How well estimated effects agree with exact ones, on cells that were measured both ways.

    `estimated`, `exact` `[cell]`, the first `n_strongest` of them those with the largest estimates, the others drawn at
    random from the rest.
    """

    estimated: Float[Tensor, " cell"]
    exact: Float[Tensor, " cell"]
    n_strongest: int

    @property
    def correlation(self) -> float:
        """Pearson correlation over all measured cells; NaN if either side is constant."""
        return _pearson(self.estimated, self.exact)

    def __str__(self) -> str:
        n, k = len(self.exact), self.n_strongest
        text = f"correlation with exact patching {self.correlation:.3f} on {n} cells"
        if k > 2 and n - k > 2:
            strong, rest = _pearson(self.estimated[:k], self.exact[:k]), _pearson(self.estimated[k:], self.exact[k:])
            text += f" ({strong:.3f} on the {k} largest estimates, {rest:.3f} on {n - k} others at random)"
        return text


@dataclass(frozen=True)
class AttributionPatching:
    """Estimated effects, with their measured agreement with exact ones (None if none were measured)."""

    effects: Effects
    agreement: Agreement | None

    def __str__(self) -> str:
        note = "not compared with exact patching" if self.agreement is None else str(self.agreement)
        return f"{self.effects}\n{note}"


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
    units, values, target = _prepared(decomposition, corrupted_tokens, clean, metric, ids)
    chosen = checked_positions(positions, corrupted_tokens)
    output, gradients, corrupted = _gradients(decomposition, corrupted_tokens, metric, list(values))
    baseline = metric_values(metric, output, len(corrupted_tokens))
    products = {}
    for site, gradient in gradients.items():
        product = gradient * (values[site].to(gradient) - corrupted[site])
        products[site] = (product.sum(2) if product.ndim == 4 else product).cpu()
    rows = [torch.stack([products[site][..., c] for site, c in unit.members]).sum(0) for unit in units]
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
    effects = Effects("attribution patching", units, where, estimate + baseline, baseline, target)
    agreement = None
    if n_checked:
        cells = _sample(effects.effects, n_checked, generator)
        agreement = _agreement(decomposition, corrupted_tokens, metric, effects, values, cells, per_pass)
    return AttributionPatching(effects, agreement)


def _prepared(
    decomposition: Decomposition, corrupted_tokens: Tensor, clean: Clean, metric: Metric, ids: Ids
) -> tuple[tuple[Unit, ...], dict[str, Tensor], Tensor | None]:
    """The units, every site's clean activations, and the clean metric if it can be known."""
    check_input(decomposition, corrupted_tokens, "corrupted_tokens")
    units = units_of(decomposition, ids)
    sites = list(dict.fromkeys(site for unit in units for site in unit.sites))
    values, target = clean_activations(decomposition, corrupted_tokens, clean, sites), None
    if isinstance(clean, Tensor):
        with torch.no_grad():
            target = metric_values(metric, decomposition.host.forward(clean), len(clean))
    return units, values, target


def clean_activations(
    decomposition: Decomposition, corrupted_tokens: Tensor, clean: Clean, sites: Sequence[str]
) -> dict[str, Tensor]:
    """`a [batch pos C]` of the clean run at the named sites, from its tokens or its cache."""
    if isinstance(clean, Tensor):
        check_input(decomposition, clean, "clean tokens")
        if clean.shape != corrupted_tokens.shape:
            raise ValueError(
                f"clean tokens have shape {tuple(clean.shape)}, corrupted ones {tuple(corrupted_tokens.shape)}; "
                "patching needs prompts of equal length, row by row"
            )
        return activations_of(decomposition, clean, sites)
    found = {}
    for site in sites:
        name = decomposition[site].site.point_names()[0]
        try:
            acts = clean[name]
        except (KeyError, TypeError, IndexError):
            keys = list(clean.keys()) if hasattr(clean, "keys") else None
            if keys is None:
                raise TypeError(
                    f"clean is a {type(clean).__name__}; expected clean tokens [batch pos], or a cache of the clean run"
                ) from None
            raise ValueError(
                f"the clean cache has no {name!r} (near: {near_names(name, keys)}); make it with run_with_cache on the "
                "decomposed model, with a names_filter that lets that name through, or give the clean tokens instead"
            ) from None
        if acts.shape[:2] != corrupted_tokens.shape[:2] and corrupted_tokens.ndim > 1:
            raise ValueError(
                f"{name} in the clean cache is {tuple(acts.shape)}, but the corrupted tokens are "
                f"{tuple(corrupted_tokens.shape)}; patching needs prompts of equal length, row by row, and a cache "
                "with its batch axis"
            )
        found[site] = acts.to(decomposition.device)
    return found


def _gradients(
    decomposition: Decomposition, tokens: Tensor, metric: Metric, sites: Sequence[str]
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The output on `tokens`, and for every site the gradient of the (summed) metric by `a'`, and `a` itself."""
    probes: dict[str, Tensor] = {}
    acts: dict[str, Tensor] = {}
    hooks = [
        (decomposition[site].site.point_names()[0], partial(_probe, site=site, probes=probes, acts=acts))
        for site in sites
    ]
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


def _probe(value: Tensor, hook: Any, *, site: str, probes: dict[str, Tensor], acts: dict[str, Tensor]) -> Tensor:
    """Hook: `a + 0`, the 0 a leaf that collects the gradient and lets the gradient to `a` through."""
    acts[site] = value.detach()
    probes[site] = torch.zeros_like(value, requires_grad=True)
    return value + probes[site]


def _sample(effects: Tensor, n: int, generator: torch.Generator | None) -> list[int]:
    """Flat numbers of `n` cells: the half with the largest |effect|, then others at random."""
    order = effects.flatten().abs().argsort(descending=True, stable=True)
    n = min(n, len(order))
    strongest, rest = order[: (n + 1) // 2], order[(n + 1) // 2 :]
    generator = generator or torch.Generator().manual_seed(0)
    drawn = rest[torch.randperm(len(rest), generator=generator, device=generator.device).cpu()[: n - len(strongest)]]
    return [*strongest.tolist(), *drawn.tolist()]


def _agreement(
    decomposition: Decomposition,
    tokens: Tensor,
    metric: Metric,
    effects: Effects,
    values: Mapping[str, Tensor],
    cells: Sequence[int],
    per_pass: int | None,
) -> Agreement:
    """Patch the cells exactly, those of the same position together."""
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
    estimated = effects.effects.flatten()[list(cells)]
    return Agreement(estimated, estimated.new_tensor([exact[cell] for cell in cells]), (len(cells) + 1) // 2)


def _pearson(x: Tensor, y: Tensor) -> float:
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    scale = float(x.norm() * y.norm())
    return float(x @ y) / scale if scale > 0 else float("nan")
