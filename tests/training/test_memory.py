"""A batch in parts, and what is computed again: the losses and gradients of the plain step, with less memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spd_lens import PGD, Batch, Decomposition, Reconstruction, TokenBatches, TrainConfig, train
from spd_lens.objective import MaskSource, Merged, Persistent
from spd_lens.training import Learner, make_learner, take_step
from tests.conftest import TL_MAJOR
from tests.small_models import tokens
from tests.training.counting import peak_bytes
from tests.training.test_loop import _fresh

# In float64, so that a rounding that Adam makes a whole step of (where a gradient is 0) stays small.
CLOSE = {"rtol": 1e-5, "atol": 1e-7}
HIDDEN = ("blocks.1.hook_out",) if TL_MAJOR >= 4 else ("blocks.1.hook_resid_post",)
# Everything that draws, climbs, counts or clips.
EVERYTHING = TrainConfig(
    steps=2,
    lr=1e-3,
    minimality=1e-2,
    frequency=1e-2,
    clip_subcomponents=0.5,
    clip_gates=0.5,
    reconstructions=(
        Reconstruction(1.0, "stochastic", "subset", draws=2),
        Reconstruction(0.5, "bernoulli", "layerwise"),
        Reconstruction(0.5, PGD(2, 0.1, "batch"), "subset"),
        Reconstruction(0.5, Persistent(lr=0.05, first_steps=2), "all"),
    ),
    hidden=0.1,
    hidden_points=HIDDEN,
)
OF_ROWS = EVERYTHING.changed(
    reconstructions=(
        Reconstruction(1.0, PGD(2, 0.1, "position"), "all"),
        Reconstruction(0.5, Persistent(scope="example", lr=0.05), "subset"),
        Reconstruction(0.5, Merged(0.5, Persistent(scope="position", lr=0.05)), "subset"),
    )
)


def _batch(masked: bool = False, n: int = 4) -> Batch:
    """Rows of which, if masked, the later have fewer positions that count."""
    rows = tokens(n)
    if not masked:
        return Batch(rows)
    width = rows.shape[1]
    return Batch(rows, position_mask=torch.arange(width) < torch.linspace(width, 1, n).long().unsqueeze(1))


def _learner(config: TrainConfig, **settings: Any) -> tuple[Decomposition, Learner]:
    decomposition = _fresh(**settings).to(torch.float64)
    for p in decomposition.model.parameters():
        p.requires_grad_(False)
    for p in decomposition.subcomponent_parameters() + decomposition.gate_parameters():
        p.requires_grad_(True)
    return decomposition, make_learner(decomposition, config)


def _trained(config: TrainConfig, batch: Batch, **settings: Any) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Losses, L0 and norms of every step, and everything that a checkpoint would hold at the end."""
    _, learner = _learner(config, **settings)
    found = [take_step(learner, batch, step) for step in range(config.steps)]
    values = [{**losses, **{f"L0/{k}": v for k, v in active.items()}, **norms} for losses, active, norms in found]
    return values, {name: t.detach().clone() for name, t in learner.tensors().items()}


def _assert_same(config: TrainConfig, other: TrainConfig, batch: Batch, **settings: Any) -> None:
    (losses, tensors), (others, others_tensors) = _trained(config, batch, **settings), _trained(other, batch, **settings)
    for one, two in zip(losses, others, strict=True):
        assert one.keys() == two.keys()
        for name in one:
            torch.testing.assert_close(two[name], one[name], **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
    assert tensors.keys() == others_tensors.keys()
    for name, expected in tensors.items():
        torch.testing.assert_close(others_tensors[name], expected, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("config", "masked"), [(EVERYTHING, False), (OF_ROWS, True)], ids=["shared", "of rows"])
def test_a_batch_in_parts_trains_what_it_trains_whole(config: TrainConfig, masked: bool) -> None:
    _assert_same(config, config.changed(accumulate=2), _batch(masked))


def test_what_is_computed_again_has_the_same_gradients() -> None:
    _assert_same(EVERYTHING, EVERYTHING.changed(recompute="all"), _batch(masked=True), gate="vector")
