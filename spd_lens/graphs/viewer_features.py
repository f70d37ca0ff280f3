"""A directory that circuit-tracer's own frontend serves: the graph, the list of graphs, and a file for every feature.

    DIR/SLUG.json, DIR/graph-metadata.json, DIR/features/SLUG/NUMBER.json

A feature's file fills the panel of examples: contexts, the logits that its `U` raises and lowers, and how its
activations are distributed. The sign of `V` and `U` is arbitrary (both turned are the same subcomponent), so the colour
scale runs from 0 to the side on which it fires more; where it does not fire (importance below the harvest's threshold)
a token has no colour. Harvests count activations in bins of half an octave; percentiles and the histogram take what is
in a bin as spread evenly.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spd_lens.graphs.contexts import MOST_CONTEXTS
from spd_lens.graphs.viewer_json import public_feature
from spd_lens.statistics.harvests import Harvest
from spd_lens.statistics.site_harvest import Histogram, SiteHarvest
from spd_lens.support.checked_json import read_json_object
from spd_lens.support.files import given_directory, write_text

if TYPE_CHECKING:
    import networkx as nx

_BARS = 40
_KINDS = {"top": "strongest", "stratified": "by range of importance", "random": "random"}


def checked_slug(slug: str) -> str:
    """The name of a graph, which becomes part of paths and addresses. Raises ValueError for what cannot."""
    if not isinstance(slug, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", slug):
        raise ValueError(
            f"slug={slug!r}; expected up to 100 letters, digits, '-', '_' and '.', a letter or digit first"
        )
    return slug


def features_scan(slug: str) -> str:
    """Where circuit-tracer's frontend looks for the features of a graph."""
    return f"./data/features/{slug}"


def write_viewer(directory: Path, whole: Mapping[str, Any], graph: nx.DiGraph, harvest: Harvest | None) -> Path:
    """Write the three kinds of files (see the module); returns the graph's.

    Raises ValueError if `graph-metadata.json` is there and is something else.
    """
    directory, slug = given_directory(directory), whole["metadata"]["slug"]
    index = directory / "graph-metadata.json"
    known = read_json_object(index).get("graphs") if index.exists() else []
    if not isinstance(known, list) or not all(isinstance(g, dict) and "slug" in g for g in known):
        raise ValueError(f"{index} is no list of graphs ({{'graphs': [{{'slug': ...}}]}}); choose another directory")
    listed = {k: v for k, v in whole["metadata"].items() if k != "spd_lens"}
    for _, data in graph.nodes(data=True):
        if data["kind"] == "subcomponent":
            number = public_feature(data)
            content = _feature(None if harvest is None else harvest[data["site"]], data["subcomponent"], harvest)
            path = directory / "features" / slug / f"{number}.json"
            write_text(path, json.dumps({"transcoder_id": slug, "index": number, **content}, allow_nan=False) + "\n")
    path = directory / f"{slug}.json"
    write_text(path, json.dumps(whole, indent=1, allow_nan=False) + "\n")
    graphs = [*(g for g in known if g["slug"] != slug), listed]
    write_text(index, json.dumps({"graphs": graphs}, indent=1, allow_nan=False) + "\n")
    return path


def _feature(site: SiteHarvest | None, c: int, harvest: Harvest | None) -> dict[str, Any]:
    if site is None or harvest is None:
        return {
            "examples_quantiles": [], "top_logits": [], "bottom_logits": [], "act_min": 0.0, "act_max": 1.0,
            "quantile_values": [], "histogram": [], "activation_frequency": 0.0,
        }  # fmt: skip
    quantiles, largest = [], 0.0
    for kind, name in _KINDS.items():
        examples = []
        for example in site.examples(c, kind)[:MOST_CONTEXTS]:  # pyright: ignore[reportArgumentType]
            pairs = zip(example.importances, example.activations, strict=True)
            shown = [a if g > harvest.threshold else 0.0 for g, a in pairs]
            largest = max(largest, *map(abs, shown))
            examples.append(
                {
                    "tokens_acts_list": shown,
                    "train_token_ind": example.at,
                    "is_repeated_datapoint": False,
                    "tokens": [harvest.token_string(token) for token in example.tokens],
                }
            )
        if examples:
            quantiles.append({"quantile_name": name, "examples": examples})
    histogram = site.activation_histogram(c)
    end = largest or 1.0
    end = -end if float(site.signed_activation[c]) < 0 else end
    directions = site.directions
    raised, lowered = (None, None) if directions is None else (directions.raised_ids, directions.lowered_ids)
    return {
        "examples_quantiles": quantiles,
        "top_logits": [] if raised is None else [harvest.token_string(t) for t in raised[c].tolist()],
        "bottom_logits": [] if lowered is None else [harvest.token_string(t) for t in lowered[c].tolist()],
        "act_min": 0.0,
        "act_max": end,
        "quantile_values": quantile_values(histogram),
        "histogram": bars(histogram, end),
        "activation_frequency": float(site.firing_rate[c]),
    }


def quantile_values(histogram: Histogram) -> list[float]:
    """The activations below which 1, 2, ... 100 % of those where it fires lie; empty if it never fires."""
    filled = np.flatnonzero(histogram.counts)
    if not len(filled):
        return []
    first, last = filled[0], filled[-1] + 1
    reached = np.concatenate([[0.0], np.cumsum(histogram.counts[first:last], dtype=np.float64)])
    return np.interp(np.arange(1, 101) / 100, reached / reached[-1], histogram.edges[first : last + 1]).tolist()


def bars(histogram: Histogram, end: float) -> list[float]:
    """Counts in equal steps from 0 to `end`, on that side of 0 alone."""
    edges, counts = np.asarray(histogram.edges), np.asarray(histogram.counts, dtype=np.float64)
    reached = np.concatenate([[0.0], counts.cumsum()])
    steps = np.interp(np.linspace(0, end, _BARS + 1), edges, reached)
    return np.abs(np.diff(steps)).tolist()
