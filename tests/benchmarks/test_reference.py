"""The library's training step against `benchmarks/reference.py`, which computes the same the usual, slow way.

The reference shares no code with the library but draws the same random numbers, so in float64 losses and gradients
agree to rounding. That is what makes the measured times comparable.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.configurations import CONFIGURATIONS, ProductStep, build
from spd_lens.objective import PGD
from spd_lens.training import Reconstruction
from tests.conftest import needs_hooked

TOLERANCE = 1e-9
SMALL = {
    "n_layers": 2, "d_model": 16, "n_heads": 2, "d_mlp": 24, "d_vocab": 30, "batch": 3, "pos": 6, "n_subcomponents": 7,
    "gate_width": 5,
}  # fmt: skip
# Every routing with both kinds of masks, and what the other cases leave at its default.
OTHER_CHOICES = {
    "normalization": None,
    "delta": False,
    "p_start": 0.9,
    "seed": 3,
    "reconstructions": tuple(
        Reconstruction(0.5 + i, masks=masks, routing=routing)
        for i, (masks, routing) in enumerate(
            (m, r) for m in ("stochastic", PGD(steps=2, step_size=0.2)) for r in ("all", "layerwise", "subset")
        )
    ),
}
RECIPE = {**{k: v for k, v in SMALL.items() if k != "n_subcomponents"}, "gate_width": 6, "gate_heads": 2, "batch": 4}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "tms_5_2": ("tms_5_2", {"batch": 64}),
    "tms_40_10": ("tms_40_10", {"batch": 32, "n_subcomponents": 50}),
    "tms_identity": ("tms_5_2", {"batch": 64, "n_hidden": 3, "identity": True, "faithfulness": 1.0}),
    "shared": ("transformer", SMALL),
    "scalar": ("transformer", {**SMALL, "gate": "scalar"}),
    "vector": ("transformer", {**SMALL, "gate": "vector"}),
    "other_choices": ("transformer", {**SMALL, **OTHER_CHOICES}),
    "bridge": ("bridge", SMALL),
    "recipe": ("recipe", RECIPE),
}
every_case = pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=needs_hooked) if name in ("transformer", "recipe") else c for c, (name, _) in CASES.items()],
)


def both(case: str) -> tuple[ProductStep, Any, Any]:
    """The library's step, the reference's, and the batch, at the same random start."""
    name, changes = CASES[case]
    built = build(name, dtype=torch.float64, **changes)
    return ProductStep(built.decomposition, built.config), built.reference, built.batch


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names, and every tensor to rounding; vector gates keep `[d_in (C h)]` as `[d_in C h]`."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        value, got = value.detach().flatten(), found[name].detach().flatten()
        scale = float(value.abs().max())
        assert scale > 0, f"{name} is zero everywhere: nothing is compared"
        error = float((got - value).abs().max())
        assert error <= TOLERANCE * scale, f"{name}: off by {error:.3g} at scale {scale:.3g}"


@every_case
def test_losses_and_gradients_of_two_steps_are_those_of_the_reference(case: str) -> None:
    product, reference, batch = both(case)
    for _ in range(2):
        found, expected = product.losses(batch), reference.losses(batch)
        assert_equal(found, expected)
        reference.total(expected).backward()
        assert_equal(product.gradients(), reference.gradients())
        product.update()
        reference.update()


@pytest.mark.parametrize("case", [pytest.param("scalar", marks=needs_hooked), "bridge"])
def test_the_comparison_reaches_every_piece_of_the_squashings(case: str) -> None:
    product, _, batch = both(case)
    decomposition = product.learner.decomposition
    pre = decomposition.pre_importances(decomposition.clean_pass(batch.inputs).inputs)
    values = torch.cat([p.detach().flatten() for p in pre.values()])
    for subcomponent in (values < 0, (values > 0) & (values < 1), values > 1):
        assert subcomponent.double().mean() > 0.01


@needs_hooked
def test_cached_residual_streams_give_the_losses_of_whole_passes() -> None:
    small = {**SMALL, "n_layers": 3, "sites": ("blocks.2.mlp.*",), "n_batches": 2}
    built = build("last_block", dtype=torch.float64, **small)
    assert built.cached is not None
    assert built.cached.start_at == 2
    # Each with its own generators, so that both draw the same.
    whole, cached = (ProductStep(built.decomposition, built.config).losses(b) for b in (built.batch, built.cached))
    assert_equal(whole, cached)


def test_the_reference_refuses_what_it_does_not_compute() -> None:
    small: dict[str, Any] = {"batch": 4}
    with pytest.raises(ValueError, match=r"clip_gates=0\.5; the reference knows only None"):
        build("tms_5_2", **small, clip_gates=0.5)
    with pytest.raises(ValueError, match=r"frequency=0\.5; the reference knows it only with a frequency_reference"):
        build("tms_5_2", **small, frequency=0.5)
    with pytest.raises(ValueError, match="the reference knows stochastic and PGD"):
        build("tms_5_2", **small, reconstructions=(Reconstruction(masks="bernoulli"),))
    built = build("tms_5_2", **small)
    assert built.reference is not None
    with pytest.raises(ValueError, match="the reference runs whole passes"):
        built.reference.losses(dataclasses.replace(built.batch, start_at=1))


def test_an_unknown_configuration_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="no configuration 'tms'; there are tms_5_2, tms_40_10") as raised:
        build("tms")
    assert all(name in str(raised.value) for name in CONFIGURATIONS)
