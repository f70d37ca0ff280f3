"""`spd-lens merge`: the decompositions of blocks as one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spd_lens.cli.output import JsonFlag, ends_in_words, show
from spd_lens.cli.run_file import RunFile
from spd_lens.cli.runs import DECOMPOSITION, RUN_FILE, open_run_model, require_directory
from spd_lens.cli.sections import ModelSection
from spd_lens.cli.yaml_file import ConfigError
from spd_lens.training import merge_decompositions

HELP = """Put decompositions of different sites of one model together, for example those of a job for every block.

To train on with all blocks at once, begin from what was merged: decompose: {sites: ..., start_from: MERGED}.

Examples:

    spd-lens merge jobs/block-000 jobs/block-001 --out merged

    spd-lens merge part-a part-b --model gpt2 --out merged
"""


@ends_in_words
def command(
    directories: Annotated[list[Path], typer.Argument(help="Runs' directories or saved decompositions.")],
    out: Annotated[Path, typer.Option(help="The directory to write.")],
    model: Annotated[str | None, typer.Option(help="The model, where the directories do not say it.")] = None,
    json: JsonFlag = False,
) -> None:
    for directory in directories:
        require_directory(directory)
    run_path = directories[0] / RUN_FILE
    if model is None and not run_path.is_file():
        raise ConfigError(f"{directories[0]} does not say which model it is of; give --model")
    section = ModelSection(name=model) if model is not None else RunFile.read(run_path).model
    saved = [path / DECOMPOSITION if (path / RUN_FILE).is_file() else path for path in directories]
    unfinished = [path.parent for path in saved if not path.is_dir()]
    if unfinished:
        raise ConfigError(f"the run in {unfinished[0]} has not ended; go on with: spd-lens train ... --resume auto")
    merged = merge_decompositions(open_run_model(section), saved)
    written = merged.save_pretrained(out)
    show(f"{merged.summary()}\nwritten: {written}", {"written": str(written), "sites": list(merged)}, as_json=json)
