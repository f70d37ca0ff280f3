"""`coactivation`: sparse samples of events against dense arrays of everything at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from spd_lens import Batch, Decomposition, TokenBatches, decompose
from spd_lens.statistics import CoActivation, coactivation
from spd_lens.toys import TMS
from tests.small_models import tiny_transformer, tokens

IN, OUT = "blocks.0.mlp.W_in", "blocks.1.mlp.W_out"


@pytest.fixture
def decomposition() -> Decomposition:
    return decompose(tiny_transformer(), {IN: 20, OUT: 12}, gate="shared", gate_width=8)


def dense(decomposition: Decomposition, rows: torch.Tensor, threshold: float) -> np.ndarray:
    """`[batch pos all_C]`: whether each subcomponent fires."""
    g = decomposition.importance(rows)
    return np.concatenate([g[site].numpy() > threshold for site in (IN, OUT)], axis=-1)


def random_firing(n_events: int, n: int = 9, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((n_events, n)) < 0.3


def test_counts_of_pairs_equal_those_of_all_data_at_once(decomposition: Decomposition) -> None:
    rows = tokens(21)
    found = coactivation(decomposition, TokenBatches(rows, 4), threshold=0.2)
    fires = dense(decomposition, rows, 0.2).reshape(-1, 32).astype(int)
    assert 0 < fires.mean() < 1
    np.testing.assert_array_equal(found.pair_counts().toarray(), fires.T @ fires)
    np.testing.assert_array_equal(found.fired, fires.sum(0))
    assert found.n_events == found.n_seen == rows.numel()
    assert found.members([0, 19, 20, 31]) == [(IN, 0), (IN, 19), (OUT, 0), (OUT, 11)]
    assert [found.number(*found.member(i)) for i in range(32)] == list(range(32))


def test_positions_that_are_left_out_neither_fire_nor_count(decomposition: Decomposition) -> None:
    rows = tokens(9)
    found = coactivation(decomposition, TokenBatches(rows, 4, exclude=[3, 4]), threshold=0.2)
    kept = ((rows != 3) & (rows != 4)).numpy()
    fires = dense(decomposition, rows, 0.2)[kept].astype(int)
    assert found.n_seen == kept.sum() < rows.numel()
    np.testing.assert_array_equal(found.pair_counts().toarray(), fires.T @ fires)


@pytest.mark.parametrize("window", [2, 3, 50, "row"])
def test_an_event_of_a_window_has_what_fires_at_any_of_its_positions(decomposition: Decomposition, window: Any) -> None:
    rows = tokens(5)
    found = coactivation(decomposition, TokenBatches(rows, 2, exclude=[3, 4]), threshold=0.2, window=window)
    fires = dense(decomposition, rows, 0.2)
    counts = ((rows != 3) & (rows != 4)).numpy()
    events = []
    for row in range(len(rows)):
        for position in range(rows.shape[1]) if window != "row" else [rows.shape[1] - 1]:
            if not (counts[row].any() if window == "row" else counts[row, position]):
                continue
            first = 0 if window == "row" else max(0, position - window + 1)
            own = [fires[row, p] for p in range(first, position + 1) if counts[row, p]]
            events.append(np.any(own, axis=0))
    expected = np.array(events).astype(int)
    np.testing.assert_array_equal(found.pair_counts().toarray(), expected.T @ expected)


def test_models_without_positions_have_one_event_per_row() -> None:
    model = decompose(TMS(5, 2), {"W_enc": 6, "W_dec": 6}, gate_width=4)
    x = torch.rand(30, 5)
    found = coactivation(model, Batch(x, position_mask=torch.arange(30) < 20), threshold=0.0)
    g = model.importance(x)
    fires = np.concatenate([g[site].numpy() > 0 for site in ("W_enc", "W_dec")], axis=1)[:20].astype(int)
    np.testing.assert_array_equal(found.pair_counts().toarray(), fires.T @ fires)
    with pytest.raises(ValueError, match="inputs have no positions; leave window=1"):
        coactivation(model, x, window=2)


def test_a_sample_is_bounded_and_made_of_whole_events() -> None:
    fires = random_firing(5000)
    # Every event is told apart by a number, which fires as bits of its own.
    bits = (np.arange(5000)[:, None] >> np.arange(13)) & 1 == 1
    found = CoActivation.of({"a": fires, "number": bits}, max_events=300)
    assert (found.n_events, found.n_seen) == (300, 5000)
    np.testing.assert_array_equal(found.fired[:9], fires.sum(0))
    numbers = []
    for e in range(300):
        own = found.ids[found.starts[e] : found.starts[e + 1]]
        number = int(sum(1 << (c - 9) for c in own if c >= 9))
        assert fires[number].nonzero()[0].tolist() == own[own < 9].tolist()
        numbers.append(number)
    assert len(set(numbers)) == 300
    # Uniform: every tenth of the stream has its share (30 +- 5).
    assert all(10 <= count <= 55 for count in np.histogram(numbers, bins=10, range=(0, 5000))[0])


def test_memory_does_not_grow_with_the_stream() -> None:
    sizes = [CoActivation.of({"a": random_firing(n)}, max_events=200).bytes for n in (1000, 8000)]
    assert sizes[1] < 1.2 * sizes[0]


def test_samples_of_parts_add_up() -> None:
    one, two = random_firing(400, seed=1), random_firing(300, seed=2)
    parts = [CoActivation.of({"a": fires}, generator=np.random.default_rng(i)) for i, fires in enumerate((one, two))]
    whole, both = parts[0] + parts[1], np.concatenate([one, two]).astype(int)
    np.testing.assert_array_equal(whole.pair_counts().toarray(), both.T @ both)
    small = [
        CoActivation.of({"a": fires}, max_events=100, generator=np.random.default_rng(i))
        for i, fires in enumerate((one, two))
    ]
    bounded = small[0] + small[1]
    assert (bounded.n_events, bounded.n_seen, bounded.max_events) == (100, 700, 100)
    np.testing.assert_array_equal(bounded.fired, both.sum(0))
    # It is the sample that one pass over both would have kept: the events with the smallest of all keys.
    every = np.sort(np.concatenate([small[0].keys, small[1].keys]))
    np.testing.assert_array_equal(np.sort(bounded.keys), every[:100])
    with pytest.raises(ValueError, match="with window 1 and 2 cannot be added"):
        parts[0] + CoActivation.of({"a": one}, window=2)


def test_partners_have_the_figures_of_their_definitions() -> None:
    fires = np.zeros((10, 4), bool)
    fires[:6, 0] = fires[4:8, 1] = fires[:6, 2] = True
    first, second = CoActivation.of({"a": fires[:, :2], "b": fires[:, 2:]}).partners("a", 0)
    assert (first.site, first.id, first.together, first.jaccard, first.precision) == ("b", 0, 6, 1.0, 1.0)
    assert (second.site, second.id, second.together) == ("a", 1, 2)
    assert (second.precision, second.recall, second.jaccard) == (2 / 4, 2 / 6, 2 / 8)
    assert second.pmi == pytest.approx(np.log2((2 / 10) / (6 / 10 * 4 / 10)))


def test_shuffling_keeps_how_often_each_fires_and_no_more() -> None:
    fires = np.repeat(random_firing(500, 1), 6, axis=1)  # six that always fire together
    found = CoActivation.of({"a": fires})
    null = found.shuffled(np.random.default_rng(0))
    np.testing.assert_array_equal(null.counts, found.counts)
    together = null.pair_counts().toarray()[0, 1]
    assert together < 0.6 * found.counts[0]
    assert all(len(set(own)) == len(own) for own in np.split(null.ids, null.starts[1:-1]))


def test_what_is_rare_and_what_is_always_on_can_be_left_out() -> None:
    fires = np.random.default_rng(1).random((200, 9)) < np.linspace(0.01, 0.9, 9)
    counts = fires.sum(0)
    least, most = sorted(counts)[2], sorted(counts)[6]
    found = CoActivation.of({"a": fires}).between(int(least), most / 200)
    kept = (fires & (counts >= least) & (counts <= most)).astype(int)
    assert (kept.sum(0) > 0).sum() == 5
    np.testing.assert_array_equal(found.pair_counts().toarray(), kept.T @ kept)
    assert found.n_events == 200
    assert "outside the sample" not in repr(found)
    with pytest.raises(ValueError, match="max_share=0; expected a share of the events"):
        found.between(1, 0)


def test_drawn_events_are_a_part_of_the_sample() -> None:
    found = CoActivation.of({"a": random_firing(500)})
    part = found.drawn(0.4, np.random.default_rng(0))
    assert part.n_events == 200
    assert set(part.keys.tolist()) < set(found.keys.tolist())


def test_bad_arguments_are_named(decomposition: Decomposition, without_type_checks: None) -> None:
    importances = torch.tensor([[0.2, 0.0], [0.9, 1.0]])
    with pytest.raises(ValueError, match=r"W holds other values than True and False; compare importances"):
        CoActivation.of({"W": importances})  # pyright: ignore[reportArgumentType]
    ones = CoActivation.of({"W": (importances > 0.1).int()})  # pyright: ignore[reportArgumentType]
    assert ones.fired.tolist() == [2, 1]
    rows: Any = tokens(3)
    for arguments, message in (
        ({"threshold": 1.0}, "threshold=1.0; expected an importance: at least 0, below 1"),
        ({"window": 0}, "window=0; expected a number of positions, at least 1, or 'row'"),
        ({"max_events": 0}, "max_events=0; expected a whole number, at least 1"),
        ({"seed": -1}, "seed=-1; expected a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            coactivation(decomposition, rows, **arguments)
    with pytest.raises(TypeError, match="threshold='high'; expected a number"):
        coactivation(decomposition, rows, threshold="high")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="the data is empty"):
        coactivation(decomposition, [])
    with pytest.raises(TypeError, match="coactivation was given a"):
        coactivation(decomposition.model, rows)
    found = coactivation(decomposition, rows, threshold=0.2)
    with pytest.raises(ValueError, match=f"no site 'blocks.0.mlp.W_on' in these co-activations; near: '{IN}'"):
        found.partners("blocks.0.mlp.W_on", 0)
    with pytest.raises(ValueError, match=r"subcomponent 20 of blocks.0.mlp.W_in; expected a whole number in 0\.\.19"):
        found.partners(IN, 20)
    with pytest.raises(ValueError, match="expected the same number, at least one, at every site"):
        CoActivation.of({"a": np.zeros((0, 3), bool)})
    with torch.no_grad():
        for parameter in decomposition.gate_parameters():
            parameter.zero_()
    with pytest.raises(ValueError, match=r"nothing fires: no importance is above 0.01 in any of 36 events"):
        coactivation(decomposition, rows)
    decomposition.remove()
    with pytest.raises(ValueError, match="was removed"):
        coactivation(decomposition, rows)
