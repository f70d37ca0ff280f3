"""`spd-lens export`: a trained decomposition as a directory for others, or on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spd_lens.cli.output import JsonFlag, ends_in_words, refuse_options, show
from spd_lens.cli.runs import DECOMPOSITION, open_saved
from spd_lens.cli.yaml_file import ConfigError
from spd_lens.components import Components
from spd_lens.core import Decomposition

HELP = """Write a trained decomposition with its card to a directory, or push it to the Hugging Face Hub.

A `components.json` that lies beside it goes with it.

Examples:

    spd-lens export runs/tiny --out tiny-spd --license mit

    spd-lens export runs/tiny --hub you/tiny-spd --private
"""


@ends_in_words
def command(
    directory: Annotated[Path, typer.Argument(help="A run's directory or a saved decomposition.")],
    out: Annotated[Path | None, typer.Option(help="The directory to write.")] = None,
    hub: Annotated[str | None, typer.Option(help="A repository on the Hub, owner/name.")] = None,
    model: Annotated[str | None, typer.Option(help="The model, where the directory does not say it.")] = None,
    license: Annotated[str, typer.Option(help="For the card, in the Hub's words.")] = "other",
    private: Annotated[bool, typer.Option("--private", help="A private repository.")] = False,
    json: JsonFlag = False,
) -> None:
    if (out is None) == (hub is None):
        raise ConfigError("give either --out, a directory, or --hub, a repository")
    if hub is None:
        refuse_options(["private"], "is for --hub")
    decomposition, run = open_saved(directory, model)
    components = _components(directory if run is None else directory / DECOMPOSITION, decomposition)
    if out is not None:
        where = str(decomposition.save_pretrained(out, license=license))
        if components is not None:
            components.save(out)
    else:
        assert hub is not None
        where = decomposition.push_to_hub(hub, private=private, license=license, components=components)
    show(f"{decomposition.summary()}\nwritten: {where}", {"written": where, "sites": list(decomposition)}, as_json=json)


def _components(directory: Path, decomposition: Decomposition) -> Components | None:
    path = directory / "components.json"
    return Components.load(path, decomposition) if path.is_file() else None
