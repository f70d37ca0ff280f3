"""Putting decomposed weights into a model and taking them out again.

Everything is checked before anything is changed, and a failure half-way undoes what was done.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from spd_lens.core.decomposed_weight import DecomposedWeight, Swapped
from spd_lens.core.gate_sets import residual_name
from spd_lens.core.gates import Gate, GlobalGate, make_gate
from spd_lens.core.pass_state import CallGuard, PassState
from spd_lens.core.points import HeadResults, ReadPoint, UnknownImportance
from spd_lens.core.settings import Settings
from spd_lens.core.subcomponents import Subcomponents, initial_factors
from spd_lens.hosts.host import Host
from spd_lens.hosts.site import POINT_SUFFIXES, ModuleInput, PointOutput, Site
from spd_lens.support.compiling import not_compiled
from spd_lens.support.given import shown
from spd_lens.support.interrupts import hold_interrupts
from spd_lens.support.names import near_names

# C beyond this many times the rank bound is a slip of the keyboard, and memory would be the first to say so.
_MOST_RANKS = 10_000


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
    if count is not None and count > _MOST_RANKS * min(target.shape):
        raise ValueError(
            f"n_subcomponents={count} for {site.name}, whose rank is at most {min(target.shape)}; expected a small "
            "multiple of that (None: 1.5 times)"
        )
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
    host: Host, sites: Sequence[Site], settings: Settings, generator: torch.Generator
) -> dict[str, DecomposedWeight]:
    """Make subcomponents and gates for checked sites and swap them in; on any failure the model is unchanged."""
    with _default_dtype(torch.float32):
        prepared = [(site, *_make_modules(site, settings, generator)) for site in sites]
        global_gate = _make_global_gate(host, sites, settings, generator) if settings.gate == "global" else None
    try:
        # A Ctrl-C that waited is raised inside `try`: the model is then whole again.
        with hold_interrupts():
            return _swap_all(host, prepared, global_gate)
    except BaseException:
        swap_out(host, sites)
        raise


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Same seed, same start: whatever default a notebook has set."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


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


def _make_modules(
    site: Site, settings: Settings, generator: torch.Generator
) -> tuple[Subcomponents | None, Gate | None]:
    """Subcomponents (None where tied) and gate (None where global) of one site, on its device."""
    target, count = site.matrix.read(), settings.n_subcomponents[site.name]
    factors = gate = None
    if site.tied_to is None:
        factors = Subcomponents(*_start(site.name, target, count, settings, generator))
    if settings.gate == "own":
        try:
            signature(settings.own_gate).bind(d_in=0, n_subcomponents=0, generator=generator)
        except TypeError as error:
            raise TypeError(
                f"gate cannot be called as gate(d_in=, n_subcomponents=, generator=): {error}; expected a function "
                "with these arguments that makes a spd_lens.core.Gate"
            ) from None
        except ValueError:
            pass  # some of C's tell nothing
        gate = settings.own_gate(d_in=target.shape[0], n_subcomponents=count, generator=generator)
        if not isinstance(gate, Gate):
            raise TypeError(f"the gate made for {site.name} is a {type(gate).__name__}; expected a spd_lens.core.Gate")
    elif settings.gate != "global":
        gate = make_gate(
            settings.gate, d_in=target.shape[0], n_subcomponents=count, width=settings.gate_width, generator=generator
        )
    placed = [None if m is None else m.to(device=target.device, dtype=_master_dtype(target)) for m in (factors, gate)]
    return placed[0], placed[1]  # pyright: ignore[reportReturnType]


def _start(
    name: str, target: Tensor, count: int, settings: Settings, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """`V` and `U` at the start, checked if they come from an object of the user's."""
    if settings.own_init is None:
        assert settings.init != "own"
        return initial_factors(target, count, settings.init, generator)
    made = settings.own_init(target.detach(), count, generator)
    expected = ((target.shape[0], count), (count, target.shape[1]))
    if not isinstance(made, (tuple, list)) or len(made) != 2 or not all(isinstance(t, Tensor) for t in made):
        raise TypeError(
            f"init gave {shown(made)} for {name}; expected two tensors, V of shape {expected[0]} and U {expected[1]}"
        )
    V, U = made
    if (tuple(V.shape), tuple(U.shape)) != expected or not bool(V.isfinite().all() & U.isfinite().all()):
        raise ValueError(
            f"init gave V {tuple(V.shape)} and U {tuple(U.shape)} for {name}; expected finite values of shape "
            f"{expected[0]} and {expected[1]}"
        )
    return V.detach().clone(), U.detach().clone()


def _make_global_gate(host: Host, sites: Sequence[Site], settings: Settings, generator: torch.Generator) -> GlobalGate:
    if settings.gate_reads == "residuals":
        widths = _residual_widths(host, sites)
    else:
        # A look-up site enters by the row that it reads, whose width is the matrix's d_out.
        widths = {site.name: site.matrix.read().shape[1 if site.is_lookup else 0] for site in sites}
    counts = {site.name: settings.n_subcomponents[site.name] for site in sites}
    target = sites[0].matrix.read()
    assert settings.gate_width is not None
    gate = GlobalGate(
        widths,
        counts,
        settings.gate_width,
        generator,
        n_blocks=settings.gate_blocks,
        n_heads=settings.gate_heads,
        causal=settings.gate_causal,
    )
    return gate.to(device=target.device, dtype=_master_dtype(target))


def _residual_widths(host: Host, sites: Sequence[Site]) -> dict[str, int]:
    """What a gate that reads residual streams is given, by name. Raises ValueError for a site outside all blocks."""
    layers = [site.layer for site in sites if site.layer is not None]
    outside = [site.name for site in sites if site.layer is None]
    if outside or host.d_model() == 0:
        raise ValueError(
            f"gate_options reads='residuals' with {outside[0] if outside else 'a model without blocks'}; expected "
            "sites in blocks alone, or reads='inputs'"
        )
    return {residual_name(layer): host.d_model() for layer in sorted(set(layers))}


def _master_dtype(target: Tensor) -> torch.dtype:
    """Subcomponents are kept in float32 whatever the model's dtype, unless that is wider."""
    return torch.float64 if target.dtype == torch.float64 else torch.float32


class InputReader:
    """Forward pre-hook on a module that multiplies: give its input to the sites that read it."""

    def __init__(self) -> None:
        self.readers: list[tuple[Callable[..., Tensor], DecomposedWeight]] = []

    @not_compiled
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for read, weight in self.readers:
            weight.receive_input(read(args, kwargs))
        hooks = module._forward_pre_hooks
        if next(reversed(hooks.values())) is self or not any(weight.is_needed() for _, weight in self.readers):
            return
        # A later pre-hook may still change what the matmul reads; being last next time costs nothing.
        own = next(key for key, hook in hooks.items() if hook is self)
        hooks.move_to_end(own)  # pyright: ignore[reportAttributeAccessIssue]
        raise RuntimeError(
            f"a PyTorch forward pre-hook was added to a {type(module).__name__} after it was decomposed, and runs "
            "after the input has been read. The order is put right now: run the pass again, or use a "
            "TransformerLens hook"
        )


def _reader_on(module: nn.Module) -> InputReader | None:
    return next((hook for hook in module._forward_pre_hooks.values() if isinstance(hook, InputReader)), None)


class _Tap:
    """Stands among the readers of an input, and keeps what they get, by thread."""

    def __init__(self, weight: DecomposedWeight) -> None:
        self.weight = weight
        self.taken: dict[int, Tensor] = {}

    def is_needed(self) -> bool:
        return True

    def receive_input(self, x: Tensor) -> None:
        self.taken[threading.get_ident()] = self.weight.with_positions(x)


@contextmanager
def tapped_input(weight: DecomposedWeight) -> Iterator[dict[int, Tensor]]:
    """While open, a pass leaves what the site's matmul reads in the dict, under the number of its thread."""
    read_from, tap = weight.site.read_from, _Tap(weight)
    if isinstance(read_from, ModuleInput):
        reader = _reader_on(read_from.module)
        assert reader is not None
        entry: Any = (read_from.read, tap)
        reader.readers.append(entry)
        try:
            yield tap.taken
        finally:
            reader.readers.remove(entry)
        return
    point: Any = read_from.point
    point.readers = [*point.readers, tap]
    try:
        yield tap.taken
    finally:
        point.readers = [r for r in point.readers if r is not tap]


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
        reader = _reader_on(read_from.module)
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
    reader = _reader_on(read_from.module)
    if reader is None:
        return
    reader.readers = [item for item in reader.readers if item[1] is not weight]
    if not reader.readers:
        # By what it is, not by handle: a deep copy's handle still refers to the original's hooks.
        hooks = read_from.module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is reader]:
            hooks.pop(key)
            read_from.module._forward_pre_hooks_with_kwargs.pop(key, None)
