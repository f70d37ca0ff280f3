"""Which commit of the Hub a model is, remembered on the model and written into provenance."""

from __future__ import annotations

from typing import Any

from torch import nn


def note_revision(model: nn.Module, *, hub_id: str, revision: str, commit: str) -> None:
    """Remember on a model which commit of the Hub it is, for the provenance of its decompositions."""
    model.spd_lens_revision = {"hub_id": hub_id, "revision": revision, "commit": commit}  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]


def noted_revision(model: nn.Module) -> dict[str, Any]:
    """What `note_revision` wrote, as a detail of provenance; nothing for other models."""
    found = getattr(model, "spd_lens_revision", None)
    return {} if found is None else {"revision": dict(found)}
