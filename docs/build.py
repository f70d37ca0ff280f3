"""The site: `make docs` (or `python docs/build.py --no-execute`, which leaves the tutorials' outputs out).

Pages are gathered in build/docs: those of docs/, README, CONTRIBUTING, CHANGELOG and experiments/README.md with their
links set right, a page for every face of the package, and the tutorials, executed here (they are committed without
outputs).
An executed tutorial is kept in build/tutorials until its text or the package changes. Then `mkdocs build --strict`:
a broken link is an error.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import nbformat
import typer
import yaml

ROOT = Path(__file__).resolve().parents[1]
STAGED, EXECUTED = ROOT / "build" / "docs", ROOT / "build" / "tutorials"
# Material announces its successor in every build.
QUIET = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
# Where pages that stand elsewhere in the repository go.
MOVED = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "experiments/README.md": "experiments.md",
}


def main(
    execute: Annotated[bool, typer.Option(help="Execute the tutorials, about ten minutes on two cores.")] = True,
) -> None:
    os.chdir(ROOT)
    # What tqdm.auto, imported by other libraries, says in a kernel without ipywidgets.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")
    shutil.rmtree(STAGED, ignore_errors=True)
    STAGED.mkdir(parents=True)
    for page in [*MOVED, *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").glob("*.md")))]:
        stage(page)
    for path in (ROOT / "docs" / "demo.txt", ROOT / "docs" / "site.css"):
        shutil.copy(path, STAGED)
    for path in sorted((ROOT / "tutorials").glob("*.ipynb")):
        target = STAGED / "tutorials" / path.name
        target.parent.mkdir(exist_ok=True)
        shutil.copy(executed(path) if execute else path, target)
    for face in faces():
        target = STAGED / "api" / f"{face.rpartition('.')[2]}.md"
        target.parent.mkdir(exist_ok=True)
        target.write_text(f"# {face}\n\n::: {face}\n", encoding="utf-8")
    built = subprocess.run([sys.executable, "-m", "mkdocs", "build", "-q", "--strict", "-f", "mkdocs.yml"], env=QUIET)
    raise typer.Exit(built.returncode)


def stage(page: str) -> None:
    """Copy a page with its links set right for the site, and the pictures that it shows."""
    source = ROOT / page

    def set_right(found: re.Match[str]) -> str:
        link, anchor = found[1], found[2] or ""
        target = os.path.normpath(os.path.join(os.path.dirname(page), link))
        if not (ROOT / target).exists():
            raise SystemExit(f"{page}: the link {link} leads nowhere")
        placed = MOVED.get(target, target.removeprefix("docs/"))
        if Path(target).suffix not in (".md", ".ipynb"):
            (STAGED / placed).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / target, STAGED / placed)
        return f"]({placed}{anchor})"

    text = re.sub(r"\]\(((?!https?:|#)[^)#\s]+)(#[^)\s]*)?\)", set_right, source.read_text(encoding="utf-8"))
    (STAGED / MOVED.get(page, Path(page).name)).write_text(text, encoding="utf-8")


def executed(path: Path) -> Path:
    """The tutorial with its outputs; what has been executed since the last change is not executed again."""
    from nbclient import NotebookClient

    sources = [path, *sorted((ROOT / "spd_lens").rglob("*.py"))]
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
    done = EXECUTED / f"{path.stem}-{digest}.ipynb"
    if not done.is_file():
        print(f"executing {path.name}", flush=True)
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=1200, kernel_name="python3").execute()
        EXECUTED.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, done)
    return done


def faces() -> list[str]:
    """`spd_lens` and its packages, as mkdocs.yml lists them."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    (api,) = [entry["API"] for entry in yaml.safe_load(text)["nav"] if "API" in entry]
    names = [name for entry in api for name in entry]
    return [name if name == "spd_lens" else f"spd_lens.{name}" for name in names]


if __name__ == "__main__":
    typer.run(main)
