"""Labels of subcomponents: those that a user typed, and what can be said without a user or a language model.

Labels are kept as JSON: `{"format": "spd_lens labels", "format_version": 1, "decomposition": hash, "labels": {site:
{id: text}}}`. The browser's pages export this, `read_labels` reads it, and `Harvest.to_html(labels=...)` shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

from spd_lens.statistics.site_harvest import SiteHarvest
from spd_lens.support.checked_json import read_json
from spd_lens.support.files import given_path, write_json
from spd_lens.support.names import near_names

LABELS_FORMAT, LABELS_VERSION = "spd_lens labels", 1

# {site: {id: label}}
Labels: TypeAlias = Mapping[str, Mapping[int, str]]

# A token that fills at least so much of what something fires on, or predicts, is named.
_NAMED_ABOVE = 0.1


def read_labels(path: str | Path, *, decomposition_sha256: str | None = None) -> dict[str, dict[int, str]]:
    """Labels that a page exported, or `write_labels` wrote.

    Raises ValueError for files that are no labels, and, given a hash, for labels of another decomposition.
    """
    path = given_path(path)
    content = read_json(path, format_name=LABELS_FORMAT, newest_version=LABELS_VERSION)
    labels = content.get("labels")
    if not isinstance(labels, dict) or not all(isinstance(own, dict) for own in labels.values()):
        raise ValueError(f"{path} is damaged: expected labels {{site: {{id: text}}}}")
    if decomposition_sha256 is not None and content.get("decomposition") != decomposition_sha256:
        raise ValueError(f"{path} holds labels of another decomposition")
    found: dict[str, dict[int, str]] = {}
    for site, own in labels.items():
        for c, text in own.items():
            if not (c.isascii() and c.isdigit() and len(c) < 10 and isinstance(text, str)):
                raise ValueError(f"{path} is damaged: {site} has the label {c!r}: {text!r}")
            found.setdefault(site, {})[int(c)] = text
    return found


def write_labels(path: str | Path, labels: Labels, *, decomposition_sha256: str) -> Path:
    """Write labels as the browser's pages export and import them."""
    path = given_path(path)
    text = {site: {str(c): label for c, label in own.items()} for site, own in labels.items()}
    write_json(
        path,
        {
            "format": LABELS_FORMAT,
            "format_version": LABELS_VERSION,
            "decomposition": decomposition_sha256,
            "labels": text,
        },
    )
    return path


def checked_labels(labels: Labels, sites: Mapping[str, SiteHarvest | None]) -> None:
    """ValueError, with near names, for labels of sites or subcomponents that there are not (None: nobody knows how many
    the site has)."""
    for site, own in labels.items():
        if site not in sites:
            raise ValueError(f"labels name the site {site!r}; near: {near_names(site, sites)}")
        harvest = sites[site]
        count = float("inf") if harvest is None else len(harvest)
        odd = [c for c in own if isinstance(c, bool) or not isinstance(c, int) or not 0 <= c < count]
        if odd:
            expected = "ids, which are whole numbers" if harvest is None else f"ids in 0..{len(harvest) - 1}"
            raise ValueError(f"labels of {site} name subcomponent {odd[0]!r}; expected {expected}")


def template_label(site: SiteHarvest, c: int, text_of: Callable[[int], str]) -> str:
    """What the counts say in a few words: the tokens that it fires on most, and what is predicted there.

    `"on ' whale' 82 %, ' whales' 9 %; predicts ',' 41 %"`. Empty if it never fires.
    """
    fired = site.input_tokens(c, 3)
    if not fired:
        return ""
    named = [s for s in fired if s.precision >= _NAMED_ABOVE]
    on = ", ".join(f"{text_of(s.token)!r} {s.precision:.0%}" for s in named)
    label = f"on {on}" if named else f"on many tokens, most {text_of(fired[0].token)!r} {fired[0].precision:.0%}"
    predicted = site.predicted_tokens(c, 1)
    if predicted and predicted[0].precision >= 2 * _NAMED_ABOVE:
        label += f"; predicts {text_of(predicted[0].token)!r} {predicted[0].precision:.0%}"
    return label
