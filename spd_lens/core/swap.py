"""Putting decomposed weights into a model and taking them out again.

Everything is checked before anything is changed, and a failure half-way undoes what was done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from spd_lens.core.decomposed_weight import DecomposedWeight, ReadPoint
from spd_lens.core.gates import Gate, GlobalGate, make_gate
from spd_lens.core.subcomponents import Subcomponents, initial_factors
from spd_lens.hosts.host import Host
from spd_lens.hosts.site import POINT_SUFFIXES, ModuleInput, Site
from spd_lens.support.names import near_names


def check_sites(host: Host, counts: Mapping[str, int | None]) -> list[Site]:
    """The sites named in `counts`, after everything has been checked that could make the swap fail."""
    host.check_can_swap()
    known = host.site_names()
    for name in counts:
        if name not in known:
            raise ValueError(f"this model has no site {name!r}; near names: {near_names(name, known)}")
    sites = [host.site(name) for name in known if name in counts]
    for site in sites:
        _check_site(site, counts[site.name], host)
    _check_ties(sites)
    return sites


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
    if target.device.type != "meta" and not bool(target.any()):
        raise ValueError(f"{site.name} is zero everywhere, so there is nothing to decompose; leave it out")
    existing = set(host.model.hook_dict)
    clash = [name for name in site.point_names() if name in existing]
    if clash:
        raise ValueError(f"{site.name}: the model already has a hook point {clash[0]!r}; rename it")


def _check_ties(sites: Sequence[Site]) -> None:
    names = [site.name for site in sites]
    for site in sites:
        if site.tied_to is not None and site.tied_to not in names:
            raise ValueError(f"{site.name} shares its weight with {site.tied_to}, which was not chosen; decompose both")
        if site.tied_to is not None and names.index(site.tied_to) > names.index(site.name):
            raise ValueError(f"{site.name} is tied to {site.tied_to}, which must be declared before it")


def swap_sites(
    host: Host, sites: Sequence[Site], settings: Mapping[str, Any], generator: torch.Generator
) -> tuple[dict[str, DecomposedWeight], GlobalGate | None]:
    """Make subcomponents and gates for checked sites and swap them in; on any failure the model is unchanged.

    `settings` holds `n_subcomponents` per site, `gate`, `gate_width` and `init`.
    """
    prepared = [(site, *_make_modules(site, settings, generator)) for site in sites]
    global_gate = _make_global_gate(sites, settings, generator) if settings["gate"] == "global" else None
    weights: dict[str, DecomposedWeight] = {}
    try:
        for site, factors, gate in prepared:
            tied_to = None if site.tied_to is None else weights[site.tied_to]
            weights[site.name] = swap_in(host, site, factors, gate, tied_to)
    except BaseException:
        for weight in reversed(list(weights.values())):
            swap_out(host, weight)
        raise
    return weights, global_gate


def _make_modules(
    site: Site, settings: Mapping[str, Any], generator: torch.Generator
) -> tuple[Subcomponents | None, Gate | None]:
    """Subcomponents (None where tied) and gate (None where global) of one site, on its device."""
    target, count, kind = site.matrix.read(), settings["n_subcomponents"][site.name], settings["gate"]
    factors = gate = None
    if site.tied_to is None:
        factors = Subcomponents(*initial_factors(target, count, settings["init"], generator))
    if kind != "global":
        gate = make_gate(
            kind, d_in=target.shape[0], n_subcomponents=count, width=settings["gate_width"], generator=generator
        )
    placed = [None if m is None else m.to(device=target.device, dtype=_master_dtype(target)) for m in (factors, gate)]
    return placed[0], placed[1]  # pyright: ignore[reportReturnType]


def _make_global_gate(sites: Sequence[Site], settings: Mapping[str, Any], generator: torch.Generator) -> GlobalGate:
    # A look-up site enters by the row that it reads, whose width is the matrix's d_out.
    widths = {site.name: site.matrix.read().shape[1 if site.is_lookup else 0] for site in sites}
    counts = {site.name: settings["n_subcomponents"][site.name] for site in sites}
    target = sites[0].matrix.read()
    gate = GlobalGate(widths, counts, settings["gate_width"], generator)
    return gate.to(device=target.device, dtype=_master_dtype(target))


def _master_dtype(target: Tensor) -> torch.dtype:
    """Subcomponents are kept in float32 whatever the model's dtype, unless that is wider."""
    return torch.float64 if target.dtype == torch.float64 else torch.float32


def _hand_over_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook on a consumer module: give its input to the sites that read it."""
    entry = module.__dict__["spd_entry"]
    for read, weight in entry["readers"]:
        weight.receive_input(read(args, kwargs))
    is_last = next(reversed(module._forward_pre_hooks)) == entry["handle_id"]
    if not is_last and any(weight.__dict__["current_input"] is not None for _, weight in entry["readers"]):
        # A later pre-hook may still change what the matmul reads; being last next time costs nothing.
        module._forward_pre_hooks.move_to_end(entry["handle_id"])  # pyright: ignore[reportAttributeAccessIssue]
        raise RuntimeError(
            f"a PyTorch forward pre-hook was added to a {type(module).__name__} after it was decomposed, and runs "
            "after the input has been read. The order is put right now: run the pass again, or use a "
            "TransformerLens hook"
        )


def _note_cached_positions(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook on a block: tell gates that look across positions how many of them a cache hides."""
    entry = module.__dict__["spd_cache_entry"]
    hidden = entry["host"].cached_positions(args, kwargs)
    for weight in entry["weights"]:
        weight.__dict__["cached_positions"] = hidden


def _become(point: HookPoint, cls: type[HookPoint]) -> None:
    point.__class__ = cls


def swap_in(
    host: Host, site: Site, subcomponents: Subcomponents | None, gate: Gate | None, tied_to: DecomposedWeight | None
) -> DecomposedWeight:
    """Turn the HookPoint that `site`'s output passes into its `DecomposedWeight`, and add the four new points."""
    weight = site.output
    already_read = isinstance(weight, ReadPoint)
    _become(weight, DecomposedWeight)
    assert isinstance(weight, DecomposedWeight)
    state = weight.__dict__
    state.update(site=site, tied_to=tied_to, recording=None, given=None, current_input=None, cached_positions=0)
    if not already_read:
        state["spd_readers"] = []
    state["points"] = {suffix: HookPoint() for suffix in POINT_SUFFIXES}
    try:
        # TransformerLens 4 refuses to patch a model with any submodule in training mode.
        training = host.model.training
        if subcomponents is not None:
            weight._modules["subcomponents"] = subcomponents.train(training)
        weight._modules["gate"] = None if gate is None else gate.train(training)
        for name, point in zip(site.point_names(), weight.points.values(), strict=True):
            host.add_point(site.parent, name, point.train(training))
        _connect(host, weight)
    except BaseException:
        swap_out(host, weight)
        raise
    return weight


def _connect(host: Host, weight: DecomposedWeight) -> None:
    source = weight.site.source
    if isinstance(source, ModuleInput):
        state = source.module.__dict__
        if "spd_entry" not in state:
            handle = source.module.register_forward_pre_hook(_hand_over_input, with_kwargs=True)
            state["spd_entry"] = {"readers": [], "handle": handle, "handle_id": handle.id}
        state["spd_entry"]["readers"].append((source.read, weight))
    else:
        if not isinstance(source.point, ReadPoint):
            _become(source.point, ReadPoint)
        source.point.__dict__.setdefault("spd_readers", []).append(weight)
    if weight.gate is not None and weight.gate.looks_across_positions:
        block = _block_before(host, weight.site)
        if block is None:
            return
        state = block.__dict__
        if "spd_cache_entry" not in state:
            handle = block.register_forward_pre_hook(_note_cached_positions, with_kwargs=True)
            state["spd_cache_entry"] = {"host": host, "weights": [], "handle": handle}
        state["spd_cache_entry"]["weights"].append(weight)


def _block_before(host: Host, site: Site) -> nn.Module | None:
    """The last block whose call starts before the site's matmul runs; None for embeddings and for plain models."""
    if host.n_layers() == 0 or site.is_lookup:
        return None
    return host.block(host.n_layers() - 1 if site.layer is None else site.layer)


def swap_out(host: Host, weight: HookPoint) -> None:
    """Undo `swap_in` exactly; the HookPoint keeps the hooks that stand on it.

    `weight` comes in as a DecomposedWeight and is a plain HookPoint (or ReadPoint) afterwards.
    """
    assert isinstance(weight, DecomposedWeight)
    site = weight.site
    for name in site.point_names():
        host.remove_point(site.parent, name)
    _disconnect(host, weight)
    for key in ("site", "tied_to", "recording", "given", "current_input", "cached_positions", "points"):
        weight.__dict__.pop(key, None)
    for key in ("subcomponents", "gate"):
        weight._modules.pop(key, None)
    still_read = bool(weight.__dict__.get("spd_readers"))
    if not still_read:
        weight.__dict__.pop("spd_readers", None)
    _become(weight, ReadPoint if still_read else HookPoint)


def _disconnect(host: Host, weight: DecomposedWeight) -> None:
    source = weight.site.source
    if isinstance(source, ModuleInput):
        _leave(source.module, "spd_entry", "readers", lambda item: item[1] is weight)
    else:
        readers = source.point.__dict__.get("spd_readers", [])
        readers[:] = [reader for reader in readers if reader is not weight]
        if not readers and type(source.point) is ReadPoint:
            source.point.__dict__.pop("spd_readers", None)
            _become(source.point, HookPoint)
    block = _block_before(host, weight.site)
    if block is not None:
        _leave(block, "spd_cache_entry", "weights", lambda item: item is weight)


def _leave(module: nn.Module, key: str, members: str, is_mine: Any) -> None:
    entry = module.__dict__.get(key)
    if entry is None:
        return
    entry[members] = [item for item in entry[members] if not is_mine(item)]
    if not entry[members]:
        # By id, not by handle: a deep copy's handle still refers to the original's hooks.
        module._forward_pre_hooks.pop(entry["handle"].id, None)
        module._forward_pre_hooks_with_kwargs.pop(entry["handle"].id, None)
        del module.__dict__[key]
