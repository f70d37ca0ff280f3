"""Text from models and data as pictures show it: none of it is read as a formula, a tag or a direction of writing."""

from __future__ import annotations

import html
from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import Tensor

from spd_lens.support.pages import shortened, visible


def checked_texts(tokens: Any, count: int, what: str) -> list[str]:
    """`tokens` as a list of `count` strings; None stands for the numbers of the positions.

    Raises TypeError for anything that is not a sequence of strings, ValueError for another number of them.
    """
    if tokens is None:
        return [str(position) for position in range(count)]
    if isinstance(tokens, (str, bytes, Tensor)) or not isinstance(tokens, Sequence):
        raise TypeError(
            f"tokens is a {type(tokens).__name__}; expected one string per position, as model.to_str_tokens(prompt) "
            "gives"
        )
    odd = [token for token in tokens if not isinstance(token, str)]
    if odd:
        raise TypeError(f"tokens holds {odd[0]!r}; expected strings, as model.to_str_tokens(prompt) gives")
    if len(tokens) != count:
        raise ValueError(
            f"{len(tokens)} tokens for {count} positions of {what}; give all tokens of the prompt, in order"
        )
    return list(tokens)


def plotly_text(text: str) -> str:
    """The text for plotly, which reads tags and formulas."""
    return html.escape(visible(text)).replace("$", "&#36;")


def drawn_text(text: str, length: int | None = None) -> str:
    """The text for matplotlib: at most `length` characters, those that the font lacks as a box.

    Texts are drawn with `parse_math=False`, so that `$` starts no formula.
    """
    shown = visible(text)
    shown = shown if length is None else shortened(shown.strip(" ") or "␣", length)
    font = _font()
    return "".join(c if font.get_char_index(ord(c)) else "\u25a1" for c in shown)


@cache
def _font() -> Any:
    from matplotlib import font_manager

    return font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))
