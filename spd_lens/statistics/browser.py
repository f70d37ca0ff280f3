"""The browser of components: a list of all, and a page for each, as files that open from disk and need nothing else.

`index.html` lists every subcomponent; `s{site}/{id}.html` shows one that fires. No page loads anything, and each has a
policy that lets no script run but its own. A page has at most 50 KB: where contexts are long, the last are left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spd_lens.statistics.firing_together import COFIRING_COLUMNS, Cofiring
from spd_lens.statistics.labels import Labels, checked_labels, template_label
from spd_lens.statistics.site_harvest import Example, Histogram, SiteHarvest
from spd_lens.statistics.token_counts import TokenStatistic
from spd_lens.support.files import given_directory, write_text
from spd_lens.support.pages import filled_page, shortened
from spd_lens.support.progress import tqdm

LARGEST_PAGE = 50_000
_GENERATOR = '<meta name="generator" content="spd_lens browser">'
_LONGEST_TOKEN, _LONGEST_LABEL = 80, 400


@dataclass(frozen=True)
class Contents:
    """What pages are made of: sites, labels, and whose labels they are; `cofires` as `spd_lens.statistics.cofiring`."""

    sites: Mapping[str, SiteHarvest]
    token_string: Callable[[int], str]
    threshold: float
    n_positions: int
    decomposition_sha256: str
    labels: Labels
    cofires: Cofiring | None = None


class _Vocabulary:
    """Tokens of one page: texts by their place in it."""

    def __init__(self, token_string: Callable[[int], str]) -> None:
        self._string, self._places = token_string, {}
        self.texts: list[str] = []

    def __call__(self, token: int) -> int:
        if token not in self._places:
            self._places[token] = len(self.texts)
            self.texts.append(shortened(self._string(token), _LONGEST_TOKEN))
        return self._places[token]


def write_browser(directory: str | Path, contents: Contents, *, title: str, max_pages: int | None = None) -> Path:
    """Write the list and the pages of the (at most `max_pages` most used) subcomponents that fire; returns the list.

    Pages of an earlier browser in `directory` are replaced. Raises ValueError if an `index.html` of something else is
    there, and for labels of what there is not.
    """
    directory = given_directory(directory)
    index = directory / "index.html"
    checked_labels(contents.labels, contents.sites)
    if index.exists():
        if not index.is_file() or _GENERATOR not in index.read_text(encoding="utf-8", errors="replace")[:2000]:
            raise ValueError(f"{index} is of something else; choose another directory")
        for path in directory.glob("s*/*.html"):
            if re.fullmatch(r"s\d+", path.parent.name) and re.fullmatch(r"\d+", path.stem):
                path.unlink()
    listed = _list(contents, max_pages)
    order = _by_use(listed)
    for k, (site, c) in enumerate(tqdm(order, desc="pages", leave=False, delay=2)):
        around = (order[k - 1] if k else None, order[k + 1] if k + 1 < len(order) else None)
        text = _component_page(contents, listed, site, c, around)
        path = directory / f"s{site}" / f"{c}.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    write_text(index, _page("browser_index.html", title, listed.data))
    return index


def inline_page(contents: Contents, *, title: str, max_pages: int) -> str:
    """The list and the `max_pages` most used components as one page, for a notebook."""
    checked_labels(contents.labels, contents.sites)
    listed = _list(contents, max_pages)
    components = {f"{s} {c}": _component(contents, listed, s, c) for s, c in _by_use(listed)}
    return _page("browser_inline.html", title, {"list": listed.data, "components": components})


def _page(template: str, title: str, data: Any) -> str:
    page = filled_page(template, title=shortened(title, _LONGEST_LABEL), data=data)
    return page.replace('<meta charset="utf-8">', f'<meta charset="utf-8">{_GENERATOR}', 1)


# -- the list ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Listed:
    """The list's data, and what component pages take from it: rows by `(site, id)`, and words for each."""

    data: dict[str, Any]
    rows: dict[tuple[int, int], int]
    names: list[str]


def _list(contents: Contents, max_pages: int | None) -> _Listed:
    names, vocabulary = list(contents.sites), _Vocabulary(contents.token_string)
    measured = any(site.effect is not None for site in contents.sites.values())
    columns: dict[str, list[Any]] = {
        key: []
        for key in ("site", "id", "rate", "importance", "activation", "effect", "tokens", "predicted", "auto", "label")
    }
    for s, (name, site) in enumerate(contents.sites.items()):
        labels, fired, effect = contents.labels.get(name, {}), site.fired.tolist(), site.effect
        columns["site"] += [s] * len(site)
        columns["id"] += range(len(site))
        columns["rate"] += map(_rounded, site.firing_rate.tolist())
        columns["importance"] += map(_rounded, site.mean_importance.tolist())
        columns["activation"] += map(_rounded, site.mean_activation.tolist())
        columns["effect"] += [None] * len(site) if effect is None else map(_rounded, effect.tolist())
        for c in range(len(site)):
            on, predicted = ([], []) if not fired[c] else (site.input_tokens(c, 3), site.predicted_tokens(c, 2))
            columns["tokens"].append([vocabulary(row.token) for row in on])
            columns["predicted"].append([vocabulary(row.token) for row in predicted])
            auto = template_label(site, c, contents.token_string) if fired[c] else ""
            columns["auto"].append(shortened(auto, 120))
            columns["label"].append(shortened(labels.get(c, ""), _LONGEST_LABEL))
    columns["page"] = _with_pages(columns["rate"], max_pages)
    about = (
        f"{len(columns['id']):,} subcomponents of {len(names)} sites, {contents.n_positions:,} positions; one fires "
        f"where its importance g is above {contents.threshold:g}"
    )
    data = {
        **columns,
        "effect": columns["effect"] if measured else None,
        "sites": [shortened(name, _LONGEST_TOKEN) for name in names],
        "vocab": vocabulary.texts,
        "of": contents.decomposition_sha256,
        "about": about,
    }
    rows = {(s, c): i for i, (s, c) in enumerate(zip(columns["site"], columns["id"], strict=True))}
    return _Listed(data, rows, names)


def _with_pages(rates: Sequence[float], max_pages: int | None) -> list[int]:
    order = sorted((i for i, rate in enumerate(rates) if rate > 0), key=lambda i: -rates[i])
    chosen = set(order if max_pages is None else order[:max_pages])
    return [int(i in chosen) for i in range(len(rates))]


def _by_use(listed: _Listed) -> list[tuple[int, int]]:
    data = listed.data
    shown = [i for i, has in enumerate(data["page"]) if has]
    shown.sort(key=lambda i: (-data["rate"][i], i))
    return [(data["site"][i], data["id"][i]) for i in shown]


# -- one component -----------------------------------------------------------------------------------------------------


def _component_page(
    contents: Contents, listed: _Listed, s: int, c: int, around: tuple[tuple[int, int] | None, tuple[int, int] | None]
) -> str:
    data = {**_component(contents, listed, s, c), "previous": around[0], "next": around[1]}
    title = f"{data['site']} · {c}"
    while True:
        text = _page("browser_component.html", title, data)
        longest = max(data["contexts"], key=lambda kind: len(data["contexts"][kind]))
        if len(text.encode()) <= LARGEST_PAGE or not data["contexts"][longest]:
            return text
        excess = len(text.encode()) - LARGEST_PAGE
        whole = len(str(data["contexts"]))
        kept = max(0, int(len(data["contexts"][longest]) * (1 - max(0.2, excess / whole))))
        data["contexts"] = {**data["contexts"], longest: data["contexts"][longest][:kept]}


def _component(contents: Contents, listed: _Listed, s: int, c: int) -> dict[str, Any]:
    name = listed.names[s]
    site, vocabulary = contents.sites[name], _Vocabulary(contents.token_string)
    row = listed.rows[s, c]
    contexts = {
        kind: [_context(example, vocabulary) for example in site.examples(c, kind)]
        for kind in ("top", "random", "stratified")
    }
    directions = site.directions
    found = {
        "of": contents.decomposition_sha256,
        "sites": listed.data["sites"],
        "site": listed.data["sites"][s],
        "id": c,
        "auto": listed.data["auto"][row],
        "label": listed.data["label"][row],
        "numbers": _numbers(site, c),
        "importance": _histogram(site.importance_histogram(c)),
        "activation": _histogram(site.activation_histogram(c)),
        "input": _tokens(site.input_tokens(c, None), vocabulary),
        "predicted": _tokens(site.predicted_tokens(c, None), vocabulary),
        "lost": site.undercounted(c),
        "raised": _logits(directions and directions.raised_ids, directions and directions.raised, c, vocabulary),
        "lowered": _logits(directions and directions.lowered_ids, directions and directions.lowered, c, vocabulary),
        "similar": None,
        "cofires": None,
        "cofireColumns": COFIRING_COLUMNS,
        "contexts": contexts,
    }
    if directions is not None:
        near = zip(directions.similar_ids[c].tolist(), directions.similar[c].tolist(), strict=True)
        found["similar"] = [_other(listed, s, d, [cosine]) for d, cosine in near]
    if contents.cofires is not None:
        found["cofires"] = [
            _other(listed, listed.names.index(other), d, values) for other, d, values in contents.cofires(name, c)
        ]
    return {**found, "vocab": vocabulary.texts}


def _other(listed: _Listed, s: int, c: int, values: Sequence[float]) -> list[Any]:
    row = listed.rows[s, c]
    words = listed.data["label"][row] or listed.data["auto"][row]
    return [s, c, shortened(words, 60), listed.data["page"][row], *map(_rounded, values)]


def _numbers(site: SiteHarvest, c: int) -> list[list[Any]]:
    effect, directions = site.effect, site.directions
    rows: list[tuple[str, float | None, str]] = [
        ("fires at", float(site.firing_rate[c]), "%"),
        ("positions where it fires", int(site.fired[c]), "n"),
        ("mean importance g", float(site.mean_importance[c]), ""),
        ("mean |a| where it fires", float(site.mean_activation[c]), ""),
        ("mean a where it fires", float(site.signed_activation[c]), ""),
        ("rms of a, everywhere", float(site.activation_rms[c]), ""),
        ("effect of its ablation, mean KL", None if effect is None else float(effect[c]), "nats"),
        ("size |V| |U|", None if directions is None else float(directions.size[c]), ""),
    ]
    return [[what, value if value is None or unit == "n" else _rounded(value), unit] for what, value, unit in rows]


def _histogram(histogram: Histogram) -> dict[str, Any]:
    """Without the empty bins at both ends."""
    filled = [i for i, count in enumerate(histogram.counts) if count]
    if not filled:
        return {"edges": [], "counts": []}
    first, last = filled[0], filled[-1]
    edges = [_rounded(edge) for edge in histogram.edges[first : last + 2]]
    return {"edges": edges, "counts": list(histogram.counts[first : last + 1])}


def _tokens(rows: Sequence[TokenStatistic], vocabulary: _Vocabulary) -> list[list[Any]]:
    """The first of every order; a token that occurs once has no PMI worth showing."""
    often = [row for row in rows if row.count > 1] or rows
    chosen = {row.token: row for row in rows[:12]}
    for key in ("recall", "pmi"):
        chosen |= {row.token: row for row in sorted(often, key=lambda r: (-getattr(r, key), -r.count, r.token))[:8]}
    return [
        [vocabulary(r.token), r.count, _rounded(r.precision), _rounded(r.recall), _rounded(r.pmi)]
        for r in chosen.values()
    ]


def _logits(
    ids: torch.Tensor | None, values: torch.Tensor | None, c: int, vocabulary: _Vocabulary
) -> list[list[Any]] | None:
    if ids is None or values is None:
        return None
    return [[vocabulary(t), _rounded(v)] for t, v in zip(ids[c].tolist(), values[c].tolist(), strict=True)]


def _context(example: Example, vocabulary: _Vocabulary) -> dict[str, Any]:
    return {
        "t": [vocabulary(token) for token in example.tokens],
        "at": example.at,
        "g": [round(g, 2) for g in example.importances],
        "a": [_rounded(a) for a in example.activations],
    }


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")
