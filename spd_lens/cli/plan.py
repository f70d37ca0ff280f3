"""`spd-lens plan`: what a run will cost, calculated; and a model's run as one job for every block."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from spd_lens.cli.block_jobs import FINISH, split_blocks
from spd_lens.cli.jobs import statuses_of
from spd_lens.cli.jobs import submit as submit_jobs
from spd_lens.cli.output import DONE, FAILED, JsonFlag, about_what_was_asked, ends_in_words, refuse_options, show
from spd_lens.cli.run_file import RunFile
from spd_lens.cli.runs import tokens_of_a_row
from spd_lens.cli.yaml_file import ConfigError, read_yaml, with_changes
from spd_lens.training import DEVICES, ModelShape, TrainConfig, plan

HELP = """Calculate bytes by kind, FLOPs by term and tokens a second of a run; no weights are loaded.

Give CONFIG, or --model with --sites and --C. --model is a known shape, or a folder with a config.json.

With --split blocks, CONFIG becomes one run's file for every block, with the shell lines (jobs.sh) and a SLURM array
(array.sbatch) that train them, in --out; finish.sh puts what they train together, and with --joint STEPS trains on with
all blocks at once. With --streams the model runs once over the data, and what enters each block is written to
OUT/streams, which the jobs read. --submit slurm (or local) hands the jobs to submitit, with --job NAME=VALUE.

Examples:

    spd-lens plan --model gpt2 --sites "blocks.*.mlp.W_*" --C 1152 --gpus 1 --device a100

    spd-lens plan --model llama-3-8b --sites "blocks.16.mlp.W_*" --gpus 8 --batch-size 64 --context 512 --device h100

    spd-lens plan config.yaml --device cpu --json --set train.accumulate=4 --set train.recompute=all

    spd-lens plan config.yaml --split blocks --streams --out jobs

    spd-lens plan config.yaml --split blocks --local --joint 2000 --out jobs --submit slurm --job slurm_partition=gpu
"""

# What a run's file says, and where.
OF_CONFIG = {
    "sites": "decompose.sites",
    "C": "decompose.sites",
    "gate": "decompose.gate",
    "gate_width": "decompose.gate_width",
    "batch_size": "data.batch_size",
    "context": "data.context",
    "precision": "train.precision",
    "accumulate": "train.accumulate",
    "recompute": "train.recompute",
    "cached": "data.cache_residuals",
    "shard": "train.shard",
}


@ends_in_words
@about_what_was_asked
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
    shard: Annotated[bool, typer.Option("--shard", help="Ranks share out V, U, gates and their moments.")] = False,
    device: Annotated[str | None, typer.Option(help=f"One of {', '.join(DEVICES)}.")] = None,
    utilisation: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the rated rate.")] = 0.3,
    split: Annotated[str | None, typer.Option(help="blocks: one job for every block.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the jobs go.")] = None,
    local: Annotated[bool, typer.Option("--local", help="Jobs train on their block's own output.")] = False,
    streams: Annotated[bool, typer.Option("--streams", help="Also write what enters every block, once.")] = False,
    joint: Annotated[int | None, typer.Option(min=1, help="Steps with all blocks at once, afterwards.")] = None,
    submit: Annotated[str | None, typer.Option(help="slurm or local: hand the jobs to submitit.")] = None,
    job: Annotated[list[str] | None, typer.Option(help="NAME=VALUE for submitit; repeatable.")] = None,
    json: JsonFlag = False,
) -> None:
    _refuse_what_is_not_read(config, split, submit, device)
    if split is not None:
        if split != "blocks" or config is None or out is None:
            raise ConfigError("--split needs CONFIG and --out: spd-lens plan config.yaml --split blocks --out jobs")
        _split(RunFile.read(config, set or []), out, streams, local, joint, submit, job or [], json)
        return
    if config is not None:
        file = with_changes(read_yaml(config), set or [])
        run = RunFile.of(file)
        with file.named():
            context = tokens_of_a_row(run.data)
        found = plan(
            ModelShape.of(model or run.model.name),
            run.decompose.sites,
            run.train_config,
            batch_size=run.data.batch_size,
            context=context,
            gate=run.decompose.gate,  # pyright: ignore[reportArgumentType]
            gate_width=run.decompose.gate_width,
            gpus=gpus,
            target_bytes=4 if run.model.dtype == "float32" else 2,
            cached=run.data.cache_residuals or run.data.residuals is not None,
            device=device,
            utilisation=utilisation,
        )
    else:
        if model is None or not sites:
            raise ConfigError("give CONFIG, or --model and --sites: --model gpt2 --sites 'blocks.5.mlp.W_*'")
        try:
            train = TrainConfig().changed(precision=precision, accumulate=accumulate, recompute=recompute, shard=shard)
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


def _refuse_what_is_not_read(config: Path | None, split: str | None, submit: str | None, device: str | None) -> None:
    if split is None:
        of_jobs = ("out", "local", "streams", "joint", "submit", "job")
        refuse_options(of_jobs, "is for jobs by block; add --split blocks --out jobs")
    else:
        refuse_options(("model", "gpus", "device", "utilisation"), "is not for --split, whose jobs are as CONFIG says")
    if submit is None:
        refuse_options(["job"], "is for --submit")
    if device is None:
        refuse_options(["utilisation"], "is for --device")
    if config is None:
        refuse_options(["set"], "changes a field of CONFIG; give one")
        return
    for name, field in OF_CONFIG.items():
        refuse_options([name], f"is for --model without CONFIG, which says it: --set {field}=...")


def _split(
    run: RunFile,
    out: Path,
    streams: bool,
    local: bool,
    joint: int | None,
    cluster: str | None,
    options: Sequence[str],
    as_json: bool,
) -> None:
    """Write the jobs, submit them if asked to, and say what to do next."""
    jobs = split_blocks(run, out, streams=streams, local=local, joint=joint)
    finish = out / FINISH
    values: list[dict[str, Any]] = [{"block": j.block, "config": str(j.config), "line": j.line} for j in jobs]
    where = f"{len(jobs)} jobs: {out / 'jobs.sh'}, or sbatch {out / 'array.sbatch'}; then sh {finish}"
    if cluster is not None:
        submitted = submit_jobs([[j.arguments] for j in jobs], out / "submitit", cluster=cluster, options=options)
        for value, own in zip(values, submitted, strict=True):
            value["job"] = str(own.job_id)
        where = f"{len(jobs)} jobs submitted to {cluster}, logs in {out / 'submitit'}; then sh {finish}"
        if cluster == "local":
            # They are children of this process: it waits for them.
            for value, status in zip(values, statuses_of(submitted), strict=True):
                value["status"] = status
    show("\n".join([where, *(j.line for j in jobs)]), {"jobs": values, "finish": str(finish)}, as_json=as_json)
    if any(value.get("status", DONE) != DONE for value in values):
        raise typer.Exit(FAILED)
