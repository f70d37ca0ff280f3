"""A small harvest for tests of pages, also with hostile texts in place of tokens, labels and sites."""

from __future__ import annotations

from pathlib import Path

import torch

from spd_lens import Decomposition, decompose, harvest
from spd_lens.statistics import Harvest
from tests.small_models import tiny_transformer, tokens

SITES = {"blocks.0.attn.W_V": 12, "blocks.1.mlp.W_in": 20, "blocks.1.mlp.W_out": 16}
ROWS = tokens(24)


def small_decomposition() -> Decomposition:
    return decompose(tiny_transformer(), SITES, gate="shared", gate_width=8)


def small_harvest(decomposition: Decomposition | None = None, **settings: object) -> Harvest:
    chosen = {"threshold": 0.3, "effect_batches": 1, **settings}
    torch.manual_seed(0)
    return harvest(decomposition or small_decomposition(), [ROWS[:9], ROWS[9:]], **chosen)  # pyright: ignore


def hostile_harvest(text: str, found: Harvest) -> Harvest:
    """The harvest with every token called `text`."""
    directions = {name: site.directions for name, site in found.items() if site.directions is not None}
    return Harvest(found.sums, found.made_from, directions, dict.fromkeys(found.token_strings, text))


def hostile_pages(text: str, found: Harvest, folder: Path) -> dict[str, str]:
    """All pages of a browser in which every text is `text`, by name."""
    labels = {name: dict.fromkeys(range(len(site)), text) for name, site in found.items()}
    hostile = hostile_harvest(text, found)
    index = hostile.to_html(folder, title=text, labels=labels)
    page = sorted(folder.glob("s*/*.html"))[0]
    return {"index": index.read_text(encoding="utf-8"), "component": page.read_text(encoding="utf-8")}
