"""Putting decomposed weights into a model and taking them out again.

Everything is checked before anything is changed (`site_checks`), and a failure half-way undoes what was done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformer_lens.hook_points import HookPoint

from spd_lens.core.decomposed_weight import DecomposedWeight
from spd_lens.core.factored_weight import Swapped
from spd_lens.core.gates import Gate, GlobalGate
from spd_lens.core.input_reader import InputReader, reader_on
from spd_lens.core.new_modules import default_dtype, make_global_gate, make_modules
from spd_lens.core.pass_state import CallGuard, PassState
from spd_lens.core.points import HeadResults, ReadPoint, UnknownImportance
from spd_lens.core.settings import Settings
from spd_lens.core.subcomponents import Subcomponents
from spd_lens.hosts.host import Host
from spd_lens.hosts.site import POINT_SUFFIXES, ModuleInput, PointOutput, Site
from spd_lens.support.interrupts import hold_interrupts


def swap_sites(
    host: Host, sites: Sequence[Site], settings: Settings, generator: torch.Generator
) -> dict[str, DecomposedWeight]:
    """Make subcomponents and gates for checked sites and swap them in; on any failure the model is unchanged."""
    with default_dtype(torch.float32):
        prepared = [(site, *make_modules(site, settings, generator)) for site in sites]
        global_gate = make_global_gate(host, sites, settings, generator) if settings.gate == "global" else None
    try:
        # A Ctrl-C that waited is raised inside `try`: the model is then whole again.
        with hold_interrupts():
            return _swap_all(host, prepared, global_gate)
    except BaseException:
        swap_out(host, sites)
        raise


def _swap_all(
    host: Host, prepared: Sequence[tuple[Site, Subcomponents | None, Gate | None]], global_gate: GlobalGate | None
) -> dict[str, DecomposedWeight]:
    state = PassState()
    weights: dict[str, DecomposedWeight] = {}
    for site, factors, gate in prepared:
        tied_to = None if site.tied_to is None else weights[site.tied_to]
        weights[site.name] = _swap_in(host, Swapped(site, {}, tied_to, state), factors, gate)
    has_cache = any(gate is not None and gate.looks_across_positions for *_, gate in prepared)
    guarded = dict(_guarded(host, site) for site, *_ in prepared)
    for layer, module in guarded.items():
        if module is not None:
            CallGuard(host, layer, module, state, asks_cache=has_cache).install()
    if global_gate is not None:
        # A module of the model, so that it moves with it and stands in its parameters; the first site has it.
        first = next(iter(weights.values()))
        first._modules["global_gate"] = global_gate.train(host.model.training)
    return weights


def _guarded(host: Host, site: Site) -> tuple[int | None, nn.Module | None]:
    """The block in whose calls a site reads and uses its input (or that runs just before), as number and module; the
    model where there are no blocks."""
    if host.n_layers() == 0:
        return None, host.model
    layer = host.first_block([site])
    return layer, None if layer is None else host.block(layer)


def _become(point: HookPoint, cls: type[HookPoint]) -> None:
    point.__class__ = cls


def _swap_in(host: Host, swapped: Swapped, subcomponents: Subcomponents | None, gate: Gate | None) -> DecomposedWeight:
    """Turn the HookPoint that the site's output passes into its `DecomposedWeight`, and add the four new points."""
    site, weight = swapped.site, swapped.site.output
    kinds = {"importance": HookPoint if gate is not None else UnknownImportance}
    swapped.points = {suffix: kinds.get(suffix, HookPoint)() for suffix in POINT_SUFFIXES}
    vars(weight)["swapped"] = swapped
    # TransformerLens 4 refuses to patch a model with any submodule in training mode.
    training = host.model.training
    if subcomponents is not None:
        weight._modules["subcomponents"] = subcomponents.train(training)
    weight._modules["gate"] = None if gate is None else gate.train(training)
    _become(weight, DecomposedWeight)
    assert isinstance(weight, DecomposedWeight)
    for name, point in zip(site.point_names(), swapped.points.values(), strict=True):
        host.add_point(site.parent, name, point.train(training))
    if isinstance(site.by_head, HookPoint):
        _become(site.by_head, HeadResults)
        vars(site.by_head)["weights"] = [weight]
    _connect(weight)
    return weight


def _connect(weight: DecomposedWeight) -> None:
    read_from = weight.site.read_from
    if isinstance(read_from, ModuleInput):
        reader = reader_on(read_from.module)
        if reader is None:
            reader = InputReader()
            read_from.module.register_forward_pre_hook(reader, with_kwargs=True)
        reader.readers.append((read_from.read, weight))
    else:
        if not isinstance(read_from.point, ReadPoint):
            _become(read_from.point, ReadPoint)
        assert isinstance(read_from.point, ReadPoint)
        read_from.point.readers = [*read_from.point.readers, weight]


def swap_out(host: Host, sites: Sequence[Site]) -> None:
    """Undo the swap of these sites exactly, from wherever it has come to; the HookPoints keep the hooks on them.

    Calling it again, after an interrupt inside it, finishes what it has begun.
    """
    with hold_interrupts():
        for site in reversed(sites):
            for name in site.point_names():
                host.remove_point(site.parent, name)
            _disconnect(site)
            if isinstance(site.by_head, HookPoint):
                vars(site.by_head).pop("weights", None)
                _become(site.by_head, HookPoint)
            _, module = _guarded(host, site)
            state = getattr(vars(site.output).get("swapped"), "state", None)
            for guard in _guards_on(module):
                if guard.state is state:
                    guard.remove()
            for key in ("subcomponents", "gate", "global_gate"):
                site.output._modules.pop(key, None)
            still_read = isinstance(site.output, ReadPoint) and bool(site.output.readers)
            if isinstance(site.output, ReadPoint):
                _become(site.output, ReadPoint if still_read else HookPoint)
            for key in ("swapped",) if still_read else ("swapped", "readers"):
                vars(site.output).pop(key, None)


def is_own_hook(hook: Any) -> bool:
    """Whether a PyTorch hook on a module is one that the swap has put there."""
    return isinstance(hook, InputReader) or isinstance(getattr(hook, "__self__", None), CallGuard)


def _guards_on(module: nn.Module | None) -> list[CallGuard]:
    if module is None:
        return []
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    found = [getattr(hook, "__self__", None) for hook in hooks]
    return [guard for guard in found if isinstance(guard, CallGuard)]


def _disconnect(site: Site) -> None:
    read_from, weight = site.read_from, site.output
    if isinstance(read_from, PointOutput):
        point = read_from.point
        if isinstance(point, ReadPoint):
            point.readers = [reader for reader in point.readers if reader is not weight]
            if not point.readers:
                vars(point).pop("readers", None)
                if type(point) is ReadPoint:
                    _become(point, HookPoint)
        return
    reader = reader_on(read_from.module)
    if reader is None:
        return
    reader.readers = [item for item in reader.readers if item[1] is not weight]
    if not reader.readers:
        # By what it is, not by handle: a deep copy's handle still refers to the original's hooks.
        hooks = read_from.module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is reader]:
            hooks.pop(key)
            read_from.module._forward_pre_hooks_with_kwargs.pop(key, None)
