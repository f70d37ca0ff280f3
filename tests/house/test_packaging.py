"""What the package says of itself: every library that it imports is declared, the version stands in one place."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import spd_lens

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def names_of(requirements: list[str]) -> set[str]:
    """Normalised names, without versions and extras."""
    return {re.split(r"[<>=\[;~! ]", each)[0].lower().replace("_", "-") for each in requirements}


def test_every_library_that_the_package_imports_is_declared() -> None:
    declared = names_of(PROJECT["dependencies"])
    # Imported inside functions that say what to install.
    extras = PROJECT["optional-dependencies"]
    for name in ("plots", "loggers", "cluster", "components", "baselines", "notebook"):
        declared |= names_of(extras[name])
    # pandas and IPython come with TransformerLens; IPython is used where a notebook has loaded it.
    declared |= {"pandas", "ipython"}
    providers = packages_distributions()
    for path in (ROOT / "spd_lens").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module or ""]
            for module in {m.split(".")[0] for m in modules} - {"spd_lens"} - sys.stdlib_module_names:
                distributions = {name.lower().replace("_", "-") for name in providers.get(module, [module])}
                assert distributions & declared, f"{path} imports {module}, which pyproject.toml does not declare"


def test_the_version_stands_in_one_place_and_the_citation_has_it() -> None:
    assert "version" in PROJECT["dynamic"]
    assert f"version: {spd_lens.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_help_starts_with_what_to_call() -> None:
    first = (spd_lens.__doc__ or "")[:1500]
    for name in ("decompose_layer", "train", "evaluate", "harvest", "ablate"):
        assert f"{name}(" in first
        assert name == "ablate" or hasattr(spd_lens, name)
