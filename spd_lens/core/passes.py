"""Passes of the decomposed model without hooks: what training, evaluation and analysis run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from spd_lens.core.decomposed_weight import DecomposedWeight
from spd_lens.core.masks import SiteMask


@contextmanager
def record_inputs(weights: Mapping[str, DecomposedWeight]) -> Iterator[dict[str, Tensor]]:
    """While open, a forward pass stores every site's input `x` in the dict, and the model is the clean target.

    Masks and patches that hooks put on the sites' own points are ignored meanwhile (S4); hooks elsewhere act.
    """
    inputs: dict[str, Tensor] = {}
    try:
        for weight in weights.values():
            weight.__dict__["recording"] = inputs
        yield inputs
    finally:
        for weight in weights.values():
            weight.__dict__["recording"] = None


@contextmanager
def given_masks(weights: Mapping[str, DecomposedWeight], masks: Mapping[str, SiteMask]) -> Iterator[None]:
    """While open, the sites named in `masks` use those masks, whatever hooks say on their own points.

    The other sites act as they do without this.
    """
    before = {name: weight.__dict__["given"] for name, weight in weights.items()}
    try:
        for name, weight in weights.items():
            weight.__dict__["given"] = masks.get(name, before[name])
        yield
    finally:
        for name, weight in weights.items():
            weight.__dict__["given"] = before[name]


@dataclass(frozen=True)
class CleanPass:
    """A forward pass of the target.

    - `output`; `inputs`: the `x` that every decomposed site read; `hidden`: the hook points that were asked for.
    - `residuals`: what entered the blocks that masked passes may start at.
    """

    output: Tensor
    inputs: dict[str, Tensor]
    hidden: dict[str, Tensor]
    residuals: dict[int, Tensor]
