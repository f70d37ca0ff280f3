"""Training a decomposition: `train`, one loop that reads from top to bottom.

One step is a clean pass of the target (no gradients), the gates on its site inputs, one masked pass per
reconstruction term, and Adam. Cost: about `1 + 3 R` forward passes of the decomposed part, R the number of masked
passes, plus the gates; with adversaries also 3 more per ascent. Nothing in a step waits for the device: losses are
fetched every `log_every` steps.

Left out on purpose: learning-rate searches, early stopping, evaluation (see `spd_lens.evaluation.evaluating`).
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.inputs import checked_decomposition
from spd_lens.core.units import ALIVE_ABOVE
from spd_lens.data.streams import endless_batches
from spd_lens.hosts.site import match_sites
from spd_lens.objective.divergences import mean_over_positions
from spd_lens.support.files import given_path, plain
from spd_lens.support.progress import tqdm
from spd_lens.training.belonging import FREE, SeenData, belongs_to, check_belongs, same_data, started
from spd_lens.training.checkpoint import Checkpoint, read_checkpoint
from spd_lens.training.config import TrainConfig
from spd_lens.training.loggers import Logger
from spd_lens.training.run_files import RunFiles, open_run
from spd_lens.training.step import Learner, accumulate_gradients, faithfulness
from spd_lens.training.terms import coefficient


@dataclass(frozen=True)
class TrainResult:
    """What a finished (or stopped) run leaves: steps done, the log, and where its files are."""

    steps: int
    config: TrainConfig
    log: list[dict[str, Any]]
    directory: Path
    interrupted: bool = False

    @property
    def final(self) -> dict[str, Any]:
        """The last line of the log."""
        return self.log[-1] if self.log else {}


def train(
    decomposition: Decomposition,
    batches: Any,
    config: TrainConfig | None = None,
    *,
    out_dir: str | Path | None = None,
    resume_from: str | Path | None = None,
    loggers: Sequence[Logger] = (),
    **changes: Any,
) -> TrainResult:
    """Train subcomponents and gates with SPD; the target is frozen meanwhile and gets its `requires_grad` back.

    - `batches`: any iterable of token batches `[batch pos]`, inputs, `Batch`es or dicts (see `spd_lens.data.batches`);
      repeated when it ends, if it can be.
    - `config` and `changes`: the choices, and fields to change in them: `train(d, batches, steps=5_000)`.
    - `out_dir`: the run's directory (log and checkpoints), by default `runs/<date>-<time>`.
    - `loggers`: functions `(step, values)` that get every log line as well; `spd_lens.training.wandb_logger` and
      `tensorboard_logger` make them.
    - `resume_from`: a run's directory or one of its checkpoints; model, decomposition and data must be the same, and
      what differs is named. The resumed run equals the uninterrupted one bit for bit on the same machine. Going on from
      an older checkpoint sets the newer ones aside.

    Ctrl-C finishes the current step, writes a checkpoint and returns with `interrupted=True`; a second one stops at
    once. Raises ValueError for empty data, token ids out of range, and losses that are NaN or infinite (the last
    good checkpoint is put back into the decomposition).
    """
    checked_decomposition(decomposition, "train")
    files, checkpoint = open_run(out_dir, resume_from, loggers)
    config = _resolve_config(config, changes, files if resume_from is not None else None)
    accelerator = make_accelerator(decomposition, config)
    is_main, n_processes, rank = accelerator.is_main_process, accelerator.num_processes, accelerator.process_index

    with _only_subcomponents_trainable(decomposition), stop_on_ctrl_c() as stop, ExitStack() as running:
        learner = make_learner(decomposition, config, accelerator)
        belongs = belongs_to(decomposition, config, batches)
        if resume_from is not None:
            _check_resumed(files, checkpoint, belongs)
        step = 0 if checkpoint is None else checkpoint.step
        seen = SeenData(None if checkpoint is None else checkpoint.data)
        if checkpoint is not None:
            batches = same_data(batches, checkpoint.data, str(checkpoint.path))
        stream = endless_batches(batches, decomposition, start=step * n_processes + rank, stride=n_processes)
        if checkpoint is not None and step < config.steps:
            stream = started(stream)
        if is_main:
            running.enter_context(files.held())
            if resume_from is None:
                files.begin(config, belongs)
            else:
                files.continue_from(checkpoint, newest=_is_run(resume_from))
        if checkpoint is None:
            _warm_up_faithfulness(learner)
        else:
            _load(learner, checkpoint)
        good: Checkpoint | None = checkpoint
        bad_step = torch.full((), -1, device=decomposition.device)
        began, first_step, interrupted = time.perf_counter(), step, False
        bar = tqdm(total=config.steps, initial=step, desc="SPD", unit="step", disable=not is_main)

        while step < config.steps:
            batch = seen.note(next(stream)).to(decomposition.device)
            _set_learning_rates(learner, step)
            losses, importances = accumulate_gradients(learner, batch, step)
            total = torch.stack([coefficient(config, name) * loss for name, loss in losses.items()]).sum()
            _average_gradients(learner, accelerator)
            norms = _clip_gradients(learner)
            learner.optimizer.step()
            learner.optimizer.zero_grad(set_to_none=True)
            for source in learner.sources.values():
                source.after_backward()
            bad_step = torch.where((bad_step < 0) & ~total.detach().isfinite(), step, bad_step)
            step += 1
            bar.update()

            # Read once: a Ctrl-C that comes between here and the end of this turn must not skip the checkpoint.
            interrupted = stop.is_set()
            is_last = step == config.steps or interrupted
            saves = is_last or (config.checkpoint_every is not None and step % config.checkpoint_every == 0)
            if saves or (step - 1) % config.log_every == 0:
                if (failed := int(bad_step)) >= 0:
                    bar.close()
                    _give_up(learner, failed, losses, good)
                rate = (step - first_step) * batch.n_positions * n_processes / (time.perf_counter() - began)
                values = _log_values(total, losses, importances, norms, learner, step - 1, rate, batch.position_mask)
                if is_main:
                    files.log(step - 1, values)
                bar.set_postfix({k: f"{values[k]:.3g}" for k in ("loss", "L0") if k in values}, refresh=False)
            if saves and is_main:
                data = seen.until(batch, (step - 1) * n_processes)
                keep = config.keep_checkpoints
                path = files.save(step, learner.tensors(), keep=keep, belongs=belongs, data=data)
                good = Checkpoint(path, step, {})
            if interrupted:
                break
        bar.close()

    log = files.read_log()
    final = {k: v for k, v in (log[-1] if log else {}).items() if k != "positions_per_second"}
    decomposition.training_record = {"config": config.to_json(), "steps": step, "final": final}
    if interrupted:
        tqdm.write(f"stopped after {step} steps; continue with resume_from={str(files.directory)!r}")
    return TrainResult(step, config, log, files.directory, interrupted)


def _is_run(resume_from: str | Path) -> bool:
    """Whether a run's directory was given, whose newest checkpoint is meant, and not one checkpoint's."""
    return (given_path(resume_from) / "config.json").is_file()


def _check_resumed(files: RunFiles, checkpoint: Checkpoint | None, belongs: Mapping[str, Any]) -> None:
    """ValueError, naming the difference, if a run goes on with another model, decomposition, configuration or data."""
    if checkpoint is None:
        # Nothing was learnt from data yet.
        check_belongs({**files.belongs(), "data": {}}, {**belongs, "data": {}}, str(files.directory))
    else:
        check_belongs(checkpoint.belongs, belongs, str(checkpoint.path))


def _load(learner: Learner, checkpoint: Checkpoint) -> None:
    try:
        learner.load(checkpoint.tensors)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{checkpoint.path} does not fit this run: {error}") from error


def _warm_up_faithfulness(learner: Learner) -> None:
    """L8: some steps on faithfulness alone, with an optimiser that is thrown away."""
    config = learner.config
    if config.faithfulness_warmup == 0:
        return
    parameters = learner.decomposition.subcomponent_parameters()
    optimizer = torch.optim.Adam(parameters, lr=config.faithfulness_warmup_lr)
    for _ in tqdm(range(config.faithfulness_warmup), desc="faithfulness warm-up", leave=False):
        faithfulness(learner).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


# -- setting up ------------------------------------------------------------------------------------------------------


def _resolve_config(config: TrainConfig | None, changes: Mapping[str, Any], resumed: RunFiles | None) -> TrainConfig:
    if resumed is None:
        return (config or TrainConfig()).changed(**changes)
    saved = resumed.config_values()
    wanted = (config or resumed.read_config()).changed(**changes)
    different = [k for k, v in plain(wanted.to_json()).items() if k not in FREE and v != saved.get(k)]
    if different:
        raise ValueError(
            f"the run in {resumed.directory} was started with another configuration (different: "
            f"{', '.join(different)}); resume with the same one, or start a new run"
        )
    return wanted


def make_accelerator(decomposition: Decomposition, config: TrainConfig) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # The state is a process-wide singleton that refuses a second precision; every run has its own.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision="bf16" if config.precision == "bf16" else "no", cpu=decomposition.device.type == "cpu"
    )
    elsewhere = accelerator.device.type != decomposition.device.type or (
        accelerator.device.type != "cpu" and accelerator.device != decomposition.device
    )
    if accelerator.num_processes > 1 and elsewhere:
        raise ValueError(
            f"process {accelerator.process_index} should run on {accelerator.device}, but its decomposition is on "
            f"{decomposition.device}; move it there with decomposition.to(...) before train()"
        )
    return accelerator


def make_learner(decomposition: Decomposition, config: TrainConfig, accelerator: Any) -> Learner:
    groups = [{"params": decomposition.subcomponent_parameters()}, {"params": decomposition.gate_parameters()}]
    device = decomposition.device
    seed = config.seed * 1_000_003 + accelerator.process_index * 101
    generators = {
        "masks": torch.Generator(device).manual_seed(seed + 1),
        "adversary": torch.Generator(device).manual_seed(seed + 2),
        # On the CPU, so that which rows are routed is known without waiting for the device.
        "routing": torch.Generator().manual_seed(seed + 3),
    }
    learner = Learner(decomposition, config, torch.optim.Adam(groups, lr=config.lr, fused=True), generators)
    learner.autocast = accelerator.autocast if config.precision == "bf16" else nullcontext
    learner.minimality_factors = match_sites(config.minimality_factors, decomposition)
    learner.targets = {name: w.target_weight.detach() for name, w in decomposition.items()}
    if accelerator.num_processes > 1:
        from torch.distributed.nn.functional import all_reduce

        learner.sum_over_processes = all_reduce
    return learner


@contextmanager
def _only_subcomponents_trainable(decomposition: Decomposition) -> Iterator[None]:
    """M3: the target's parameters get no gradients; every `requires_grad` is put back at the end."""
    trained = decomposition.subcomponent_parameters() + decomposition.gate_parameters()
    everything = {id(p): p for p in [*decomposition.model.parameters(), *trained]}
    before = {key: p.requires_grad for key, p in everything.items()}
    try:
        for p in everything.values():
            p.requires_grad_(False)
        for p in trained:
            p.requires_grad_(True)
        yield
    finally:
        for key, p in everything.items():
            p.requires_grad_(before[key])


@contextmanager
def stop_on_ctrl_c() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets instead of breaking into a half-done step; the second one interrupts."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = signal.getsignal(signal.SIGINT)

    def on_interrupt(number: int, frame: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)


# -- parts of a step ------------------------------------------------------------------------------------------------


def _set_learning_rates(learner: Learner, step: int) -> None:
    config = learner.config
    factor = config.lr_factor(step)
    subcomponents, gates = learner.optimizer.param_groups
    subcomponents["lr"] = config.lr * factor
    gates["lr"] = (config.lr if config.gate_lr is None else config.gate_lr) * factor


def _average_gradients(learner: Learner, accelerator: Any) -> None:
    if accelerator.num_processes == 1:
        return
    for group in learner.optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                p.grad = accelerator.reduce(p.grad, reduction="mean")


def _clip_gradients(learner: Learner) -> dict[str, Tensor]:
    """Clip subcomponents and gates separately; returns the norms before clipping."""
    norms = {}
    limits = (learner.config.clip_subcomponents, learner.config.clip_gates)
    for name, group, limit in zip(("subcomponents", "gates"), learner.optimizer.param_groups, limits, strict=True):
        if limit is not None:
            norms[f"grad_norm_{name}"] = torch.nn.utils.clip_grad_norm_(group["params"], limit)
    return norms


def _log_values(
    total: Tensor,
    losses: Mapping[str, Tensor],
    importances: Mapping[str, Tensor],
    norms: Mapping[str, Tensor],
    learner: Learner,
    step: int,
    rate: float,
    position_mask: Tensor | None,
) -> dict[str, float]:
    """One line of the log; the only place of the loop that waits for the device."""
    tensors = {"loss": total, **losses, **norms}
    per_site = {f"L0/{n}": _mean_active(g, position_mask) for n, g in importances.items()}
    names = [*tensors, *per_site]
    values = torch.stack([v.detach().float() for v in (*tensors.values(), *per_site.values())]).tolist()
    line = dict(zip(names, values, strict=True))
    line["L0"] = sum(line[name] for name in per_site)
    line["lr"] = learner.optimizer.param_groups[0]["lr"]
    line["p"] = learner.config.p_at(step)
    line["positions_per_second"] = round(rate, 1)
    return line


def _mean_active(g: Tensor, position_mask: Tensor | None) -> Tensor:
    """Mean number of active subcomponents over the positions that count (and over heads, where there are any)."""
    active = (g.detach() > ALIVE_ABOVE).float().sum(-1)
    if position_mask is None:
        return active.mean()
    counts = position_mask.reshape(*position_mask.shape, *[1] * (active.ndim - position_mask.ndim))
    return mean_over_positions(active, counts.expand_as(active))


def _give_up(learner: Learner, step: int, losses: Mapping[str, Tensor], good: Checkpoint | None) -> None:
    """Put the last good checkpoint back and say which loss went wrong."""
    wrong = [name for name, loss in losses.items() if not bool(loss.isfinite())]
    kept = "there was no checkpoint yet"
    if good is not None:
        learner.load(read_checkpoint(good.path).tensors)
        kept = f"the decomposition is back at step {good.step} ({good.path})"
    raise ValueError(
        f"the loss became NaN or infinite at step {step} (terms: {', '.join(wrong) or 'recovered since'}); {kept}. "
        "Lower lr, or clip gradients with clip_subcomponents=1.0 and clip_gates=1.0"
    )
