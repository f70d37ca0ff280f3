"""Every command: its help with examples, one run, its JSON, and its exit status."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from spd_lens import Decomposition, decompose, train
from spd_lens.cli import RunFile, app, load_run_data, open_saved
from spd_lens.components import Components, merge_subcomponents
from spd_lens.data import TokenStream
from spd_lens.graphs import attribution_graph
from spd_lens.models import load_moby_dick, load_tiny_lm
from spd_lens.statistics import Harvest, coactivation
from spd_lens.training import tune_readout
from tests.conftest import TL_MAJOR

ROOT = Path(__file__).parents[2]
CONFIG = """\
model: {name: tiny_lm}
decompose: {sites: {"blocks.1.mlp.W_in": 8}}
data: {text: moby_dick, context: 16, batch_size: 4, max_rows: 40}
train: {steps: 4, minimality: 1e-4, log_every: 1, checkpoint_every: 2}
evaluate: {data: {split: held_out, max_rows: 8}, quick: true}
"""


def invoke(*arguments: Any, status: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == status, (result.output, result.stderr, result.exception)
    return result


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two trained and evaluated runs, `a` and `b`, and their file."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "config.yaml").write_text(CONFIG)
    for name, seed in (("a", 0), ("b", 1)):
        invoke("train", folder / "config.yaml", "--out", folder / name, "--set", f"decompose.seed={seed}")
        invoke("evaluate", folder / name)
    return folder


@pytest.mark.parametrize("name", [command.name for command in app.registered_commands])
def test_every_command_has_help_with_examples(name: str) -> None:
    text = invoke(name, "--help").output
    assert "Examples:" in text
    assert f"spd-lens {name}" in text
    assert "--json" in text


def test_a_run_from_the_command_line_equals_one_from_python(runs: Path) -> None:
    run = RunFile.read(runs / "config.yaml")
    decomposition = decompose(load_tiny_lm(), run.decompose.sites, seed=0)
    train(decomposition, load_run_data(run.data, decomposition), run.train_config, out_dir=runs / "python")
    saved, _ = open_saved(runs / "a", None)
    for name, tensor in decomposition.tensors().items():
        assert torch.equal(tensor, saved.tensors()[name]), name


def test_a_run_on_streamed_files_is_that_of_python_and_goes_on(runs: Path, tmp_path: Path) -> None:
    for i in range(2):
        text = load_moby_dick("train")[i * 4000 : (i + 1) * 4000]
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")
    files = [str(tmp_path / f"{i}.txt") for i in range(2)]
    data = f"{{files: {files}, stream: true, streams: 2, shuffle: 8, context: 16, batch_size: 4}}"
    arguments = ("train", runs / "config.yaml", "--set", f"data={data}", "--set", "evaluate={quick: true}")
    arguments = (*arguments, "--out", tmp_path / "run", "--json")
    assert json.loads(invoke(*arguments).stdout)["steps"] == 4
    saved, run = open_saved(tmp_path / "run", None)
    assert run is not None
    decomposition = decompose(load_tiny_lm(), run.decompose.sites, seed=0)
    tokenizer: Any = decomposition.model.tokenizer
    stream = TokenStream(files, tokenizer, context=16, batch_size=4, streams=2, shuffle=8)
    train(decomposition, stream, run.train_config, out_dir=tmp_path / "python")
    for name, tensor in decomposition.tensors().items():
        assert torch.equal(tensor, saved.tensors()[name]), name
    assert json.loads(invoke(*arguments, "--resume", "auto").stdout)["steps"] == 4


def test_train_refuses_a_directory_that_holds_a_run_and_goes_on_with_resume(runs: Path) -> None:
    result = invoke("train", runs / "config.yaml", "--out", runs / "a", status=2)
    assert "--resume auto" in result.stderr
    arguments = ("train", runs / "config.yaml", "--out", runs / "a", "--resume", "auto", "--json")
    done = json.loads(invoke(*arguments).stdout)
    assert done["steps"] == 4
    assert not done["interrupted"]


def test_errors_are_one_line_or_one_object_and_a_status(runs: Path) -> None:
    arguments = ("train", runs / "config.yaml", "--set", "train.stps=3", "--out", runs / "x")
    assert invoke(*arguments, status=2).stderr.startswith("error: ")
    found = json.loads(invoke(*arguments, "--json", status=2).stderr)
    assert found["status"] == 2
    assert "near: 'steps'" in found["error"]
    assert not (runs / "x").exists()
    assert "no out_dir" in invoke("train", runs / "config.yaml", status=2).stderr
    damaged = runs / "a" / "evaluation.json"
    copy = runs / "damaged.json"
    copy.write_text(damaged.read_text()[:100])
    invoke("pareto", copy, "--out", runs / "x.png", status=1)


def test_errors_of_sections_name_the_line_and_what_may_be_meant(runs: Path, tmp_path: Path) -> None:
    file = runs / "config.yaml"

    def told(*changes: str) -> str:
        options = [part for change in changes for part in ("--set", change)]
        return invoke("train", file, "--out", tmp_path / "x", *options, status=2).stderr

    sites = told("decompose.sites={blocks.1.mlp.W_inn: 8}")
    assert f"{file}, line 2: decompose.sites.blocks.1.mlp.W_inn: " in sites
    assert "'blocks.1.mlp.W_in'" in sites
    assert f"{file}, line 1: model.device: 'gpu' is not to be had here" in told("model.device=gpu")
    files = "data={files: [none.txt], context: 16}"
    assert "line 5: evaluate.data: split: held_out with files" in told(files)
    assert "data.files: there is no file none.txt" in told(files, "evaluate.data={max_rows: 8}")
    assert not (tmp_path / "x").exists()
    missing = invoke("evaluate", runs / "aa", status=2).stderr
    assert f"there is no directory {runs / 'aa'}; near: '{runs / 'a'}'" in missing
    assert "there is no directory" in invoke("merge", runs / "aa", "--out", tmp_path / "y", status=2).stderr
    sites = invoke("plan", file, "--set", "decompose.sites={blocks.7.mlp.W_in: 8}", status=2).stderr
    assert "blocks.7.mlp.W_in" in sites


def test_evaluate_saves_a_report_with_a_verdict(runs: Path) -> None:
    found = json.loads(invoke("evaluate", runs / "a", "--json", "--quick").stdout)
    assert set(found["sites"]) == {"blocks.1.mlp.W_in"}
    assert found["verdict"]
    assert Path(found["saved"]).is_file()


def test_compare_of_a_run_with_itself_finds_everything_again(runs: Path) -> None:
    found = json.loads(invoke("compare", runs / "a", runs / "a", "--all", "--json").stdout)
    assert found["sites"]["blocks.1.mlp.W_in"]["mmcs"]["rank_one"] == pytest.approx(1.0, abs=1e-6)
    other = json.loads(invoke("compare", runs / "a", runs / "b", "--json").stdout)
    assert other["sites"]["blocks.1.mlp.W_in"]["mmcs"]["rank_one"] < 0.9


def test_pareto_draws_runs(runs: Path) -> None:
    found = json.loads(invoke("pareto", runs / "a", runs / "b", "--out", runs / "p.png", "--json").stdout)
    assert [point["label"] for point in found["points"]["SPD"]] == ["a", "b"]
    assert (runs / "p.png").stat().st_size > 1000


def test_harvest_saves_what_python_loads(runs: Path) -> None:
    found = json.loads(invoke("harvest", runs / "a", "--json").stdout)
    site = found["sites"]["blocks.1.mlp.W_in"]
    assert site["subcomponents"] == 8
    loaded = Harvest.load(found["saved"])["blocks.1.mlp.W_in"]
    assert float(loaded.firing_rate.sum()) == pytest.approx(site["fires_per_position"])


def test_browse_writes_the_pages_of_a_harvest(runs: Path, tmp_path: Path) -> None:
    assert "holds no harvest" in invoke("browse", runs, status=1).stderr
    invoke("harvest", runs / "b", "--max-batches", "2")
    found = json.loads(invoke("browse", runs / "b", "--out", tmp_path / "pages", "--json").stdout)
    pages = list((tmp_path / "pages").glob("s0/*.html"))
    assert len(pages) == found["pages"]
    assert Path(found["index"]).read_text(encoding="utf-8").count("<title>") == 1


def test_graph_draws_the_graph_of_python(runs: Path, tmp_path: Path) -> None:
    outputs = ("--out", tmp_path / "graph.html", "--file", tmp_path / "graph.json", "--json")
    arguments = ("graph", runs / "a", "--prompt", "The white", "--readout", " whale", "--importance-above", "0")
    found = json.loads(invoke(*arguments, *outputs).stdout)
    decomposition, _ = open_saved(runs / "a", None)
    tokens = decomposition.model.to_tokens("The white", prepend_bos=False)
    expected = attribution_graph(decomposition, tokens, readouts=[" whale"], importance_above=0.0)
    assert found["tokens"] == list(expected.tokens)
    assert found["edges"] == expected.graph.number_of_edges() > 0
    first = found["strongest"][0]
    assert expected.graph.edges[first["from"], first["to"]]["weight"] == pytest.approx(first["attribution"])
    assert json.loads((tmp_path / "graph.json").read_text())["links"]
    assert "The white" in (tmp_path / "graph.html").read_text(encoding="utf-8")
    assert found["written"] == [str(tmp_path / "graph.html"), str(tmp_path / "graph.json")]
    near = invoke("graph", runs / "a", "--prompt", "The white", "--readout", "of the whale", status=1).stderr
    assert "of the whale" in near


def test_components_lie_beside_the_decomposition_and_are_exported(runs: Path, tmp_path: Path) -> None:
    found = json.loads(invoke("components", runs / "b", "--threshold", "0.1", "--json").stdout)
    decomposition, run = open_saved(runs / "b", None)
    assert run is not None
    data = load_run_data(run.evaluation_data, decomposition)
    merging = merge_subcomponents(coactivation(decomposition, data, threshold=0.1))
    saved = Components.load(found["saved"], decomposition)
    assert Path(found["saved"]) == runs / "b" / "decomposition" / "components.json"
    assert [unit.members for unit in saved] == merging.groups
    assert found["events"] == 8 * 16
    assert found["bits_per_event"] == pytest.approx(min(merging.description_lengths))
    invoke("export", runs / "b", "--out", tmp_path / "exported")
    assert (tmp_path / "exported" / "components.json").is_file()
    assert "expected a number of positions" in invoke("components", runs / "b", "--window", "all", status=2).stderr


def test_export_writes_what_from_pretrained_reads(runs: Path) -> None:
    invoke("export", runs / "a", "--out", runs / "exported", "--license", "mit")
    loaded = Decomposition.from_pretrained(runs / "exported", load_tiny_lm())
    assert list(loaded) == ["blocks.1.mlp.W_in"]
    assert "either --out" in invoke("export", runs / "a", status=2).stderr
    assert "--model" in invoke("evaluate", runs / "exported", status=2).stderr
    assert "--data" in invoke("evaluate", runs / "exported", "--model", "tiny_lm", status=2).stderr


def test_specialise_prints_costs_and_losses_and_writes_a_model(runs: Path, tmp_path: Path) -> None:
    arguments = ("specialise", runs / "a", "--budget", "0.95", "--max-rows", "4", "--json")
    values = json.loads(invoke(*arguments, "--out", tmp_path / "small").stdout)
    assert values["costs"]["after"]["parameters"] <= 0.95 * values["costs"]["before"]["parameters"]
    assert set(values["losses"]["inside"]) == {"before", "after"}
    assert (tmp_path / "small" / "model.py").is_file()
    assert "expected a budget" in invoke("specialise", runs / "a", "--budget", "0.01", status=1).stderr


def test_edit_measures_saves_and_bakes(runs: Path, tmp_path: Path) -> None:
    arguments = ("edit", runs / "a", "--scale", "blocks.1.mlp.W_in:0,3=0", "--json")
    outputs = ("--save", tmp_path / "edit.json", "--bake", tmp_path / "model")
    found = json.loads(invoke(*arguments, *outputs).stdout)
    assert found["kl"] > 0
    assert (tmp_path / "edit.json").is_file()
    assert any((tmp_path / "model").iterdir())
    for wrong in ("blocks.1.mlp.W_in:x=0", "blocks.1.mlp.W_in=0", "3"):
        assert "expected SITE:IDS=FACTOR" in invoke("edit", runs / "a", "--scale", wrong, status=2).stderr


def test_edit_leaves_out_positions_that_do_not_count_and_harvest_reads_the_last_rows(
    runs: Path, tmp_path: Path
) -> None:
    data = "{text: moby_dick, context: 16, batch_size: 4, max_rows: 6, exclude: [%s]}"
    section = RunFile.read(runs / "config.yaml", ["data=" + data % ""]).data
    rows = load_run_data(section, open_saved(runs / "a", None)[0])
    tokens = torch.cat([batch.inputs for batch in rows.once()])  # pyright: ignore[reportAttributeAccessIssue]
    # The most frequent token does not count.
    excluded = int(tokens.flatten().mode().values)
    (tmp_path / "data.yaml").write_text(data.strip("{}").replace(", ", "\n") % excluded)
    arguments = ("--data", tmp_path / "data.yaml", "--json")
    scale = ("--scale", "blocks.1.mlp.W_in:0,1,2,3,4,5,6,7=0")
    found = json.loads(invoke("edit", runs / "a", *scale, *arguments).stdout)
    decomposition, _ = open_saved(runs / "a", None)
    model, weight = decomposition.model, decomposition["blocks.1.mlp.W_in"]
    with torch.no_grad():
        clean = model(tokens).double().log_softmax(-1)
        weight.site.matrix.write(weight.target_weight - weight.V @ weight.U)
        edited = model(tokens).double().log_softmax(-1)
    kl, counts = (clean.exp() * (clean - edited)).sum(-1), tokens != excluded
    assert found["positions"] == int(counts.sum()) < tokens.numel()
    assert found["kl"] == pytest.approx(float(kl[counts].mean()), rel=1e-3)
    assert found["top_changes"] == pytest.approx(
        float((clean.argmax(-1) != edited.argmax(-1))[counts].double().mean()), abs=1e-6
    )
    found = json.loads(invoke("harvest", runs / "a", *arguments, "--out", tmp_path / "harvest").stdout)
    assert Harvest.load(found["saved"]).n_positions == int(counts.sum())


def test_local_jobs_stop_behind_their_block(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(BLOCKS)
    invoke("plan", tmp_path / "config.yaml", "--split", "blocks", "--local", "--out", tmp_path / "jobs")
    for block in (0, 1):
        config = RunFile.read(tmp_path / "jobs" / f"block-00{block}.yaml").train_config
        assert config.stop_at == block + 1
        assert config.divergence == "relative_mse"


def test_plan_says_what_a_run_costs(runs: Path) -> None:
    options = ("--C", "1152", "--gpus", "2", "--device", "a100")
    found = json.loads(invoke("plan", "--model", "gpt2", "--sites", "blocks.5.mlp.W_*", *options, "--json").stdout)
    assert found["rows"] == 4
    assert found["tokens_per_second"] > 0
    assert found["bytes"] == pytest.approx(sum(found["bytes_by_kind"].values()))
    assert "calculated" in invoke("plan", runs / "config.yaml", "--device", "cpu").stdout
    assert "give CONFIG, or" in invoke("plan", status=2).stderr
    assert "near: 'gpt2'" in invoke("plan", "--model", "gtp2", "--sites", "blocks.0.*", status=2).stderr


BLOCKS = CONFIG.replace('{"blocks.1.mlp.W_in": 8}', '{"blocks.*.mlp.W_in": 8}, gate: shared, gate_width: 8')


def test_a_plan_of_rows_that_are_cut_already_has_their_length(runs: Path, tmp_path: Path) -> None:
    """Whatever `context` says, which such data do not read."""
    np.save(tmp_path / "rows.npy", np.zeros((4, 64), dtype=np.int64))

    def planned(*changes: str) -> Any:
        options = [part for change in changes for part in ("--set", change)]
        return json.loads(invoke("plan", runs / "config.yaml", *options, "--json").stdout)

    tokens = f"data={{tokens: {tmp_path / 'rows.npy'}, batch_size: 4}}"
    assert planned(tokens, "evaluate={}") == planned("data.context=64")
    (tmp_path / "streams").mkdir()
    (tmp_path / "rows.npy").rename(tmp_path / "streams" / "tokens.npy")
    residuals = f"data={{residuals: {tmp_path / 'streams'}, batch_size: 4}}"
    assert planned(residuals, "evaluate={}") == planned("data.context=64", "data.cache_residuals=true")
    wrong = invoke("plan", runs / "config.yaml", "--set", tokens, "--set", "evaluate={}", status=2).stderr
    assert "line 3: data.tokens: there is no file" in wrong


def test_jobs_of_blocks_are_trained_apart_and_merged(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(BLOCKS)
    split = ("plan", tmp_path / "config.yaml", "--split", "blocks", "--streams", "--out", tmp_path / "jobs", "--json")
    jobs = json.loads(invoke(*split).stdout)["jobs"]
    assert [job["block"] for job in jobs] == [0, 1]
    assert (tmp_path / "jobs" / "jobs.sh").read_text().splitlines()[1:] == [job["line"] for job in jobs]
    assert "--array=0-1" in (tmp_path / "jobs" / "array.sbatch").read_text()
    evaluated = RunFile.read(tmp_path / "config.yaml").evaluation_data
    for job in jobs:
        assert RunFile.read(job["config"]).evaluation_data == evaluated
        invoke(*shlex.split(job["line"])[1:])
    directories = [shlex.split(job["line"])[4] for job in jobs]
    found = json.loads(invoke("merge", *directories, "--out", tmp_path / "merged", "--json").stdout)
    assert found["sites"] == ["blocks.0.mlp.W_in", "blocks.1.mlp.W_in"]
    merged = Decomposition.from_pretrained(tmp_path / "merged", load_tiny_lm())
    for directory in directories:
        part, _ = open_saved(Path(directory), None)
        for name, tensor in part.tensors().items():
            assert torch.equal(merged.tensors()[name], tensor)
    changes = ("--set", f"decompose.start_from={tmp_path / 'merged'}", "--out", tmp_path / "joint", "--json")
    assert json.loads(invoke("train", tmp_path / "config.yaml", *changes).stdout)["steps"] == 4


@pytest.mark.slow  # two processes at once, one of them killed
def test_two_jobs_at_once_of_which_one_is_killed_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(BLOCKS.replace("steps: 4", "steps: 30"))
    split = ("plan", tmp_path / "config.yaml", "--split", "blocks", "--streams", "--out", tmp_path / "jobs", "--json")
    jobs = json.loads(invoke(*split).stdout)["jobs"]
    for job in jobs:
        invoke(*shlex.split(job["line"])[1:])
    alone = [open_saved(Path(shlex.split(job["line"])[4]), None)[0].tensors() for job in jobs]
    for job in jobs:
        shutil.rmtree(shlex.split(job["line"])[4])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}

    def start(job: dict[str, str]) -> subprocess.Popen[bytes]:
        arguments = [sys.executable, "-m", "spd_lens", *shlex.split(job["line"])[1:]]
        return subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL)

    first, second = map(start, jobs)
    log = Path(shlex.split(jobs[1]["line"])[4]) / "checkpoints"
    deadline = time.monotonic() + 240
    while not (log.exists() and any(log.glob("step-*"))) and time.monotonic() < deadline:
        time.sleep(0.02)
    second.kill()
    assert second.wait() == -signal.SIGKILL
    assert first.wait(timeout=300) == 0
    assert start(jobs[1]).wait(timeout=300) == 0
    for job, expected in zip(jobs, alone, strict=True):
        found = open_saved(Path(shlex.split(job["line"])[4]), None)[0].tensors()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name


def test_evaluations_on_the_way_and_figures_go_to_the_logs(runs: Path, tmp_path: Path) -> None:
    changes = ("evaluations={fast_every: 2, slow_every: 4}", "log={tensorboard: true, figures_every: 2}")
    options = [part for change in changes for part in ("--set", change)]
    options += ["--set", "evaluate={data: {split: held_out, max_rows: 8}, adversary_steps: [2], starts: 1}"]
    invoke("train", runs / "config.yaml", "--out", tmp_path / "run", *options, "--json")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    kinds = [{name.split("/")[0] for name in line} & {"fast", "slow"} for line in lines]
    assert kinds == [set(), {"fast"}, set(), {"fast", "slow"}]
    saved, _ = open_saved(tmp_path / "run", None)
    again, _ = open_saved(runs / "a", None)
    for name, tensor in saved.tensors().items():
        assert torch.equal(again.tensors()[name], tensor), name
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    written = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert {event.step: event.value for event in written.Scalars("loss")} == pytest.approx(
        {line["step"]: line["loss"] for line in lines}, rel=1e-5
    )
    assert sorted(written.Tags()["images"]) == ["importance/L0", "importance/density", "importance/histogram"]
    assert [event.step for event in written.Images("importance/L0")] == [0, 2]


def test_a_run_with_a_readout_keeps_it_and_goes_on_with_it(runs: Path, tmp_path: Path) -> None:
    local = "train={steps: 4, minimality: 1e-4, log_every: 1, checkpoint_every: 2, stop_at: 1, divergence: mse}"
    options = ("--set", local, "--set", "readout={max_batches: 2}", "--set", "decompose.sites={blocks.0.mlp.W_in: 8}")
    arguments = ("train", runs / "config.yaml", *options, "--json", "--out")
    invoke(*arguments, tmp_path / "run")
    whole, run = open_saved(tmp_path / "run", None)
    assert run is not None
    decomposition = decompose(load_tiny_lm(), run.decompose.sites, seed=0)
    data = load_run_data(run.data, decomposition)
    config = run.train_config.changed(readout=tune_readout(decomposition, data, 1, max_batches=2))
    train(decomposition, data, config, out_dir=tmp_path / "python")
    for name, tensor in decomposition.tensors().items():
        assert torch.equal(whole.tensors()[name], tensor), name
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000004"
    shutil.rmtree(checkpoint)
    shutil.copytree(tmp_path / "python" / "checkpoints" / "step-00000004", checkpoint)
    assert json.loads(invoke(*arguments, tmp_path / "run", "--resume", "auto").stdout)["steps"] == 4
    wrong = invoke("train", runs / "config.yaml", "--set", "readout={}", "--out", tmp_path / "x", status=2)
    assert "stop_at: BLOCK, divergence: mse" in wrong.stderr


def test_local_jobs_with_a_readout_use_it_but_for_the_last_block(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        BLOCKS.replace("{steps: 4", "{stop_at: 1, divergence: mse, steps: 4") + "readout: {}\n"
    )
    invoke("plan", tmp_path / "config.yaml", "--split", "blocks", "--local", "--joint", "5", "--out", tmp_path / "jobs")
    first, last, joint = (RunFile.read(tmp_path / "jobs" / f"{n}.yaml") for n in ("block-000", "block-001", "joint"))
    assert (first.train_config.stop_at, first.train_config.divergence, first.readout is None) == (1, "mse", False)
    assert (last.train_config.stop_at, last.train_config.divergence, last.readout is None) == (None, "kl", True)
    assert (joint.train_config.stop_at, joint.train_config.steps, joint.readout is None) == (None, 5, True)
    assert joint.decompose.start_from == str(tmp_path / "jobs" / "merged")


@pytest.mark.skipif(TL_MAJOR >= 4, reason="train_many cannot run a TransformerBridge")
@pytest.mark.slow
def test_seeds_trained_as_one_are_the_seeds_trained_apart(runs: Path, tmp_path: Path) -> None:
    sweep = ("sweep", runs / "config.yaml", "--over", "decompose.seed=0,1", "--out", tmp_path, "--batched", "--json")
    found = json.loads(invoke(*sweep).stdout)
    assert [row["status"] for row in found["runs"]] == [0, 0]
    assert Path(found["picture"]).is_file()
    for row, name in zip(found["runs"], ("a", "b"), strict=True):
        apart, _ = open_saved(runs / name, None)
        together, _ = open_saved(Path(row["directory"]), None)
        for key, tensor in apart.tensors().items():
            torch.testing.assert_close(together.tensors()[key], tensor, rtol=1e-3, atol=1e-4, msg=key)
    assert json.loads(invoke(*sweep).stdout) == found
    differ = ("--over", "decompose.sites={blocks.1.mlp.W_in: 8},{blocks.1.mlp.W_in: 9}", "--batched")
    assert "the same shape" in invoke("sweep", runs / "config.yaml", *differ, "--out", tmp_path / "x", status=1).stderr


def test_demo_prints_a_file_that_train_accepts(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(invoke("demo", "--config").output)
    assert RunFile.read(path).train_config.steps == 300
    assert json.loads(invoke("demo", "--config", "--json").output)["config"] == path.read_text()


@pytest.mark.slow  # a whole evaluation
def test_demo_ends_with_a_verdict(tmp_path: Path) -> None:
    found = json.loads(invoke("demo", "--steps", "2", "--out", tmp_path / "demo", "--json").stdout)
    assert found["verdict"]
    assert set(found["contexts"]) == {"blocks.1.mlp.W_in", "blocks.1.mlp.W_out"}


def test_a_sweep_does_not_take_finished_runs_of_another_file_for_its_own(runs: Path, tmp_path: Path) -> None:
    arguments = ("sweep", runs / "config.yaml", "--over", "decompose.seed=0", "--out", tmp_path, "--json")
    shutil.copytree(runs / "a", tmp_path / "seed-0")
    found = json.loads(invoke(*arguments).stdout)
    assert [(row["directory"], row["status"]) for row in found["runs"]] == [(str(tmp_path / "seed-0"), 0)]
    (tmp_path / "changed.yaml").write_text(CONFIG.replace("steps: 4", "steps: 9"))
    changed = ("sweep", tmp_path / "changed.yaml", *arguments[2:])
    assert "holds a finished run of a file with another train" in invoke(*changed, status=2).stderr


@pytest.mark.slow  # five processes, each of which imports torch
def test_a_sweep_goes_on_where_it_was_and_draws_a_picture(runs: Path, tmp_path: Path) -> None:
    arguments = ("sweep", runs / "config.yaml", "--over", "train.minimality=1e-4,1e-2", "--out", tmp_path, "--json")
    first = json.loads(invoke(*arguments).stdout)
    assert [row["status"] for row in first["runs"]] == [0, 0]
    assert Path(first["picture"]).is_file()
    report = Path(first["runs"][0]["directory"]) / "evaluation.json"
    written = report.stat().st_mtime_ns
    (Path(first["runs"][1]["directory"]) / "evaluation.json").unlink()
    again = json.loads(invoke(*arguments).stdout)
    assert again == first
    assert report.stat().st_mtime_ns == written
    assert "same number" in invoke(*arguments, "--over", "train.seed=1", "--zip", status=2).stderr
    assert "stps" in invoke(*arguments, "--over", "train.stps=1", status=2).stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_train_stopped_by_a_signal_writes_a_checkpoint_and_ends_with_75(
    number: signal.Signals, runs: Path, tmp_path: Path
) -> None:
    changes = ["--set", "train.steps=100000", "--set", "train.checkpoint_every=null"]
    arguments = [sys.executable, "-m", "spd_lens", "train", str(runs / "config.yaml"), "--out", str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    process = subprocess.Popen([*arguments, *changes, "--json"], env=environment, stdout=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    done = json.loads(output)
    assert done["interrupted"]
    assert done["steps"] > 0
    assert (tmp_path / "run" / "checkpoints" / f"step-{done['steps']:08d}" / "state.json").is_file()


@pytest.mark.parametrize(("words", "expected"), [("spd-lens swe", "sweep"), ("spd-lens train --res", "--resume")])
def test_the_shell_completes_commands_and_options(words: str, expected: str) -> None:
    given = {"_SPD_LENS_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    assert CliRunner().invoke(app, [], env=given, prog_name="spd-lens").output.split() == [expected]
