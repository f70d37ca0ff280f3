"""`spd-lens edit`: scale subcomponents of a trained decomposition, look at what changes, keep the edit, bake it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from spd_lens.cli.output import JsonFlag, ends_in_words, show
from spd_lens.cli.runs import data_for, open_saved
from spd_lens.cli.yaml_file import ConfigError
from spd_lens.data import first_batches
from spd_lens.editing import edit, save_baked, save_edit
from spd_lens.objective import divergence_per_position

HELP = """Scale subcomponents, 0 takes them away: what that changes on the run's data, and a plain model of it.

--scale SITE:IDS=FACTOR; IDS are numbers with commas between them. The KL divergence of the edited model from the
target is measured on batches of the run's evaluation data.

Examples:

    spd-lens edit runs/tiny --scale blocks.1.mlp.W_in:3,17=0

    spd-lens edit runs/tiny --scale blocks.1.mlp.W_in:3=0.5 --save edit.json --bake edited_model
"""


@ends_in_words
def command(
    directory: Annotated[Path, typer.Argument(help="A run's directory or a saved decomposition.")],
    scale: Annotated[list[str], typer.Option(help="SITE:IDS=FACTOR; repeatable.")],
    model: Annotated[str | None, typer.Option(help="The model, where the directory does not say it.")] = None,
    data: Annotated[Path | None, typer.Option(help="A YAML file with the fields of a data section.")] = None,
    max_batches: Annotated[int, typer.Option(min=1, help="Batches to measure on.")] = 2,
    save: Annotated[Path | None, typer.Option(help="Write the edit to this JSON file.")] = None,
    bake: Annotated[Path | None, typer.Option(help="Write the changed plain model to this new directory.")] = None,
    json: JsonFlag = False,
) -> None:
    changes = read_changes(scale)
    if bake is not None and bake.exists():
        raise ConfigError(f"--bake {bake} exists already; choose another name or remove it")
    decomposition, run = open_saved(directory, model)
    made = edit(decomposition, changes)
    kl: list[torch.Tensor] = []
    top: list[torch.Tensor] = []
    with torch.no_grad():
        batches = data_for(decomposition, run, data)
        for batch in first_batches(batches, decomposition, max_batches, purpose="measure an edit on"):
            if batch.tokens is None:
                raise ConfigError("an edit is measured on tokens; leave cached residual streams away")
            if batch.attention_mask is not None:
                raise ConfigError("an edit is measured on whole rows of tokens; leave padding on the left away")
            tokens = batch.tokens.to(decomposition.device)
            clean, edited = decomposition.host.forward(tokens), made.logits(tokens)
            counts = torch.ones_like(tokens, dtype=torch.bool)
            counts = counts if batch.position_mask is None else batch.position_mask.to(counts.device)
            kl.append(divergence_per_position(clean, edited)[counts])
            top.append((clean.argmax(-1) != edited.argmax(-1))[counts].float())
    values: dict[str, Any] = {
        "edit": str(made),
        "kl": float(torch.cat(kl).mean()),
        "top_changes": float(torch.cat(top).mean()),
        "positions": sum(len(part) for part in kl),
        "saved": None if save is None else str(save_edit(made, save)),
        "baked": None if bake is None else str(save_baked(made.bake(), bake)),
    }
    text = f"{made}\nKL from the target {values['kl']:.4g}, another top token at {values['top_changes']:.1%} of "
    text += f"{values['positions']:,} positions"
    for name in ("saved", "baked"):
        text += f"\n{name}: {values[name]}" if values[name] else ""
    show(text, values, as_json=json)


def read_changes(scale: list[str]) -> dict[str, dict[int, float]]:
    """`{site: {id: factor}}` of `SITE:IDS=FACTOR`s. Raises ConfigError for text that is none."""
    changes: dict[str, dict[int, float]] = {}
    for text in scale:
        where, _, factor = text.partition("=")
        site, _, ids = where.rpartition(":")
        try:
            new = [(int(c), float(factor)) for c in ids.split(",")]
        except ValueError:
            raise ConfigError(f"--scale {text!r}; expected SITE:IDS=FACTOR: blocks.1.mlp.W_in:3,17=0") from None
        for number, scaled in new:
            if number in changes.setdefault(site, {}):
                raise ConfigError(f"--scale {text!r}: {site}:{number} is named twice; name every subcomponent once")
            changes[site][number] = scaled
    return changes
