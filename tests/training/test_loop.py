"""`train`: the loss it computes, what it learns, exact resume, and what happens when something is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from spd_lens import Decomposition, Reconstruction, TrainConfig, decompose, evaluate, train
from spd_lens.data import Batch, TokenBatches, cache_residuals
from spd_lens.objective import PGD, Persistent
from spd_lens.training import TrainResult, tensorboard_logger, wandb_logger
from tests.conftest import DEVICES, TL_MAJOR
from tests.small_models import D_VOCAB, TiedAutoencoder, tiny_transformer, tokens

EVERYTHING = TrainConfig(
    steps=12,
    log_every=3,
    checkpoint_every=4,
    faithfulness_warmup=5,
    minimality=1e-3,
    minimality_factors={"*.W_V": 3.0},
    p_start=2.0,
    p_end=0.5,
    frequency=1e-3,
    reconstructions=(
        Reconstruction(1.0, "stochastic", "all"),
        Reconstruction(0.5, "bernoulli", "layerwise"),
        Reconstruction(0.5, PGD(2, 0.1, "batch"), "subset"),
        Reconstruction(0.5, Persistent(), "all"),
    ),
    hidden=0.1,
    hidden_points=("blocks.1.hook_out",) if TL_MAJOR >= 4 else ("blocks.1.hook_resid_post",),
    clip_subcomponents=1.0,
    clip_gates=1.0,
    lr_warmup=2,
)


def _fresh(**settings: Any) -> Decomposition:
    arguments: dict[str, Any] = {"gate": "shared", "gate_width": 8, "seed": 3} | settings
    return decompose(tiny_transformer(), {"blocks.1.mlp.W_*": 20, "blocks.1.attn.W_V": 10}, **arguments)


def _tensors(decomposition: Decomposition) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in decomposition.tensors().items()}


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def _without_clock(result: TrainResult) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if k != "positions_per_second"} for line in result.log]


def test_the_same_seed_trains_the_same_and_another_seed_does_not(tmp_path: Path) -> None:
    found = []
    for i, seed in enumerate((0, 0, 1)):
        decomposition = _fresh()
        train(decomposition, TokenBatches(tokens(32), 4), EVERYTHING, out_dir=tmp_path / str(i), seed=seed)
        found.append(_tensors(decomposition))
    assert _same(found[0], found[1])
    assert not _same(found[0], found[2])


def test_minimality_factors_reach_the_sites_that_match_and_no_other(tmp_path: Path) -> None:
    decomposition = _fresh()
    before = _tensors(decomposition)
    # On minimality alone, a gate whose site has factor 0 has no gradient, and Adam leaves it where it is.
    nowhere = (Reconstruction(routing=0.0),)
    factors = {"*": 0.0, "*.W_V": 1.0}
    config = TrainConfig(steps=1, faithfulness=0.0, reconstructions=nowhere, minimality_factors=factors)
    train(decomposition, [tokens(4)], config, out_dir=tmp_path)
    after = _tensors(decomposition)
    moved = {name.split(".gate.")[0] for name in after if not torch.equal(after[name], before[name])}
    assert moved == {"blocks.1.attn.W_V"}


def test_minimality_factors_are_in_the_loss_that_is_logged(tmp_path: Path) -> None:
    """All sites at factor 3 is three times the coefficient; the log has the unweighted loss times the factor."""
    lines = []
    for i, (minimality, factors) in enumerate([(3e-2, {}), (1e-2, {"*": 3.0})]):
        config = TrainConfig(steps=3, log_every=1, minimality=minimality, minimality_factors=factors)
        lines.append(train(_fresh(), [tokens(4)], config, out_dir=tmp_path / str(i)).log)
    for plain, factored in zip(*lines, strict=True):
        assert factored["loss"] == pytest.approx(plain["loss"], rel=1e-5)
        assert factored["minimality"] == pytest.approx(3 * plain["minimality"], rel=1e-5)


def test_a_factor_for_no_site_or_below_zero_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no site matches 'blocks.1.mlp.W_inn'; near names: 'blocks.1.mlp.W_in'"):
        train(_fresh(), [tokens(4)], steps=1, minimality_factors={"blocks.1.mlp.W_inn": 2.0}, out_dir=tmp_path / "a")
    assert not (tmp_path / "a").exists()
    with pytest.raises(ValueError, match=r"minimality_factors\['x'\]=-1.0; expected zero or more"):
        TrainConfig(minimality_factors={"x": -1.0})


@pytest.mark.parametrize("step", [4, 8])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path, step: int) -> None:
    config = EVERYTHING.changed(keep_checkpoints=10)
    whole = _fresh()
    result = train(whole, TokenBatches(tokens(32), 4), config, out_dir=tmp_path / "run")
    resumed = _fresh()
    checkpoint = tmp_path / "run" / "checkpoints" / f"step-{step:08d}"
    again = train(resumed, TokenBatches(tokens(32), 4), resume_from=checkpoint)
    assert _same(_tensors(whole), _tensors(resumed))
    assert _without_clock(result) == _without_clock(again)


def test_a_resumed_run_skips_what_a_plain_iterable_has_given_already(tmp_path: Path) -> None:
    data = list(tokens(40).split(4))
    config = EVERYTHING.changed(keep_checkpoints=10)
    whole, resumed = _fresh(), _fresh()
    train(whole, data, config, out_dir=tmp_path / "run")
    train(resumed, data, resume_from=tmp_path / "run" / "checkpoints" / "step-00000008")
    assert _same(_tensors(whole), _tensors(resumed))


_CHILD = """
import sys, torch
sys.path.insert(0, {root!r})
torch.set_num_threads(1)
import warnings; warnings.simplefilter("ignore")
from pathlib import Path
from tests.training.test_loop import EVERYTHING, _fresh
from tests.small_models import tokens
from spd_lens import train
from spd_lens.data import TokenBatches
from safetensors.torch import save_file
d = _fresh()
path = Path({run!r})
config = EVERYTHING.changed(steps=60, checkpoint_every=5)
print("ready", flush=True)
data = TokenBatches(tokens(32), 4)
if (path / "config.json").exists():
    train(d, data, resume_from=path)
else:
    train(d, data, config, out_dir=path)
save_file({{k: v.detach().contiguous() for k, v in d.tensors().items()}}, {out!r})
"""


@pytest.mark.parametrize("most_kills", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_and_resumed_equals_the_uninterrupted_one(
    most_kills: int, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    root = str(Path(__file__).parents[2])
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(run: Path, out: Path) -> subprocess.Popen[str]:
        code = _CHILD.format(root=root, run=str(run), out=str(out))
        command = [sys.executable, "-c", code]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)

    whole = start(tmp_path / "whole", tmp_path / "whole.safetensors")
    _, errors = whole.communicate(timeout=300)
    assert whole.returncode == 0, errors
    checkpoints = tmp_path / "killed" / "checkpoints"
    moments, kills = torch.Generator().manual_seed(0), 0
    for _ in range(most_kills):
        child = start(tmp_path / "killed", tmp_path / "killed.safetensors")
        assert child.stdout is not None
        child.stdout.readline()
        seen = set(os.listdir(checkpoints)) if checkpoints.exists() else set()
        deadline = time.time() + 120
        while time.time() < deadline and child.poll() is None:
            now = set(os.listdir(checkpoints)) if checkpoints.exists() else set()
            if now - seen:
                break
            time.sleep(0.002)
        time.sleep(0.3 * float(torch.rand((), generator=moments)))
        child.send_signal(signal.SIGKILL)
        child.communicate()
        kills += child.returncode == -signal.SIGKILL
        if (tmp_path / "killed.safetensors").exists():
            break
    assert kills > 0, "every child came to its end first"
    print(f"{kills} kills of a run, each resumed")
    last = start(tmp_path / "killed", tmp_path / "killed.safetensors")
    _, errors = last.communicate(timeout=300)
    assert last.returncode == 0, errors
    a, b = load_file(tmp_path / "whole.safetensors"), load_file(tmp_path / "killed.safetensors")
    assert _same(a, b)

    def lines(run: str) -> list[dict[str, float]]:
        text = (tmp_path / run / "log.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k != "positions_per_second"} for line in text]

    assert lines("whole") == lines("killed")


def test_cached_residuals_give_the_losses_of_the_tokens(tmp_path: Path) -> None:
    data = TokenBatches(tokens(32), 4)
    on_tokens, on_residuals = _fresh(), _fresh()
    cached = cache_residuals(on_residuals, data)
    assert cached.start_at == 1
    a = train(on_tokens, data, EVERYTHING, out_dir=tmp_path / "a")
    b = train(on_residuals, cached, EVERYTHING, out_dir=tmp_path / "b")
    for line_a, line_b in zip(_without_clock(a), _without_clock(b), strict=True):
        assert line_a.keys() == line_b.keys()
        for key in line_a:
            assert line_a[key] == pytest.approx(line_b[key], rel=1e-3, abs=1e-5), key


def test_training_on_residuals_runs_no_block_before_the_first_decomposed_one(tmp_path: Path) -> None:
    decomposition = _fresh()
    cached = cache_residuals(decomposition, TokenBatches(tokens(8), 4))
    calls = [0, 0]

    def count(layer: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            calls[layer] += 1

        return hook

    for layer in (0, 1):
        decomposition.model.blocks[layer].ln1.register_forward_pre_hook(count(layer), with_kwargs=True)
    train(decomposition, cached, steps=2, out_dir=tmp_path / "run")
    assert calls[0] == 0
    assert calls[1] > 0


def test_tied_toy_learns_to_be_faithful_and_reconstructs(tmp_path: Path) -> None:
    model = TiedAutoencoder()
    decomposition = decompose(model, {"*": 10}, seed=1)
    generator = torch.Generator().manual_seed(0)
    data = [
        torch.rand(256, 5, generator=generator) * (torch.rand(256, 5, generator=generator) < 0.2) for _ in range(50)
    ]
    result = train(decomposition, data, steps=400, lr=5e-3, divergence="mse", minimality=3e-2, out_dir=tmp_path / "run")
    first, last = result.log[0], result.log[-1]
    assert last["faithfulness"] < 5e-3 < first["faithfulness"]
    assert last["stochastic_all"] < 0.2 * first["stochastic_all"]
    assert last["L0"] < 0.7 * first["L0"]


def test_the_target_is_frozen_while_training_and_gets_its_flags_back(tmp_path: Path) -> None:
    decomposition = _fresh()
    own = {id(p) for p in [*decomposition.subcomponent_parameters(), *decomposition.gate_parameters()]}
    others = [p for p in decomposition.model.parameters() if id(p) not in own]
    others[0].requires_grad_(False)
    flags = [p.requires_grad for p in others]
    before = [p.detach().clone() for p in others]
    train(decomposition, TokenBatches(tokens(8), 4), steps=2, out_dir=tmp_path / "run")
    assert [p.requires_grad for p in others] == flags
    assert all(p.grad is None for p in others)
    assert all(torch.equal(a, b) for a, b in zip(before, others, strict=True))


def test_positions_that_are_left_out_have_no_influence(tmp_path: Path) -> None:
    found = []
    for filler in (5, 6):
        rows = tokens(16)
        mask = torch.ones_like(rows, dtype=torch.bool)
        mask[:, -3:] = False
        # A causal model: what stands at the last positions cannot reach the others.
        batch = Batch(rows.masked_fill(~mask, filler), position_mask=mask)
        decomposition = _fresh()
        train(decomposition, [batch], steps=3, log_every=1, out_dir=tmp_path / str(filler), minimality=1e-2)
        found.append(_tensors(decomposition))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-4, atol=1e-6)


def test_a_nan_stops_the_run_and_the_last_good_checkpoint_is_put_back(tmp_path: Path) -> None:
    decomposition = _fresh()
    kept: dict[str, Tensor] = {}

    def data() -> Any:
        for i in range(100):
            if i == 5:
                kept.update(_tensors(decomposition))
            if i == 6:
                with torch.no_grad():
                    decomposition["blocks.1.mlp.W_in"].V[0, 0] = torch.nan
            yield tokens(4, seed=i)

    with pytest.raises(ValueError, match=r"NaN or infinite at step 6.*back at step 5"):
        train(decomposition, data(), steps=20, log_every=1, checkpoint_every=5, out_dir=tmp_path / "run")
    assert _same(_tensors(decomposition), kept)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "the data is empty"),
        (iter(tokens(8).split(4)), "ended after 2 batches"),
        ([torch.full((2, 5), D_VOCAB)], "token ids run from 40 to 40"),
        ([torch.zeros(0, 5, dtype=torch.long)], "it is empty"),
        (["text"], "a batch is text"),
        ([{"labels": 1}], "expected 'tokens' or 'input_ids'"),
    ],
)
def test_bad_data_is_refused_in_words(data: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        train(_fresh(), data, steps=3, out_dir=tmp_path / "run")


def test_unknown_choices_list_near_names() -> None:
    with pytest.raises(TypeError, match="no field 'minimalty'; near: minimality"):
        train(_fresh(), [tokens(4)], minimalty=1.0)


def test_a_run_is_never_overwritten_nor_resumed_differently(tmp_path: Path) -> None:
    train(_fresh(), [tokens(4)], steps=2, out_dir=tmp_path / "run")
    with pytest.raises(ValueError, match="already holds a run"):
        train(_fresh(), [tokens(4)], steps=2, out_dir=tmp_path / "run")
    with pytest.raises(ValueError, match=r"another configuration \(different: lr"):
        train(_fresh(), [tokens(4)], resume_from=tmp_path / "run", lr=0.5)
    with pytest.raises(ValueError, match="holds neither a run nor a checkpoint"):
        train(_fresh(), [tokens(4)], resume_from=tmp_path)


def test_ctrl_c_finishes_the_step_saves_and_can_be_resumed(tmp_path: Path) -> None:
    config = EVERYTHING.changed(checkpoint_every=None)
    whole, stopped, resumed = _fresh(), _fresh(), _fresh()
    train(whole, TokenBatches(tokens(32), 4), config, out_dir=tmp_path / "whole")

    class Interrupting(TokenBatches):
        def batches_from(self, start: int) -> Any:
            for i, batch in enumerate(super().batches_from(start)):
                if i == 5:
                    signal.raise_signal(signal.SIGINT)
                yield batch

    assert threading.current_thread() is threading.main_thread()
    result = train(stopped, Interrupting(tokens(32), 4), config, out_dir=tmp_path / "run")
    assert result.interrupted
    assert result.steps == 6
    train(resumed, TokenBatches(tokens(32), 4), resume_from=tmp_path / "run")
    assert _same(_tensors(whole), _tensors(resumed))


def test_ctrl_c_while_a_line_is_logged_still_ends_with_a_checkpoint(tmp_path: Path) -> None:
    def interrupt(step: int, values: Any) -> None:
        if step == 4:
            signal.raise_signal(signal.SIGINT)

    config = EVERYTHING.changed(checkpoint_every=None, log_every=1)
    result = train(_fresh(), TokenBatches(tokens(32), 4), config, out_dir=tmp_path / "run", loggers=[interrupt])
    assert result.interrupted
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{result.steps:08d}"]


def test_loggers_get_every_line(tmp_path: Path) -> None:
    seen: list[int] = []
    logger = lambda step, values: seen.append(step)  # noqa: E731
    result = train(_fresh(), [tokens(4)], steps=5, log_every=2, out_dir=tmp_path / "run", loggers=[logger])
    assert seen == [0, 2, 4] == [line["step"] for line in result.log]


def test_bf16_autocast_stays_near_float32(tmp_path: Path) -> None:
    losses = []
    for precision in ("fp32", "bf16"):
        result = train(_fresh(), [tokens(8)], steps=3, log_every=1, precision=precision, out_dir=tmp_path / precision)
        losses.append([line["loss"] for line in result.log])
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[1] != losses[0]


def test_a_config_survives_json() -> None:
    assert TrainConfig.from_json(json.loads(json.dumps(EVERYTHING.to_json()))) == EVERYTHING


def test_training_waits_for_the_device_only_where_it_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from spd_lens.training import loop as training

    decomposition = _fresh()
    forbidden = ("item", "tolist", "numpy", "__float__", "__int__", "__bool__", "cpu")
    real = training.accumulate_gradients

    def guarded(*args: Any) -> Any:
        with monkeypatch.context() as patch:
            for name in forbidden:

                def refuse(self: Tensor, *a: Any, _name: str = name, **k: Any) -> Any:
                    raise AssertionError(f"Tensor.{_name} in a training step")

                patch.setattr(Tensor, name, refuse)
            return real(*args)

    monkeypatch.setattr(training, "accumulate_gradients", guarded)
    config = EVERYTHING.changed(reconstructions=(Reconstruction(), Reconstruction(0.5, "pgd", "layerwise")))
    train(decomposition, TokenBatches(tokens(8), 4), config, out_dir=tmp_path / "run")


def test_wandb_and_tensorboard_get_what_the_log_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins of the same interface: neither is a dependency, and neither is imported unless asked for."""
    sent: dict[str, list[Any]] = {"wandb": [], "tensorboard": []}

    class Run:
        def log(self, values: dict[str, float], step: int) -> None:
            sent["wandb"].append((step, values["loss"]))

    class SummaryWriter:
        def __init__(self, directory: str) -> None:
            assert directory == str(tmp_path / "board")

        def add_scalar(self, name: str, value: float, step: int) -> None:
            if name == "loss":
                sent["tensorboard"].append((step, value))

        def flush(self) -> None:
            pass

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **arguments: Run()))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    loggers = [wandb_logger(project="spd"), tensorboard_logger(tmp_path / "board")]
    result = train(_fresh(), [tokens(4)], steps=3, log_every=1, out_dir=tmp_path / "run", loggers=loggers)
    expected = [(line["step"], line["loss"]) for line in result.log]
    assert sent == {"wandb": expected, "tensorboard": expected}


@pytest.mark.parametrize("device", DEVICES)
def test_training_and_evaluation_run_where_the_model_is(tmp_path: Path, device: str) -> None:
    decomposition = _fresh().to(device)
    result = train(decomposition, TokenBatches(tokens(8), 4), EVERYTHING.changed(steps=3), out_dir=tmp_path / "run")
    assert result.steps == 3
    assert {t.device.type for t in decomposition.tensors().values()} == {device}
    report = evaluate(decomposition, TokenBatches(tokens(8), 4), adversary_steps=(2,))
    assert report.positions == 8 * 12


def test_a_step_asks_the_device_for_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the `meta` device there are shapes but no values, so whatever needs one (also a count of rows) raises."""
    from spd_lens.training import Learner, accumulate_gradients

    # There is no autocast for this device.
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    decomposition = _fresh()
    decomposition.to("meta")
    for p in decomposition.model.parameters():
        p.requires_grad_(False)
    trained = decomposition.subcomponent_parameters() + decomposition.gate_parameters()
    for p in trained:
        p.requires_grad_(True)
    every_routing = (
        Reconstruction(routing="subset"),
        Reconstruction(routing=0.5),
        Reconstruction(masks="bernoulli", routing="layerwise"),
        Reconstruction(masks="pgd", routing="subset"),
        Reconstruction(masks="persistent", routing="subset"),
    )
    config = EVERYTHING.changed(reconstructions=every_routing)
    generators = {name: torch.Generator() for name in ("masks", "adversary", "routing")}
    learner = Learner(decomposition, config, torch.optim.Adam(trained), generators)
    learner.targets = {name: w.target_weight.detach() for name, w in decomposition.items()}
    losses, _ = accumulate_gradients(learner, Batch(tokens(4).to("meta")), 0)
    assert all(loss.device.type == "meta" for loss in losses.values())
    assert all(p.grad is not None for p in trained)
    with pytest.raises(RuntimeError, match="meta"):
        losses["minimality"].item()
