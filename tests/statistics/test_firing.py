"""`harvest`: streamed statistics against statistics of everything at once."""

from __future__ import annotations

import pytest
import torch

from spd_lens import Decomposition, TokenBatches, decompose, harvest
from tests.small_models import tiny_transformer, tokens

SITE = "blocks.1.mlp.W_in"


@pytest.fixture
def decomposition() -> Decomposition:
    return decompose(tiny_transformer(), {SITE: 20}, gate="shared", gate_width=8)


def test_rates_and_means_equal_those_of_all_data_at_once(decomposition: Decomposition) -> None:
    rows = tokens(21)
    found = harvest(decomposition, TokenBatches(rows, 4), threshold=0.2)[SITE]
    g = decomposition.importance(rows)[SITE]
    with torch.no_grad():
        _, cache = decomposition.model.run_with_cache(rows)
    a = cache["blocks.1.hook_W_in_acts"].abs()
    fires = g > 0.2
    torch.testing.assert_close(found.firing_rate, fires.float().mean((0, 1)))
    torch.testing.assert_close(found.mean_importance, g.mean((0, 1)))
    torch.testing.assert_close(found.mean_activation, (a * fires).sum((0, 1)) / fires.sum((0, 1)).clamp_min(1))
    assert found.n_positions == rows.numel()


def test_top_examples_are_the_strongest_positions_with_their_context(decomposition: Decomposition) -> None:
    rows = tokens(21)
    found = harvest(decomposition, TokenBatches(rows, 4), top_k=3, before=3, after=2)[SITE]
    g = decomposition.importance(rows)[SITE]
    with torch.no_grad():
        _, cache = decomposition.model.run_with_cache(rows)
    score = g * cache["blocks.1.hook_W_in_acts"].abs() * (g > 0.1)
    for c in found.most_used(5):
        best = score[..., c].amax(1).sort(descending=True)
        for example, row, value in zip(found.examples(c), best.indices[:3], best.values[:3], strict=False):
            at = int(score[row, :, c].argmax())
            assert example.importance * abs(example.activation) == pytest.approx(float(value), rel=1e-4)
            assert example.tokens == rows[row, max(0, at - 3) : at + 3].tolist()
            assert example.tokens[example.at] == int(rows[row, at])


def test_most_used_are_sorted_by_rate_and_can_leave_out_the_always_on(decomposition: Decomposition) -> None:
    found = harvest(decomposition, TokenBatches(tokens(8), 4))[SITE]
    rates = [float(found.firing_rate[c]) for c in found.most_used(20)]
    assert rates == sorted(rates, reverse=True)
    assert all(float(found.firing_rate[c]) <= 0.5 for c in found.most_used(20, below=0.5))


def test_excluded_positions_are_not_counted(decomposition: Decomposition) -> None:
    rows = tokens(8)
    found = harvest(decomposition, TokenBatches(rows, 4, exclude=[3, 4]))[SITE]
    kept = (rows != 3) & (rows != 4)
    g = decomposition.importance(rows)[SITE]
    assert found.n_positions == int(kept.sum())
    torch.testing.assert_close(found.firing_rate, (g[kept] > 0.1).float().mean(0))


def test_inputs_without_tokens_are_refused(decomposition: Decomposition) -> None:
    from spd_lens import Batch

    with pytest.raises(ValueError, match="needs tokens"):
        harvest(decomposition, [Batch(torch.rand(2, 3, 16), start_at=1)])
    with pytest.raises(ValueError, match="not one batch"):
        harvest(decomposition, [])


def test_a_harvest_prints_a_table_and_not_its_tensors(decomposition: Decomposition) -> None:
    found = harvest(decomposition, tokens(6))
    assert repr(found) == "Harvest(1 sites, 72 positions, fires above 0.1)"
    fired = int((found[SITE].firing_rate > 0).sum())
    assert repr(found[SITE]) == f"SiteHarvest({fired} of 20 subcomponents fire, 72 positions)"
    assert f"{float(found[SITE].firing_rate.sum()):.1f}" in str(found).splitlines()[-1].split()
    assert f"<td>{SITE}</td><td>20</td><td>{fired}</td>" in found._repr_html_()


def test_a_mistyped_site_or_id_is_named(decomposition: Decomposition, without_type_checks: None) -> None:
    found = harvest(decomposition, tokens(6))
    with pytest.raises(KeyError, match=r"no harvested site 'blocks\.1\.mlp\.W_on'; near: 'blocks\.1\.mlp\.W_in'"):
        found["blocks.1.mlp.W_on"]
    for c in (20, -1, True, "3"):
        with pytest.raises(ValueError, match=r"expected the id of a subcomponent, in 0\.\.19"):
            found[SITE].examples(c)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="top_k=0; expected a whole number, at least 1"):
        harvest(decomposition, tokens(6), top_k=0)
