"""Attribution graphs as JSON that circuit-tracer's viewer and Neuronpedia read (`graph_reading` reads it back).

The public fields (`metadata`, `qParams`, `nodes`, `links`) follow Neuronpedia's graph schema. That viewer has rows for
layers; here every site is a row of its own, in the order in which sites run, so `layer` is the number of the site.
Subcomponents are written as "cross layer transcoder" nodes and deltas as "mlp reconstruction error" nodes, the words
that viewers know. What these words cannot say (site names, the measured agreement, exact numbers) stands beside them
under the key `spd_lens`, which other readers ignore; `read_graph` needs it. Viewers put labels and tokens into their
pages as HTML, so what could begin an element there is written with another character (`public_text`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spd_lens.graphs.graph_settings import GraphSettings
from spd_lens.support.checked_json import content_hash
from spd_lens.support.files import given_path, write_text
from spd_lens.support.pages import visible

if TYPE_CHECKING:
    import networkx as nx

FORMAT_VERSION = 4
_PUBLIC_TYPES = {
    "subcomponent": "cross layer transcoder",
    "delta": "mlp reconstruction error",
    "embedding": "embedding",
    "readout": "logit",
}


@dataclass(frozen=True)
class GraphFile:
    """What a graph file holds: the graph, the prompt's tokens, what it was made with, and its measured agreement."""

    graph: nx.DiGraph
    tokens: tuple[str, ...]
    settings: GraphSettings
    check: dict[str, Any]


def graph_json(
    content: GraphFile,
    *,
    slug: str,
    cumulative: Mapping[str, float],
    supernodes: Mapping[str, Sequence[str]],
    labels: Mapping[str, str],
    scan: str | None = None,
) -> dict[str, Any]:
    """The whole file as JSON values; `cumulative` is every node's cumulative share of influence: viewers prune by it.

    - `supernodes`: by their label the nodes that viewers draw as one. `labels`: of nodes, where there is a better one.
    - `scan`: what viewers call the dictionary, under which they look for features (None: the model's name).
    """
    public = public_ids(content.graph)
    nodes = [_node(name, data, public, cumulative, labels.get(name)) for name, data in content.graph.nodes(data=True)]
    links = [
        {"source": public[s], "target": public[t], "weight": data["weight"], "spd_lens": _plain(data)}
        for s, t, data in content.graph.edges(data=True)
    ]
    prompt = [public_text(token) for token in content.tokens] or ["any position"]
    pruning = content.settings.model_dump(include={"node_threshold", "edge_threshold"}, exclude_none=True)
    metadata = {
        "slug": slug,
        "scan": content.settings.model if scan is None else scan,
        "transcoder_list": [],
        # Viewers drop what stands at over two thirds of the positions, which in a prompt of one is everything.
        "prompt_tokens": prompt if len(prompt) > 1 else [*prompt, ""],
        "prompt": public_text("".join(content.tokens)),
        # `influence` is a share of what this file has, so at 1 all of it is shown and the slider goes down from there.
        "node_threshold": 1.0,
        "schema_version": 1,
        "info": {"generator": {"name": "spd_lens", "version": version("spd-lens")}},
        "generation_settings": _plain(content.settings.model_dump()),
        "pruning_settings": _plain(pruning),
        "spd_lens": {
            "format_version": FORMAT_VERSION,
            "tokens": list(content.tokens),
            "check": _plain(content.check),
        },
    }
    grouped = [[public_text(label), *(public[name] for name in nodes)] for label, nodes in supernodes.items()]
    # Viewers group what is pinned.
    pinned = [node for _, *nodes in grouped for node in nodes]
    qparams = {"pinnedIds": pinned, "supernodes": grouped, "linkType": "both", "clickedId": "", "sg_pos": ""}
    whole = {"metadata": metadata, "qParams": qparams, "nodes": nodes, "links": links}
    metadata["spd_lens"]["checksum"] = checksum_of(whole)
    return whole


def write_graph(path: str | Path, whole: Mapping[str, Any]) -> Path:
    """Write what `graph_json` gave."""
    path = given_path(path)
    write_text(path, json.dumps(whole, indent=1, allow_nan=False) + "\n")
    return path


def checksum_of(whole: Mapping[str, Any]) -> str:
    """SHA-256 of everything but the checksum itself and `qParams`, which viewers write back."""
    metadata = whole["metadata"]
    own = {k: v for k, v in metadata["spd_lens"].items() if k != "checksum"}
    kept = {k: v for k, v in whole.items() if k != "qParams"}
    return content_hash({**kept, "metadata": {**metadata, "spd_lens": own}})


# What HTML takes for the beginning of an element, a comment or a declaration.
_TAG = re.compile(r"<(?=[A-Za-z/!?])")


def public_text(text: str) -> str:
    """The text as other viewers may have it: they put labels and tokens into pages as HTML.

    >>> public_text("a<b> <|end|>")
    'a‹b> <|end|>'
    """
    return _TAG.sub("‹", visible(text))


def public_ids(graph: nx.DiGraph) -> dict[str, str]:
    """`{our node: node_id}`: `"{layer}_{id}_{position}"`, the layer E for embeddings and the last one for readouts."""
    found = {}
    for name, data in graph.nodes(data=True):
        position = 0 if data["position"] is None else data["position"]
        found[name] = f"{_layer(data)}_{_public_number(data)}_{position}"
    assert len(set(found.values())) == len(found), "two nodes have one public id"
    return found


def _layer(data: Mapping[str, Any]) -> str:
    return "E" if data["kind"] == "embedding" else str(data["row"])


def _public_number(data: Mapping[str, Any]) -> int:
    """The middle of a node_id: the subcomponent, the token, or a negative number where there is none."""
    return {"subcomponent": data["subcomponent"], "delta": -1}.get(data["kind"], data["number"])


def public_feature(data: Mapping[str, Any]) -> int:
    """The number of a subcomponent for viewers, which read layer and id back out of it (Cantor's pairing)."""
    row, number = data["row"], data["subcomponent"]
    return (row + number) * (row + number + 1) // 2 + number


def _label(data: Mapping[str, Any], better: str | None) -> str:
    """The label as viewers read it: of a readout they want `(p=...)`, and the token between double quotes."""
    if data["kind"] != "readout":
        return public_text(better or data["label"])
    what = data["label"] if data["predicts"] is None else data["predicts"]
    what = public_text(what).replace('"', "”").replace("(p=", "(p =")
    p = float(data["probability"] or 0.0)
    value = f"{p:.3f}" if p == 0 or p >= 0.001 else f"{p:.1e}"
    return f'Output "{what}" (p={value})' if data["predicts"] is not None else f'"{what}" of no token (p=0)'


def _node(
    name: str, data: Mapping[str, Any], public: Mapping[str, str], cumulative: Mapping[str, float], label: str | None
) -> dict[str, Any]:
    position = 0 if data["position"] is None else data["position"]
    number, layer = _public_number(data), _layer(data)
    is_readout = data["kind"] == "readout"
    return {
        "node_id": public[name],
        "feature": public_feature(data) if data["kind"] == "subcomponent" else number,
        "layer": layer,
        "ctx_idx": position,
        "feature_type": _PUBLIC_TYPES[data["kind"]],
        "token_prob": float(data["probability"] or 0.0) if is_readout else 0.0,
        "is_target_logit": is_readout,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": f"{'L' if is_readout else layer}_{number}-{0 if data['kind'] == 'subcomponent' else position}",
        "clerp": _label(data, label),
        # Rounding may leave the last a hair above 1, which viewers would drop.
        "influence": None if name not in cumulative else min(1.0, cumulative[name]),
        "activation": _number(data["activation"]),
        "spd_lens": {"id": name, **_plain(data)},
    }


def _plain(value: Any) -> Any:
    """The value with JSON's own types only; numbers that JSON cannot write become null."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return _number(value)
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
