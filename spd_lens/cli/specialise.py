"""`spd-lens specialise`: a smaller plain model of a trained decomposition, for the domain of a text."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from spd_lens.cli.output import JsonFlag, ends_in_words, show
from spd_lens.cli.runs import data_for, open_saved
from spd_lens.cli.yaml_file import ConfigError
from spd_lens.specialists import Costs, specialise

HELP = """Keep the subcomponents that a domain needs, write smaller matrices.

The domain is the run's evaluation data, or what --data says. Parameters, bytes, FLOPs, milliseconds and the loss before
and after are printed; the loss on rows of the domain that were not looked at, and with --other on another text. The
model that --out writes runs with torch alone.

Examples:

    spd-lens specialise runs/tiny --budget 0.7 --data speeches.yaml --out specialist

    spd-lens specialise runs/tiny --budget 600000 --distil-steps 100 --json
"""


@ends_in_words
def command(
    directory: Annotated[Path, typer.Argument(help="A run's directory or a saved decomposition.")],
    budget: Annotated[float, typer.Option(help="The most parameters, or below 1 a share of the model's.")],
    model: Annotated[str | None, typer.Option(help="The model, where the directory does not say it.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="A YAML file with the fields of a data section: the domain.")
    ] = None,
    other: Annotated[Path | None, typer.Option(help="The same for a text outside of the domain.")] = None,
    max_rows: Annotated[int, typer.Option(min=2, help="Rows of the domain to look at; as many are held out.")] = 64,
    write: Annotated[
        str, typer.Option(help="subcomponents, refitted, or whitened (the lowest loss): see the docs.")
    ] = "subcomponents",
    domain_tokens: Annotated[
        bool, typer.Option("--domain-tokens", help="Leave out embedding rows it never uses.")
    ] = False,
    distil_steps: Annotated[int, typer.Option(min=0, help="Steps of distillation afterwards.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the small model to this new directory.")] = None,
    json: JsonFlag = False,
) -> None:
    if not (budget > 0 and math.isfinite(budget)):
        raise ConfigError(f"--budget {budget}; expected a number of parameters, or below 1 a share of the model's")
    if out is not None and out.exists():
        raise ConfigError(f"--out {out} exists already; choose another name or remove it")
    decomposition, run = open_saved(directory, model)
    rows = _rows(data_for(decomposition, run, data), 2 * max_rows)
    texts = {"inside": rows[1::2]}
    if other is not None:
        texts["outside"] = _rows(data_for(decomposition, run, other), max_rows)
    made = specialise(
        decomposition,
        rows[::2],
        budget if budget < 1 else int(budget),
        write=write,  # pyright: ignore[reportArgumentType]
        tokens="domain" if domain_tokens else "all",
        distil_steps=distil_steps,
    )
    costs, losses = made.costs(rows[:8]), made.losses(**texts)
    written = None if out is None else made.save(out, tokenizer=decomposition.host.tokenizer())
    values: dict[str, Any] = {
        "costs": {when: asdict(cost) for when, cost in costs.items()},
        "losses": {where: {"before": pair[0], "after": pair[1]} for where, pair in losses.items()},
        "kept": {site: None if kept is None else list(kept) for site, kept in made.kept.items()},
        "written": None if written is None else str(written),
    }
    lines = [str(made), *(f"{when}: {_in_words(cost)}" for when, cost in costs.items())]
    lines += [f"loss {where}: {pair[0]:.3f} before, {pair[1]:.3f} after" for where, pair in losses.items()]
    show("\n".join(lines + ([] if written is None else [f"written: {written}"])), values, as_json=json)


def _in_words(costs: Costs) -> str:
    return (
        f"{costs.parameters:,} parameters, {costs.bytes / 1e6:.2f} MB, {costs.flops / 1e6:,.0f} MFLOP and "
        f"{costs.milliseconds:.1f} ms for {costs.timed_on[0]} x {costs.timed_on[1]} tokens"
    )


def _rows(batches: Any, count: int) -> torch.Tensor:
    found: list[torch.Tensor] = []
    for batch in batches.once() if hasattr(batches, "once") else batches:
        if batch.tokens is None or batch.attention_mask is not None:
            raise ConfigError("a specialist is made of whole rows of tokens; leave residual streams and padding away")
        found.append(batch.tokens)
        if sum(len(part) for part in found) >= count:
            break
    rows = torch.cat(found)[:count]
    if len(rows) < 2:
        raise ConfigError("the domain has fewer than two rows: one to look at and one held out are the least")
    return rows
