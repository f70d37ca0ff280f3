"""Training a decomposition: `train`, one loop that reads from top to bottom.

One step is a clean pass of the target (no gradients), the gates on its site inputs, one masked pass per
reconstruction term, and Adam. Cost: about `1 + 3 R` forward passes of the decomposed part, R the number of masked
passes, plus the gates; with adversaries also 3 more per ascent. Nothing in a step waits for the device: losses are
fetched every `log_every` steps.

Left out on purpose: learning-rate searches, early stopping.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.inputs import checked_decomposition
from spd_lens.data.batch_hashes import check_same_rows
from spd_lens.data.batches import Batch
from spd_lens.data.processes import Processes, join_processes
from spd_lens.data.streams import endless_batches
from spd_lens.support.files import given_path, plain
from spd_lens.support.given import given_function, given_instance, given_list
from spd_lens.support.progress import tqdm
from spd_lens.training.agreement import check_same_run
from spd_lens.training.belonging import (
    FREE,
    SeenData,
    belongs_to,
    check_belongs,
    compare_now,
    keeps_place,
    place_of,
    same_data,
    started,
)
from spd_lens.training.checkpoint import Checkpoint
from spd_lens.training.conditions import Stop, not_finite, stop_on_signals, training_conditions
from spd_lens.training.config import TrainConfig
from spd_lens.training.evaluations import Evaluations, Evaluator
from spd_lens.training.last_good import LastGood
from spd_lens.training.learner import Learner, make_learner
from spd_lens.training.log_figures import figure_steps, show_figures
from spd_lens.training.loggers import Logger
from spd_lens.training.offloading import only_entered_blocks
from spd_lens.training.run_files import RunFiles, open_run
from spd_lens.training.sharding import sharded
from spd_lens.training.step import accumulate_gradients, apply_gradients, faithfulness, set_learning_rates
from spd_lens.training.train_result import TrainResult

# Several processes agree on whether to stop at every so many steps.
STEPS_BETWEEN_QUESTIONS = 5


def train(
    decomposition: Decomposition,
    batches: Any,
    config: TrainConfig | None = None,
    *,
    out_dir: str | Path | None = None,
    resume_from: str | Path | None = None,
    loggers: Sequence[Logger] = (),
    evaluations: Evaluations | None = None,
    **changes: Any,
) -> TrainResult:
    """Train subcomponents and gates with SPD; the target is frozen meanwhile and gets its `requires_grad` back.

    - `batches`: any iterable of token batches `[batch pos]`, inputs, `Batch`es or dicts (see `spd_lens.data.batches`);
      repeated when it ends, if it can be.
    - `config` and `changes`: the choices, and fields to change in them: `train(d, batches, steps=5_000)`.
    - `out_dir`: the run's directory (log and checkpoints), by default `runs/<date>-<time>`.
    - `loggers`: functions `(step, values)` that get every log line as well; `spd_lens.training.wandb_logger` and
      `tensorboard_logger` make them, with figures of the importances every `figures_every` steps.
    - `evaluations`: when to evaluate on the way, and on what (`spd_lens.training.Evaluations`); nothing else changes.
    - `resume_from`: a run's directory or one of its checkpoints; model, decomposition and data must be the same, and
      what differs is named. The resumed run equals the uninterrupted one bit for bit on the same machine. Going on from
      an older checkpoint sets the newer ones aside.

    Ctrl-C finishes the current step, writes a checkpoint and returns with `interrupted=True`; a second one stops at
    once. SIGTERM, a scheduler's notice, writes a checkpoint and then ends the process. Gradients may be switched off
    around the call, the target may be in training mode: what a run needs is set, and put back. Raises ValueError for
    empty data, token ids out of range, and for losses or parameters that are NaN or infinite (the last good checkpoint,
    or the start, is put back into the decomposition).

    Under `torchrun` or `accelerate launch` every process calls this with the same arguments and takes its rows of every
    batch; what comes out is what one process trains, to the rounding of sums. The first process writes the files, and
    any number of processes goes on from them.
    """
    checked_decomposition(decomposition, "train")
    for logger in given_list("loggers", loggers, "functions (step, values)"):
        given_function("a logger", logger, "(step, values), such as wandb_logger() makes", 2)
    processes = join_processes(decomposition.device)
    files, checkpoint = _open_everywhere(processes, out_dir, resume_from, loggers)
    config = _resolve_config(config, changes, files if resume_from is not None else None)
    if config.offload and evaluations is not None:
        raise ValueError("offload=True with evaluations, which run the whole model; evaluate when the run is done")

    with stop_on_signals() as stop, training_conditions(decomposition), ExitStack() as running:
        step = 0 if checkpoint is None else checkpoint.step
        belongs = belongs_to(decomposition, config, batches if processes.is_main else None)
        check_same_run(processes, decomposition, config, batches, belongs, evaluations, step)
        belongs = processes.same(belongs)
        if resume_from is not None:
            _check_resumed(files, checkpoint, belongs)
        gathered = running.enter_context(sharded(decomposition)) if config.shard else nullcontext
        learner = make_learner(decomposition, config, processes)
        seen = SeenData(None if checkpoint is None else checkpoint.data)
        has_place = keeps_place(batches)
        if checkpoint is not None and (processes.is_main or has_place):
            batches = same_data(batches, checkpoint.data, str(checkpoint.path))
        # Without a place of its own, data is known by its hashes: the first process sees whole batches for them.
        own = batches.for_process(processes.rank, processes.count) if hasattr(batches, "for_process") else None
        shares = own is not None and (has_place or not processes.is_main)
        given = own if shares else batches
        stream = endless_batches(given, decomposition, start=step, whole=not shares or processes.count == 1)
        if checkpoint is not None:
            if step < config.steps:
                stream = started(stream)
            else:
                compare_now(batches)
        if processes.count > 1 and step < config.steps and not has_place:
            first = next(stream)
            check_same_rows(first, processes, is_whole=not shares)
            stream = chain([first], stream)
        if processes.is_main:
            running.enter_context(files.held())
            if resume_from is None:
                files.begin(config, belongs)
            else:
                files.continue_from(checkpoint, newest=_is_run(resume_from))
        if config.offload and step < config.steps:
            stream, start_at = _first_start(stream)
            running.enter_context(only_entered_blocks(decomposition, start_at, config.stop_at))
        # In every process, because all have to log at the same steps, and share out what is evaluated.
        evaluator = Evaluator.of(decomposition, evaluations, config.steps, processes.count)
        draws_every = processes.same(figure_steps(loggers))
        good = LastGood(learner, checkpoint)
        if checkpoint is None:
            _warm_up_faithfulness(learner, stop, processes)
        else:
            good.put_back()
        # The first step whose loss was not finite, as a number below 0: the largest is the earliest, on all processes.
        bad_step = torch.full((), -config.steps - 1, device=decomposition.device)
        began, first_step = time.perf_counter(), step
        interrupted = processes.any(stop.is_set(), decomposition.device)
        bar = tqdm(total=config.steps, initial=step, desc="SPD", unit="step", disable=not processes.is_main)

        while step < config.steps and not interrupted:
            whole = seen.note(next(stream))
            batch = (whole if shares else processes.own_rows(whole)).to(decomposition.device)
            set_learning_rates(learner, step)
            losses, active = accumulate_gradients(learner, batch, step)
            total = torch.stack([learner.weights.of(name) * loss for name, loss in losses.items()]).sum()
            norms = apply_gradients(learner)
            bad_step = torch.where((bad_step < -config.steps) & ~total.detach().isfinite(), -step, bad_step)
            step += 1
            bar.update()

            # Read once: a Ctrl-C that comes between here and the end of this turn must not skip the checkpoint.
            waits = step == config.steps or (step - 1) % config.log_every == 0  # for the device, whatever is asked
            interrupted = _agreed_to_stop(stop, processes, step, decomposition.device, waits=waits)
            is_last = step == config.steps or interrupted
            saves = is_last or (config.checkpoint_every is not None and step % config.checkpoint_every == 0)
            evaluates = evaluator is not None and evaluator.is_due(step)
            if saves or evaluates or (step - 1) % config.log_every == 0:
                if (failed := -int(processes.largest(bad_step))) <= config.steps:
                    bar.close()
                    good.give_up(f"the loss became NaN or infinite at step {failed}", losses)
                rate = (step - first_step) * batch.n_positions * processes.count / (time.perf_counter() - began)
                values = _log_values(total, losses, active, norms, learner, step - 1, rate, batch.position_mask)
                if evaluator is not None and evaluates:
                    with gathered():
                        values |= evaluator.values(step)
                if processes.is_main:
                    files.log(step - 1, values)
                bar.set_postfix({k: f"{values[k]:.3g}" for k in ("loss", "L0") if k in values}, refresh=False)
            if any((step - 1) % every == 0 for every in draws_every):
                with gathered():
                    if processes.is_main:
                        show_figures(loggers, step - 1, decomposition, batch, config.stop_at)
            if saves:
                if wrong := not_finite(decomposition):
                    bar.close()
                    good.give_up(f"{wrong} became NaN or infinite at step {step - 1}", losses)
                tensors = learner.tensors()
                path, place = None, place_of(given, processes)
                together = processes if learner.shared() else None
                if processes.is_main or together is not None:
                    data = place or (seen.until(whole, step - 1) if processes.is_main else {})
                    keep = config.keep_checkpoints
                    path = files.save(step, tensors, keep=keep, belongs=belongs, data=data, together=together)
                good.is_now(Checkpoint(processes.same(path), step, {}))
        bar.close()
        processes.wait()

    log = processes.same(files.read_log() if processes.is_main else None)
    final = {k: v for k, v in (log[-1] if log else {}).items() if k != "positions_per_second"}
    decomposition.training_record = {"config": config.to_json(), "steps": step, "final": final}
    if interrupted and processes.is_main:
        going_on = f"continue with resume_from={str(files.directory)!r}" if step else "nothing to go on from yet"
        tqdm.write(f"stopped after {step} steps; {going_on}", file=sys.stderr)
    return TrainResult(step, config, log, files.directory, interrupted)


def _open_everywhere(
    processes: Processes, out_dir: str | Path | None, resume_from: str | Path | None, loggers: Sequence[Logger]
) -> tuple[RunFiles, Checkpoint | None]:
    """The same run's files in every process. Raises ValueError for several processes without a directory."""
    if processes.count > 1 and out_dir is None and resume_from is None:
        raise ValueError(f"{processes.count} processes train together; give out_dir, the directory of their one run")
    if processes.is_main or resume_from is not None:
        opened = open_run(out_dir, resume_from, loggers)
    else:
        assert out_dir is not None
        opened = RunFiles(given_path(out_dir), ()), None
    processes.wait()
    return opened


def _agreed_to_stop(stop: Stop, processes: Processes, step: int, device: torch.device, *, waits: bool = False) -> bool:
    """Whether the run stops here; several processes ask each other every few steps, and where the step `waits` for the
    device anyway, so that all stop at the same."""
    if processes.count == 1:
        return stop.is_set()
    return (waits or step % STEPS_BETWEEN_QUESTIONS == 0) and processes.any(stop.is_set(), device)


def _first_start(stream: Iterator[Batch]) -> tuple[Iterator[Batch], int | None]:
    """The stream, and the block that its batches enter."""
    first = next(stream)
    return chain([first], stream), first.start_at


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


def _warm_up_faithfulness(learner: Learner, stop: Stop, processes: Processes) -> None:
    """L8: some steps on faithfulness alone, with an optimiser that is thrown away."""
    config = learner.config
    if config.faithfulness_warmup == 0:
        return
    parameters = learner.decomposition.subcomponent_parameters()
    optimizer = torch.optim.Adam(parameters, lr=config.faithfulness_warmup_lr)
    device = learner.decomposition.device
    for step in tqdm(range(config.faithfulness_warmup), desc="faithfulness warm-up", leave=False):
        if _agreed_to_stop(stop, processes, step, device):
            return
        faithfulness(learner).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


# -- setting up ------------------------------------------------------------------------------------------------------


def _resolve_config(config: TrainConfig | None, changes: Mapping[str, Any], resumed: RunFiles | None) -> TrainConfig:
    if config is not None:
        given_instance("config", config, TrainConfig, "TrainConfig(steps=100), or steps=100 alone")
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


# -- parts of a step ------------------------------------------------------------------------------------------------


def _log_values(
    total: Tensor,
    losses: Mapping[str, Tensor],
    active: Mapping[str, Tensor],
    norms: Mapping[str, Tensor],
    learner: Learner,
    step: int,
    rate: float,
    position_mask: Tensor | None,
) -> dict[str, float]:
    """One line of the log; the only place of the loop that waits for the device."""
    tensors = {"loss": total, **losses, **norms, **learner.weights.shown()}
    per_site = {f"L0/{n}": mean for n, mean in active.items()}
    names = [*tensors, *per_site]
    values = torch.stack([v.detach().float() for v in (*tensors.values(), *per_site.values())])
    if (weight := learner.processes.weight(position_mask)) is not None:
        values = values * weight
    line = dict(zip(names, learner.processes.mean(values).tolist(), strict=True))
    line["L0"] = sum(line[name] for name in per_site)
    line["lr"] = learner.optimizer.param_groups[0]["lr"]
    config = learner.config
    line |= {"p": config.p_at(step)} if config.penalty == "power" else {"gamma": config.gamma_at(step)}
    line["positions_per_second"] = round(rate, 1)
    return line
