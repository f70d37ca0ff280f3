"""The import graph is the drawn one: no cycles, hosts stand alone, and importing the package costs little."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "spd_lens"

# Every module may import the ones before its own line, and none after it.
LAYERS = [
    {"hosts.site", "files", "tables", "blocks", "factors", "member_adam", "pages", "graph_pruning"},
    {"graph_json", "graph_page"},
    {"attribution_result"},
    {"hosts.hooked", "hosts.bridge", "hosts.root"},
    {"hosts"},
    {"pointwise_mlp"},
    {"gates"},
    {"subcomponents"},
    {"swap", "masks", "interventions", "checkpoint"},
    {"losses", "adversary"},
    {"config", "decomposition"},
    {"decompose", "data", "run_files", "effects", "task_words", "prompt_pairs"},
    {"step", "evaluate", "harvest", "plots", "replacement", "tasks"},
    {"training", "ablation", "patching", "circuit_nodes", "circuit_behaviour", "heatmaps"},
    {"many", "path_patching", "circuit_checks", "circuit_units", "attribution_targets"},
    {"direct_pass"},
    {"removals"},
    {"attribution_check"},
    {"attribution_graph"},
    {"dataset_graph"},
    {"circuits", "circuit_curves"},
    {"pretrained", "toys.tiny_lm", "toys.tms", "toys.resid_mlp", "toys.features", "toys.saved_transformer", "recovery"},
    {"toys.train_target", "known_solution", "baselines.apd_targets", "baselines.fixed"}
    | {"toys.induction", "toys.modular_addition"},
    {"baselines.apd"},
    {"baselines.apd_report"},
    {"toys", "baselines"},
    {""},
]


def _module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path) -> set[str]:
    """Modules of this package that a file imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "spd_lens":
            found.add(node.module.removeprefix("spd_lens").lstrip("."))
        if isinstance(node, ast.Import):
            ours = [a.name for a in node.names if a.name.split(".")[0] == "spd_lens"]
            found |= {name.removeprefix("spd_lens").lstrip(".") for name in ours}
    return found


def test_imports_point_down_only() -> None:
    level = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    for path in PACKAGE.rglob("*.py"):
        module = _module_name(path)
        assert module in level, f"{module} is not drawn in LAYERS"
        for imported in _imports(path):
            assert level[imported] < level[module], f"{module} imports {imported}, which does not stand below it"


def test_only_hosts_and_their_hook_points_know_transformer_lens() -> None:
    allowed_anywhere = {"HookPoint", "FactoredMatrix", "PatchingResult"}
    loaders = {"pretrained", "toys.tiny_lm", "toys.tms", "toys.resid_mlp"}
    loaders |= {"toys.saved_transformer", "toys.induction", "toys.modular_addition"}
    for path in PACKAGE.rglob("*.py"):
        module = _module_name(path)
        if module.startswith("hosts") or module in loaders:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformer_lens"):
                assert {a.name for a in node.names} <= allowed_anywhere, module


def test_no_module_imports_what_only_one_major_has_at_import_time() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom):
                assert "HookedTransformer" not in {a.name for a in node.names}, path


def test_importing_costs_little_more_than_transformer_lens() -> None:
    code = (
        "import time, warnings; warnings.simplefilter('ignore'); import transformer_lens; "
        "t = time.process_time(); import spd_lens; print(time.process_time() - t)"
    )
    seconds = min(
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    )
    assert seconds < 0.3
