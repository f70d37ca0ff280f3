"""A model's run as one job for every block: their files, shell lines and SLURM array, and what comes after them."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spd_lens.cli.run_file import RunFile
from spd_lens.cli.runs import decompose_run, load_run_data, open_run_model
from spd_lens.cli.sections import DataSection
from spd_lens.cli.yaml_file import ConfigError
from spd_lens.data import TokenBatches, write_residuals
from spd_lens.support.files import write_text
from spd_lens.training import ModelShape, sites_by_block

FINISH, MERGED = "finish.sh", "merged"


@dataclass(frozen=True)
class BlockJob:
    """One block's job: its file, its directory, and the shell line that trains it, or goes on."""

    block: int
    config: Path
    directory: Path

    @property
    def arguments(self) -> list[str]:
        """The arguments of `spd-lens`."""
        return ["train", str(self.config), "--out", str(self.directory), "--resume", "auto"]

    @property
    def line(self) -> str:
        """The shell line."""
        return shlex.join(["spd-lens", *self.arguments])


SBATCH = """\
#!/bin/bash
#SBATCH --job-name=spd-blocks
#SBATCH --array=0-{last}
#SBATCH --gpus-per-task=1
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
# Two minutes before the time is over a checkpoint is written; status 75 asks for the rest.
line=$(sed -n "$((SLURM_ARRAY_TASK_ID + 2))p" {lines})
bash -c "exec $line" &
trap 'kill -TERM $!; wait $!' TERM
wait $!
status=$?
[ $status -eq 75 ] && scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"
exit $status
"""


def split_blocks(
    run: RunFile, out: Path, *, streams: bool = False, local: bool = False, joint: int | None = None
) -> list[BlockJob]:
    """Write one run's file for every block with sites, `jobs.sh`, `array.sbatch` and `finish.sh`; nothing is trained.

    - `streams`: the model is run once over the data; otherwise nothing is loaded.
    - `local`: every job reconstructs the residual stream behind its block, and costs that block alone; with a read-out
      in the file, in its metric, but for the last block, which is trained on the logits.
    - `joint`: so many steps of all blocks at once follow in `finish.sh`, from what was merged, on the data of the file.

    Raises ConfigError for a model whose shape is not known, ValueError for patterns that name nothing.
    """
    shape = ModelShape.of(run.model.name)
    blocks = sites_by_block(shape.sites(run.decompose.sites))
    if joint is not None:
        _write_joint(run, out, joint)
    if streams:
        run = _on_streams(run, _write_streams(run, list(blocks), out / "streams"))
    jobs = []
    for block, own in blocks.items():
        job = BlockJob(block, out / f"block-{block:03d}.yaml", out / f"block-{block:03d}")
        section = run.decompose.model_copy(update={"sites": dict(own)})
        changes = {"decompose": section, "out_dir": str(job.directory)}
        if local:
            changes |= _local(run, block, is_last=block + 1 == shape.n_layers)
        run.model_copy(update=changes).write(job.config)
        jobs.append(job)
    write_text(out / "jobs.sh", "\n".join(["#!/bin/sh", *(job.line for job in jobs)]) + "\n")
    lines = shlex.quote(str(out / "jobs.sh"))
    write_text(out / "array.sbatch", SBATCH.format(last=len(jobs) - 1, lines=lines))
    merged = ["spd-lens", "merge", *(str(job.directory) for job in jobs), "--out", str(out / MERGED)]
    finish = [f"test -d {shlex.quote(str(out / MERGED))} || {shlex.join(merged)}"]
    if joint is not None:
        arguments = ["train", str(out / "joint.yaml"), "--out", str(out / "joint"), "--resume", "auto"]
        finish.append(shlex.join(["spd-lens", *arguments]))
    write_text(out / FINISH, "\n".join(["#!/bin/sh", "set -e", *finish]) + "\n")
    return jobs


def _on_streams(run: RunFile, data: DataSection) -> RunFile:
    """The run on cached streams, evaluated on the tokens that it was to be evaluated on."""
    if not run.evaluate.data:
        return run.model_copy(update={"data": data})
    own = {name: value for name, value in run.evaluation_data.model_dump().items() if value is not None}
    return run.model_copy(update={"data": data, "evaluate": run.evaluate.model_copy(update={"data": own})})


def _local(run: RunFile, block: int, *, is_last: bool) -> dict[str, Any]:
    """What of a run's file differs in a job that trains a block on its own output."""
    if run.readout is None:
        return {"train": run.train | {"stop_at": block + 1, "divergence": "relative_mse"}}
    if is_last:
        plain = {name: value for name, value in run.train.items() if name not in ("stop_at", "divergence")}
        return {"train": plain, "readout": None}
    return {"train": run.train | {"stop_at": block + 1, "divergence": "mse"}}


def _write_joint(run: RunFile, out: Path, steps: int) -> None:
    """The file of the run that goes on from the merged blocks: logits are compared, over all blocks."""
    plain = {name: value for name, value in run.train.items() if name not in ("stop_at", "divergence")}
    changes = {
        "decompose": run.decompose.model_copy(update={"start_from": str(out / MERGED)}),
        "train": plain | {"steps": steps},
        "readout": None,
        "out_dir": str(out / "joint"),
    }
    run.model_copy(update=changes).write(out / "joint.yaml")


def _write_streams(run: RunFile, blocks: list[int], directory: Path) -> DataSection:
    """Write what enters every block; the data section that reads it."""
    if run.data.stream:
        raise ConfigError(
            "--streams with stream: true; write the tokens first (TokenStream.write_tokens), give data.tokens"
        )
    if run.data.cache_residuals or run.data.residuals is not None:
        raise ConfigError("--streams with cached streams in the data section; leave cache_residuals and residuals away")
    model = open_run_model(run.model)
    decomposition = decompose_run(model, run.decompose)
    if not directory.exists():
        batches = load_run_data(run.data, decomposition)
        assert isinstance(batches, TokenBatches)
        write_residuals(decomposition, batches, blocks, directory)
    kept = {"batch_size": run.data.batch_size, "seed": run.data.seed, "exclude": run.data.exclude}
    return DataSection(residuals=str(directory), **kept)
