"""Harvests: token statistics, examples, effects and directions against independent computations; files; shards."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path

import pytest
import torch

from spd_lens import Batch, Decomposition, TokenBatches, decompose, harvest
from spd_lens.statistics import Harvest
from tests import oracle
from tests.conftest import needs_hooked
from tests.small_models import tiny_transformer, tokens

SITE, OTHER = "blocks.1.mlp.W_in", "blocks.0.attn.W_V"
ROWS = tokens(24)


@pytest.fixture
def decomposition() -> Decomposition:
    return decompose(tiny_transformer(), {SITE: 20, OTHER: 12}, gate="shared", gate_width=8)


def whole(decomposition: Decomposition, rows: torch.Tensor = ROWS, **settings: object) -> Harvest:
    return harvest(decomposition, [rows[:9], rows[9:]], threshold=0.2, **settings)  # pyright: ignore


def importances_and_activations(decomposition: Decomposition, site: str = SITE) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        clean = decomposition.clean_pass(ROWS)
        return decomposition.importance(ROWS)[site], decomposition[site].activations(clean.inputs[site])


def test_token_statistics_are_those_of_all_positions_at_once(decomposition: Decomposition) -> None:
    found = whole(decomposition)[SITE]
    g, _ = importances_and_activations(decomposition)
    with torch.no_grad():
        predicted = decomposition.model(ROWS).argmax(-1)
    for c in found.most_used(5):
        fires = g[..., c] > 0.2
        for tokens_there, rows in ((ROWS, found.input_tokens(c, None)), (predicted, found.predicted_tokens(c, None))):
            assert sum(row.count for row in rows) == int(fires.sum())
            for row in rows:
                here = tokens_there == row.token
                both = int((here & fires).sum())
                assert row.count == both
                assert row.precision == pytest.approx(both / int(fires.sum()))
                assert row.recall == pytest.approx(both / int(here.sum()))
                expected = math.log(both * ROWS.numel() / (int(fires.sum()) * int(here.sum())))
                assert row.pmi == pytest.approx(expected, abs=1e-12)
            assert [row.precision for row in rows] == sorted((row.precision for row in rows), reverse=True)
        assert int(found.top_token()[c]) == found.input_tokens(c, 1)[0].token


def test_histograms_count_every_firing_once_and_in_its_bin(decomposition: Decomposition) -> None:
    found = whole(decomposition)[SITE]
    g, a = importances_and_activations(decomposition)
    for c in found.most_used(4):
        fires = g[..., c] > 0.2
        for values, histogram in (
            (g[..., c][fires], found.importance_histogram(c)),
            (a[..., c][fires], found.activation_histogram(c)),
        ):
            expected = [
                sum(low < v <= high if low >= 0 else low <= v < high for v in values.tolist())
                for low, high in zip(histogram.edges[:-1], histogram.edges[1:], strict=True)
            ]
            assert list(histogram.counts) == expected
            assert sum(expected) == int(fires.sum())


def test_means_of_activations_keep_their_sign_apart(decomposition: Decomposition) -> None:
    found = whole(decomposition)[SITE]
    g, a = importances_and_activations(decomposition)
    fires = g > 0.2
    torch.testing.assert_close(found.signed_activation, (a * fires).sum((0, 1)) / fires.sum((0, 1)).clamp_min(1))
    torch.testing.assert_close(found.activation_rms, a.square().mean((0, 1)).sqrt())


def test_random_and_stratified_examples_are_positions_where_it_fires(decomposition: Decomposition) -> None:
    found = whole(decomposition, random_k=5, bands=3, per_band=2, before=2, after=1)[SITE]
    g, a = importances_and_activations(decomposition)
    for c in found.most_used(6):
        fires = {(r, p) for r, p in (g[..., c] > 0.2).nonzero().tolist()}
        for kind, most in (("random", 5), ("stratified", 6)):
            examples = found.examples(c, kind)  # pyright: ignore[reportArgumentType]
            assert len(examples) <= most
            for example in examples:
                places = [
                    (r, p)
                    for r, p in fires
                    if ROWS[r, max(0, p - 2) : p + 2].tolist() == example.tokens
                    and float(g[r, p, c]) == pytest.approx(example.importance)
                ]
                assert places
                r, p = places[0]
                assert example.at == min(p, 2)
                torch.testing.assert_close(torch.tensor(example.importances), g[r, max(0, p - 2) : p + 2, c])
                torch.testing.assert_close(torch.tensor(example.activations), a[r, max(0, p - 2) : p + 2, c])
        assert len(found.examples(c, "random")) == min(5, len(fires))
        bands = [int((e.importance - 0.2) / 0.8 * 3 - 1e-9) for e in found.examples(c, "stratified")]
        assert bands == sorted(bands, reverse=True)


def test_a_random_example_is_as_likely_as_any_other(decomposition: Decomposition) -> None:
    c = harvest(decomposition, ROWS, threshold=0.2)[SITE].most_used(1)[0]
    g, _ = importances_and_activations(decomposition)
    fires = (g[..., c] > 0.2).nonzero().tolist()
    drawn = []
    for seed in range(200):
        example = harvest(decomposition, ROWS, threshold=0.2, random_k=1, seed=seed, before=11, after=11)
        (only,) = example[SITE].examples(c, "random")
        drawn.append(only.at)
    # Positions in a row are drawn as often as they fire.
    first_half = sum(p < 6 for _, p in fires) / len(fires)
    share = sum(at < 6 for at in drawn) / len(drawn)
    assert abs(share - first_half) < 4 * math.sqrt(0.25 / 200)


def same(one: Harvest, two: Harvest) -> None:
    assert one.sums.n_positions == two.sums.n_positions
    first, second = one.sums.tensors(), two.sums.tensors()
    for name, tensor in first.items():
        if name.rpartition(".")[2] in ("keys", "tokens", "importances", "activations") and tensor.ndim > 1:
            continue  # examples are compared as a set below
        torch.testing.assert_close(tensor, second[name], rtol=1e-9, atol=1e-9, msg=name)
    for site in one:
        for c in range(len(one[site])):
            for kind in ("random", "stratified"):
                mine, other = (
                    sorted(
                        (e.tokens, round(e.importance, 5), round(e.activation, 4)) for e in h[site].examples(c, kind)
                    )
                    for h in (one, two)
                )
                assert mine == other, (site, c, kind)
            mine, other = (h[site].examples(c, "top") for h in (one, two))
            assert [e.importance for e in mine] == pytest.approx([e.importance for e in other], abs=1e-6)
            # Of those as strong as the weakest kept, rounding decides which stay; the stronger ones are the same.
            kept = [sorted(e.tokens for e in top if e.importance > top[-1].importance + 1e-5) for top in (mine, other)]
            assert kept[0] == kept[1], (site, c)


def test_shards_that_are_merged_in_any_order_give_the_harvest_of_the_whole(decomposition: Decomposition) -> None:
    settings = {"threshold": 0.2, "effect_batches": 2}
    parts = [ROWS[:5], ROWS[5:11], ROWS[11:]]
    found = [harvest(decomposition, part, **settings) for part in parts]  # pyright: ignore
    together = harvest(decomposition, [ROWS[:5], ROWS[5:11], ROWS[11:]], threshold=0.2, effect_batches=3)
    same(found[0].merged(found[1], found[2]), together)
    same(found[2].merged(found[0]).merged(found[1]), together)
    assert found[0].n_positions == parts[0].numel()


def test_the_same_data_other_settings_and_other_decompositions_are_not_merged(decomposition: Decomposition) -> None:
    found = harvest(decomposition, ROWS)
    with pytest.raises(ValueError, match="read the same data as harvest 0"):
        found.merged(harvest(decomposition, ROWS))
    some = harvest(decomposition, ROWS[:5])
    with pytest.raises(ValueError, match="harvest 1 read the same data as harvest 0"):
        found.merged(some).merged(some)
    with pytest.raises(ValueError, match="harvest 1 was made with other settings"):
        found.merged(harvest(decomposition, ROWS[:5], top_k=3))
    other = decompose(tiny_transformer(), {SITE: 20, OTHER: 12}, gate="shared", gate_width=8, seed=7)
    with pytest.raises(ValueError, match="harvest 1 is of another decomposition of this target"):
        found.merged(harvest(other, ROWS[:5]))


def test_a_harvest_is_read_as_it_was_written_and_only_for_its_decomposition(
    decomposition: Decomposition, tmp_path: Path
) -> None:
    found = whole(decomposition, effect_batches=1)
    decomposition.save_pretrained(tmp_path)
    found.save(tmp_path)
    loaded = Harvest.load(tmp_path, decomposition)
    same(loaded, found)
    assert loaded.token_strings == found.token_strings
    assert str(loaded) == str(found)
    torch.testing.assert_close(loaded[SITE].effect, found[SITE].effect)
    again = Decomposition.from_pretrained(tmp_path, tiny_transformer())
    Harvest.load(tmp_path, again)
    with torch.no_grad():
        again[SITE].V[0, 0] += 1
    with pytest.raises(ValueError, match="is of another decomposition of this target"):
        Harvest.load(tmp_path, again)
    changed = decompose(tiny_transformer(seed=3), {SITE: 20, OTHER: 12}, gate="shared", gate_width=8)
    with pytest.raises(ValueError, match="is of another target"):
        Harvest.load(tmp_path, changed)
    with pytest.raises(ValueError, match="holds no harvest"):
        Harvest.load(tmp_path / "nothing")


def test_an_interrupted_harvest_goes_on_and_counts_nothing_twice(
    decomposition: Decomposition, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = [ROWS[i : i + 4] for i in range(0, 24, 4)]

    class Interrupt(Exception):
        pass

    def stopping() -> object:
        yield from data[:3]
        raise Interrupt

    settings = {"out_dir": tmp_path, "save_every": 2, "threshold": 0.2}
    with pytest.raises(Interrupt):
        harvest(decomposition, stopping(), **settings)  # pyright: ignore
    with pytest.raises(ValueError, match="was interrupted after 2 batches; call harvest"):
        Harvest.load(tmp_path)
    runs = []
    original = Decomposition.clean_pass
    monkeypatch.setattr(Decomposition, "clean_pass", lambda self, *a, **k: runs.append(1) or original(self, *a, **k))
    with pytest.raises(ValueError, match="the first 2 batches are not those"):
        harvest(decomposition, data[1:], **settings)  # pyright: ignore
    with pytest.raises(ValueError, match=r"other settings \(top_k was 8 and is 2\)"):
        harvest(decomposition, data, top_k=2, **settings)  # pyright: ignore
    with pytest.raises(ValueError, match="has counted 2 batches, and this data has fewer"):
        harvest(decomposition, data[:1], **settings)  # pyright: ignore
    runs.clear()
    resumed = harvest(decomposition, data, **settings)  # pyright: ignore
    assert len(runs) == 4
    monkeypatch.undo()
    same(resumed, harvest(decomposition, data, threshold=0.2))
    same(Harvest.load(tmp_path, decomposition), resumed)
    assert harvest(decomposition, data, **settings).n_positions == ROWS.numel()  # pyright: ignore


def test_memory_does_not_grow_with_the_data(decomposition: Decomposition) -> None:
    sizes = [harvest(decomposition, tokens(n, seed=n), tokens_kept=4, n_events=64).sums.bytes() for n in (64, 512)]
    assert sizes[1] <= sizes[0] * 1.1


def test_the_effect_of_an_ablation_is_that_of_the_edited_weight(decomposition: Decomposition) -> None:
    rows = ROWS[:6]
    found = harvest(decomposition, Batch(rows, position_mask=rows != 3), effect_batches=1)
    effect = found[SITE].effect
    assert effect is not None
    assert whole(decomposition)[SITE].effect is None
    weight = copy.deepcopy(decomposition)[SITE]
    model = weight.swapped.decomposition.model
    original = weight.target_weight.clone()
    with torch.no_grad():
        p = model(rows).log_softmax(-1)
        for c in (0, 7, 19):
            weight.site.matrix.write(original - torch.outer(weight.V[:, c], weight.U[c]))
            q = model(rows).log_softmax(-1)
            kl = (p.exp() * (p - q)).sum(-1)[rows != 3].mean()
            torch.testing.assert_close(effect[c], kl, rtol=1e-3, atol=1e-6)


def test_similar_subcomponents_are_those_of_the_largest_cosine_of_matrices(decomposition: Decomposition) -> None:
    directions = whole(decomposition)[SITE].directions
    assert directions is not None
    weight = decomposition[SITE]
    matrices = torch.einsum("ic,co->cio", weight.V.detach(), weight.U.detach()).flatten(1)
    cosines = torch.nn.functional.cosine_similarity(matrices[:, None], matrices[None], dim=2)
    torch.testing.assert_close(directions.size, matrices.norm(dim=1))
    cosines.fill_diagonal_(-2)
    torch.testing.assert_close(directions.similar, cosines.topk(8).values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("site", ["blocks.1.mlp.W_out", "blocks.1.attn.W_O", "blocks.1.attn.W_V", "embed.W_E"])
def test_what_is_written_to_the_logits_is_the_derivative_on_the_direct_path(site: str) -> None:
    """Frozen scale and pattern: the only thing between `U` and the logits is the final normalisation's scale."""
    decomposition = decompose(tiny_transformer(), {site: 12})
    model, host = decomposition.model, decomposition.host
    found = host.direct_logits(site, decomposition[site].U.detach()[:3])
    assert found is not None
    stream = torch.randn(3, 16)
    U = decomposition[site].U.detach()[:3]
    if site.endswith("W_V"):
        # With all attention on one position, the heads' output is the value itself.
        U = U @ host.site("blocks.1.attn.W_O").matrix.read()
    norm = model.ln_final

    def logits(x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scale = centred.square().mean(-1, keepdim=True).sqrt()
        return norm(x[None])[0] * scale @ host.site("unembed.W_U").matrix.read()

    # LayerNorm's bias is multiplied by the scale here: taken off by a second difference.
    bias = norm(torch.zeros(1, 1, 16))[0] @ host.site("unembed.W_U").matrix.read()

    def scaled_bias(x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean(-1, keepdim=True)).square().mean(-1, keepdim=True).sqrt() * bias

    with torch.no_grad():
        expected = logits(stream + U) - scaled_bias(stream + U) - logits(stream) + scaled_bias(stream)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-3, atol=1e-3)


def test_matrices_without_a_direct_path_write_nothing_to_the_logits(decomposition: Decomposition) -> None:
    found = whole(decomposition)
    assert found[SITE].directions is not None
    assert found[SITE].directions.raised is None
    raised = found[OTHER].directions
    assert raised is not None
    assert raised.raised_ids is not None
    logits = decomposition.host.direct_logits(OTHER, decomposition[OTHER].U.detach())
    assert logits is not None
    assert torch.equal(raised.raised_ids.long(), logits.topk(10).indices)


def test_settings_that_make_no_sense_are_named(decomposition: Decomposition, without_type_checks: None) -> None:
    for name in ("random_k", "bands", "tokens_kept", "effect_batches", "n_background"):
        with pytest.raises(ValueError, match=f"{name}=-1; expected a whole number"):
            harvest(decomposition, ROWS, **{name: -1})  # pyright: ignore
    with pytest.raises(ValueError, match=r"threshold=1.5; expected a number in \[0, 1\)"):
        harvest(decomposition, ROWS, threshold=1.5)
    with pytest.raises(ValueError, match="kind='best'; expected 'top', 'random' or 'stratified'"):
        harvest(decomposition, ROWS)[SITE].examples(0, "best")  # pyright: ignore
    assert isinstance(harvest(decomposition, TokenBatches(ROWS, 4)), Harvest)


def test_what_does_not_count_enters_no_number_not_even_nan(decomposition: Decomposition) -> None:
    mask = torch.ones(4, ROWS.shape[1], dtype=torch.bool)
    mask[:, -2:] = False
    expected = harvest(decomposition, Batch(ROWS[:4], position_mask=mask), effect_batches=1)

    def broken(value: torch.Tensor, hook: object) -> torch.Tensor:
        value[:, -2:] = torch.nan
        return value

    with decomposition.model.hooks(fwd_hooks=[("blocks.1.hook_attn_out", broken)]):
        found = harvest(decomposition, Batch(ROWS[:4], position_mask=mask), effect_batches=1)
    for name in ("firing_rate", "mean_importance", "mean_activation", "signed_activation", "activation_rms", "effect"):
        torch.testing.assert_close(getattr(found[SITE], name), getattr(expected[SITE], name), msg=name)
    assert len(found[SITE].examples(found[SITE].most_used(1)[0])) > 0


@pytest.mark.parametrize("name", ["n_events", "n_background", "random_k", "per_band", "before", "after"])
def test_nothing_of_a_kind_can_be_asked_for(decomposition: Decomposition, name: str) -> None:
    found = harvest(decomposition, ROWS, **{name: 0})  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(found[SITE].firing_rate, harvest(decomposition, ROWS)[SITE].firing_rate)
    assert found[SITE].examples(found[SITE].most_used(1)[0])
    found.merged(harvest(decomposition, ROWS[:3], **{name: 0})).contents()  # pyright: ignore[reportArgumentType]


@needs_hooked
def test_with_an_input_per_head_the_strongest_head_speaks_with_its_sign() -> None:
    decomposition = decompose(oracle.CASES["split_qkv"].build(), {"blocks.0.attn.W_V": 6}, seed=3)
    rows = tokens(4, length=6) % (decomposition.host.vocabulary_size() or 1)
    found = harvest(decomposition, rows, threshold=0.0)["blocks.0.attn.W_V"]
    weight = decomposition["blocks.0.attn.W_V"]
    x = decomposition.clean_pass(rows).inputs["blocks.0.attn.W_V"]
    sums, counts = [0.0] * 6, [0] * 6
    with torch.no_grad():
        a, g = x.to(weight.V) @ weight.V, decomposition.importance(rows)["blocks.0.attn.W_V"]
    assert a.ndim == 4
    for row, position, c in itertools.product(range(4), range(6), range(6)):
        if float(g[row, position, :, c].max()) > 0:
            sums[c] += max(a[row, position, :, c].tolist(), key=abs)
            counts[c] += 1
    expected = [s / max(1, n) for s, n in zip(sums, counts, strict=True)]
    assert min(expected) < 0
    assert found.signed_activation.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)
