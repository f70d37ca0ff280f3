"""How objects show themselves: a `repr` of one line, whatever they hold, and text in a notebook."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from spd_lens.support.pages import shortened

LONGEST_VALUE = 60


def short_repr(self: Any) -> str:
    """The `repr` of a dataclass, tensors by their shapes, mappings and long sequences by their lengths.

    >>> import torch
    >>> @dataclasses.dataclass
    ... class Point:
    ...     x: Tensor
    ...     names: list[str]
    ...     __repr__ = short_repr
    >>> Point(torch.zeros(2, 3), ["a"] * 100)
    Point(x=float32 [2, 3], names=list of 100)
    """
    fields = [f"{field.name}={_shown(getattr(self, field.name))}" for field in dataclasses.fields(self) if field.repr]
    return f"{type(self).__name__}({', '.join(fields)})"


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, Mapping) and value:
        return f"{type(value).__name__} of {len(value)}"
    text = " ".join(repr(value).split())
    if len(text) <= LONGEST_VALUE:
        return text
    if isinstance(value, (list, tuple, set, frozenset)):
        return f"{type(value).__name__} of {len(value)}"
    return shortened(text, LONGEST_VALUE)


def text_html(self: Any) -> str:
    """What `print` shows of an object, as a `_repr_html_` for notebooks."""
    return f"<pre>{html.escape(str(self))}</pre>"


def with_widget(page: str, text: str, widget: Callable[[], Any] | None) -> dict[str, Any]:
    """What a notebook is given to show: the page, the text, and the widget where ipywidgets is there."""
    bundle = {"text/html": page, "text/plain": text}
    if widget is None:
        return bundle
    try:
        shown = widget()._repr_mimebundle_()
    except ImportError:
        return bundle
    data = shown[0] if isinstance(shown, tuple) else shown
    return {**bundle, **{kind: value for kind, value in (data or {}).items() if kind not in bundle}}
