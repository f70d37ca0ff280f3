"""HTML from Jinja2 templates: pages that need nothing else, and short pieces for notebooks.

Every template is autoescaped, data goes in as JSON that no text in it can break out of, and every page has a
content-security policy that lets nothing in from outside and runs no script but the page's own.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)


def script_json(value: Any) -> str:
    """JSON for a `<script type="application/json">` element; numbers that JSON cannot write become null.

    `<`, `>`, `&` and the line separators are written as `\\u....`: not only `</script>` ends such an element,
    `<!--<script>` keeps it from ending.
    """
    text = json.dumps(_finite(value), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("spd_lens.support", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = visible
    return environment


def filled_page(template: str, *, title: str, data: Any) -> str:
    """The page `templates/{template}` with its title, and `data` where its script reads it.

    The policy in its head names the scripts by their SHA-256, so no other script runs in it, whatever the data.
    """
    from markupsafe import Markup

    return (
        _environment()
        .get_template(template)
        .render(title=visible(title), data=Markup(script_json(data)), policy=Markup(_policy(template)))
    )


@functools.cache
def _policy(template: str) -> str:
    # The script is the template's own and holds no values, so its hash can be taken from the template's text.
    own = _environment().get_template(template).render(title="", data="", policy="")
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in _SCRIPT.findall(own)]
    scripts = " ".join(f"'sha256-{h}'" for h in hashes) or "'none'"
    return f"default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page_without_script(template: str, *, title: str, **values: Any) -> str:
    """The page `templates/{template}` filled in; its policy lets no script run and nothing in from outside."""
    from markupsafe import Markup

    policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    return _environment().get_template(template).render(title=title, policy=Markup(policy), **values)


def table_html(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """A table for a notebook: a caption, a header, rows (first column left, others right), and lines below."""
    template = _environment().get_template("table.html")
    return template.render(title=title, header=list(header), rows=[list(row) for row in rows], notes=list(notes))


# What would reorder, hide or end other text: control characters, and all that Unicode calls ignorable by default
# (bidirectional controls, characters without a width, fillers, variation selectors).
_HIDDEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e"
    r"\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\ud800-\udfff\U0001bca0-\U0001bca3"
    r"\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
# More marks on one character are a tower that covers other lines; no script that is written needs them.
_MOST_MARKS = 3


def visible(text: str) -> str:
    """The text with line breaks, tabs and characters that nobody can see written out, and marks above `_MOST_MARKS` on
    one character.

    >>> visible("a\\nb\\u202ec")
    'a⏎b<U+202E>c'
    """
    text = text.replace("\n", "⏎").replace("\t", "⇥")
    text = _HIDDEN.sub(lambda found: f"<U+{ord(found.group()):04X}>", text)
    return text if text.isascii() else _without_towers(text)


def _without_towers(text: str) -> str:
    shown, marks = [], 0
    for character in text:
        marks = marks + 1 if unicodedata.category(character) in ("Mn", "Me") else 0
        shown.append(character if marks <= _MOST_MARKS else f"<U+{ord(character):04X}>")
    return "".join(shown)


def visible_lines(text: str) -> str:
    """As `visible`, but line breaks stay: for texts of several lines on a terminal."""
    return "\n".join(map(visible, text.split("\n")))


def shortened(text: str, n: int) -> str:
    """At most `n` characters of the text, an ellipsis in place of the rest."""
    return text if len(text) <= n else text[: n - 1] + "…"
