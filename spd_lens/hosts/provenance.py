"""What identifies a target: its name, the kind of its host, and what was done to its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Provenance:
    """What identifies the target: written into saved decompositions and checked on loading."""

    model_name: str
    host: str
    weight_processing: str
    details: Mapping[str, Any] = field(default_factory=dict)


def configuration_of(model: nn.Module) -> dict[str, Any] | None:
    """The fields of a TransformerLens model's configuration, its dtype as text; None for a model without one."""
    config = getattr(model, "cfg", None)
    if config is None:
        return None
    fields = dict(config.to_dict() if hasattr(config, "to_dict") else vars(config))
    return fields | {"dtype": str(fields.get("dtype", torch.float32)).removeprefix("torch.")}
