"""What a harvest and labels say of the subcomponents of a graph: where they fire, and what they are called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from spd_lens.graphs.graph_settings import GraphSettings
from spd_lens.statistics.harvests import Harvest
from spd_lens.statistics.labels import Labels, checked_labels, read_labels, template_label
from spd_lens.support.given import given_instance
from spd_lens.support.shown import short_repr

if TYPE_CHECKING:
    import networkx as nx

# (site, id)
Key: TypeAlias = tuple[str, int]

MOST_CONTEXTS = 8


@dataclass(frozen=True)
class Context:
    """A text in which a subcomponent is important: its tokens, and the importance (or None) at each of them."""

    tokens: Sequence[str]
    importances: Sequence[float] | None = None

    __repr__ = short_repr


@dataclass(frozen=True)
class Described:
    """By `(site, id)`: labels that somebody gave, labels from counts, and texts in which it fires."""

    labels: dict[Key, str] = field(default_factory=dict)
    auto: dict[Key, str] = field(default_factory=dict)
    contexts: dict[Key, Sequence[Context]] = field(default_factory=dict)

    def name(self, key: Key) -> str:
        """The label that was given, or the one from counts; empty where there is neither."""
        return self.labels.get(key) or self.auto.get(key, "")


def described(
    graph: nx.DiGraph,
    settings: GraphSettings,
    harvest: Harvest | None,
    labels: Labels | str | Path | None,
    contexts: Mapping[Key, Sequence[Context]] | None = None,
) -> Described:
    """What a harvest and labels (`{site: {id: text}}` or a file of them) say of a graph's subcomponents.

    `contexts` count before those of the harvest, which are its strongest.

    Raises ValueError for the harvest or labels of another decomposition, for contexts of what is no node, and for
    labels of sites (with a harvest, which knows how many there are, also of subcomponents) that there are not.
    """
    nodes = (data for _, data in graph.nodes(data=True) if data["kind"] == "subcomponent")
    keys = list(dict.fromkeys((data["site"], data["subcomponent"]) for data in nodes))
    found = Described(contexts=dict(contexts or {}))
    unknown = [key for key in found.contexts if tuple(key) not in keys]
    if unknown:
        raise ValueError(f"contexts has {unknown[0]!r}, which is no (site, subcomponent) of this graph")
    own = settings.decomposition
    if isinstance(labels, (str, Path)):
        labels = read_labels(labels, decomposition_sha256=own)
    sites = list(settings.sites) or list(dict.fromkeys(site for site, _ in keys))
    if harvest is not None:
        given_instance("harvest", harvest, Harvest, "harvest(decomposition, batches)")
        if own is not None and harvest.made_from.decomposition != own:
            raise ValueError("the harvest is of another decomposition than the graph (its V, U or gates differ)")
    checked_labels(labels or {}, dict.fromkeys(sites) if harvest is None else harvest)
    for site, texts in (labels or {}).items():
        found.labels.update({(site, c): text for c, text in texts.items() if (site, c) in keys})
    if harvest is None:
        return found
    for site, c in keys:
        found.auto[site, c] = template_label(harvest[site], c, harvest.token_string)
        if (site, c) not in found.contexts:
            examples = harvest[site].examples(c, "top")[:MOST_CONTEXTS]
            texts = [[harvest.token_string(t) for t in example.tokens] for example in examples]
            pairs = zip(texts, examples, strict=True)
            found.contexts[site, c] = [Context(tokens, example.importances) for tokens, example in pairs]
    return found
