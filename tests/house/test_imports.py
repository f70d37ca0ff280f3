"""The house: packages import downwards only, hosts stand alone, users see faces, importing costs little."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import networkx as nx
import pytest

import spd_lens
from tests.conftest import TL_MAJOR

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "spd_lens"

# A package may import those on the lines above its own, none beside it.
LEVELS = [
    {"support"},
    {"hosts"},
    {"core"},
    {"objective", "data", "tasks", "patching"},
    {"evaluation", "statistics", "circuits"},
    {"training", "graphs", "components", "editing", "specialists"},
    {"pictures"},
    {"audit"},
    {"models"},
    {"toys"},
    {"baselines"},
    {""},
    {"cli"},
    {"__main__"},
]
BESIDE = {"models", "toys", "baselines"}
# The profile marks the functions that a step calls, and measures the blocks of memory that are kept; the benchmark of
# a step has to know how many go before a recording.
ALLOWED_INSIDE = {"measure.py": {"workspace", "step", "masked_terms", "parts"}, "step.py": {"cuda_graphs"}}
SOURCES = sorted(PACKAGE.rglob("*.py"))


def _module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _package_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def _imports(path: Path) -> set[str]:
    """Modules of this package that a file imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "spd_lens":
            found.add(node.module)
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.split(".")[0] == "spd_lens"}
    return found


def test_packages_import_downwards_only() -> None:
    level = {name: i for i, names in enumerate(LEVELS) for name in names}
    for path in SOURCES:
        own = _package_of(_module_name(path))
        assert own in level, f"the package {own!r} is not drawn in LEVELS"
        for imported in map(_package_of, _imports(path)):
            assert imported == own or level[imported] < level[own], f"{path} imports {imported!r}"
            assert imported not in BESIDE or own in {*BESIDE, "", "cli"}, (
                f"{path} imports {imported!r}, beside the house"
            )


def test_no_package_has_a_cycle_inside() -> None:
    graph = nx.DiGraph()
    for path in SOURCES:
        module = _module_name(path)
        graph.add_edges_from((module, imported) for imported in _imports(path))
    assert list(nx.simple_cycles(graph)) == []


def test_a_face_is_a_module_and_no_file_hides_behind_a_function() -> None:
    for package in (spd_lens, *_faces()):
        for found in pkgutil.iter_modules(package.__path__):
            name = f"{package.__name__}.{found.name}"
            importlib.import_module(name)
            assert isinstance(getattr(package, found.name), ModuleType), f"{name} is a file and a function at once"


@pytest.mark.parametrize(
    ("function", "module"),
    {"decompose": "core", "evaluate": "evaluation", "harvest": "statistics", "train": "training"}.items(),
)
def test_a_function_of_the_face_stays_one_and_its_module_has_another_name(function: str, module: str) -> None:
    with pytest.raises(ModuleNotFoundError, match=f"spd_lens.{function}"):
        importlib.import_module(f"spd_lens.{function}")
    package = importlib.import_module(f"spd_lens.{module}")
    assert isinstance(getattr(spd_lens, module), ModuleType)
    # Importing every file of the package, in any order, hides neither.
    for found in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{found.name}")
    assert inspect.isfunction(getattr(spd_lens, function))
    assert getattr(package, function) is getattr(spd_lens, function)


def _faces() -> Iterator[ModuleType]:
    for found in pkgutil.iter_modules(spd_lens.__path__):
        if found.ispkg:
            yield importlib.import_module(f"spd_lens.{found.name}")


@pytest.mark.parametrize(
    ("name", "module"),
    {
        "Subcomponents": "core.subcomponents",
        "SiteMask": "core.masks",
        "DecomposedWeight": "core.decomposed_weight",
        "FactoredWeight": "core.factored_weight",
        "Decomposition": "core.decomposition",
        "Unit": "core.units",
        "Checkpoint": "training.checkpoint",
        "Circuit": "circuits.circuit",
        "AttributionGraph": "graphs.graph",
        "Components": "components.components",
        "Merging": "components.merging",
        "Task": "tasks.task",
        "Recovery": "toys.recovery",
        "Host": "hosts.host",
        "ModelDescription": "hosts.model_description",
        "Provenance": "hosts.provenance",
        "Site": "hosts.site",
    }.items(),
)
def test_a_class_stands_in_the_file_of_its_name(name: str, module: str) -> None:
    face = importlib.import_module(f"spd_lens.{module.split('.')[0]}")
    assert getattr(face, name).__module__ == f"spd_lens.{module}"


def _shown_in_notebooks() -> Iterator[type]:
    for face in _faces():
        for name in face.__all__:
            value = getattr(face, name)
            if inspect.isclass(value) and hasattr(value, "_repr_html_") and value.__module__.startswith("spd_lens."):
                yield value


def test_what_notebooks_show_stands_in_a_file_of_its_name() -> None:
    """A word of the class's name begins as a word of the file's: `CircuitReport` in circuit_report, `Edit` in edits."""
    found = list(_shown_in_notebooks())
    assert len(found) > 20
    for each in found:
        words = {word.lower()[:4] for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z][a-z]*", each.__name__)}
        file = each.__module__.rpartition(".")[2]
        assert words & {word[:4] for word in file.split("_")}, f"{each.__name__} stands in {each.__module__}"


def test_a_public_name_means_one_thing() -> None:
    known: dict[str, object] = {}
    for face in (spd_lens, *_faces()):
        for name in face.__all__:
            assert known.setdefault(name, getattr(face, name)) is getattr(face, name), f"{face.__name__}.{name}"


# Pairs that are left: a case's and a specialist's candidate, an edit's change and that of a reason, settings in a file.
TWICE = {"Candidate", "Change", "Settings", "Block", "MLP"}


def test_a_name_of_a_class_stands_once() -> None:
    where: dict[str, list[str]] = {}
    for path in SOURCES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                where.setdefault(node.name, []).append(str(path.relative_to(PACKAGE)))
    assert {name for name, files in where.items() if len(files) > 1} == TWICE, where


def test_no_file_holds_two_concepts() -> None:
    """Past 400 lines there were always two."""
    long = {str(path): n for path in SOURCES if (n := len(path.read_text().splitlines())) > 400}
    assert long == {}


def _readers() -> Iterator[tuple[Path, str]]:
    """What readers and users see: tutorials, examples in pages, and all programs beside the package."""
    for folder in ("tests", "benchmarks", "experiments", "scripts", "tutorials"):
        for path in (ROOT / folder).rglob("*.py"):
            yield path, path.read_text()
    for path in (ROOT / "tutorials").glob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        yield path, "\n".join("".join(cell["source"]) for cell in cells)
    for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        yield path, path.read_text()


def test_readers_are_shown_faces_only() -> None:
    deep = re.compile(r"^\s*(?:from|import) spd_lens\.\w+\.\w+", re.MULTILINE)
    shown = [f"{path}: {found.group()}" for path, text in _readers() for found in deep.finditer(text)]
    assert shown == []


def test_programs_take_from_a_face_what_it_exports() -> None:
    """Not a file by its name, whose insides are then used: tests may, of what has no other door."""
    for folder in ("benchmarks", "experiments", "scripts", "tutorials", "docs"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "spd_lens":
                    face = importlib.import_module(node.module or "")
                    hidden = {alias.name for alias in node.names} - set(face.__all__) - {"__version__"}
                    assert not hidden - ALLOWED_INSIDE.get(path.name, set()), f"{path} takes {hidden} from inside"


def test_only_hosts_and_models_import_transformer_lens() -> None:
    allowed_anywhere = {"HookPoint", "FactoredMatrix", "PatchingResult"}
    for path in SOURCES:
        if _package_of(_module_name(path)) in {"hosts", "models", "toys"}:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformer_lens"):
                assert {a.name for a in node.names} <= allowed_anywhere, path


def test_no_module_imports_what_only_one_major_has_at_import_time() -> None:
    for path in SOURCES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom):
                assert "HookedTransformer" not in {a.name for a in node.names}, path


def test_importing_costs_little_more_than_transformer_lens() -> None:
    code = (
        "import time, warnings; warnings.simplefilter('ignore'); s = time.process_time(); import transformer_lens; "
        "t = time.process_time(); import spd_lens; print((time.process_time() - t) / (t - s))"
    )
    # A share, because a busy machine slows both alike: 0.06 of TransformerLens 3.9, 0.13 of the lighter 4.3.
    most, shares = (0.1 if TL_MAJOR < 4 else 0.2), [float("inf")]
    while min(shares) >= most and len(shares) <= 3:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        shares.append(float(done.stdout))
    assert min(shares) < most
