"""`Circuit`: a set of subcomponents, over all positions or each at a position of its own.

A node is a `Unit` of one subcomponent, everywhere or at one position. A circuit says nothing about what
stands outside of it; how it was shown to hold is in a `CircuitReport` (`spd_lens.circuits.circuit_report`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sized
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.inputs import checked_decomposition
from spd_lens.core.interventions import HookList, delta_hooks, mask_hooks
from spd_lens.core.units import Ids, Unit, check_site, units_of
from spd_lens.support.given import given_whole
from spd_lens.support.pages import shortened, table_html


@dataclass(frozen=True, eq=False, repr=False)
class Circuit:
    """Which subcomponents are in the circuit, for every decomposed site.

    - `kept[site]` `[pos C]`: True for nodes. The position axis has length 1 where a node is a subcomponent at all
      positions.
    - `importances[site]` `[pos C]`: the importance that each node had when it was chosen (1 if given by hand).
    """

    kept: Mapping[str, Bool[Tensor, "_pos _C"]]
    importances: Mapping[str, Float[Tensor, "_pos _C"]]

    @property
    def by_position(self) -> bool:
        """Whether nodes are subcomponents at single positions."""
        return any(kept.shape[0] > 1 for kept in self.kept.values())

    @property
    def units(self) -> list[Unit]:
        """The nodes, for all that takes units; without a position where a node stands for all of them."""
        found = []
        for site, kept in self.kept.items():
            for position, c in kept.nonzero().tolist():
                found.append(Unit(((site, c),), (position,) if len(kept) > 1 else None))
        return found

    def as_unit(self, name: str | None = None) -> Unit:
        """The whole circuit as one unit. Raises ValueError for one with positions, or without nodes."""
        if self.by_position or not self.n_nodes:
            raise ValueError(f"{self}: only a circuit of subcomponents at all positions is one unit; use .units")
        return Unit(tuple((site, c) for site, ids in self.ids.items() for c in ids), None, name)

    @property
    def ids(self) -> dict[str, list[int]]:
        """`{site: ids}` of the subcomponents in the circuit, at whatever position; every decomposed site is a key."""
        return {site: kept.any(0).nonzero().flatten().tolist() for site, kept in self.kept.items()}

    @property
    def n_nodes(self) -> int:
        """Number of nodes."""
        return sum(int(kept.sum()) for kept in self.kept.values())

    @property
    def n_subcomponents(self) -> int:
        """Number of different subcomponents; equal to `n_nodes` unless nodes have positions."""
        return sum(len(ids) for ids in self.ids.values())

    def n_parameters(self, decomposition: Decomposition) -> int:
        """`sum over subcomponents of (d_in + d_out)`: the numbers in their `V_c` and `U_c`. Tied ones count once."""
        seen: dict[str, set[int]] = {}
        for site, ids in self.ids.items():
            owner = decomposition[site].tied_to
            seen.setdefault(site if owner is None else owner.site.name, set()).update(ids)
        return sum(len(ids) * (decomposition[s].V.shape[0] + decomposition[s].U.shape[1]) for s, ids in seen.items())

    def only(self, decomposition: Decomposition) -> HookList:
        """Hooks that leave nothing but the circuit at the decomposed sites: all other masks and the deltas are 0.

        For a circuit without positions this is the model with `W' = sum over nodes of V_c U_c`.
        """
        return [hook for site, kept in self.kept.items() for hook in _hooks(decomposition, site, kept, delta=0.0)]

    def without(self, decomposition: Decomposition) -> HookList:
        """Hooks that knock the circuit out: its masks are 0, all else (also the delta) stays.

        For a circuit without positions this is the model with `W' = W - sum over nodes of V_c U_c`.
        """
        return [hook for site, kept in self.kept.items() for hook in _hooks(decomposition, site, ~kept, delta=None)]

    def __repr__(self) -> str:
        return f"Circuit({shortened(str(self), 200)})"

    def _repr_html_(self) -> str:
        rows = [
            (site, str(len(ids)), shortened(", ".join(map(str, ids)), 120)) for site, ids in self.ids.items() if ids
        ]
        return table_html(str(self).partition(": ")[0], ("site", "subcomponents", "ids"), rows)

    def __str__(self) -> str:
        members = Unit(tuple((site, c) for site, ids in self.ids.items() for c in ids))
        unit = "nodes (subcomponent, position)" if self.by_position else "subcomponents"
        return f"{self.n_nodes} {unit}: " + (members.label or "none")


def _hooks(decomposition: Decomposition, site: str, kept: Tensor, *, delta: float | None) -> HookList:
    weight = decomposition[site]
    factor = kept.to(device=weight.V.device, dtype=weight.V.dtype)
    factor = factor[0] if len(factor) == 1 else factor.unsqueeze(0)
    return mask_hooks(weight, factor) + ([] if delta is None else delta_hooks(weight, delta))


def circuit_of(decomposition: Decomposition, ids: Ids, *, n_positions: int | None = None) -> Circuit:
    """The circuit of the named subcomponents, `{site: ids}` or units; sites that are not named have none.

    Units with positions are nodes there; `n_positions` is then the length of the prompts, and units without positions
    are nodes at all of them. Raises ValueError for unknown sites and ids, TypeError for ids that are not integers.

    >>> from spd_lens import decompose
    >>> from spd_lens.models import load_tiny_lm
    >>> circuit = circuit_of(decompose(load_tiny_lm(), {"blocks.0.mlp.W_in": 8}), {"blocks.0.mlp.W_in": [3, 5]})
    >>> print(circuit)
    2 subcomponents: blocks.0.mlp.W_in[3, 5]
    """
    checked_decomposition(decomposition, "circuit_of")
    if isinstance(ids, Mapping):
        for site in ids:
            check_site(decomposition, site)
        ids = {site: chosen for site, chosen in ids.items() if not (isinstance(chosen, Sized) and len(chosen) == 0)}
    empty = isinstance(ids, Sized) and len(ids) == 0
    units = () if empty else units_of(decomposition, ids)
    placed = [unit for unit in units if unit.positions is not None]
    if placed and n_positions is None:
        raise ValueError(f"{placed[0]} has positions; give n_positions, the length of the prompts")
    if n_positions is not None:
        n_positions = given_whole("n_positions", n_positions, least=1)
    length = (n_positions or 1) if placed else 1
    kept = {}
    for site, weight in decomposition.items():
        kept[site] = torch.zeros(length, weight.n_subcomponents, dtype=torch.bool, device=weight.V.device)
        for unit in units:
            for position in (slice(None),) if unit.positions is None else unit.positions:
                if not isinstance(position, slice) and not -length <= position < length:
                    raise ValueError(f"{unit}: expected positions in 0..{length - 1}")
                kept[site][position, unit.ids_at(site)] = True
    return Circuit(kept, {site: k.to(decomposition[site].V.dtype) for site, k in kept.items()})
