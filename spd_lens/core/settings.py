"""`Settings`: what a decomposition was made with, typed and checked; what rebuilds its modules from a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Annotated, Any, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from pydantic import BeforeValidator
from torch import Tensor

from spd_lens.core.gates import Gate
from spd_lens.support.validated import Count, Flag, Integer, validated


@runtime_checkable
class GateMaker(Protocol):
    """A gate of one's own: called once for every site, gives its `Gate`."""

    def __call__(self, *, d_in: int, n_subcomponents: int, generator: torch.Generator) -> Gate: ...


# A start of one's own: `V [d_in, C]` and `U [C, d_out]` for the target's matrix, C and a generator.
InitMaker: TypeAlias = Callable[[Tensor, int, torch.Generator], tuple[Tensor, Tensor]]


def filled_later(W: Tensor, n_subcomponents: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A start that costs nothing, for V and U whose values come from a file."""
    return torch.zeros(W.shape[0], n_subcomponents), torch.zeros(n_subcomponents, W.shape[1])


def _counts(value: Any) -> Any:
    if not isinstance(value, Mapping) or not value:
        raise ValueError("expected {site: C} with at least one site")
    return dict(value)


@validated
class Settings:
    """The arguments of `decompose`, sites by name.

    - `gate`, `init`: a kind by name, or `"own"` for an object that was passed; what rebuilds it is then with the user.
    - `own_gate`, `own_init`: these objects, for this process alone; a start that is there is used whatever `init` says.
    - `gate_blocks`, `gate_heads`, `gate_causal`, `gate_reads`: of the global gate.
    """

    n_subcomponents: Annotated[dict[str, Count], BeforeValidator(_counts)]
    gate: Literal["scalar", "vector", "shared", "attention", "global", "own"] = "scalar"
    gate_width: Count | None = None
    init: Literal["normal", "paper", "exact", "singular", "own"] = "normal"
    seed: Integer = 0
    gate_blocks: Count = 1
    gate_heads: Count = 1
    gate_causal: Flag = True
    gate_reads: Literal["inputs", "residuals"] = "inputs"
    own_gate: Any = field(default=None, repr=False, compare=False)
    own_init: Any = field(default=None, repr=False, compare=False)

    def with_own(self, gate: GateMaker | None) -> Settings:
        """The same, to rebuild modules for saved values: with a gate of one's own, and a start that is not computed.

        Raises ValueError if a gate of one's own is missing, or was given and is not needed.
        """
        if (self.gate == "own") != (gate is not None):
            need = "a gate of one's own; give it as gate=" if gate is None else f"gate={self.gate!r}; leave gate= away"
            raise ValueError(f"this decomposition was made with {need}")
        return dataclasses.replace(self, own_gate=gate, own_init=filled_later)

    def to_json(self) -> dict[str, Any]:
        """Plain values for files; objects of one's own are not among them."""
        values = dataclasses.asdict(dataclasses.replace(self, own_gate=None, own_init=None))
        if self.gate_reads == "inputs":
            # Files from before there was a choice do not have it.
            del values["gate_reads"]
        return {name: value for name, value in values.items() if not name.startswith("own_")}
