"""`Reconstruction`: one term of the loss, and how its masks stand in files."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from spd_lens.core.routing import Routing
from spd_lens.objective.adversary import PGD, Persistent
from spd_lens.objective.mask_sources import MasksGiven, MaskSource, Merged, mask_source
from spd_lens.support.validated import Count, NonNegative, validated

# Budgets that stand in files by the name of their class.
BUDGETS = {"PGD": PGD, "Persistent": Persistent, "Merged": Merged}


@dataclass(frozen=True)
class Reconstruction:
    """One reconstruction term of the loss: a mask source times a routing (L5).

    - `coefficient`: its weight in the total.
    - `masks`: a kind of `sample_masks`; an adversary, `PGD(...)` (K3) or `Persistent(...)` (K4), or both in one pass,
      `Merged(...)` (L9), or their names for default budgets; or a `MaskSource` of one's own.
    - `routing`: `"all"`, `"layerwise"`, `"subset"` or a static probability (K5).
    - `draws`: samples per step (S); 1 is enough.

    Checked by the `TrainConfig` that holds it.
    """

    coefficient: float = 1.0
    masks: MasksGiven = "stochastic"
    routing: Routing = "all"
    draws: int = 1

    @property
    def name(self) -> str:
        """Name of the term in logs."""
        return f"{mask_source(self.masks).name}_{self.routing}"

    def check(self) -> None:
        """Raise ValueError or TypeError unless every field makes sense."""
        source = mask_source(self.masks)
        plain = _checked_term(coefficient=self.coefficient, draws=self.draws)
        if isinstance(self.routing, str) and self.routing not in ("all", "layerwise", "subset"):
            raise ValueError(f"routing={self.routing!r}; expected 'all', 'layerwise', 'subset' or a probability")
        if isinstance(self.routing, bool) or not isinstance(self.routing, (str, float)):
            raise ValueError(f"routing={self.routing!r}; expected 'all', 'layerwise', 'subset' or a float")
        if isinstance(self.routing, float) and not 0 <= self.routing <= 1:
            raise ValueError(f"routing={self.routing}; expected a probability between 0 and 1")
        if source.climbs and plain.draws > 1:
            raise ValueError(f"draws={self.draws} with an adversary; expected 1, its masks are not drawn")
        if source.name == "merged" and self.routing == "layerwise":
            raise ValueError("merged masks with routing='layerwise'; expected 'all', 'subset' or a probability")


@validated
class _CheckedTerm:
    coefficient: NonNegative
    draws: Count


def _checked_term(**values: Any) -> _CheckedTerm:
    return _CheckedTerm(**values)


def masks_to_json(masks: MasksGiven) -> Any:
    if isinstance(masks, MaskSource):
        return {"type": "own", "name": masks.name}
    if isinstance(masks, str):
        return masks
    return {"type": type(masks).__name__, **_plain(dataclasses.asdict(masks))}


def _plain(values: Any) -> Any:
    if isinstance(values, dict):
        return {k: _plain(v) for k, v in values.items()}
    return list(values) if isinstance(values, tuple) else values


def masks_from_json(masks: Any) -> Any:
    if isinstance(masks, str):
        return masks
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in masks.items() if k != "type"}
    if masks.get("type") not in BUDGETS:
        raise ValueError(f"masks of one's own ({fields.get('name')!r}) cannot be read from a file; expected config=")
    if "persistent" in fields:
        nested: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields["persistent"].items()}
        fields["persistent"] = Persistent(**nested)
    return BUDGETS[masks["type"]](**fields)
