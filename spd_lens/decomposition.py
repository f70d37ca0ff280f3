"""`decompose_layer`, `decompose` and the `Decomposition` they return: what a user holds.

A decomposition is a mapping from site names to `DecomposedWeight`s that stand inside the model. Interventions are
lists of ordinary TransformerLens hooks; nothing is switched on or off in the model itself.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spd_lens.gates import GateKind, GlobalGate, DEFAULT_WIDTH, importance_of, make_gate
from spd_lens.hosts import Host, Site, near_names, open_host
from spd_lens.subcomponents import (
    DecomposedWeight,
    InitKind,
    SiteMask,
    Subcomponents,
    given_masks,
    initial_factors,
    record_inputs,
    swap_in,
    swap_out,
)

HookList = list[tuple[str, Any]]


@dataclass(frozen=True)
class CleanPass:
    """A forward pass of the target: its output and the input `x` that every decomposed site read in it."""

    output: Tensor
    inputs: dict[str, Tensor]


class Decomposition(Mapping[str, DecomposedWeight]):
    """The decomposed weights of one model, by site name.

    `copy.deepcopy(decomposition)` copies the model with it (`copy.model`); the two are then independent.
    """

    def __init__(
        self,
        host: Host,
        weights: dict[str, DecomposedWeight],
        global_gate: GlobalGate | None,
        settings: dict[str, Any],
    ) -> None:
        self.host = host
        self.settings = settings
        self._weights = weights
        self.global_gate = global_gate
        self._removed = False

    # -- a mapping ---------------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> DecomposedWeight:
        if name not in self._weights:
            raise KeyError(f"no decomposed site {name!r}; near: {near_names(name, self._weights)}")
        return self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def __repr__(self) -> str:
        sites = ", ".join(f"{name}: C={weight.n_subcomponents}" for name, weight in self.items())
        return f"Decomposition({type(self.model).__name__}, {{{sites}}})"

    @property
    def model(self) -> Any:
        """The TransformerLens model whose hook points were swapped."""
        return self.host.model

    @property
    def device(self) -> torch.device:
        """Where the subcomponents are."""
        return next(iter(self._weights.values())).V.device

    # -- parameters --------------------------------------------------------------------------------------------

    def subcomponent_parameters(self) -> list[nn.Parameter]:
        """All `V` and `U`; tied sites count once."""
        return [p for w in self.values() if w.tied_to is None for p in w.subcomponents.parameters()]

    def gate_parameters(self) -> list[nn.Parameter]:
        """All parameters of gates."""
        own = [p for w in self.values() if w.gate is not None for p in w.gate.parameters()]
        return own + ([] if self.global_gate is None else list(self.global_gate.parameters()))

    def to(self, *args: Any, **kwargs: Any) -> Decomposition:
        """Move the model together with its decomposition, as `model.to`; returns itself."""
        self.model.to(*args, **kwargs)
        if self.global_gate is not None:
            self.global_gate.to(*args, **kwargs)
        return self

    # -- running -----------------------------------------------------------------------------------------------

    def clean_pass(self, batch: Tensor, *, start_at: int | None = None) -> CleanPass:
        """The target's output and every site's input, without gradients; hooks on the sites' points do not act.

        With `start_at=L`, `batch` is the residual stream that enters block L and only blocks from L on are run.
        """
        with torch.no_grad(), record_inputs(self._weights) as inputs:
            output = self._run(batch, start_at)
        return CleanPass(output, inputs)

    def masked_forward(
        self, batch: Tensor, masks: Mapping[str, SiteMask], *, start_at: int | None = None
    ) -> Tensor:
        """The model's output with the given masks at the named sites and the target everywhere else."""
        with given_masks(self._weights, masks):
            return self._run(batch, start_at)

    def _run(self, batch: Tensor, start_at: int | None) -> Tensor:
        self._check_present()
        return self.host.forward(batch) if start_at is None else self.host.forward_from(start_at, batch)

    def pre_importances(self, inputs: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "*batch _"]]:
        """Pre-activations `p [batch pos C]` of every site's gate, from the clean inputs `x` (S4)."""
        if self.global_gate is not None:
            dense = {
                name: x if x.is_floating_point() else self[name].target_weight[x.clamp_min(0)]
                for name, x in inputs.items()
            }
            return self.global_gate(dense)
        pre = {}
        for name, x in inputs.items():
            weight = self._weights[name]
            assert weight.gate is not None
            pre[name] = weight.gate(x, weight.activations(x))
        return pre

    @torch.no_grad()
    def importance(self, tokens: Tensor) -> dict[str, Float[Tensor, "*batch _"]]:
        """Importance `g = clamp(p, 0, 1)`, `[batch pos C]` per site, from a clean pass over `tokens` (S3, S4)."""
        inputs = self.clean_pass(tokens).inputs
        return {name: importance_of(pre) for name, pre in self.pre_importances(inputs).items()}

    # -- interventions: lists of TransformerLens hooks -----------------------------------------------------------

    def ablate(self, subcomponents: Mapping[str, Iterable[int]]) -> HookList:
        """Hooks that remove the named subcomponents: their mask is 0, all else (also the delta) stays.

        Use with `model.hooks(fwd_hooks=...)`; lists compose by addition, because every hook multiplies the mask
        that it receives.
        """
        hooks: HookList = []
        for name, ids in subcomponents.items():
            weight, chosen = self[name], self._checked_ids(name, ids)
            factor = torch.ones(weight.n_subcomponents, device=weight.V.device)
            factor[chosen] = 0
            hooks.append((weight.site.point_names()[2], partial(_multiply, factor=factor)))
        return hooks

    def keep(self, subcomponents: Mapping[str, Iterable[int]]) -> HookList:
        """Hooks that keep only the named subcomponents of each named site: all others and the delta are 0."""
        hooks: HookList = []
        for name, ids in subcomponents.items():
            weight, chosen = self[name], self._checked_ids(name, ids)
            factor = torch.zeros(weight.n_subcomponents, device=weight.V.device)
            factor[chosen] = 1
            hooks.append((weight.site.point_names()[2], partial(_multiply, factor=factor)))
            hooks.append((weight.site.point_names()[3], partial(_multiply, factor=torch.zeros_like(factor[0]))))
        return hooks

    def mask(
        self,
        masks: Mapping[str, Float[Tensor, "*batch _"]],
        delta: float | Mapping[str, Float[Tensor, "*batch"]] = 1.0,
    ) -> HookList:
        """Hooks that multiply the masks of the named sites by `mask` (`[C]` or `[batch pos C]`).

        `delta` is one number for all named sites, or `{site: Tensor [batch pos]}`.
        """
        hooks: HookList = []
        for name, mask in masks.items():
            weight = self[name]
            if mask.shape[-1:] != (weight.n_subcomponents,):
                raise ValueError(
                    f"mask for {name} has shape {tuple(mask.shape)}; its last axis must be C = "
                    f"{weight.n_subcomponents}"
                )
            hooks.append((weight.site.point_names()[2], partial(_multiply, factor=mask)))
        deltas = dict.fromkeys(masks, delta) if isinstance(delta, (int, float)) else delta
        for name, value in deltas.items():
            if isinstance(value, (int, float)):
                if value == 1:
                    continue
                value = torch.tensor(float(value), device=self[name].V.device)
            hooks.append((self[name].site.point_names()[3], partial(_multiply, factor=value)))
        return hooks

    def _checked_ids(self, name: str, ids: Iterable[int]) -> list[int]:
        chosen, count = [int(c) for c in ids], self[name].n_subcomponents
        wrong = [c for c in chosen if not 0 <= c < count]
        if wrong:
            raise ValueError(f"subcomponents {wrong[:5]} of {name}: expected ids in 0..{count - 1}")
        return chosen

    # -- state -------------------------------------------------------------------------------------------------

    def remove(self) -> None:
        """Give the model back as it was: same modules, hook names and outputs. Calling it twice is an error."""
        self._check_present()
        for weight in reversed(list(self._weights.values())):
            swap_out(self.host, weight)
        self._removed = True

    def _check_present(self) -> None:
        if self._removed:
            raise ValueError("this decomposition was removed from its model; decompose it again, or load a saved one")


def _multiply(value: Tensor, hook: Any, *, factor: Tensor) -> Tensor:
    """Hook: `value * factor`; a factor `[batch pos C]` also fits activations with a head axis."""
    if 1 < factor.ndim < value.ndim:
        factor = factor.unsqueeze(-2 if factor.ndim + 1 == value.ndim and factor.shape[-1] == value.shape[-1] else -1)
    return value * factor.to(value.device)


# -- making one ------------------------------------------------------------------------------------------------


def decompose_layer(
    model: nn.Module,
    layer: int,
    n_subcomponents: int | None = None,
    *,
    sites: Sequence[str] | None = None,
    gate: GateKind = "scalar",
    gate_width: int | None = None,
    init: InitKind = "normal",
    seed: int = 0,
) -> Decomposition:
    """Swap the weights of one block for subcomponents and return the `Decomposition`.

    `sites` are names within the block; by default its MLP matrices (`mlp.W_gate` where there is one, `mlp.W_in`,
    `mlp.W_out`). `n_subcomponents` is C for every site; by default 1.5 times the rank bound `min(d_in, d_out)`.
    The model is the target, bit for bit, until a hook masks something.

    Raises ValueError for a layer out of range, an unknown site, C < 1, non-finite weights, or a site that is
    decomposed already; the model is then unchanged.
    """
    host = open_host(model)
    count = host.n_layers()
    if not 0 <= layer < count:
        raise ValueError(f"layer={layer}; this model has blocks 0..{count - 1}")
    chosen = host.default_sites(layer) if sites is None else tuple(sites)
    if not chosen:
        raise ValueError(f"block {layer} has no MLP matrices; name sites, for example sites=('attn.W_V', 'attn.W_O')")
    patterns = {f"blocks.{layer}.{site}": n_subcomponents for site in chosen}
    return decompose(model, patterns, gate=gate, gate_width=gate_width, init=init, seed=seed)


def decompose(
    model: nn.Module,
    n_subcomponents: Mapping[str, int | None],
    *,
    gate: GateKind = "scalar",
    gate_width: int | None = None,
    init: InitKind = "normal",
    seed: int = 0,
) -> Decomposition:
    """Swap all sites that match the patterns, `{pattern: C}`, for subcomponents.

    Patterns are shell-style (`"blocks.*.mlp.W_*"`, `"blocks.0.attn.W_[QKVO]"`) over site names. A pattern that
    matches nothing is an error that lists near names; where two patterns match a site, the later one sets its C.
    C = None stands for 1.5 times the rank bound. Subcomponents and gates are initialised from `seed`, on the CPU,
    so the same seed gives the same start on every device.

    Raises ValueError or TypeError as `decompose_layer`; the model is then unchanged.
    """
    host = open_host(model)
    host.check_can_swap()
    counts = _matched_counts(host, n_subcomponents)
    sites = [host.site(name) for name in counts]
    for site in sites:
        _check_site(site, counts[site.name], host)
    _check_ties(sites)
    generator = torch.Generator().manual_seed(seed)
    settings = {
        "n_subcomponents": {name: _count(site, counts[name]) for name, site in zip(counts, sites, strict=True)},
        "gate": gate,
        "gate_width": gate_width if gate_width is not None else DEFAULT_WIDTH.get(gate),
        "init": init,
        "seed": seed,
    }
    return build(host, sites, settings, generator)


def build(
    host: Host, sites: Sequence[Site], settings: dict[str, Any], generator: torch.Generator
) -> Decomposition:
    """Make subcomponents and gates for checked sites and swap them in; on any failure the model is unchanged."""
    gate, width, counts = settings["gate"], settings["gate_width"], settings["n_subcomponents"]
    prepared = []
    for site in sites:
        target = site.matrix.read()
        factors = (
            None
            if site.tied_to is not None
            else Subcomponents(*initial_factors(target.cpu(), counts[site.name], settings["init"], generator))
        )
        own_gate = (
            None
            if gate == "global"
            else make_gate(
                gate, d_in=target.shape[0], n_subcomponents=counts[site.name], width=width, generator=generator
            )
        )
        dtype = torch.float64 if target.dtype == torch.float64 else torch.float32
        modules = [None if m is None else m.to(device=target.device, dtype=dtype) for m in (factors, own_gate)]
        prepared.append((site, *modules))
    global_gate = None
    if gate == "global":
        d_ins = {s.name: s.matrix.read().shape[1 if s.is_lookup else 0] for s in sites}
        first = sites[0].matrix.read()
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        global_gate = GlobalGate(d_ins, counts, width, generator).to(device=first.device, dtype=dtype)
    weights: dict[str, DecomposedWeight] = {}
    try:
        for site, factors, own_gate in prepared:
            tied_to = None if site.tied_to is None else weights[site.tied_to]
            weights[site.name] = swap_in(host, site, factors, own_gate, tied_to)
    except BaseException:
        for weight in reversed(list(weights.values())):
            swap_out(host, weight)
        raise
    return Decomposition(host, weights, global_gate, settings)


def _matched_counts(host: Host, patterns: Mapping[str, int | None]) -> dict[str, int | None]:
    names = host.site_names()
    if not patterns:
        raise ValueError(f"no pattern given; sites of this model: {near_names('', names)}")
    counts: dict[str, int | None] = {}
    for pattern, count in patterns.items():
        matched = [n for n in names if fnmatch.fnmatchcase(n, pattern)] or [
            n for n in names if n.rsplit(".", 1)[-1] == pattern and "blocks" not in n
        ]
        if not matched:
            raise ValueError(f"no site matches {pattern!r}; near names: {near_names(pattern, names)}")
        counts.update(dict.fromkeys(matched, count))
    return {name: counts[name] for name in names if name in counts}


def _count(site: Site, count: int | None) -> int:
    return int(1.5 * min(site.matrix.read().shape)) if count is None else count


def _check_site(site: Site, count: int | None, host: Host) -> None:
    if isinstance(site.output, DecomposedWeight):
        raise ValueError(f"{site.name} is decomposed already; remove() that decomposition first")
    if count is not None and (isinstance(count, bool) or not isinstance(count, int)):
        raise TypeError(f"n_subcomponents for {site.name} is {count!r}; expected an int")
    if count is not None and count < 1:
        raise ValueError(f"n_subcomponents={count} for {site.name}; expected at least 1")
    target = site.matrix.read()
    if not target.is_floating_point():
        raise ValueError(
            f"{site.name} is stored as {target.dtype} (quantised); load the model in a floating-point dtype"
        )
    if target.device.type != "meta" and not bool(torch.isfinite(target).all()):
        raise ValueError(f"{site.name} contains NaN or infinite entries; there is no decomposition of that")
    existing = set(host.model.hook_dict)
    clash = [name for name in site.point_names() if name in existing]
    if clash:
        raise ValueError(f"{site.name}: the model already has a hook point {clash[0]!r}; rename it")


def _check_ties(sites: Sequence[Site]) -> None:
    names = [site.name for site in sites]
    for site in sites:
        if site.tied_to is not None and site.tied_to not in names:
            raise ValueError(
                f"{site.name} shares its weight with {site.tied_to}, which was not chosen; decompose both"
            )
        if site.tied_to is not None and names.index(site.tied_to) > names.index(site.name):
            raise ValueError(f"{site.name} is tied to {site.tied_to}, which must be declared before it")
