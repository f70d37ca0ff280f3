"""`spd-lens browse`: a harvest as pages that open from disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spd_lens.cli.output import JsonFlag, ends_in_words, show
from spd_lens.statistics import Harvest

HELP = """Write a browser of all subcomponents: a list and a page for each, as files that open from disk.

It shows what `spd-lens harvest` has saved.

Examples:

    spd-lens browse runs/tiny

    spd-lens browse runs/tiny --labels labels.json --max-pages 500 --out pages
"""


@ends_in_words
def command(
    directory: Annotated[Path, typer.Argument(help="A run's directory with a harvest, or that of a harvest.")],
    labels: Annotated[Path | None, typer.Option(help="Labels that the pages exported.")] = None,
    title: Annotated[str | None, typer.Option(help="What stands above the list; by default the directory.")] = None,
    max_pages: Annotated[int | None, typer.Option(min=1, help="Pages of the most used alone.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the pages go; by default HARVEST/pages.")] = None,
    json: JsonFlag = False,
) -> None:
    own = directory / "harvest"
    where = own if own.is_dir() else directory
    index = Harvest.load(where).to_html(
        out or where / "pages", title=title or str(directory), labels=labels, max_pages=max_pages
    )
    n_pages = sum(1 for _ in index.parent.glob("s*/*.html"))
    show(f"{n_pages} pages; open {index}", {"pages": n_pages, "index": str(index)}, as_json=json)
