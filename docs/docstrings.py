"""For the API pages: docstrings as Markdown wants them. Examples (`>>> ...`) become code blocks, which would be read as
quotations; a list begins after an empty line, or it would run on in the paragraph."""

from __future__ import annotations

import re
from typing import Any

import griffe

ITEM = re.compile(r"(?:- |\d+\. )")


class MarkdownDocstrings(griffe.Extension):
    """Sets every docstring right."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """`text` with a fence around each doctest, and an empty line before each list that follows a paragraph."""
    lines: list[str] = []
    inside, in_list = False, False
    for line in text.splitlines():
        if not inside and line.lstrip().startswith(">>>"):
            lines += ["", "```python"]
            inside = True
        elif inside and not line.strip():
            lines.append("```")
            inside = False
        elif not inside and ITEM.match(line) and not in_list:
            in_list = True
            if lines and lines[-1].strip():
                lines.append("")
        elif in_list and line.strip() and not line.startswith(" ") and not ITEM.match(line):
            in_list = False
        lines.append(line)
    return "\n".join([*lines, "```"] if inside else lines)
