"""Whether sites can be swapped: everything is checked before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from spd_lens.core.decomposed_weight import DecomposedWeight
from spd_lens.hosts.host import Host
from spd_lens.hosts.site import Site
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
