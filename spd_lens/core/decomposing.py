"""`decompose_layer` and `decompose`: how a decomposition is made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import nn

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.gates import DEFAULT_WIDTH, GateKind
from spd_lens.core.settings import GateMaker, InitMaker, Settings
from spd_lens.core.site_checks import check_sites
from spd_lens.core.subcomponents import InitKind
from spd_lens.core.swap import swap_sites
from spd_lens.hosts.host import Host
from spd_lens.hosts.opening import open_host
from spd_lens.hosts.site import Site, match_sites
from spd_lens.support.given import given_function, given_seed, shown
from spd_lens.support.names import near_names


def decompose_layer(
    model: nn.Module,
    layer: int,
    n_subcomponents: int | None = None,
    *,
    sites: Sequence[str] | None = None,
    gate: GateKind | GateMaker = "scalar",
    gate_width: int | None = None,
    init: InitKind | InitMaker = "normal",
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
    if isinstance(layer, bool) or not isinstance(layer, Integral):
        raise TypeError(f"layer={layer!r}; expected the number of a block, 0..{count - 1}")
    if not 0 <= layer < count:
        raise ValueError(f"layer={layer}; this model has blocks 0..{count - 1}")
    chosen = host.default_sites(layer) if sites is None else _names_within_block(sites, layer)
    if not chosen:
        raise ValueError(f"block {layer} has no MLP matrices; name sites, for example sites=('attn.W_V', 'attn.W_O')")
    patterns = {f"blocks.{layer}.{site}": n_subcomponents for site in chosen}
    return decompose(model, patterns, gate=gate, gate_width=gate_width, init=init, seed=seed)


def decompose(
    model: nn.Module,
    n_subcomponents: Mapping[str, int | None],
    *,
    gate: GateKind | GateMaker = "scalar",
    gate_width: int | None = None,
    gate_options: Mapping[str, Any] | None = None,
    init: InitKind | InitMaker = "normal",
    seed: int = 0,
) -> Decomposition:
    """Swap all sites that match the patterns, `{pattern: C}`, for subcomponents.

    Patterns are shell-style (`"blocks.*.mlp.W_*"`, `"blocks.0.attn.W_[QKVO]"`) over site names. A pattern that
    matches nothing is an error that lists near names; where two patterns match a site, the later one sets its C.
    C = None stands for 1.5 times the rank bound. Subcomponents and gates are initialised from `seed`, on the CPU,
    so the same seed gives the same start on every device.

    - `gate`: a kind, or an object that makes the gate of a site: `gate(d_in=, n_subcomponents=, generator=) -> Gate`.
    - `gate_options`: further choices of the global gate: `n_blocks`, `n_heads`, `causal` (see `GlobalGate`), and
      `reads`: `"inputs"` of the sites, or `"residuals"`, the residual stream before every block with a site.
    - `init`: a kind, or a function `(W, C, generator) -> (V, U)`.

    Raises ValueError or TypeError as `decompose_layer`; the model is then unchanged.
    """
    host = open_host(model)
    seed = given_seed(seed)
    _check_makers(gate, init)
    counts = _matched_counts(host, n_subcomponents)
    sites = check_sites(host, counts)
    generator = torch.Generator().manual_seed(seed)
    kind = gate if isinstance(gate, str) else "own"
    settings = Settings(
        n_subcomponents={site.name: _count(site, counts[site.name]) for site in sites},
        gate=kind,
        gate_width=gate_width if gate_width is not None else DEFAULT_WIDTH.get(kind),  # pyright: ignore
        init="own" if callable(init) else init,
        seed=seed,
        own_gate=gate if kind == "own" else None,
        own_init=init if callable(init) else None,
        **_checked_options(kind, gate_options),
    )
    return Decomposition(host, swap_sites(host, sites, settings, generator), settings)


def _names_within_block(sites: Sequence[str], layer: int) -> tuple[str, ...]:
    if isinstance(sites, (str, Mapping)) or not isinstance(sites, Iterable):
        if isinstance(sites, Mapping):
            instead = "[" + ", ".join(map(repr, sites)) + "] (a C for each: decompose(model, {name: C}))"
        else:
            instead = f"[{str(sites)!r}]"
        raise TypeError(f"sites={sites!r}; expected a list of names, for example sites={instead}")
    chosen = tuple(sites)
    if not chosen:
        raise ValueError("sites is empty; expected names such as 'mlp.W_in', or None for the matrices of the MLP")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"sites={list(chosen)!r} names one twice; expected every name once")
    odd = [site for site in chosen if not isinstance(site, str)]
    if odd:
        raise TypeError(f"sites holds {odd[0]!r}; expected names such as 'mlp.W_in'")
    whole = [site for site in chosen if site.startswith("blocks.")]
    if whole:
        raise ValueError(
            f"sites holds {whole[0]!r}; expected names within block {layer}, such as {whole[0].split('.', 2)[-1]!r} "
            "(whole names: decompose(model, {name: C}))"
        )
    return chosen


def _matched_counts(host: Host, patterns: Mapping[str, int | None]) -> dict[str, int | None]:
    names = host.site_names()
    if not isinstance(patterns, Mapping):
        raise TypeError(
            f"given {patterns!r} for the sites; expected {{pattern: C}}, for example {{'blocks.0.mlp.W_*': None}} "
            "(None: 1.5 times the rank bound)"
        )
    odd = [pattern for pattern in patterns if not isinstance(pattern, str)]
    if odd:
        raise TypeError(f"{odd[0]!r} is no pattern of site names; expected text such as 'blocks.0.mlp.W_*'")
    if not patterns:
        raise ValueError(f"no pattern given; sites of this model: {near_names('', names)}")
    plain = {p: int(c) if isinstance(c, Integral) and not isinstance(c, bool) else c for p, c in patterns.items()}
    return match_sites(plain, names)


def _check_makers(gate: Any, init: Any) -> None:
    """Kinds and makers of one's own; unknown texts are refused by the settings, wrong results where they come back."""
    if not isinstance(gate, str) and (isinstance(gate, nn.Module) or not callable(gate)):
        raise TypeError(
            f"gate={shown(gate)}; expected a kind such as 'scalar', or a function that makes the gate of one site: "
            "gate(d_in=, n_subcomponents=, generator=) -> Gate"
        )
    if not isinstance(init, str):
        given_function("init", init, "(W, C, generator) -> (V, U), or a kind such as 'normal'", 3)


def _count(site: Site, count: int | None) -> int:
    return int(1.5 * min(site.matrix.read().shape)) if count is None else count


GATE_OPTIONS = {"n_blocks": "gate_blocks", "n_heads": "gate_heads", "causal": "gate_causal", "reads": "gate_reads"}


def _checked_options(gate: str, options: Mapping[str, Any] | None) -> dict[str, Any]:
    if not options:
        return {}
    if not isinstance(options, Mapping):
        raise TypeError(f"gate_options={shown(options)}; expected a dict such as {{'n_blocks': 2}}")
    if gate != "global":
        raise ValueError(f"gate_options with gate={gate!r}; expected them with gate='global' only")
    for name in options:
        if name not in GATE_OPTIONS:
            raise TypeError(f"gate_options has {name!r}; near: {near_names(name, GATE_OPTIONS)}")
    return {GATE_OPTIONS[name]: value for name, value in options.items()}
