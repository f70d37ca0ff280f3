"""The browser of subcomponents inside a notebook, with a box that runs the model on one's own sentence.

`browse` gives an object that a notebook shows. Without a kernel (a notebook that is only read, on the web or exported)
the list and the pages in it still work, because they are one self-contained page in a frame of its own; the box needs
a kernel and ipywidgets (the extra `notebook`).
"""

from __future__ import annotations

import html
from typing import Any

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.inputs import checked_decomposition
from spd_lens.pictures.importance import importance_page
from spd_lens.statistics.browser import inline_page
from spd_lens.statistics.harvests import Harvest
from spd_lens.statistics.labels import Labels
from spd_lens.support.pages import shortened
from spd_lens.support.shown import with_widget

# A frame of another origin: its scripts run, and can reach neither the notebook nor its files.
_SANDBOX = "allow-scripts allow-downloads"


def framed(page: str, height: int) -> str:
    """A whole page as an element of another."""
    return (
        f'<iframe sandbox="{_SANDBOX}" srcdoc="{html.escape(page, quote=True)}" '
        f'style="width:100%;height:{height}px;border:1px solid #8888"></iframe>'
    )


class InlineBrowser:
    """What `browse` gives: shown by a notebook; `run` is what its box does."""

    def __init__(self, page: str, decomposition: Decomposition | None, height: int, rows_per_site: int) -> None:
        self.page, self.decomposition, self.height, self.rows_per_site = page, decomposition, height, rows_per_site

    def __repr__(self) -> str:
        return f"InlineBrowser({len(self.page) / 2**20:.1f} MB, shown in notebooks)"

    def _repr_html_(self) -> str:
        return framed(self.page, self.height)

    def run(self, text: str) -> str:
        """A page of the importances that the decomposition has on a sentence, ready to be shown.

        Raises ValueError for an empty text, one that is too long, and without a decomposition or a tokenizer.
        """
        if self.decomposition is None:
            raise ValueError(
                "this browser was made without a decomposition; browse(harvest, decomposition) can run one"
            )
        checked_decomposition(self.decomposition, "browse")
        if not text:
            raise ValueError("the sentence is empty")
        tokens = self.decomposition.host.text_tokens(text)
        importances = self.decomposition.importance(tokens)
        found = {name: g.amax(2) if g.ndim == 4 else g for name, g in importances.items()}
        words = self.decomposition.host.token_strings(tokens[0].tolist())
        return importance_page(found, words, title=shortened(text, 80), rows_per_site=self.rows_per_site)

    def widget(self) -> Any:
        """The page above a box for a sentence, as an ipywidgets widget. Raises ImportError without ipywidgets."""
        try:
            import ipywidgets
        except ImportError as error:
            raise ImportError(
                "the box that runs the model needs ipywidgets: pip install 'spd-lens[notebook]'"
            ) from error
        frame = ipywidgets.HTML(framed(self.page, self.height))
        if self.decomposition is None:
            return frame
        box = ipywidgets.Text(placeholder="a sentence of your own, then Enter", layout={"width": "70%"})
        button, result = ipywidgets.Button(description="run the model"), ipywidgets.HTML()

        def show(_: Any) -> None:
            try:
                result.value = framed(self.run(box.value), 420)
            except ValueError as error:
                result.value = f"<pre>{html.escape(str(error))}</pre>"

        button.on_click(show)
        box.on_msg(lambda _, content, __: show(None) if content.get("event") == "submit" else None)
        return ipywidgets.VBox([frame, ipywidgets.HBox([box, button]), result])

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        """The widget where there is one, and the page alone for whoever has no kernel."""
        return with_widget(self._repr_html_(), repr(self), None if self.decomposition is None else self.widget)


def browse(
    harvest: Harvest,
    decomposition: Decomposition | None = None,
    *,
    title: str = "Subcomponents",
    labels: Labels | None = None,
    max_pages: int = 200,
    rows_per_site: int = 16,
    height: int = 640,
) -> InlineBrowser:
    """The browser of a harvest inside a notebook: the list of all, and the `max_pages` most used components.

    With the `decomposition` that the harvest is of, a box below runs it on a sentence and shows, token by token, the
    importance of the `rows_per_site` strongest subcomponents of each site. Labels that are typed in a notebook last as
    long as the page: export them. `Harvest.to_html` writes files, which keep them, with a page for every component.

    Raises ValueError for the harvest of another decomposition, and for labels of what there is not.
    """
    if decomposition is not None:
        harvest.check_of(decomposition)
    page = inline_page(harvest.contents(labels), title=title, max_pages=max_pages)
    return InlineBrowser(page, decomposition, height, rows_per_site)
