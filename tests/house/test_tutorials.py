"""The tutorials run from top to bottom, are committed without outputs, and their folded solutions are right."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

TUTORIALS = sorted((Path(__file__).parents[2] / "tutorials").glob("*.ipynb"))


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_a_tutorial_is_committed_without_outputs_and_is_short(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert len(notebook.cells) <= 40
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@pytest.mark.tutorial
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_a_tutorial_runs_and_its_solutions_pass(path: Path) -> None:
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    # After the last cell: every folded solution, then the exercises' own tests, which are commented out for readers.
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    solutions = re.findall(r"<details>.*?```python\n(.*?)```", text, re.DOTALL)
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    checks = re.findall(r"^# (test_\w+\(.*\))$", code, re.MULTILINE)
    assert len(solutions) == len(checks) > 0
    notebook.cells.append(nbformat.v4.new_code_cell("\n".join(solutions + checks)))
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
