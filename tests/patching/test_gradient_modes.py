"""What takes gradients takes them whatever the caller has switched off, and leaves the switch as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from spd_lens import Decomposition, decompose, evaluate
from spd_lens.circuits import find_circuit
from spd_lens.evaluation import worst_case
from spd_lens.graphs import attribution_graph, dataset_graph
from spd_lens.patching import attribution_patching
from tests.small_models import tiny_transformer, tokens


def last(logits: Tensor) -> Tensor:
    return logits[:, -1, 0]


WORK: dict[str, Callable[[Decomposition, Tensor], Any]] = {
    "attribution_graph": lambda d, t: attribution_graph(d, t[:1], importance_above=None, n_checked=4).check.predicted,
    "dataset_graph": lambda d, t: dataset_graph(d, t, importance_above=None, metric=last, n_checked=4).check.predicted,
    "attribution_patching": lambda d, t: attribution_patching(d, t, t.flip(0), last).effects.values.tolist(),
    "find_circuit": lambda d, t: find_circuit(d, t, steps=2, prune_tries=2, budgets=(2,), restarts=1).circuit.ids,
    "worst_case": lambda d, t: worst_case(d, t, steps=(2,), starts=1).divergence,
    "evaluate": lambda d, t: evaluate(d, t, adversary_steps=(2,), starts=1).adversarial,
}


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_mode_of_the_caller_changes_nothing(work: str, mode: Any) -> None:
    decomposition = decompose(tiny_transformer(), {"blocks.*.mlp.W_in": 4})
    expected = WORK[work](decomposition, tokens(2))
    with mode():
        # Also the tokens are made under it.
        assert WORK[work](decomposition, tokens(2)) == expected
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
