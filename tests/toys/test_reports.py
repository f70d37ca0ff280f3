"""Metrics against known mechanisms: right and wrong decompositions made by hand, each recognised for its reason."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from spd_lens import decompose
from spd_lens.core import DecomposedWeight, Decomposition
from spd_lens.toys import TMS, ResidMLP, one_hot_inputs, recovery, reports, resid_mlp_report, tms_report
from tests.small_models import generator, rand, randn

N_FEATURES, C = 5, 12


def pentagon() -> Tensor:
    """What TMS 5-2 learns: five directions at equal angles."""
    angles = torch.arange(N_FEATURES) * 2 * math.pi / N_FEATURES
    return 1.13 * torch.stack([angles.cos(), angles.sin()], dim=1)


def set_gate(weight: DecomposedWeight, threshold: float, signs: Tensor | None = None) -> None:
    """Importance 1 where `|a| > threshold` (with `signs [C]`, where `signs a > threshold`), else 0, by steep GELUs."""
    gate, steep = weight.gate, 1e5
    assert gate is not None
    with torch.no_grad():
        for p in gate.parameters():
            p.zero_()
        gate.w_in[:, 0] = steep * (1 if signs is None else signs)
        gate.w_in[:, 1] = -steep if signs is None else 0
        gate.b_in[:, :2] = -steep * threshold
        gate.w_out[:, :2] = 1.0


def set_factors(weight: DecomposedWeight, V: Tensor, U: Tensor) -> None:
    """Put `V U` into the first columns; the other subcomponents are zero."""
    with torch.no_grad():
        weight.V.zero_()[:, : V.shape[1]] = V
        weight.U.zero_()[: len(U)] = U


def decomposed_tms(
    V: Tensor, U: Tensor, *, identity: bool = False, decoder_above: float = 0.6, signs: Tensor | None = None
) -> Decomposition:
    """A pentagon TMS with the encoder's subcomponents given, on where their activation is clearly not 0.

    The decoder's activations of a feature's neighbours are 0.31 times its own, so its gates stand higher.
    """
    model = TMS(N_FEATURES, 2, identity=identity)
    with torch.no_grad():
        model.W.copy_(pentagon())
        model.b.fill_(-0.25)
    decomposition = decompose(model, {"*": C})
    set_factors(decomposition["W_enc"], V, U)
    set_gate(decomposition["W_enc"], 0.05)
    # An activation of the decoder is negative for features on the other side; those must stay off.
    set_gate(decomposition["W_dec"], decoder_above, decomposition["W_dec"].V.new_ones(C) if signs is None else signs)
    if identity:
        set_factors(decomposition["W_id"], torch.eye(2), torch.eye(2))
        set_gate(decomposition["W_id"], 0.05)
    return decomposition


def rotation(degrees: float) -> Tensor:
    angle = math.radians(degrees)
    return torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


# -- whole reports ---------------------------------------------------------------------------------------------------


def test_one_subcomponent_per_feature_is_a_success() -> None:
    report = tms_report(decomposed_tms(torch.eye(5), pentagon()))
    assert report.problems == ()
    assert report.success
    assert report.encoder == report.decoder == reports.FeatureSite(5, n_alive=5, one_each=True, identity_error=0)
    assert report.recovery.mmcs == pytest.approx(1)
    assert report.recovery.ml2r == pytest.approx(1)
    assert str(report).endswith("\nthe known solution")


def test_which_subcomponent_serves_which_feature_does_not_matter_and_signs_may_flip() -> None:
    order = torch.randperm(C, generator=generator())
    signs = torch.tensor([1.0, -1]).repeat(C // 2)
    V = torch.cat([torch.eye(5), torch.zeros(5, C - 5)], dim=1)[:, order] * signs
    U = torch.cat([pentagon(), torch.zeros(C - 5, 2)])[order] * signs[:, None]
    assert tms_report(decomposed_tms(V, U, signs=signs)).success


def test_shrunken_subcomponents_fail_by_their_length_alone() -> None:
    report = tms_report(decomposed_tms(torch.eye(5), 0.9 * pentagon()))
    assert report.problems == ("W_enc: ML2R 0.900 is not within 0.95 to 1.05",)
    assert "not the known solution" in str(report)
    assert "ML2R 0.900" in str(report)


def test_two_subcomponents_per_feature_fail_by_their_number() -> None:
    halves = torch.cat([pentagon(), pentagon()]) / 2
    report = tms_report(decomposed_tms(torch.eye(5).repeat(1, 2), halves, decoder_above=0.3))
    assert report.recovery.mmcs == pytest.approx(1)
    assert report.recovery.ml2r == pytest.approx(0.5)
    assert "W_enc: 10 subcomponents alive for 5 features" in report.problems
    assert report.encoder.identity_error == 5


def test_one_feature_in_two_subcomponents_fails_though_mean_length_is_within_range() -> None:
    V = torch.cat([torch.eye(5), torch.eye(5)[:, :1]], dim=1)
    U = torch.cat([pentagon(), 0.1 * pentagon()[:1]])
    U[0] *= 0.9
    report = tms_report(decomposed_tms(V, U))
    assert report.problems[0] == "W_enc: 6 subcomponents alive for 5 features"
    assert not report.recovery.problems("W_enc")


def test_one_subcomponent_for_two_features_fails_by_its_number() -> None:
    V, U = torch.eye(5)[:, 1:].clone(), pentagon()[1:].clone()
    V[0, 0], U[0] = 1, pentagon()[:2].mean(0)
    report = tms_report(decomposed_tms(V, U))
    assert "W_enc: 4 subcomponents alive for 5 features" in report.problems
    assert report.encoder.identity_error == 2  # feature 0 is missing its own, and has another's
    assert report.recovery.mmcs < 0.99


def test_two_features_mixed_fail_by_direction_though_the_sum_is_exact() -> None:
    V, U = torch.eye(5), pentagon()
    V[:2, :2], U[:2] = rotation(30), rotation(30).T @ U[:2]
    torch.testing.assert_close(V @ U, pentagon())
    report = tms_report(decomposed_tms(V, U))
    assert report.encoder.n_alive == 5
    assert "W_enc: some feature has not exactly one subcomponent of its own" in report.problems
    assert report.encoder.identity_error == 2
    assert report.recovery.mmcs < 0.99


def test_a_dead_subcomponent_of_the_right_direction_does_not_count() -> None:
    V, U = torch.eye(5).repeat(1, 2), torch.cat([pentagon() @ rotation(20), 1e-3 * pentagon()])
    V[:, 5:] *= 1e-3
    report = tms_report(decomposed_tms(V, U))
    assert report.recovery.mmcs_all == pytest.approx(1)
    assert report.recovery.mmcs == pytest.approx(math.cos(math.radians(20)))
    assert report.recovery.ml2r == pytest.approx(1)
    assert report.problems == (f"W_enc: MMCS {report.recovery.mmcs:.3f} is below 0.99",)


def test_a_decoder_that_also_needs_the_neighbours_fails() -> None:
    report = tms_report(decomposed_tms(torch.eye(5), pentagon(), decoder_above=0.2))
    assert report.encoder.identity_error == 0
    assert report.decoder.identity_error == 10
    assert all(problem.startswith("W_dec") for problem in report.problems)
    assert not report.success


def test_nothing_alive_is_no_success_and_no_error() -> None:
    decomposition = decomposed_tms(torch.eye(5), pentagon())
    set_gate(decomposition["W_enc"], 10.0)
    report = tms_report(decomposition)
    assert (report.recovery.mmcs, report.recovery.ml2r) == (0, 0)
    assert report.recovery.mmcs_all == pytest.approx(1)
    assert report.encoder == reports.FeatureSite(5, n_alive=0, one_each=False, identity_error=5)
    assert not report.success


def test_importance_below_one_on_what_is_needed_fails() -> None:
    assert reports.FeatureSite.of(0.95 * torch.eye(5)).problems("W") == []
    assert reports.FeatureSite.of(0.7 * torch.eye(5)).problems("W") == [
        "W: 5 importances differ from one subcomponent per feature"
    ]


def test_identity_as_two_subcomponents_is_right_in_any_basis() -> None:
    decomposition = decomposed_tms(torch.eye(5), pentagon(), identity=True)
    # No feature is orthogonal to a subcomponent at 10 degrees; at 0 degrees feature 0 needs only one of them.
    for degrees, always_on in ((10, 2), (0, 1)):
        set_factors(decomposition["W_id"], rotation(degrees), rotation(degrees).T)
        report = tms_report(decomposition)
        assert report.success
        assert report.identity == reports.DenseSite(2, n_alive=2, n_always_on=always_on, error=0)


def test_identity_as_three_subcomponents_is_wrong() -> None:
    decomposition = decomposed_tms(torch.eye(5), pentagon(), identity=True)
    directions = torch.tensor([[1.0, -0.5, -0.5], [0, 3**0.5 / 2, -(3**0.5) / 2]]) * (2 / 3) ** 0.5
    torch.testing.assert_close(directions @ directions.T, torch.eye(2))
    set_factors(decomposition["W_id"], directions, directions.T)
    report = tms_report(decomposition)
    assert report.problems == ("W_id: 3 subcomponents alive where the rank is 2",)


def test_a_report_needs_its_sites() -> None:
    with pytest.raises(ValueError, match="W_enc is not decomposed"):
        tms_report(decompose(ResidMLP(4, 8, 1, 2), {"*": 3}))


def decomposed_resid_mlp(scale: float = 1.0) -> Decomposition:
    """Two blocks, 10 features, 4 neurons each: `V` reads one feature each, `W_out` is cut by neurons."""
    model = ResidMLP(10, 40, 2, 4)
    decomposition = decompose(model, {"*": C})
    brought = streams_by_hand(model)
    for layer in range(2):
        inner, outer = (decomposition[f"blocks.{layer}.mlp.{name}"] for name in ("W_in", "W_out"))
        set_factors(inner, torch.linalg.pinv(brought[layer]), scale * brought[layer] @ inner.target_weight)
        set_factors(outer, torch.eye(4), outer.target_weight)
        set_gate(inner, 0.4)
        set_gate(outer, 1e-4)
    return decomposition


def streams_by_hand(model: ResidMLP) -> list[Tensor]:
    """What every feature brings to every block: half the difference of the streams on one-hot inputs of 0.75 and of
    -0.75, divided by 0.75, by float64 arithmetic on the weights."""
    up, down = 0.75 * model.W_E.double(), -0.75 * model.W_E.double()
    found = []
    for mlp in model.mlps():
        found.append(((up - down) / 1.5).float())
        up, down = (
            stream + (stream @ mlp.W_in.detach().double()).relu() @ mlp.W_out.detach().double() for stream in (up, down)
        )
    return found


def test_directions_of_a_later_block_hold_what_the_blocks_before_wrote() -> None:
    decomposition = decomposed_resid_mlp()
    model = decomposition.model
    inner = decomposition["blocks.1.mlp.W_in"]
    with torch.no_grad():
        model.mlps()[0].W_out.mul_(20)
    # Subcomponents along the embedding alone are no longer what a feature needs there.
    set_factors(inner, torch.linalg.pinv(model.W_E), model.W_E @ inner.target_weight)
    set_gate(inner, 0.4)
    first, second = (layer.recovery for layer in resid_mlp_report(decomposition).layers)
    assert first.mmcs == pytest.approx(1, abs=1e-4)
    wanted = streams_by_hand(model)[1] @ inner.target_weight
    subcomponents = torch.linalg.pinv(model.W_E), model.W_E @ inner.target_weight
    V = streams_by_hand(model)[1] @ subcomponents[0]
    on = recovery.alive(decomposition.importance(one_hot_inputs(10))["blocks.1.mlp.W_in"])[:10]
    assert second.mmcs == pytest.approx(recovery.mmcs(V, subcomponents[1], wanted, on), abs=1e-4)
    assert second.mmcs < 0.99


def test_the_hand_made_resid_mlp_is_a_success() -> None:
    report = resid_mlp_report(decomposed_resid_mlp())
    assert report.problems == ()
    assert [layer.W_out.n_alive for layer in report.layers] == [4, 4]
    assert all(layer.contribution_error < 1e-4 for layer in report.layers)
    assert "blocks.1.mlp.W_out" in str(report)


def test_a_shrunken_resid_mlp_is_recognised_in_every_block() -> None:
    report = resid_mlp_report(decomposed_resid_mlp(scale=0.9))
    assert report.problems == tuple(
        f"blocks.{layer}.mlp.W_in: ML2R 0.900 is not within 0.95 to 1.05" for layer in range(2)
    )
    assert [layer.contribution_error for layer in report.layers] == pytest.approx([0.1, 0.1], abs=1e-4)


def test_neurons_missing_from_W_out_are_recognised() -> None:
    decomposition = decomposed_resid_mlp()
    set_factors(decomposition["blocks.1.mlp.W_out"], torch.eye(4)[:, :3], torch.ones(3, 40))
    report = resid_mlp_report(decomposition)
    assert report.problems == ("blocks.1.mlp.W_out: 3 subcomponents alive where the rank is 4",)
    assert report.layers[0].contribution_error < 1e-4
    assert report.layers[1].contribution_error > 0.5


# -- metrics against oracles -----------------------------------------------------------------------------------------


def test_mmcs_and_ml2r_equal_loops_over_whole_subcomponents() -> None:
    V, U, W = randn(6, 9, seed=1), randn(9, 4, seed=2), randn(6, 4, seed=3)
    V[:, 2] = 0
    among = rand(9, seed=4) > 0.4
    for chosen in (range(9), among.nonzero().flatten().tolist()):
        cosines, ratios = [], []
        for j in range(6):
            subcomponents = {c: torch.outer(V[:, c], U[c])[j] for c in chosen}
            cos = {
                c: float(p @ W[j] / (p.norm() * W[j].norm())) if p.norm() > 0 else 0.0 for c, p in subcomponents.items()
            }
            best = max(cos, key=lambda c: cos[c])
            cosines.append(cos[best])
            ratios.append(float(subcomponents[best].norm() / W[j].norm()))
        limits = None if len(chosen) == 9 else among
        assert recovery.mmcs(V, U, W, limits) == pytest.approx(sum(cosines) / 6)
        assert recovery.ml2r(V, U, W, limits) == pytest.approx(sum(ratios) / 6)


def fewest_errors(G: Tensor) -> int:
    """Over every way to give the features columns of their own (missing columns are zero)."""
    n, columns = G.shape
    padded = torch.cat([G, torch.zeros(n, max(0, n - columns))], dim=1)
    best = padded.numel()
    for chosen in itertools.permutations(range(padded.shape[1]), n):
        wanted = torch.zeros_like(padded)
        wanted[range(n), chosen] = 1
        best = min(best, int(((padded - wanted).abs() > 0.1).sum()))
    return best


def test_hungarian_matching_equals_the_best_of_all_permutations() -> None:
    values = torch.tensor([0.0, 0.05, 0.3, 0.85, 0.95, 1.0])
    errors = set()
    for seed in range(150):
        shape = [(3, 3), (3, 5), (4, 4), (4, 3), (5, 2)][seed % 5]
        G = values[torch.randint(0, 6, shape, generator=generator(seed))]
        assert recovery.identity_error(G) == fewest_errors(G)
        errors.add(recovery.identity_error(G))
    assert len(errors) > 5


def test_identity_error_is_zero_exactly_for_permuted_identities() -> None:
    G = 0.95 * torch.eye(4)[:, torch.randperm(4, generator=generator())] + 0.04
    G = torch.cat([G, torch.zeros(4, 3)], dim=1)
    matched, error = recovery.identity_match(G)
    assert error == 0
    assert torch.equal(matched, G.argmax(dim=1))
    G[2, 6] = 0.11
    assert recovery.identity_error(G) == 1


def test_a_matching_of_equally_many_errors_takes_the_larger_importance() -> None:
    matched, error = recovery.identity_match(torch.tensor([[0.3, 0.6], [0.7, 0.3]]))
    assert matched.tolist() == [1, 0]
    assert error == 4


def test_alive_and_one_each_at_the_threshold() -> None:
    G = torch.tensor([[0.1, 0.11, 0.0], [1.0, 0.0, 0.05]])
    assert recovery.alive(G).tolist() == [True, True, False]
    assert recovery.has_one_each(G)
    assert not recovery.has_one_each(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    assert not recovery.has_one_each(torch.tensor([[1.0, 0.5], [0.0, 1.0]]))


def test_dense_error_counts_absent_subcomponents_and_strays() -> None:
    block = torch.cat([torch.ones(4, 2), torch.zeros(4, 3)], dim=1)
    assert recovery.dense_error(block[:, torch.tensor([2, 0, 3, 1, 4])], 2) == 0
    assert recovery.dense_error(block, 3) == 1
    assert recovery.dense_error(block, 1) == 4
    weak = block.clone()
    weak[:, 1] = 0.8
    assert recovery.dense_error(weak, 2) == 1
    partly = block.clone()
    partly[0, 0] = 0
    assert recovery.dense_error(partly, 2) == 0
    assert recovery.always_on(partly).tolist() == [False, True, False, False, False]


def test_target_contributions_are_products_entry_by_entry() -> None:
    W_in, W_out = randn(3, 4, seed=1), randn(4, 3, seed=3)
    found = recovery.target_contributions(W_in, W_out)
    for i, n in itertools.product(range(3), range(4)):
        assert float(found[i, n]) == pytest.approx(float(W_in[i, n] * W_out[n, i]))
