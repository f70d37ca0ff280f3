"""Attribution graphs as JSON that circuit-tracer's viewer and Neuronpedia read, and back.

The public fields (`metadata`, `qParams`, `nodes`, `links`) follow Neuronpedia's graph schema. That viewer has rows for
layers; here every site is a row of its own, in the order in which sites run, so `layer` is the number of the site.
Subcomponents are written as "cross layer transcoder" nodes and deltas as "mlp reconstruction error" nodes, the words
that viewers know. What these words cannot say (site names, the measured agreement, exact numbers) stands beside them
under the key `spd_lens`, which other readers ignore; `read_graph` needs it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError

from spd_lens.support.checked_json import CheckedContent, content_hash, in_words, read_json_object
from spd_lens.support.files import given_path, write_text

if TYPE_CHECKING:
    import networkx as nx

FORMAT_VERSION = 2
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
    settings: dict[str, Any]
    check: dict[str, Any]


def write_graph(
    path: str | Path,
    content: GraphFile,
    *,
    slug: str,
    cumulative: Mapping[str, float],
    supernodes: Mapping[str, Sequence[str]],
) -> Path:
    """Write `content` to `path`; `cumulative` is every node's cumulative share of influence, which viewers prune by.

    `supernodes`: by their label the nodes that viewers draw as one.
    """
    path = given_path(path)
    public = public_ids(content.graph)
    nodes = [_node(name, data, public, cumulative, content) for name, data in content.graph.nodes(data=True)]
    links = [
        {"source": public[s], "target": public[t], "weight": data["weight"], "spd_lens": _plain(data)}
        for s, t, data in content.graph.edges(data=True)
    ]
    metadata = {
        "slug": slug,
        "scan": str(content.settings.get("model", "unknown")),
        "transcoder_list": [],
        "prompt_tokens": list(content.tokens),
        "prompt": "".join(content.tokens),
        "schema_version": 1,
        "info": {"generator": {"name": "spd_lens", "version": version("spd-lens")}},
        "generation_settings": _plain(content.settings),
        "spd_lens": {"format_version": FORMAT_VERSION, "check": _plain(content.check)},
    }
    grouped = [[label, *(public[name] for name in nodes)] for label, nodes in supernodes.items()]
    # Viewers group what is pinned.
    pinned = [node for _, *nodes in grouped for node in nodes]
    qparams = {"pinnedIds": pinned, "supernodes": grouped, "linkType": "both", "clickedId": "", "sg_pos": ""}
    whole = {"metadata": metadata, "qParams": qparams, "nodes": nodes, "links": links}
    metadata["spd_lens"]["checksum"] = _checksum(whole)
    write_text(path, json.dumps(whole, indent=1, allow_nan=False) + "\n")
    return path


def public_ids(graph: nx.DiGraph) -> dict[str, str]:
    """`{our node: node_id}`: `"{layer}_{id}_{position}"`, the layer E for embeddings and the last one for targets."""
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


def _node(
    name: str, data: Mapping[str, Any], public: Mapping[str, str], cumulative: Mapping[str, float], content: GraphFile
) -> dict[str, Any]:
    position = 0 if data["position"] is None else data["position"]
    number, layer = _public_number(data), _layer(data)
    is_target = data["kind"] == "readout"
    # Viewers read layer and id of a transcoder node back out of this number (Cantor's pairing).
    paired = (data["row"] + number) * (data["row"] + number + 1) // 2 + number
    return {
        "node_id": public[name],
        "feature": paired if data["kind"] == "subcomponent" else number,
        "layer": layer,
        "ctx_idx": position,
        "feature_type": _PUBLIC_TYPES[data["kind"]],
        "token_prob": float(data["probability"] or 0.0) if is_target else 0.0,
        "is_target_logit": is_target,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": f"{'L' if is_target else layer}_{number}-{0 if data['kind'] == 'subcomponent' else position}",
        "clerp": data["label"],
        "influence": _number(cumulative.get(name)),
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


# -- reading ----------------------------------------------------------------------------------------------------------


class _Node(CheckedContent):
    """What stands under a node's key `spd_lens`."""

    id: str
    kind: Literal["subcomponent", "delta", "embedding", "readout"]
    label: str
    site: str
    subcomponent: int = Field(ge=-1)
    number: int = Field(ge=-2)
    position: Annotated[int, Field(ge=0)] | None
    token: str | None
    row: int
    activation: float | None
    importance: float | None
    probability: float | None
    readout_weight: float | None
    from_unshown: float | None
    firing_rate: float | None = None


class _Link(CheckedContent):
    """What stands under a link's key `spd_lens`."""

    weight: float
    absolute: float | None = None


def read_graph(path: str | Path) -> GraphFile:
    """Read what `write_graph` wrote.

    Raises ValueError, saying where, for a file that is absent, damaged, from another program, or of another version.
    The checksum is over everything, so a graph that was edited elsewhere is refused.
    """
    import networkx as nx

    path = given_path(path)
    whole = read_json_object(path)
    own = _check_head(path, whole)
    graph, names = nx.DiGraph(), {}
    for i, node in enumerate(whole["nodes"]):
        part = _part(path, node, f"nodes[{i}]", ("node_id", "spd_lens"))
        data = _checked(path, part["spd_lens"], f"nodes[{i}]", _Node)
        if not isinstance(part["node_id"], str) or part["node_id"] in names or data["id"] in graph:
            raise ValueError(f"{path}: nodes[{i}] has no id of its own ({part['node_id']!r})")
        names[part["node_id"]] = data.pop("id")
        graph.add_node(names[part["node_id"]], **data)
    for i, link in enumerate(whole["links"]):
        part = _part(path, link, f"links[{i}]", ("source", "target", "weight", "spd_lens"))
        ends = [part["source"], part["target"]]
        unknown = [end for end in ends if not isinstance(end, str) or end not in names]
        if unknown:
            raise ValueError(f"{path}: links[{i}] names the node {unknown[0]!r}, which is not among the nodes")
        data = _checked(path, part["spd_lens"], f"links[{i}]", _Link)
        graph.add_edge(names[ends[0]], names[ends[1]], **data)
    metadata = whole["metadata"]
    tokens, settings = metadata.get("prompt_tokens"), metadata.get("generation_settings")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise ValueError(f"{path}: metadata.prompt_tokens is missing or no list of strings")
    if not isinstance(settings, dict) or not isinstance(own.get("check"), dict):
        raise ValueError(f"{path}: metadata.generation_settings or metadata.spd_lens.check is missing")
    return GraphFile(graph, tuple(tokens), settings, own["check"])


def _check_head(path: Path, whole: dict[str, Any]) -> dict[str, Any]:
    """Kind, version and checksum; returns what is ours in the metadata."""
    for key, kind in (("metadata", dict), ("qParams", dict), ("nodes", list), ("links", list)):
        if not isinstance(whole.get(key), kind):
            raise ValueError(f"{path}: {key} is missing or no {kind.__name__}; this is not an attribution graph")
    own = whole["metadata"].get("spd_lens")
    version = own.get("format_version") if isinstance(own, dict) else None
    if not isinstance(own, dict) or isinstance(version, bool) or not isinstance(version, int):
        raise ValueError(
            f"{path} was not written by spd_lens (metadata.spd_lens is missing); only such graphs are read"
        )
    if version > FORMAT_VERSION:
        raise ValueError(f"{path} has format version {version}; this spd_lens reads up to {FORMAT_VERSION}. Upgrade it")
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {version}; this spd_lens reads {FORMAT_VERSION}. Make it again")
    if own.get("checksum") != _checksum(whole):
        raise ValueError(f"{path} is damaged or was changed by hand: its checksum does not fit its contents")
    return own


def _checksum(whole: Mapping[str, Any]) -> str:
    """SHA-256 of everything but the checksum itself."""
    metadata = whole["metadata"]
    own = {k: v for k, v in metadata["spd_lens"].items() if k != "checksum"}
    return content_hash({**whole, "metadata": {**metadata, "spd_lens": own}})


def _checked(path: Path, value: Any, where: str, kind: type[CheckedContent]) -> dict[str, Any]:
    try:
        return kind.model_validate(value).model_dump(exclude_unset=True)
    except ValidationError as error:
        raise ValueError(f"{path}: {where}.spd_lens is damaged: {in_words(error)}") from error


def _part(path: Path, value: Any, where: str, keys: Sequence[str]) -> dict[str, Any]:
    missing = [key for key in keys if not isinstance(value, dict) or key not in value]
    if missing:
        raise ValueError(f"{path}: {where} has no {missing[0]!r}")
    return value
