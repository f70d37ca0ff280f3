"""What TransformerLens is like inside is known in `hosts` (and `models`) alone."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "spd_lens"
# Toys and the baselines on them are models of our own, with hook points and a configuration of their own.
KNOW_MODELS = {"hosts", "models", "toys", "baselines"}
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.relative_to(PACKAGE).parts[0] not in KNOW_MODELS]
# `hook_W_in_acts` and the like are ours.
ITS_POINTS = re.compile(
    r"hook_(z|q|k|v|result|pattern|attn_scores|attn|mlp|embed|pos_embed|scale|normalized|pre|post|in|out|tokens)\b"
    r"|hook_(resid|attn|mlp|rot|[qkv]_input)_?\w*"
)
ITS_CLASSES = {"HookedTransformer", "TransformerBridge", "HookedRootModule"}


def inside_knowledge(source: str) -> Iterator[str]:
    """Lines that read a configuration, name a hook point of TransformerLens's, or ask what class a model is."""
    tree = ast.parse(source)
    texts = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        line = f"line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Attribute) and node.attr == "cfg":
            yield f"{line}: .cfg"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
            if node.value == "cfg" or node.value in ITS_CLASSES or ITS_POINTS.search(node.value):
                yield f"{line}: {node.value!r}"
        elif isinstance(node, ast.Compare):
            names = [n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)]
            if "__name__" in names:
                yield f"{line}: compares the name of a class"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_hosts_know_how_transformer_lens_is_built(path: Path) -> None:
    assert list(inside_knowledge(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "line",
    [
        "width = model.cfg.d_model",
        "width = getattr(model, 'cfg', None)",
        "name = f'blocks.{layer}.attn.hook_z'",
        "points = ['blocks.0.hook_resid_post']",
        "is_bridge = type(model).__name__ == 'TransformerBridge'",
        "is_linear = type(module).__name__ in kinds",
        "is_bridge = host.provenance().host == 'TransformerBridge'",
    ],
)
def test_the_search_finds(line: str) -> None:
    assert list(inside_knowledge(line)) != []


def test_the_search_leaves_our_own_points_and_docstrings_alone() -> None:
    source = '"""Hooks on `hook_z`."""\nname = "blocks.0.hook_W_in_acts"\nerror = f"given a {type(model).__name__}"'
    assert list(inside_knowledge(source)) == []
