"""APD over seeds, sensitivity maps and the sceptics' table, on a few steps: they resume, and count what was run."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

from experiments import baselines, reproduce, sensitivity
from experiments.apd_experiments import APD_EXPERIMENTS, APDExperiment, apd_table, reproduce_apd, summarise_apd
from experiments.baselines import compare_cost, compare_subcomponents, importance_error, subcomponents_table
from experiments.paper import EXPERIMENTS
from experiments.runs import accepted_targets
from experiments.sensitivity import APDGrid, SPDGrid, read_lines, run_map, summarise_map, summary_lines
from experiments.sensitivity_figure import save_map
from spd_lens import decompose, train
from spd_lens.baselines import APDLearner, apd_report, train_apd
from spd_lens.support import read_tensors
from spd_lens.toys import TMS, SparseFeatures, tms_report

RUNS, STEPS = 3, 6


def untrained_targets(seeds: Sequence[int]) -> list[nn.Module]:
    return [TMS(5, 2, seed=seed) for seed in seeds]


@pytest.fixture(autouse=True)
def small_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """TMS 5-2 on untrained targets, of which the one with seed 1 is rejected."""
    rejected = TMS(5, 2, seed=1).W
    small = replace(
        EXPERIMENTS["tms_5-2"],
        train_targets=untrained_targets,
        target_problems=lambda model: ["seed 1"] if torch.equal(model.W, rejected) else [],
    )
    monkeypatch.setitem(EXPERIMENTS, "tms_5-2", small)


def small() -> APDExperiment:
    full = APD_EXPERIMENTS["apd_tms_5-2"]
    return replace(full, group=2, config=full.config.changed(steps=STEPS, batch_size=64), checkpoint_every=2)


def kill_at(step: int, monkeypatch: pytest.MonkeyPatch, asked: list[int] | None = None) -> None:
    """APD's training step raises at one step; the numbers of the others are kept."""
    whole = APDLearner.step

    def killed(learner: Any, x: Any, now: int) -> Any:
        if now == step:
            raise RuntimeError("killed")
        if asked is not None:
            asked.append(now)
        return whole(learner, x, now)

    monkeypatch.setattr(APDLearner, "step", killed)


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    reproduce_apd(small(), RUNS, results=tmp_path / "finished", work=tmp_path / "finished-work")
    summarise_apd(small(), tmp_path / "finished")
    return tmp_path / "finished"


def without_cpu_time(path: Path) -> dict[str, Any]:
    return {k: v for k, v in json.loads(path.read_text()).items() if k != "cpu_hours"}


# -- APD over seeds --------------------------------------------------------------------------------------------------


def test_a_killed_apd_run_continues_to_the_same_result(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, work = tmp_path / "results", tmp_path / "work"
    with monkeypatch.context() as patch:
        kill_at(3, patch)
        with pytest.raises(RuntimeError, match="killed"):
            reproduce_apd(small(), RUNS, results=results, work=work)
    assert not list(results.glob("run-*"))
    asked: list[int] = []
    with monkeypatch.context() as patch:
        kill_at(-1, patch, asked)
        reproduce_apd(small(), RUNS, results=results, work=work)
    # The first group from its checkpoint on, the second as a whole.
    assert asked == [*range(2, STEPS), *range(STEPS)]
    summarise_apd(small(), results)
    for i in range(RUNS):
        ours, expected = (read_tensors(d / f"run-00{i}.safetensors") for d in (results, finished))
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[key], expected[key]) for key in ours)
        assert without_cpu_time(results / f"run-00{i}.json") == without_cpu_time(finished / f"run-00{i}.json")
    assert without_cpu_time(results / "summary.json") == without_cpu_time(finished / "summary.json")


def test_a_finished_apd_run_is_not_trained_again(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_at(0, monkeypatch)
    reproduce_apd(small(), RUNS, results=finished, work=tmp_path / "new")


def test_apd_gets_the_targets_of_spd_and_trains_each_as_if_alone(finished: Path, tmp_path: Path) -> None:
    targets = accepted_targets(EXPERIMENTS["tms_5-2"], RUNS, tmp_path / "cache")
    assert json.loads((finished / "targets.json").read_text())["accepted"] == targets.seeds == [0, 2, 3]
    for i, seed in enumerate(targets.seeds):
        tensors, record = (
            read_tensors(finished / f"run-00{i}.safetensors"),
            without_cpu_time(finished / f"run-00{i}.json"),
        )
        assert torch.equal(tensors["target|W"], TMS(5, 2, seed=seed).W)
        assert (record["target_seed"], record["decomposition_seed"]) == (seed, 1000 + i)
        (alone,) = train_apd([TMS(5, 2, seed=seed)], small().config.changed(seed=1000 + i))
        torch.testing.assert_close(tensors["V|W"], alone.V["W"], rtol=1e-5, atol=1e-6)
        assert record["recovery"]["ml2r_all"] == pytest.approx(apd_report(alone).recovery.ml2r_all, rel=1e-4)


def test_recomputing_apd_from_its_tensors_gives_the_same_files(finished: Path) -> None:
    before = {path.name: path.read_bytes() for path in finished.glob("*.json")}
    for path in finished.glob("run-*.json"):
        # What is recomputed must not be read.
        record = json.loads(path.read_text())
        path.write_text(json.dumps({**record, "success": True, "recovery": None, "faithfulness": None}))
    (finished / "summary.json").unlink()
    summarise_apd(small(), finished)
    assert {path.name: path.read_bytes() for path in finished.glob("*.json")} == before


def test_the_apd_summary_counts_its_runs(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    records = [json.loads((finished / f"run-00{i}.json").read_text()) for i in range(RUNS)]
    assert {"settings", "versions", "command", "criterion"} <= summary.keys()
    assert summary["runs"] == RUNS
    assert summary["successes"] == sum(not r["problems"] for r in records)
    lengths = torch.tensor([r["recovery"]["ml2r"] for r in records], dtype=torch.float64)
    assert summary["ml2r_mean"] == pytest.approx(float(lengths.mean()), abs=1e-5)
    assert summary["ml2r_std"] == pytest.approx(float(lengths.std()), abs=1e-5)
    assert f"{summary['successes']} of {RUNS} runs succeed" in apd_table(summary)


def test_apd_runs_with_other_settings_are_refused(finished: Path, tmp_path: Path) -> None:
    other = replace(small(), config=small().config.changed(simplicity=0.5))
    with pytest.raises(ValueError, match="was made with other settings"):
        reproduce_apd(other, RUNS, results=finished, work=tmp_path / "other")
    with pytest.raises(ValueError, match="was made with other settings"):
        summarise_apd(other, finished)


def test_reproduce_runs_apd_by_name(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(reproduce.main)
    places = ["--results", str(tmp_path / "results"), "--work", str(tmp_path / "work")]
    result = CliRunner().invoke(app, ["apd_tms_5-2", "--seeds", "2", "--steps", "3", *places])
    assert result.exit_code == 0, result.output
    assert "apd_tms_5-2: 0 of 2 runs succeed, 0 but for length" in result.stdout
    summary = json.loads((tmp_path / "results" / "apd_tms_5-2" / "summary.json").read_text())
    assert summary["settings"]["config"]["steps"] == 3
    again = CliRunner().invoke(app, ["apd_tms_5-2", "--steps", "3", "--recompute", *places])
    assert again.exit_code == 0, again.output
    assert CliRunner().invoke(app, ["apd_tms_5-3", *places]).exit_code == 2


# -- sensitivity -----------------------------------------------------------------------------------------------------

SPD_GRID = SPDGrid(coefficients=(3e-3, 0.3), lrs=(1e-3, 6e-3), counts=(3, 6), steps=STEPS)
APD_GRID = APDGrid(coefficients=(0.1, 7.0), ks=(0.2, 0.4), steps=STEPS)


@pytest.mark.parametrize("grid", [SPD_GRID, APD_GRID], ids=["spd", "apd"])
def test_a_map_is_continued_and_nothing_is_run_twice(
    grid: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[int, int]] = []
    whole = type(grid).train

    def counted(self: Any, jobs: Any, program: Any, out_dir: Path) -> Any:
        if len(trained) == 1:
            trained.append((-1, -1))
            raise InterruptedError
        trained.extend({(seed, program["C"]) for _, seed, _ in jobs})
        return whole(self, jobs, program, out_dir)

    monkeypatch.setattr(type(grid), "train", counted)
    path = tmp_path / f"{grid.method}.jsonl"
    for seeds, lines in ((1, 4), (2, None), (2, 8 * len(grid.programs))):
        with suppress(InterruptedError):
            run_map(grid, seeds, results=tmp_path, work=tmp_path / "work")
        assert lines is None or len(read_lines(path)) == lines
    counts = [program["C"] for program in grid.programs]
    assert sorted(trained) == sorted([(-1, -1), *((1000 + i, C) for i in range(2) for C in counts)])
    at = {(r["run"], r["C"], r["coefficient"], r.get("lr"), r.get("k")) for r in read_lines(path)}
    assert len(at) == len(read_lines(path))
    with pytest.raises(ValueError, match=f"the {grid.method} map there has other settings"):
        run_map(replace(grid, steps=STEPS + 1), 2, results=tmp_path, work=tmp_path / "work")


def test_a_column_of_a_map_is_run_first_and_the_rest_completes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = replace(SPD_GRID, lrs=(1e-3, 3e-3), counts=(20,), method="spd_smooth")
    asked: list[list[tuple[float, float]]] = []

    def verdicts(self: Any, jobs: Any, program: Any, out_dir: Path) -> Any:
        asked.append([(cell["coefficient"], cell["lr"]) for _, _, cell in jobs])
        return [{"success": True, "found": True, "ml2r": 1.0} for _ in jobs]

    monkeypatch.setattr(SPDGrid, "train", verdicts)
    for column in (True, False, False):
        run_map(grid, 1, results=tmp_path, work=tmp_path / "work", column=column)
        summary = summarise_map(tmp_path, "a command")
        assert summary["spd_smooth"]["runs"] == sum(map(len, asked))
        if column:
            assert save_map(tmp_path / "rules.png", summary, {"spd_smooth": 20}).is_file()
    assert asked == [[(3e-3, 3e-3), (0.3, 3e-3)], [(3e-3, 1e-3), (0.3, 1e-3)]]
    assert [cell["k"] for cell in APDGrid.full().column] == [APD_EXPERIMENTS["apd_tms_5-2"].config.k] * 5


def test_a_cell_of_the_spd_map_is_what_train_gives_with_its_settings(tmp_path: Path) -> None:
    run_map(SPD_GRID, 1, results=tmp_path, work=tmp_path / "work")
    experiment = EXPERIMENTS["tms_5-2"]
    for i, record in enumerate(read_lines(tmp_path / "spd.jsonl")):
        model = TMS(5, 2, seed=record["target_seed"])
        decomposition = decompose(
            model, {"*": record["C"]}, gate="scalar", gate_width=experiment.gate_width, init="exact", seed=1000
        )
        config = experiment.config.changed(
            steps=STEPS, seed=1000, minimality=record["coefficient"], lr=record["lr"], gate_lr=record["lr"] * 10 / 3
        )
        train(decomposition, experiment.features(1000), config=config, out_dir=tmp_path / str(i))
        report = tms_report(decomposition)
        assert record["mmcs"] == pytest.approx(report.recovery.mmcs, abs=1e-3)
        assert record["ml2r"] == pytest.approx(report.recovery.ml2r, abs=1e-3)
        assert record["n_alive"] == report.encoder.n_alive


def test_a_cell_of_the_apd_map_is_what_train_apd_gives_with_its_settings(tmp_path: Path) -> None:
    run_map(APD_GRID, 1, results=tmp_path, work=tmp_path / "work")
    for record in read_lines(tmp_path / "apd.jsonl"):
        config = APD_EXPERIMENTS["apd_tms_5-2"].config.changed(
            steps=STEPS, seed=1000, simplicity=record["coefficient"], k=record["k"]
        )
        (apd,) = train_apd([TMS(5, 2, seed=0)], config)
        report = apd_report(apd)
        assert record["ml2r"] == pytest.approx(report.recovery.ml2r, abs=1e-3)
        assert record["problems"] == list(report.problems)


def test_both_maps_are_centred_on_the_settings_used_elsewhere() -> None:
    spd, apd = SPDGrid.full(), APDGrid.full()
    config = EXPERIMENTS["tms_5-2"].config
    assert (spd.coefficients[2], spd.lrs[2], spd.steps) == (config.minimality, config.lr, config.steps)
    presets = APD_EXPERIMENTS["apd_tms_5-2"].config
    assert (apd.coefficients[2], apd.ks[2], apd.steps) == (presets.simplicity, presets.k, presets.steps)
    for coefficients in (spd.coefficients, apd.coefficients):
        assert coefficients[-1] / coefficients[0] == pytest.approx(100)
    for second in (spd.lrs, apd.ks):
        assert second[-1] / second[0] == pytest.approx(10)
    assert spd.counts == (5, 10, 20, 40)


def test_the_summary_of_maps_counts_by_cell_and_is_drawn(tmp_path: Path) -> None:
    lines = []
    # Of three runs in a cell one finds the features at the right length, one shorter, one not at all.
    for grid in (SPD_GRID, APD_GRID):
        for program in grid.programs:
            for cell in grid.cells:
                for i, (found, ml2r) in enumerate([(True, 1.0), (True, 0.9), (False, 0.3)]):
                    verdict = {"success": ml2r == 1.0, "found": found, "ml2r": ml2r, "cpu_seconds": 1.0}
                    lines.append((grid.method, {"run": i, **program, **cell, **verdict}))
    for method in ("spd", "apd"):
        text = "".join(json.dumps(record) + "\n" for m, record in lines if m == method)
        (tmp_path / f"{method}.jsonl").write_text(text)
    (tmp_path / "settings.json").write_text(json.dumps({"spd": SPD_GRID.settings(), "apd": APD_GRID.settings()}))
    summary = summarise_map(tmp_path, "a command")
    assert (summary["spd"]["runs"], summary["spd"]["found"], summary["spd"]["successes"]) == (24, 16, 8)
    assert summary["apd"]["by_C"] == {5: {"runs": 12, "found": 8, "successes": 4}}
    assert len(summary["spd"]["cells"]) == 8
    assert all((c["runs"], c["found"], c["ml2r_of_found"]) == (3, 2, 0.95) for c in summary["spd"]["cells"])
    assert json.loads((tmp_path / "summary.json").read_text())["command"] == "a command"
    assert "APD C=5: of 12 runs 8 find one subcomponent per feature, 4 with the right length too" in summary_lines(
        summary
    )
    assert save_map(tmp_path / "map.png", summary, {"spd": 6, "apd": 5}).read_bytes().startswith(b"\x89PNG")


# -- sceptics' baselines ---------------------------------------------------------------------------------------------


def pentagon(angle: float) -> TMS:
    """TMS 5-2 as it looks when trained: five directions of equal distance, a negative bias."""
    model, angles = TMS(5, 2), angle + torch.arange(5) * 2 * math.pi / 5
    with torch.no_grad():
        model.W.copy_(1.13 * torch.stack([angles.cos(), angles.sin()], dim=1))
        model.b.fill_(-0.25)
    return model


def test_subcomponents_are_compared_on_the_same_targets() -> None:
    experiment = EXPERIMENTS["tms_5-2"]
    experiment = replace(
        experiment, features=lambda seed: SparseFeatures(5, 64, probability=0.3, seed=seed),
        n_subcomponents={"W_enc": 6, "W_dec": 6}, config=experiment.config.changed(steps=40),
    )  # fmt: skip
    found = compare_subcomponents(experiment, [pentagon(0.0), pentagon(0.3)])
    assert list(found) == ["svd", "random", "rows", "spd"]
    assert all(v["runs"] == 2 for v in found.values())
    # The known solution is held fixed; two singular vectors cannot be five subcomponents.
    assert found["rows"]["mmcs"] == pytest.approx(1, abs=1e-6)
    assert found["rows"]["ml2r"] == pytest.approx(1, abs=1e-6)
    assert found["svd"]["alive_encoder"] <= 2
    assert found["svd"]["successes"] == 0
    assert "2 of 2" not in subcomponents_table(found)


def test_the_error_under_importances_by_hand() -> None:
    model = TMS(5, 2, seed=3)
    decomposition = decompose(copy.deepcopy(model), {"*": 4}, gate="scalar", gate_width=3, seed=1)
    x = SparseFeatures(5, 40, probability=0.4, seed=2).batch(0)
    g = {name: values.detach().double() for name, values in decomposition.importance(x).items()}
    encoder, decoder = decomposition["W_enc"], decomposition["W_dec"]
    factors = [t.detach().double() for t in (encoder.V, encoder.U, decoder.V, decoder.U)]
    hidden = (g["W_enc"] * (x.double() @ factors[0])) @ factors[1]
    output = torch.relu((g["W_dec"] * (hidden @ factors[2])) @ factors[3] + model.b.detach().double())
    clean = model(x).detach().double()
    expected = float((output - clean).square().sum() / clean.square().sum())
    assert expected > 0.01
    assert importance_error(decomposition, x) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("members", [1, 2])
def test_costs_are_measured_on_the_same_rows(members: int) -> None:
    found = compare_cost("tms_5-2", batch=64, rounds=2, members=members)
    assert 0 < found["rows"] < 64
    # 5 components of 2 terms, of lengths 5 and 2; SPD's factors are shared by its two sites, its gates are not.
    assert found["apd"]["parameters"] == 5 * 2 * (5 + 2)
    assert found["spd"]["parameters"] == 20 * (5 + 2) + 2 * 20 * (16 + 16 + 16 + 1)
    assert found["apd"]["held_mb"] == pytest.approx(3 * 4 * 70 / 1e6)
    assert found["spd"]["held_mb"] >= 3 * 4 * found["spd"]["parameters"] / 1e6
    for method in ("spd", "apd"):
        assert found[method]["step_ms"] > 0
        assert found[method]["peak_mb"] > 0
    assert found["ratio"] > 0


def test_the_commands_print_what_they_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = typer.Typer()
    app.command()(baselines.main)
    arguments = ["--targets", "2", "--steps", "2", "--cost-of", "tms_5-2", "--rounds", "1", "--batch", "64"]
    result = CliRunner().invoke(app, [*arguments, "--json", "--work", str(tmp_path)])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout.strip().splitlines()[-1])
    assert {"subcomponents", "cost", "settings", "versions", "command", "machine"} <= printed.keys()
    assert printed["cost"]["tms_5-2"].keys() == {"rows", "members", "ratio", "C", "spd", "apd"}
    wrong = CliRunner().invoke(app, ["--cost-of", "tms_5-3"])
    assert wrong.exit_code == 2
    app = typer.Typer()
    app.command()(sensitivity.main)
    assert CliRunner().invoke(app, ["--method", "sgd"]).exit_code == 2
