"""`experiments/reproduce.py` on a few steps: it resumes where it was, and its tensors alone give its tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from experiments import reproduce, shared_subcomponent
from experiments.paper import EXPERIMENTS, Experiment, Stage, load_target, target_tensors
from experiments.resid_mlp import (
    ALIKE,
    FAR_AHEAD,
    RECRUITING_BATCHES,
    SPARE,
    from_basis,
    from_inputs,
    in_used_directions,
    n_used_directions,
    recruit,
    resid_mlp_problems,
)
from spd_lens import Decomposition, train
from spd_lens.support import read_tensors, write_tensors
from spd_lens.toys import TMS, ResidMLP, SparseFeatures, one_hot_inputs
from spd_lens.training import TrainResult

RUNS, STEPS, CHECKPOINT_EVERY = 3, 6, 3


class Recorded(SparseFeatures):
    """Keeps the numbers of the batches that were asked for, and is killed at one of them."""

    def __init__(self, asked: list[int], killed_at: int | None, seed: int, n_features: int = 5) -> None:
        super().__init__(n_features, 64, probability=0.05, seed=seed)
        self.asked, self.killed_at = asked, killed_at

    def batch(self, index: int) -> Tensor:
        if index == self.killed_at:
            raise RuntimeError("killed")
        self.asked.append(index)
        return super().batch(index)


def small(asked: list[int] | None = None, killed_at: int | None = None) -> Experiment:
    """TMS 5-2 on untrained targets, of which those with an odd seed are rejected."""

    def train_targets(seeds: Sequence[int]) -> list[nn.Module]:
        return [TMS(5, 2, seed=seed) for seed in seeds]

    odd = [TMS(5, 2, seed=seed).W for seed in range(1, 40, 2)]
    full = EXPERIMENTS["tms_5-2"]
    return replace(
        full,
        group=2,
        train_targets=train_targets,
        target_problems=lambda model: ["odd"] if any(torch.equal(model.W, W) for W in odd) else [],
        features=lambda seed: Recorded([] if asked is None else asked, killed_at, seed),
        config=full.config.changed(steps=STEPS, checkpoint_every=CHECKPOINT_EVERY, faithfulness_warmup=2),
    )


def compared(checkpoint: int) -> list[int]:
    """A run that goes on from a checkpoint asks for its first batch and the last one before it: is it the same data?"""
    return [0, checkpoint - 1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("finished")
    reproduce.reproduce(small(), RUNS, results=directory / "results", work=directory / "work")
    reproduce.summarise(small(), directory / "results")
    return directory / "results"


def without_cpu_time(path: Path) -> dict:
    return {k: v for k, v in json.loads(path.read_text()).items() if k != "cpu_hours"}


def test_a_killed_run_continues_to_the_same_result(finished: Path, tmp_path: Path) -> None:
    results, work = tmp_path / "results", tmp_path / "work"
    # Killed in the second group, after the first checkpoint.
    reproduce.reproduce(small(), 2, results=results, work=work)
    with pytest.raises(RuntimeError, match="killed"):
        reproduce.reproduce(small(killed_at=CHECKPOINT_EVERY + 1), RUNS, results=results, work=work)
    asked: list[int] = []
    reproduce.reproduce(small(asked), RUNS, results=results, work=work)
    assert asked == [*compared(CHECKPOINT_EVERY), *range(CHECKPOINT_EVERY, STEPS)]
    reproduce.summarise(small(), results)
    for i in range(RUNS):
        name = f"{reproduce.run_name(i)}.safetensors"
        ours, expected = read_tensors(results / name), read_tensors(finished / name)
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[key], expected[key]) for key in ours)
    assert without_cpu_time(results / "summary.json") == without_cpu_time(finished / "summary.json")


def test_a_finished_run_is_not_trained_again(finished: Path, tmp_path: Path) -> None:
    reproduce.reproduce(small(killed_at=0), RUNS, results=finished, work=tmp_path / "new")


def test_targets_are_taken_in_order_and_rejected_on_their_own_merits(finished: Path) -> None:
    targets = json.loads((finished / "targets.json").read_text())
    assert targets == {"accepted": [0, 2, 4], "rejected": {"1": ["odd"], "3": ["odd"]}}
    for i, seed in enumerate(targets["accepted"]):
        assert torch.equal(read_tensors(finished / f"run-{i:03d}.safetensors")["target|W"], TMS(5, 2, seed=seed).W)


def test_recomputing_from_the_tensors_alone_gives_the_same_files(finished: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in finished.glob("*.json")}
    for name in before:
        # What is recomputed must not be read.
        path = finished / name
        if name.startswith("run-"):
            record = json.loads(path.read_text())
            path.write_text(json.dumps({**record, "success": True, "recovery": None}))
    (finished / "summary.json").unlink()
    reproduce.summarise(small(), finished)
    assert {path.name: path.read_bytes() for path in finished.glob("*.json")} == before


def test_the_summary_has_what_readers_of_it_expect(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    wanted = {"runs", "successes", "mmcs_mean", "mmcs_std", "ml2r_mean", "ml2r_std", "settings", "versions", "command"}
    assert wanted <= summary.keys()
    assert summary["runs"] == RUNS
    assert summary["targets_rejected"] == 2
    assert summary["successes"] == RUNS - len(summary["failures"])
    records = [json.loads((finished / f"run-{i:03d}.json").read_text()) for i in range(RUNS)]
    mmcs = torch.tensor([record["recovery"]["mmcs"] for record in records], dtype=torch.float64)
    assert summary["mmcs_mean"] == pytest.approx(float(mmcs.mean()), abs=1e-5)
    assert summary["mmcs_std"] == pytest.approx(float(mmcs.std()), abs=1e-5)
    assert f"{summary['successes']} of {RUNS} runs succeed" in reproduce.table(summary)


def test_pictures_are_drawn(finished: Path) -> None:
    decomposition = reproduce.read_run(small(), finished, 0)
    for path in reproduce.save_figures(finished, decomposition):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_runs_with_other_settings_are_refused(finished: Path, tmp_path: Path) -> None:
    changed = replace(small(), config=small().config.changed(minimality=0.5))
    with pytest.raises(ValueError, match="was made with other settings"):
        reproduce.reproduce(changed, RUNS, results=finished, work=tmp_path)


def test_altered_gates_are_noticed(finished: Path, tmp_path: Path) -> None:
    tensors = read_tensors(finished / "run-000.safetensors")
    tensors["decomposition|W_enc.gate.b_out"] = tensors["decomposition|W_enc.gate.b_out"] + 1
    write_tensors(tmp_path / "run-000.safetensors", tensors)
    with pytest.raises(ValueError, match="no longer give the importances"):
        reproduce.read_run(small(), tmp_path, 0)


# -- residual MLPs -----------------------------------------------------------------------------------------------------

FEATURES, BLOCKS, NEURONS = 6, 2, 3
SHARES = (0.5, 0.5)


def small_resid_mlp(asked: dict[int, list[int]] | None = None, killed: tuple[int, int] | None = None) -> Experiment:
    """Two stages of 6 steps on an untrained target; `asked` gets the batches of every stage, `killed` is a stage and
    a batch."""
    full = EXPERIMENTS["resid_mlp_2"]
    used = n_used_directions(FEATURES, BLOCKS, NEURONS)

    def features(seed: int) -> Recorded:
        stage = int(seed >= reproduce.STAGE_SEED)
        killed_at = killed[1] if killed is not None and killed[0] == stage else None
        return Recorded([] if asked is None else asked.setdefault(stage, []), killed_at, seed, FEATURES)

    return replace(
        full,
        train_targets=lambda seeds: [in_used_directions(wide(seed), seed=seed) for seed in seeds],
        target_problems=lambda model: [],
        new_target=lambda: ResidMLP(FEATURES, used, BLOCKS, NEURONS),
        features=features,
        n_subcomponents={name: 8 if name.endswith("W_in") else 4 for name in full.n_subcomponents},
        stages=(Stage("W_in", SHARES[0], 1e-3), Stage("", SHARES[1], 1e-4)),
        config=full.config.changed(steps=2 * STEPS, checkpoint_every=CHECKPOINT_EVERY),
    )


def wide(seed: int = 0) -> ResidMLP:
    return ResidMLP(FEATURES, 40, BLOCKS, NEURONS, seed=seed)


@pytest.fixture(scope="module")
def finished_resid_mlp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("resid_mlp")
    reproduce.reproduce(small_resid_mlp(), 2, results=directory / "results", work=directory / "work")
    reproduce.summarise(small_resid_mlp(), directory / "results")
    return directory / "results"


def test_the_used_directions_hold_the_whole_network() -> None:
    model = wide()
    # Rows of W_in in directions that nothing writes to are what may be lost.
    small = in_used_directions(model)
    assert small.cfg.d_resid == FEATURES + (BLOCKS - 1) * NEURONS
    x = torch.randn(50, FEATURES, generator=torch.Generator().manual_seed(1))
    expected, theirs = model.run_with_cache(x)
    found, ours = small.run_with_cache(x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    for block in range(BLOCKS):
        for point in ("hook_pre", "hook_post"):
            name = f"blocks.{block}.mlp.{point}"
            torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=0)
    torch.testing.assert_close(small.W_E.norm(dim=1), torch.ones(FEATURES))


def test_more_used_directions_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match="d_resid=8; expected at least 9"):
        in_used_directions(ResidMLP(FEATURES, 8, BLOCKS, NEURONS))


def test_a_target_that_gave_up_a_feature_is_rejected() -> None:
    model = ResidMLP(4, 4, 1, 4)
    with torch.no_grad():
        model.W_E.copy_(torch.eye(4))
        model.mlps()[0].W_in.copy_(torch.eye(4))
        model.mlps()[0].W_out.copy_(torch.diag(torch.tensor([1.0, 0.6, 0.4, 1.0])))
    assert resid_mlp_problems(model) == ("features [2] were not learned: under half of the largest response",)
    with torch.no_grad():
        model.mlps()[0].W_out[2, 2] = 0.9
    assert resid_mlp_problems(model) == ()


def test_subcomponents_from_inputs_lie_along_inputs_of_all_features_and_sum_to_the_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(5, 3, generator=generator)
    # Feature 4 is on in a single row, in the middle of many others.
    x = 0.5 * torch.eye(5)[[0, 1, 2, 3] * 10 + [4] + [0, 1, 2, 3] * 10]
    V, U = from_inputs(torch.cat([torch.zeros(3, 5), x]), W, 5)
    assert sorted(V.abs().argmax(dim=0).tolist()) == [0, 1, 2, 3, 4]
    torch.testing.assert_close(V.abs().amax(dim=0), V.norm(dim=0))
    torch.testing.assert_close(V @ U, W)
    with pytest.raises(ValueError, match="2 inputs that are not zero; expected at least C=5"):
        from_inputs(torch.cat([torch.zeros(9, 5), x[:2]]), W, 5)


@pytest.mark.parametrize(("d_in", "d_out"), [(3, 7), (7, 3)])
def test_subcomponents_along_a_basis_sum_to_the_matrix_and_the_others_are_short(d_in: int, d_out: int) -> None:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(d_in, d_out, generator=generator)
    V, U = from_basis(W, 10, generator)
    torch.testing.assert_close(V[:, :3] @ U[:3], W)
    lengths = V.norm(dim=0) * U.norm(dim=1)
    torch.testing.assert_close(lengths[3:], torch.full((7,), SPARE * float(W.norm()) / 3**0.5))
    with pytest.raises(ValueError, match="C=2; expected at least 3"):
        from_basis(W, 2, generator)


def test_recruited_subcomponents_repair_the_inputs_that_are_served_worst_and_used_ones_stay() -> None:
    experiment = small_resid_mlp()
    decomposition = experiment.decompose(experiment.train_targets([0])[0], 3)
    used = 3
    with torch.no_grad():
        for weight in decomposition.values():
            assert weight.gate is not None
            weight.gate.w_out.zero_()
            weight.gate.b_out.fill_(-10.0)[:used] = 10.0
    before = {name: tensor.detach().clone() for name, tensor in decomposition.tensors().items()}
    data = experiment.features(3)
    recruit(decomposition, data, 3)
    after = {name: tensor.detach() for name, tensor in decomposition.tensors().items()}

    x = torch.cat([data.batch(2 * FAR_AHEAD + i) for i in range(RECRUITING_BATCHES)])
    inputs = decomposition.clean_pass(x).inputs
    for name, weight in decomposition.items():
        same = [torch.equal(before[f"{name}.V"][:, c], after[f"{name}.V"][:, c]) for c in range(weight.V.shape[1])]
        if name.endswith("W_out"):
            assert all(same)
            continue
        assert all(same[:used])
        assert torch.equal(before[f"{name}.U"][:used], after[f"{name}.U"][:used])
        assert torch.equal(before[f"{name}.gate.b_out"][:used], after[f"{name}.gate.b_out"][:used])
        recruited = [c for c, kept in enumerate(same) if not kept]
        assert recruited
        assert recruited[0] == used
        V, U, W = before[f"{name}.V"][:, :used], before[f"{name}.U"][:used], weight.target_weight
        directions = torch.nn.functional.normalize(inputs[name], dim=1) @ after[f"{name}.V"][:, recruited]
        for c, row in zip(recruited, directions.argmax(dim=0).tolist(), strict=True):
            own = inputs[name][row]
            # The used subcomponents and this one give the site's output on its input.
            found = own @ V @ U + (own @ after[f"{name}.V"][:, c]) * after[f"{name}.U"][c]
            torch.testing.assert_close(found, own @ W, atol=1e-5, rtol=1e-4)
            assert float(after[f"{name}.gate.b_out"][c]) == 0.0
        alike = (after[f"{name}.V"][:, recruited].T @ after[f"{name}.V"][:, recruited]).abs().fill_diagonal_(0)
        assert float(alike.max()) <= ALIKE + 1e-6
        error = (inputs[name] @ W - inputs[name] @ V @ U).norm(dim=1)
        assert int(directions[:, 0].argmax()) == int(error.argmax())


def test_a_stage_that_recruits_is_resumed_after_its_recruiting(tmp_path: Path) -> None:
    def with_recruits(experiment: Experiment) -> Experiment:
        return replace(experiment, stages=(experiment.stages[0], replace(experiment.stages[1], recruits=True)))

    def trained(experiment: Experiment, directory: Path) -> dict[str, Tensor]:
        target = experiment.train_targets([0])[0]
        return reproduce.train_in_stages(with_recruits(experiment), target, 1000, directory).tensors()

    whole = trained(small_resid_mlp(), tmp_path / "whole")
    with pytest.raises(RuntimeError, match="killed"):
        trained(small_resid_mlp(killed=(1, CHECKPOINT_EVERY + 1)), tmp_path / "parts")
    resumed = trained(small_resid_mlp(), tmp_path / "parts")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    target = small_resid_mlp().train_targets([0])[0]
    plain = reproduce.train_in_stages(small_resid_mlp(), target, 1000, tmp_path / "plain").tensors()
    assert not torch.equal(plain["blocks.0.mlp.W_in.V"], whole["blocks.0.mlp.W_in.V"])


def test_a_stage_has_its_share_of_the_steps_and_a_coefficient_of_its_own() -> None:
    whole = small_resid_mlp().config
    one = Stage("W_in", 0.25, 0.5).config(whole, n_sites=1)
    assert (one.steps, one.minimality, [term.routing for term in one.reconstructions]) == (3, 0.5, ["all"])
    assert len(Stage("", 0.25, 0.5).config(whole, n_sites=2).reconstructions) == 2


@pytest.mark.parametrize("stage", [0, 1])
def test_a_run_killed_in_any_stage_continues_to_the_same_result(
    stage: int, finished_resid_mlp: Path, tmp_path: Path
) -> None:
    results, work = tmp_path / "results", tmp_path / "work"
    killed = small_resid_mlp(killed=(stage, CHECKPOINT_EVERY + 1))
    with pytest.raises(RuntimeError, match="killed"):
        reproduce.reproduce(killed, 1, results=results, work=work)
    assert not list(results.glob("run-*"))
    asked: dict[int, list[int]] = {}
    reproduce.reproduce(small_resid_mlp(asked), 1, results=results, work=work)
    trained = {number: [i for i in batches if i < STEPS] for number, batches in asked.items()}
    rest = [*compared(CHECKPOINT_EVERY), *range(CHECKPOINT_EVERY, STEPS)]
    assert trained == ({0: rest, 1: list(range(STEPS))} if stage == 0 else {0: compared(STEPS), 1: rest})
    ours, expected = (read_tensors(path / "run-000.safetensors") for path in (results, finished_resid_mlp))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in ours)


def test_the_first_stage_is_where_the_second_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Tensor]] = []

    def watched(decomposition: Decomposition, *arguments: Any, **choices: Any) -> TrainResult:
        seen.append({name: tensor.detach().clone() for name, tensor in decomposition.tensors().items()})
        result = train(decomposition, *arguments, **choices)
        seen.append({name: tensor.detach().clone() for name, tensor in decomposition.tensors().items()})
        return result

    monkeypatch.setattr(reproduce, "train", watched)
    experiment = small_resid_mlp()
    reproduce.train_in_stages(experiment, experiment.train_targets([0])[0], 1000, tmp_path)
    fresh, first, second, last = seen
    assert fresh.keys() == first.keys() < second.keys()
    assert not any(torch.equal(fresh[name], first[name]) for name in first if name.endswith(".V"))
    assert all(torch.equal(second[name], first[name]) for name in first)
    assert not any(torch.equal(last[name], second[name]) for name in last if name.endswith(".V"))


def test_the_summary_of_a_residual_mlp_averages_over_blocks(finished_resid_mlp: Path) -> None:
    summary = json.loads((finished_resid_mlp / "summary.json").read_text())
    records = [json.loads((finished_resid_mlp / f"run-{i:03d}.json").read_text()) for i in range(2)]
    values = [[layer["recovery"]["mmcs"] for layer in record["layers"]] for record in records]
    assert summary["mmcs_mean"] == pytest.approx(float(torch.tensor(values).mean()), abs=1e-5)
    errors = [[layer["contribution_error"] for layer in record["layers"]] for record in records]
    assert summary["contribution_error_mean"] == pytest.approx(float(torch.tensor(errors).mean()), abs=1e-5)
    assert summary["alive_W_in"] == [[layer["W_in"]["n_alive"] for layer in record["layers"]] for record in records]
    assert f"{summary['successes']} of 2 runs succeed" in reproduce.table(summary)


def test_pictures_of_a_residual_mlp_are_drawn(finished_resid_mlp: Path) -> None:
    decomposition = reproduce.read_run(small_resid_mlp(), finished_resid_mlp, 0)
    paths = reproduce.save_figures(finished_resid_mlp, decomposition)
    assert [path.name for path in paths] == ["importance.png", "contributions.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_a_saved_target_keeps_its_embedding() -> None:
    experiment, seed = small_resid_mlp(), 4
    model = experiment.train_targets([seed])[0]
    tensors = target_tensors(model)
    x = one_hot_inputs(FEATURES)
    assert torch.equal(load_target(experiment, tensors)(x), model(x))
    del tensors["W_E"]
    with pytest.raises(ValueError, match="has no \\['W_E'\\]"):
        load_target(experiment, tensors)


def test_what_a_feature_brings_to_the_second_block_differs_by_sign() -> None:
    model = wide()
    W_E, first = model.W_E.double(), model.mlps()[0]
    W_in, W_out = first.W_in.detach().double(), first.W_out.detach().double()
    for sign, found in zip((1, -1), shared_subcomponent.signed_streams(model), strict=True):
        for i in range(FEATURES):
            wrote = sum(max(0.0, float(sign * W_E[i] @ W_in[:, n])) * W_out[n] for n in range(NEURONS))
            torch.testing.assert_close(found[i].double(), W_E[i] + sign * wrote, atol=1e-6, rtol=1e-5)


def test_the_best_subcomponents_for_given_importances_are_trained() -> None:
    """More steps reconstruct better."""
    model = EXPERIMENTS["resid_mlp_2"].new_target()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.W_E.copy_(torch.nn.functional.normalize(torch.randn(model.W_E.shape, generator=generator), dim=1))
    short, long = (shared_subcomponent.best_reconstruction(model, 1, steps=steps, seed=0) for steps in (2, 60))
    assert 0 < long["reconstruction"] < short["reconstruction"]
    assert long["against_slopes"] != pytest.approx(long["against_positive_values"])
    # Where the first block writes nothing, both signs bring the same.
    with torch.no_grad():
        model.mlps()[0].W_out.zero_()
    silent = shared_subcomponent.best_reconstruction(model, 0, steps=2, seed=0)
    assert silent["against_slopes"] == pytest.approx(silent["against_positive_values"])
