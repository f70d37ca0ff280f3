"""A compiled step is the plain one, to the rounding of sums."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from spd_lens import PGD, Decomposition, Reconstruction, TrainConfig, decompose
from spd_lens.data import Batch
from spd_lens.objective import Persistent
from spd_lens.support import compiling
from spd_lens.training import make_learner, take_step
from tests.small_models import tiny_transformer, tokens

# The compiler looks at the `grad` of what it is given, whatever that is, and makes instances of autograd's functions.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
    # It does not look through the checks of types.
    pytest.mark.usefixtures("without_type_checks"),
]

TERMS = (Reconstruction(), Reconstruction(masks=PGD(steps=1)), Reconstruction(masks=Persistent(), routing="subset"))
GATES = {"scalar": 4, "vector": 4, "shared": 8, "attention": 8, "global": 8}


def _fresh(gate: str) -> Decomposition:
    torch.manual_seed(0)
    decomposition = decompose(
        tiny_transformer(dtype=torch.float64),
        {"blocks.*.mlp.W_*": 20, "blocks.1.attn.W_Q": 12},
        gate=gate,
        gate_width=GATES[gate],
        seed=3,
    )
    for p in decomposition.model.parameters():
        p.requires_grad_(False)
    for p in decomposition.subcomponent_parameters() + decomposition.gate_parameters():
        p.data = p.data.double()
        p.requires_grad_(True)
    return decomposition


def _steps(gate: str, **changes: Any) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    config = TrainConfig(
        steps=3,
        schedule="constant",
        minimality=1e-2,
        frequency=1e-2,
        reconstructions=TERMS,
        clip_subcomponents=0.5,
        clip_gates=0.5,
    )
    decomposition = _fresh(gate)
    learner = make_learner(decomposition, config.changed(**changes))
    losses = [take_step(learner, Batch(tokens(4, seed=k)), k)[0] for k in range(2)]
    return losses, {name: t.detach() for name, t in decomposition.tensors().items()}


def _assert_equal(gate: str, backend: str, **changes: Any) -> None:
    torch._dynamo.reset()
    expected, found = _steps(gate, **changes), _steps(gate, compile=backend, **changes)
    for one, other in zip(expected[0], found[0], strict=True):
        assert one.keys() == other.keys()
        for name, loss in one.items():
            torch.testing.assert_close(other[name], loss, rtol=1e-6, atol=1e-9, msg=name)
    for name, tensor in expected[1].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-5, atol=1e-8, msg=name)


@pytest.mark.parametrize(
    ("gate", "changes"),
    [
        pytest.param("global", {}, marks=pytest.mark.slow),
        pytest.param("scalar", {"recompute": "all"}, marks=pytest.mark.slow),
        pytest.param("vector", {"accumulate": 2}, marks=pytest.mark.slow),
        pytest.param("shared", {"squash": "leaky"}, marks=pytest.mark.slow),
        pytest.param("attention", {"recompute": "gates"}, marks=pytest.mark.slow),
    ],
)
def test_a_step_through_compiled_regions_is_the_plain_one(gate: str, changes: dict[str, Any]) -> None:
    _assert_equal(gate, "aot_eager", **changes)


def test_a_step_through_traced_regions_is_the_plain_one() -> None:
    _assert_equal("shared", "eager", reconstructions=TERMS[:1])


@pytest.mark.slow  # a C++ compiler at work
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler on this machine")
@pytest.mark.parametrize("gate", ["scalar", "shared"])
def test_a_step_through_inductors_kernels_is_the_plain_one(gate: str) -> None:
    _assert_equal(gate, "inductor")


def test_regions_are_compiled_while_that_is_asked_for_and_not_longer() -> None:
    seen = []

    def plain(x: Tensor) -> Tensor:
        seen.append("plain")
        return x + 1

    @compiling.region(plain)
    def formula(x: Tensor) -> Tensor:
        return x + 2

    x = torch.zeros(2)
    assert formula(x).tolist() == [1, 1]
    with compiling.compiled_regions("eager"):
        assert formula(x).tolist() == [2, 2]
    assert formula(x).tolist() == [1, 1]
    assert seen == ["plain", "plain"]


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="compile"):
        TrainConfig(compile="inductr")  # pyright: ignore[reportArgumentType]
