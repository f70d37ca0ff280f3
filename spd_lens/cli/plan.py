"""`spd-lens plan`: what a run will cost, calculated; and a model's run as one job for every block."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from spd_lens.cli.output import JsonFlag, ends_in_words, show
from spd_lens.cli.run_file import DataSection, RunFile
from spd_lens.cli.runs import decompose_run, load_run_data, open_run_model
from spd_lens.cli.yaml_file import ConfigError
from spd_lens.data import write_residuals
from spd_lens.support.files import write_text
from spd_lens.training import DEVICES, ModelShape, TrainConfig, plan, sites_by_block

HELP = """Calculate bytes by kind, FLOPs by term and tokens a second of a run; no weights are loaded.

Give CONFIG, or --model with --sites and --C. --model is a known shape, or a folder with a config.json.

With --split blocks, CONFIG becomes one run's file for every block, with the shell lines (jobs.sh) and a SLURM array
(array.sbatch) that train them, in --out; `spd-lens merge` puts what they train together. With --streams the model runs
once over the data, and what enters each block is written to OUT/streams, which the jobs read.

Examples:

    spd-lens plan --model gpt2 --sites "blocks.*.mlp.W_*" --C 1152 --gpus 1 --device a100

    spd-lens plan --model llama-3-8b --sites "blocks.16.mlp.W_*" --gpus 8 --batch-size 64 --context 512 --device h100

    spd-lens plan config.yaml --device cpu --json --set train.accumulate=4 --set train.recompute=all

    spd-lens plan config.yaml --split blocks --streams --out jobs
"""


@ends_in_words
def command(
    config: Annotated[Path | None, typer.Argument(help="A run's YAML file.")] = None,
    set: Annotated[list[str] | None, typer.Option("--set", help="FIELD=VALUE in CONFIG.")] = None,
    model: Annotated[str | None, typer.Option(help="A known shape, or a folder with a config.json.")] = None,
    sites: Annotated[list[str] | None, typer.Option(help="Patterns of sites; repeatable.")] = None,
    C: Annotated[int | None, typer.Option("--C", min=1, help="Of every site; by default 1.5 x rank.")] = None,
    gate: Annotated[str, typer.Option(help="shared, scalar or vector.")] = "shared",
    gate_width: Annotated[int | None, typer.Option(min=1, help="Hidden width of a gate.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a batch, all ranks together.")] = 8,
    context: Annotated[int, typer.Option(min=2, help="Tokens of a row.")] = 128,
    gpus: Annotated[int, typer.Option(min=1, help="Ranks.")] = 1,
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    accumulate: Annotated[int, typer.Option(min=1, help="Parts of a batch, one after the other.")] = 1,
    recompute: Annotated[str, typer.Option(help="none, gates, passes or all.")] = "none",
    cached: Annotated[bool, typer.Option("--cached", help="On cached residual streams.")] = False,
    device: Annotated[str | None, typer.Option(help=f"One of {', '.join(DEVICES)}.")] = None,
    utilisation: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the rated rate.")] = 0.3,
    split: Annotated[str | None, typer.Option(help="blocks: one job for every block.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the jobs go.")] = None,
    local: Annotated[bool, typer.Option("--local", help="Jobs train on their block's own output.")] = False,
    streams: Annotated[bool, typer.Option("--streams", help="Also write what enters every block, once.")] = False,
    json: JsonFlag = False,
) -> None:
    if split is not None:
        if split != "blocks" or config is None or out is None:
            raise ConfigError("--split needs CONFIG and --out: spd-lens plan config.yaml --split blocks --out jobs")
        jobs = split_blocks(RunFile.read(config, set or []), out, streams=streams, local=local)
        values = [{"block": job.block, "config": str(job.config), "line": job.line} for job in jobs]
        where = f"{len(jobs)} jobs: {out / 'jobs.sh'}, or sbatch {out / 'array.sbatch'}"
        show("\n".join([where, *(job.line for job in jobs)]), {"jobs": values}, as_json=json)
        return
    if config is not None:
        run = RunFile.read(config, set or [])
        found = plan(
            ModelShape.of(model or run.model.name),
            run.decompose.sites,
            run.train_config,
            batch_size=run.data.batch_size,
            context=run.data.context,
            gate=run.decompose.gate,  # pyright: ignore[reportArgumentType]
            gate_width=run.decompose.gate_width,
            gpus=gpus,
            target_bytes=4 if run.model.dtype == "float32" else 2,
            cached=run.data.cache_residuals,
            device=device,
            utilisation=utilisation,
        )
    else:
        if model is None or not sites:
            raise ConfigError("give CONFIG, or --model and --sites: --model gpt2 --sites 'blocks.5.mlp.W_*'")
        try:
            train = TrainConfig().changed(precision=precision, accumulate=accumulate, recompute=recompute)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        found = plan(
            ModelShape.of(model),
            dict.fromkeys(sites, C),
            train,
            batch_size=batch_size,
            context=context,
            gate=gate,  # pyright: ignore[reportArgumentType]
            gate_width=gate_width,
            gpus=gpus,
            target_bytes=4 if precision == "fp32" else 2,
            cached=cached,
            device=device,
            utilisation=utilisation,
        )
    show(str(found), found.to_json(), as_json=json)


@dataclass(frozen=True)
class BlockJob:
    """One block's job: its file, its directory, and the shell line that trains it, or goes on."""

    block: int
    config: Path
    directory: Path

    @property
    def line(self) -> str:
        """The shell line."""
        config, directory = shlex.quote(str(self.config)), shlex.quote(str(self.directory))
        return f"spd-lens train {config} --out {directory} --resume auto"


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


def split_blocks(run: RunFile, out: Path, *, streams: bool = False, local: bool = False) -> list[BlockJob]:
    """Write one run's file for every block with sites, `jobs.sh` and `array.sbatch`; nothing is trained.

    With `streams` the model is run once over the data; otherwise nothing is loaded. With `local` every job reconstructs
    the residual stream behind its block, and costs that block alone.

    Raises ConfigError for a model whose shape is not known, ValueError for patterns that name nothing.
    """
    blocks = sites_by_block(ModelShape.of(run.model.name).sites(run.decompose.sites))
    if streams:
        run = run.model_copy(update={"data": _write_streams(run, list(blocks), out / "streams")})
    jobs = []
    for block, own in blocks.items():
        job = BlockJob(block, out / f"block-{block:03d}.yaml", out / f"block-{block:03d}")
        section = run.decompose.model_copy(update={"sites": dict(own)})
        train = run.train | ({"stop_at": block + 1, "divergence": "relative_mse"} if local else {})
        changed = run.model_copy(update={"decompose": section, "train": train, "out_dir": str(job.directory)})
        changed.write(job.config)
        jobs.append(job)
    write_text(out / "jobs.sh", "\n".join(["#!/bin/sh", *(job.line for job in jobs)]) + "\n")
    lines = shlex.quote(str(out / "jobs.sh"))
    write_text(out / "array.sbatch", SBATCH.format(last=len(jobs) - 1, lines=lines))
    return jobs


def _write_streams(run: RunFile, blocks: list[int], directory: Path) -> DataSection:
    """Write what enters every block; the data section that reads it."""
    if run.data.cache_residuals or run.data.residuals is not None:
        raise ConfigError("--streams with cached streams in the data section; leave cache_residuals and residuals away")
    model = open_run_model(run.model)
    decomposition = decompose_run(model, run.decompose)
    if not directory.exists():
        write_residuals(decomposition, load_run_data(run.data, decomposition), blocks, directory)
    kept = {"batch_size": run.data.batch_size, "seed": run.data.seed, "exclude": run.data.exclude}
    return DataSection(residuals=str(directory), **kept)
