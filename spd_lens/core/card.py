"""The README of a saved decomposition: a card for the Hugging Face Hub, and whether one that is there may be replaced.

A card of ours ends in a comment with the hash of what stands above it. A README without it, or one that was edited
since, is its owner's and never overwritten.
"""

from __future__ import annotations

import hashlib
import html
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

_MARK = re.compile(r"\n<!-- card of spd_lens, replaced by the next save unless edited: ([0-9a-f]{64}) -->\n\Z")


def model_card(config: Mapping[str, Any], *, license: str) -> str:
    """The card of a save: what was decomposed, how to load it, how it was trained and what was measured."""
    made_from, training = config["provenance"], config["training"] or {}
    settings = config["settings"]
    sites = "\n".join(f"| {as_code(name)} | {count} |" for name, count in settings["n_subcomponents"].items())
    data = ModelCardData(
        library_name="spd_lens",
        license=license,
        tags=["interpretability", "parameter-decomposition", "transformer-lens"],
    )
    text = f"""---
{data.to_yaml()}
---
# SPD decomposition of {as_text(made_from["model_name"])}

Stochastic Parameter Decomposition (arXiv 2506.20790): each matrix below is written as a sum of rank-one \
subcomponents with a gate that predicts, per input, how much each one matters.

Made from a {as_text(made_from["host"])} ({as_text(made_from["weight_processing"])}); gate: \
{as_text(settings["gate"])}; seed {as_text(settings["seed"])}. Whoever shares it also needs the right to share what \
was made from that model.

| site | C |
|---|---|
{sites}

```python
from spd_lens import Decomposition
decomposition = Decomposition.from_pretrained(PATH_OR_HUB_ID, model)
```

{_how_trained(training)}

Versions: {", ".join(f"{as_text(k)} {as_text(v)}" for k, v in config["versions"].items())}.
"""
    card = str(ModelCard(text))
    return f"{card}\n<!-- card of spd_lens, replaced by the next save unless edited: {_digest(card)} -->\n"


def _how_trained(record: Mapping[str, Any]) -> str:
    parts = record.get("merged")
    if parts is None:
        final = ", ".join(f"{as_text(k)} {as_text(_short(v))}" for k, v in (record.get("final") or {}).items())
        return f"Trained for {as_text(record.get('steps', 0))} steps. Final metrics: {final or 'not recorded'}."
    lines = [f"- {', '.join(map(as_code, part['sites']))}: {_how_trained(part)}" for part in parts]
    return "\n".join([f"Put together from {len(parts)} decompositions:", "", *lines])


def is_replaceable(readme: Path) -> bool:
    """Whether there is no README yet, or one that we wrote and nobody edited."""
    if not readme.exists():
        return True
    try:
        # As bytes: reading as text would make other line ends equal to ours.
        text = readme.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    mark = _MARK.search(text)
    return mark is not None and mark[1] == _digest(text[: mark.start()])


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _digest(card: str) -> str:
    return hashlib.sha256(card.encode()).hexdigest()


def as_text(value: Any) -> str:
    """A value as plain text of a Markdown page: one line, nothing of it read as Markdown or HTML, none of it hidden."""
    line = _visible(str(value))
    return re.sub(r"([\\`*_{}\[\]#!|~$])", r"\\\1", html.escape(line, quote=False))


def as_code(value: Any) -> str:
    """A name in a code span of a table."""
    line = _visible(str(value)).replace("|", "\\|")
    ticks = "`" * (max((len(run) for run in re.findall("`+", line)), default=0) + 1)
    space = " " if "`" in line else ""
    return f"{ticks}{space}{line}{space}{ticks}"


def _visible(text: str) -> str:
    """Control and direction characters, which could reorder or hide what follows, as their numbers."""
    return "".join(f"U+{ord(c):04X}" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c for c in text)
