"""The two transformers with known mechanisms: what they can do, how they do it, and the data they were trained on."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from experiments import known_subcomponents
from experiments.known_subcomponents import (
    fourier_subcomponents,
    put_subcomponents,
    rotated_subcomponents,
    singular_subcomponents,
)
from experiments.toy_checks import always_on, firing_rates, objective, others, singular_ranks, used_ids
from spd_lens import Decomposition, decompose
from spd_lens.data import as_batch
from spd_lens.models import (
    INDUCTION_DIRECTORY,
    MODULAR_ADDITION_DIRECTORY,
    ModularSums,
    RepeatedSequences,
    all_sums,
    earlier_copies,
    fourier_reading,
    frequency_shares,
    grid_frequency_shares,
    head_roles,
    induction,
    induction_accuracy,
    induction_loss,
    load_induction,
    load_induction_decomposition,
    load_modular_addition,
    load_recipe,
    only_the_answer,
    predictable,
    sum_accuracy,
    sum_labels,
)
from spd_lens.training import Reconstruction, TrainConfig
from tests.conftest import needs_hooked
from tests.small_models import generator

LOADERS = [load_induction, load_modular_addition]
RESULTS = Path(__file__).parents[2] / "experiments" / "results"
DIRECTORIES = [INDUCTION_DIRECTORY, MODULAR_ADDITION_DIRECTORY]


# -- the shipped decomposition -----------------------------------------------------------------------------------------


def test_the_shipped_induction_decomposition_is_the_one_that_was_reported() -> None:
    decomposition = load_induction_decomposition()
    tokens = RepeatedSequences(256, seed=1_000_003).batch(0)
    used = used_ids(firing_rates(decomposition.importance(tokens)))
    reported = json.loads((RESULTS / "induction" / "summary.json").read_text())["check"]["used"]
    assert {name: len(ids) for name, ids in used.items()} == {k: v for k, v in reported.items() if k != "all"}
    with torch.no_grad():
        without = decomposition.model.run_with_hooks(tokens, fwd_hooks=decomposition.ablate(used))
        alone = decomposition.model.run_with_hooks(tokens, fwd_hooks=decomposition.keep(used))
    # Chance is one of 47 tokens; without the skill it is not exceeded by much, with it everything is right.
    assert induction_accuracy(without, tokens) < 3 / 47
    assert induction_accuracy(alone, tokens) > 0.99


# -- induction: data -------------------------------------------------------------------------------------------------


def test_sequences_are_distinct_tokens_and_then_repetitions_of_the_last_ones() -> None:
    tokens = RepeatedSequences(200, seed=3).batch(0)
    assert tokens.shape == (200, induction.N_CTX)
    periods, starts = set(), set()
    for bos, *body in tokens.tolist():
        assert bos == induction.BOS
        assert induction.BOS not in body
        n_distinct = len(set(body))
        assert len(set(body[:n_distinct])) == n_distinct
        period = n_distinct - body.index(body[n_distinct])
        assert all(body[i] == body[i - period] for i in range(n_distinct, len(body)))
        assert len(body) - n_distinct >= period
        periods.add(period)
        starts.add(n_distinct - period)
    assert periods == set(range(induction.MIN_PERIOD, induction.MAX_PERIOD + 1))
    assert min(starts) == 0
    assert max(starts) > 15


def test_predictable_positions_are_those_whose_token_was_there_before() -> None:
    tokens = torch.tensor([[0, 5, 3, 7, 3, 7, 3], [0, 1, 2, 3, 4, 5, 6]])
    assert predictable(tokens).tolist() == [[False, False, False, False, True, True, False], [False] * 7]
    assert earlier_copies(tokens)[0].nonzero().tolist() == [[4, 2], [5, 3], [6, 2], [6, 4]]


def test_accuracy_and_loss_count_what_they_say() -> None:
    tokens = torch.tensor([[0, 5, 3, 7, 3, 7, 3]])
    logits = torch.zeros(1, 7, 8)
    logits[0, 4, 7] = 100.0  # right
    logits[0, 5, 1] = 100.0  # wrong
    assert induction_accuracy(logits, tokens) == 0.5
    # Four positions must say nothing, one is right, one is wrong by 100 nats.
    assert float(induction_loss(logits, tokens)) == pytest.approx((4 * math.log(8) + 0 + 100) / 6, rel=1e-6)


@pytest.mark.parametrize("source", [RepeatedSequences(4, seed=5), ModularSums(4, seed=5)])
def test_batch_i_is_the_same_wherever_one_starts(source: RepeatedSequences | ModularSums) -> None:
    batches = list(islice(source, 5))
    assert torch.equal(next(source.batches_from(4)), batches[4])
    assert not torch.equal(batches[3], batches[4])
    assert as_batch(batches[0]).tokens is not None
    assert not torch.equal(type(source)(4, seed=6).batch(0), batches[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RepeatedSequences(0), "batch_size=0; expected at least 1"),
        (lambda: RepeatedSequences(1, seed=-1), "seed=-1; expected zero or more"),
        (lambda: RepeatedSequences(1, min_period=5, max_period=4), "expected 1 <= min_period <= max_period"),
        (lambda: RepeatedSequences(1, max_period=16), "expected room for a BOS and two periods"),
        (lambda: RepeatedSequences(1, d_vocab=20), "distinct ones beside the BOS"),
        (lambda: ModularSums(53 * 53 + 1), "expected between 1 and p\\^2"),
        (lambda: ModularSums(1, seed=-1), "seed=-1; expected zero or more"),
        (lambda: frequency_shares(torch.ones(4)), "p = 4 numbers; expected an odd number"),
        (lambda: grid_frequency_shares(torch.ones(4, 4, 1)), "expected \\[p, p, ...\\] with an odd p"),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# -- induction: mechanism --------------------------------------------------------------------------------------------


def test_induction_model_is_right_on_the_predictable_part_and_undecided_elsewhere() -> None:
    model, tokens = load_induction(), RepeatedSequences(256, seed=99).batch(0)
    with torch.no_grad():
        logits = model(tokens)
    assert induction_accuracy(logits, tokens) > 0.99
    unknown = ~predictable(tokens)
    unknown[:, -1] = False
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)[unknown].mean()
    assert float(entropy) > 0.95 * math.log(induction.D_VOCAB)


def test_rows_without_a_repetition_have_no_score() -> None:
    rows = torch.arange(8)[None]
    with pytest.raises(ValueError, match="no token of these 1 rows comes a second time"):
        induction_accuracy(torch.zeros(1, 8, induction.D_VOCAB), rows)
    with pytest.raises(ValueError, match="no token of these 1 rows comes a second time"):
        head_roles(load_induction(), rows)


def test_one_head_looks_back_by_one_and_one_after_the_earlier_copy() -> None:
    model, tokens = load_induction(), RepeatedSequences(256, seed=99).batch(0)
    roles, recipe = head_roles(model, tokens), load_recipe(INDUCTION_DIRECTORY)["test"]
    assert list(roles.previous_token_head) == recipe["previous_token_head"]
    assert list(roles.induction_head) == recipe["induction_head"]
    assert roles.previous_token_head[0] == 0
    assert roles.induction_head[0] == 1
    assert roles.clear() == {"previous": [roles.previous_token_head], "induction": [roles.induction_head]}


def test_head_scores_equal_sums_over_patterns_entry_by_entry() -> None:
    model, tokens = load_induction(), RepeatedSequences(3, seed=2).batch(0)
    _, cache = model.run_with_cache(tokens)
    rows, n = tokens.tolist(), tokens.shape[1]
    roles = head_roles(model, tokens)
    for layer, head in (roles.previous_token_head, roles.induction_head):
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"][:, head].tolist()
        after, looked_at = [], set()
        for i, row in enumerate(rows):
            for q in range(n - 1):
                copies = [k for k in range(q) if row[k] == row[q]]
                if copies:
                    after.append(sum(pattern[i][q][k + 1] for k in copies))
                    looked_at |= {(i, k + 1) for k in copies}
        back = [pattern[i][k][k - 1] for i, k in looked_at]
        assert roles.induction[layer][head] == pytest.approx(sum(after) / len(after), abs=1e-5)
        assert roles.previous[layer][head] == pytest.approx(sum(back) / len(back), abs=1e-5)


@needs_hooked
def test_a_head_that_writes_nothing_has_no_role() -> None:
    model, tokens = load_induction(), RepeatedSequences(3, seed=2).batch(0)
    layer, head = head_roles(model, tokens).induction_head
    with torch.no_grad():
        model.blocks[layer].attn.W_O[head] = 0
    assert head_roles(model, tokens).induction[layer][head] == 0


def test_without_either_head_the_skill_is_gone() -> None:
    model, tokens = load_induction(), RepeatedSequences(256, seed=99).batch(0)
    roles = head_roles(model, tokens)
    for layer in range(2):
        for head in range(model.cfg.n_heads):

            def to_mean(z: torch.Tensor, hook: Any, head: int = head) -> torch.Tensor:
                z[:, :, head] = z[:, :, head].mean((0, 1))
                return z

            logits = model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{layer}.attn.hook_z", to_mean)])
            accuracy = induction_accuracy(logits, tokens)
            if (layer, head) in (roles.previous_token_head, roles.induction_head):
                assert accuracy < 0.3
            else:
                assert accuracy > 0.9


# -- modular addition ------------------------------------------------------------------------------------------------


def test_all_sums_are_all_pairs_and_a_full_batch_is_a_permutation_of_them() -> None:
    sums = all_sums(5)
    assert sums.tolist() == [[a, b, 5] for a in range(5) for b in range(5)]
    batch = ModularSums(25, p=5, seed=1).batch(0)
    assert sorted(batch.tolist()) == sums.tolist()
    assert sum_labels(torch.tensor([[3, 4, 5], [1, 2, 5]]), 5).tolist() == [2, 3]


def test_frequency_shares_of_waves() -> None:
    n = torch.arange(11)
    wave = 3 + 2 * torch.cos(2 * torch.pi * 4 * n / 11 + 0.7) + torch.sin(2 * torch.pi * 2 * n / 11)
    expected = torch.tensor([0, 0.2, 0, 0.8, 0])
    torch.testing.assert_close(frequency_shares(wave), expected, atol=1e-6, rtol=0)
    assert frequency_shares(torch.ones(2, 11)).tolist() == [[0.0] * 5] * 2
    torch.testing.assert_close(frequency_shares(torch.randn(3, 11)).sum(-1), torch.ones(3))
    assert frequency_shares(torch.ones(0, 11)).shape == grid_frequency_shares(torch.ones(11, 11, 0)).shape == (0, 5)


def test_grid_frequency_shares_equal_a_projection_on_the_products() -> None:
    p = 7
    values = torch.randn(p, p, 2, dtype=torch.float64, generator=generator())
    n = torch.arange(p, dtype=torch.float64)
    centred = values - values.mean((0, 1))
    for k in range(1, 4):
        one = [torch.ones(p).double(), torch.cos(2 * torch.pi * k * n / p), torch.sin(2 * torch.pi * k * n / p)]
        products = torch.stack([torch.outer(f, g).flatten() for f in one for g in one][1:])
        basis = torch.linalg.qr(products.T).Q
        expected = (basis.T @ centred.flatten(0, 1)).square().sum(0) / centred.square().sum((0, 1))
        torch.testing.assert_close(grid_frequency_shares(values)[:, k - 1], expected, atol=1e-10, rtol=0)


def test_modular_addition_is_right_on_every_sum() -> None:
    model, sums = load_modular_addition(), all_sums()
    with torch.no_grad():
        logits = model(sums)
    assert sum_accuracy(logits, sums) == 1
    recipe = load_recipe(MODULAR_ADDITION_DIRECTORY)
    assert recipe["test"]["accuracy_test"] == 1
    assert recipe["train_share"] <= 0.5


def test_modular_addition_uses_few_frequencies_throughout() -> None:
    reading, recipe = (
        fourier_reading(load_modular_addition()),
        load_recipe(MODULAR_ADDITION_DIRECTORY)["test"],
    )
    assert list(reading.key_frequencies) == recipe["key_frequencies"]
    assert 2 <= len(reading.key_frequencies) <= 6
    assert reading.embedding_explained > 0.9
    assert reading.unembedding_explained > 0.9
    assert reading.neurons_explained > 0.8
    assert reading.neurons_explained == pytest.approx(recipe["neurons_explained"], abs=1e-3)
    on = reading.neuron_frequency > 0
    assert set(reading.neuron_frequency[on].tolist()) <= set(reading.key_frequencies)


def test_an_untrained_model_has_no_key_frequencies() -> None:
    model, source = load_modular_addition(), generator()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=source) / p.shape[-1] ** 0.5)
    reading = fourier_reading(model)
    assert reading.embedding_explained < 0.3
    assert reading.neurons_explained < 0.5


def test_only_the_answer_silences_the_other_positions() -> None:
    model, sums = load_modular_addition(), all_sums()[:7]
    with torch.no_grad():
        before = model(sums)
        model.add_perma_hook("unembed.hook_out", only_the_answer)
        after = model(sums)
    assert torch.equal(after[:, -1], before[:, -1])
    assert not after[:, :-1].any()


# -- files and loading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", LOADERS)
def test_loading_is_quick_silent_and_leaves_the_seed_alone(load: Callable[[], Any]) -> None:
    load()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load()
    assert time.perf_counter() - started < 5
    assert not model.training
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("load", LOADERS)
def test_dtype_is_chosen_or_refused(load: Callable[..., Any], without_type_checks: None) -> None:
    assert next(load(dtype=torch.float64).parameters()).dtype == torch.float64
    with pytest.raises(TypeError, match="dtype is 'float32'; expected a torch dtype"):
        load(dtype="float32")
    with pytest.raises(ValueError, match=r"dtype is torch\.int64; expected a floating point type"):
        load(dtype=torch.int64)


def plain_logits(directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    """The model written out, from its file alone, in float64."""
    w = {name: value.double() for name, value in load_file(directory / "model.safetensors").items()}
    x = w["embed.W_E"][tokens] + w["pos_embed.W_pos"][: tokens.shape[1]]
    future = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
    for layer in range(2):
        b = {name.removeprefix(f"blocks.{layer}."): v for name, v in w.items() if name.startswith(f"blocks.{layer}.")}
        if not b:
            break
        q, k, v = (
            torch.einsum("bpm,hmd->bhpd", x, b[f"attn.W_{letter}"]) + b[f"attn.b_{letter}"][:, None] for letter in "QKV"
        )
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(future, -torch.inf)
        x = x + torch.einsum("bhpd,hdm->bpm", scores.softmax(-1) @ v, b["attn.W_O"]) + b["attn.b_O"]
        if "mlp.W_in" in b:
            x = x + (x @ b["mlp.W_in"] + b["mlp.b_in"]).relu() @ b["mlp.W_out"] + b["mlp.b_out"]
    return x @ w["unembed.W_U"] + w["unembed.b_U"]


@pytest.mark.parametrize("host", [pytest.param("hooked", marks=needs_hooked), "bridge"])
@pytest.mark.parametrize("load", LOADERS)
def test_logits_are_those_of_the_model_written_out(load: Callable[..., Any], host: str) -> None:
    is_induction = load is load_induction
    tokens = RepeatedSequences(8, seed=3).batch(0) if is_induction else all_sums()[::100]
    expected = plain_logits(INDUCTION_DIRECTORY if is_induction else MODULAR_ADDITION_DIRECTORY, tokens)
    with torch.no_grad():
        found = load(dtype=torch.float64, host=host)(tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("directory", DIRECTORIES)
def test_files_are_small_and_never_pickled(directory: Path) -> None:
    assert {path.suffix for path in directory.rglob("*") if path.is_file()} <= {".safetensors", ".json", ".md"}
    files = [path for path in directory.iterdir() if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    assert sum(path.stat().st_size for path in files) < 500_000
    with safe_open(directory / "model.safetensors", framework="pt") as stored:
        shapes = [stored.get_slice(name).get_shape() for name in stored.keys()]  # noqa: SIM118
    assert sum(torch.Size(shape).numel() for shape in shapes) == load_recipe(directory)["n_params"]


@pytest.mark.parametrize("directory", DIRECTORIES)
def test_recipe_says_how(directory: Path) -> None:
    assert {"command", "seed", "versions", "steps", "optimizer", "cpu_seconds", "test"} <= load_recipe(directory).keys()


def test_both_can_be_decomposed_and_stay_themselves() -> None:
    for model, tokens, pattern in (
        (load_induction(), RepeatedSequences(2).batch(0), "blocks.*.attn.W_[QKVO]"),
        (load_modular_addition(), ModularSums(5).batch(0), "blocks.0.mlp.W_*"),
    ):
        with torch.no_grad():
            before = model(tokens)
            decomposition = decompose(model, {pattern: 4}, gate="attention", gate_width=4)
            assert torch.equal(model(tokens), before)
        assert all(g.shape[:2] == tokens.shape for g in decomposition.importance(tokens).values())


# -- benchmarks: hand-made subcomponents and checks ------------------------------------------------------------------

MODULAR_SITES = {"embed.W_E": 54, "blocks.0.mlp.W_*": 64}


def modular() -> Decomposition:
    return decompose(load_modular_addition(), MODULAR_SITES, gate_width=2)


@pytest.mark.parametrize("make", ["singular", "rotated", "aligned", "in planes", "across planes", "rows"])
def test_hand_made_subcomponents_sum_to_the_matrices(make: Any) -> None:
    decomposition = modular()
    weights = {name: weight.target_weight for name, weight in decomposition.items()}
    if make == "singular":
        subcomponents = singular_subcomponents(weights)
    elif make == "rotated":
        subcomponents = rotated_subcomponents(weights)
    else:
        subcomponents = fourier_subcomponents(decomposition.model, make)
    put_subcomponents(decomposition, subcomponents)
    for name, weight in decomposition.items():
        # Rounding of 64 products in float32, against the largest of them.
        largest = (weight.V.abs().max(0).values * weight.U.abs().max(1).values).max()
        assert (weight.weight - weights[name]).abs().max() < 64 * torch.finfo(torch.float32).eps * largest, name


def test_only_rotation_across_planes_mixes_frequencies() -> None:
    model = load_modular_addition()
    keys = fourier_reading(model).key_frequencies
    own = {kind: fourier_subcomponents(model, kind) for kind in ("aligned", "in planes", "across planes")}
    for kind in ("aligned", "in planes"):
        share, where = frequency_shares(own[kind]["embed.W_E"][0][:53, :6].T).max(-1)
        torch.testing.assert_close(share, torch.ones_like(share))
        assert (where + 1).tolist() == [k for k in keys for _ in range(2)]
    # The best of three shares of a random direction is (1 + 1/2 + 1/3) / 3 on average.
    mixed = frequency_shares(own["across planes"]["embed.W_E"][0][:53, :6].T).amax(-1).mean()
    assert float(mixed) == pytest.approx(0.611, abs=0.2)
    # What W_out writes along one direction alone, the unembedding reads as one frequency among the three.
    for kind, pure in (("aligned", True), ("in planes", True), ("across planes", False)):
        shares = frequency_shares(own[kind]["blocks.0.mlp.W_out"][1][:6] @ model.W_U.detach().double())
        among = shares[:, [k - 1 for k in keys]]
        second = among.sort(descending=True).values[:, 1] / among.sum(-1)
        assert bool((second < 1e-9).all()) == pure


@needs_hooked
def test_singular_ranks_equal_cutting_the_weights_themselves() -> None:
    pattern, tokens = "blocks.0.attn.W_[QV]", RepeatedSequences(8, seed=4).batch(0)
    decomposition = decompose(load_induction(), {pattern: 64}, gate_width=2)
    put_subcomponents(decomposition, singular_subcomponents({n: w.target_weight for n, w in decomposition.items()}))
    found = singular_ranks(decomposition, tokens, 0.01)

    def kl_of_rank(letter: str, k: int) -> float:
        model = load_induction()
        with torch.no_grad():
            clean = model(tokens).log_softmax(-1)
            W = getattr(model.blocks[0].attn, f"W_{letter}")
            flat = W.permute(1, 0, 2).flatten(1).double()
            left, s, right = torch.linalg.svd(flat, full_matrices=False)
            cut = (left[:, :k] * s[:k]) @ right[:k]
            W.copy_(cut.reshape(64, *W.shape[::2]).permute(1, 0, 2))
            return float((clean.exp() * (clean - model(tokens).log_softmax(-1))).sum(-1).mean())

    for letter in "QV":
        ids = found[f"blocks.0.attn.W_{letter}"]
        assert ids == list(range(len(ids)))
        assert kl_of_rank(letter, len(ids)) < 0.01 <= kl_of_rank(letter, len(ids) - 1)


def test_always_on_is_exact_with_everything_on_and_the_adversary_is_worse_than_chance() -> None:
    decomposition = decompose(load_induction(), {"blocks.*.attn.W_V": 64}, gate_width=2)
    put_subcomponents(decomposition, rotated_subcomponents({n: w.target_weight for n, w in decomposition.items()}))
    tokens = RepeatedSequences(4, seed=4).batch(0)
    everything = {name: list(range(64)) for name in decomposition}
    none = others(decomposition, everything)
    assert set(map(len, none.values())) == {0}
    # Nothing is left to choose but the mask of a delta of 0, up to float32.
    assert max(always_on(decomposition, everything, tokens).values()) < 1e-5
    with_none = always_on(decomposition, none, tokens)
    assert with_none["adversarial"] > with_none["stochastic"] > 0.1


def test_objective_with_every_gate_fully_on() -> None:
    decomposition = modular()
    put_subcomponents(decomposition, rotated_subcomponents({n: w.target_weight for n, w in decomposition.items()}))
    for weight in decomposition.values():
        weight.gate.w_out.data.zero_()
        weight.gate.b_out.data.fill_(2.0)
    config = TrainConfig(minimality=0.1, reconstructions=(Reconstruction(), Reconstruction(routing="layerwise")))
    values = objective(decomposition, [all_sums()[::50], all_sums()[7::50]], config)
    # S2 at a pre-activation of 2 is 1.01; exact sums leave nothing to reconstruct.
    assert values["minimality"] == pytest.approx(1.01 * (54 + 64 + 64), rel=1e-5)
    assert values["stochastic_all"] == pytest.approx(0, abs=1e-4)
    assert values["total"] == pytest.approx(0.1 * values["minimality"], abs=2e-4)


def test_subcomponents_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="kind='both'; expected 'aligned', 'in planes', 'across planes' or 'rows'"):
        known_subcomponents._turn("both", 3, 2, 0)  # pyright: ignore[reportArgumentType]


# -- benchmarks: what the stored results say -------------------------------------------------------------------------

RESULTS = Path(__file__).resolve().parents[2] / "experiments" / "results"


def stored(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def test_stored_induction_run_finds_the_two_heads_with_as_few_as_the_singular_vectors() -> None:
    result = stored("induction/summary.json")
    check, baseline = result["check"], result["singular_vectors"]
    assert check["used"]["all"] <= baseline["needed"]["all"] == 59
    roles = {f"{layer}.{head}" for layer, head in (check["previous_token_head"], check["induction_head"])}
    assert {head for head, own in check["heads"].items() if any(own["used"].values())} == roles
    assert all(check["heads"][head]["without_used"]["accuracy"] < 0.1 for head in roles)
    assert check["without_used"]["accuracy"] < 0.1
    assert check["only_used"]["accuracy"] > 0.99
    assert check["without_others"]["accuracy"] > 0.99
    # A worst case far below what removing everything costs (1.9 nats).
    assert result["evaluation"]["adversarial"]["20"] < 0.1 < 1.9 < result["evaluation"]["divergence"]["all off"]


def test_stored_runs_from_a_random_start_are_reported_as_worse_than_the_default() -> None:
    default, rotated, frozen = (stored(f"induction/{name}.json") for name in ("summary", "rotated", "frozen"))
    assert default["loss"]["total"] < frozen["loss"]["total"] < rotated["loss"]["total"]
    assert rotated["evaluation"]["adversarial"]["20"] > 1 > frozen["evaluation"]["adversarial"]["20"]


def test_stored_modular_addition_runs_differ_as_the_docs_say() -> None:
    aligned, found = (stored(f"modular_addition/{name}.json") for name in ("summary", "rotated"))
    assert found["loss"]["total"] < 0.5 * aligned["loss"]["total"]
    for result, least, most in ((aligned, 0.8, 1.0), (found, 0.0, 0.7)):
        shares = result["check"]["mean_best_share"].values()
        assert all(least < share["used, by mean importance"] < most for share in shares)
    assert found["evaluation"]["adversarial"]["20"] > 2 > aligned["evaluation"]["adversarial"]["20"]


def test_stored_gates_alone_put_the_objective_against_fourier_subcomponents() -> None:
    loss = {
        f"{row['subcomponents']} {row['seed']}": row["loss"]["total"]
        for row in stored("modular_addition/gates_alone.json")["rows"]
    }
    found = stored("modular_addition/rotated.json")["loss"]["total"]
    assert found < loss["rows 0"] < loss["aligned 0"] < min(loss["across planes 0"], loss["across planes 100"])
