"""The modules that a swap puts into a model: subcomponents and gates, made for every site, not yet trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature

import torch
from torch import Tensor

from spd_lens.core.gate_sets import residual_name
from spd_lens.core.gates import Gate, GlobalGate, make_gate
from spd_lens.core.settings import Settings
from spd_lens.core.subcomponents import Subcomponents, initial_factors
from spd_lens.hosts.host import Host
from spd_lens.hosts.site import Site
from spd_lens.support.given import shown


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Same seed, same start: whatever default a notebook has set."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def make_modules(
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


def make_global_gate(host: Host, sites: Sequence[Site], settings: Settings, generator: torch.Generator) -> GlobalGate:
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
