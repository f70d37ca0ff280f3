"""`coeffects` against weights from which a subcomponent is subtracted for real."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spd_lens import Batch, Decomposition, decompose
from spd_lens.components import coeffects, merge_subcomponents
from spd_lens.toys import TMS
from tests.small_models import tiny_transformer, tokens

IN, OUT = "blocks.0.mlp.W_in", "blocks.1.mlp.W_out"


def ablated(decomposition: Decomposition, site: str, c: int, inputs: Tensor) -> Tensor:
    """The output of a copy with `W - V_c U_c` written into its weights."""
    other = copy.deepcopy(decomposition)
    with torch.no_grad():
        weight = other[site]
        weight.site.matrix.stored().sub_(torch.outer(weight.V[:, c], weight.U[c]))
        other.remove()
        return other.model(inputs)


def test_events_are_output_numbers_that_an_ablation_moves() -> None:
    decomposition = decompose(TMS(5, 2, seed=1), {"W_enc": 6}, gate_width=4, seed=0)
    x = torch.rand(20, 5)
    found = coeffects(decomposition, x, {"W_enc": None}, threshold=0.02)
    with torch.no_grad():
        target = decomposition.model(x)
    moved = []
    for c in range(6):
        with torch.no_grad():
            W = decomposition["W_enc"].target_weight - torch.outer(
                decomposition["W_enc"].V[:, c], decomposition["W_enc"].U[c]
            )
            model = decomposition.model
            # Only the encoder changes: the decoder is the same matrix, and no site here.
            hidden = x @ W
            output = torch.relu(hidden @ model.W.T + model.b)
        moved.append(((output - target).abs() > 0.02).flatten().numpy())
    fires = np.array(moved).T.astype(int)
    assert 0 < fires.mean() < 1
    np.testing.assert_array_equal(found.pair_counts().toarray(), fires.T @ fires)
    assert found.n_events == x.numel()


def test_of_a_language_model_events_are_log_probabilities_of_the_likeliest_tokens() -> None:
    decomposition = decompose(tiny_transformer(), {IN: 6, OUT: 4}, gate="shared", gate_width=8)
    rows = tokens(3)
    mask = torch.arange(12) < 9
    batch = Batch(rows, position_mask=mask.expand(3, 12))
    found = coeffects(decomposition, [batch], {IN: [1, 4], OUT: [3]}, threshold=0.05)
    with torch.no_grad():
        clean = decomposition.model(rows)
    top = clean.topk(8, dim=-1).indices
    columns = []
    for site, c in ((IN, 1), (IN, 4), (OUT, 3)):
        difference = (
            ablated(decomposition, site, c, rows).log_softmax(-1).gather(-1, top)
            - clean.log_softmax(-1).gather(-1, top)
        )  # fmt: skip
        columns.append((difference[:, :9].abs() > 0.05).flatten().numpy())
    fires = np.array(columns).T.astype(int)
    assert 0 < fires.mean() < 1
    numbers = [found.number(IN, 1), found.number(IN, 4), found.number(OUT, 3)]
    np.testing.assert_array_equal(found.pair_counts().toarray()[np.ix_(numbers, numbers)], fires.T @ fires)
    assert found.n_seen == 3 * 9 * 8


def test_a_readout_of_ones_own_says_which_numbers_count() -> None:
    decomposition = decompose(tiny_transformer(), {IN: 6}, gate="shared", gate_width=8)
    found = coeffects(
        decomposition,
        tokens(3),
        {IN: None},
        readout=lambda output, clean: output[..., 3] - output[..., 5],
        threshold=0.05,
    )
    assert found.n_events == 36
    assert sum(len(group) for group in merge_subcomponents(found).groups) == len(np.unique(found.ids))


def test_bad_arguments_are_named(without_type_checks: None) -> None:
    decomposition = decompose(tiny_transformer(), {IN: 6}, gate="shared", gate_width=8)
    rows: Any = tokens(3)
    with pytest.raises(ValueError, match="threshold=0; expected a number above 0"):
        coeffects(decomposition, rows, threshold=0)
    with pytest.raises(ValueError, match=r"expected single subcomponents at all positions"):
        coeffects(decomposition, rows, [{IN: [1, 2]}])
    with pytest.raises(ValueError, match="no ablation moves any output by more than threshold=1e"):
        coeffects(decomposition, rows, threshold=1e6)
    with pytest.raises(ValueError, match="no decomposed site"):
        coeffects(decomposition, rows, {"blocks.0.mlp.W_on": [0]})
    decomposition.remove()
    with pytest.raises(ValueError, match="was removed"):
        coeffects(decomposition, rows)
