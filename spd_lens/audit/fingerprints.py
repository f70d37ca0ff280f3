"""SHA-256 of all that a report is about, and of the code that made it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spd_lens.audit.candidates import named_units
from spd_lens.audit.cases import Cases
from spd_lens.audit.report import Digests
from spd_lens.core.decomposition import Decomposition
from spd_lens.core.fingerprint import target_fingerprint
from spd_lens.core.units import Unit
from spd_lens.support.checked_json import content_hash
from spd_lens.support.files import tensor_hash


def digests(decomposition: Decomposition, cases: Cases, tokens: Tensor, components: Any = None) -> Digests:
    """SHA-256 of the model, its decomposition, the cases, the components and the input. Cost: every parameter is read
    once."""
    units = named_units(decomposition, components, tokens.shape[1])
    made_from = target_fingerprint(decomposition)
    tensors = {name: tensor_hash(tensor) for name, tensor in decomposition.tensors().items()}
    return Digests(
        model=_model_hash(decomposition),
        host=made_from["host"],
        sites=made_from["sites"],
        decomposition=content_hash(tensors),
        cases=cases.digest(),
        components=_units_hash(units) if units else None,
        input=hashlib.sha256(tokens.cpu().to(torch.int64).contiguous().numpy().tobytes()).hexdigest(),
    )


def _model_hash(decomposition: Decomposition) -> str:
    """Of every entry of every parameter and buffer of the target, not of a sample; the decomposition's do not count."""
    own = {id(p) for p in decomposition.subcomponent_parameters() + decomposition.gate_parameters()}
    state = [*decomposition.model.named_parameters(), *decomposition.model.named_buffers()]
    return content_hash({name: tensor_hash(p) for name, p in state if id(p) not in own})


def _units_hash(units: Sequence[Unit]) -> str:
    """Of names, members and positions; in which order they stand does not matter."""
    told = [[unit.label, sorted(unit.members), unit.positions] for unit in units]
    return content_hash({"components": sorted(told, key=lambda own: str(own[0]))})


def code_digest() -> str:
    """SHA-256 of the source of this package: which code made a report."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
