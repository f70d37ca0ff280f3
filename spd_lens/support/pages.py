"""Self-contained HTML pages from templates: data goes in as JSON that no text in it can break out of."""

from __future__ import annotations

import html
import json
from importlib import resources
from typing import Any


def script_json(value: Any) -> str:
    """JSON for a `<script type="application/json">` element.

    Every `<` is written as `\\u003c`: not only `</script>` ends such an element, `<!--<script>` keeps it from ending.
    """
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")


def filled_page(template: str, *, title: str, data: Any) -> str:
    """The page `templates/{template}`, its `__TITLE__` escaped and its (last) `__DATA__` as JSON."""
    page = resources.files("spd_lens.support").joinpath(f"templates/{template}").read_text(encoding="utf-8")
    # The title may hold the word __DATA__ itself: the data's place is found first.
    before, after = page.rsplit("__DATA__", 1)
    title = html.escape(title)
    return before.replace("__TITLE__", title) + script_json(data) + after.replace("__TITLE__", title)
