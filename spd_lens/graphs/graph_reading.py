"""Reading graphs that `spd_lens.graphs.viewer_json` wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from spd_lens.graphs.graph_settings import GraphSettings
from spd_lens.graphs.viewer_json import FORMAT_VERSION, GraphFile, checksum_of
from spd_lens.support.checked_json import CheckedContent, Content, in_words, read_json_object
from spd_lens.support.files import given_path


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
    predicts: str | None
    from_unshown: float | None
    firing_rate: float | None = None


class _Link(CheckedContent):
    """What stands under a link's key `spd_lens`."""

    weight: float
    absolute: float | None = None


def read_graph(path: str | Path) -> GraphFile:
    """Read what `write_graph` wrote.

    Raises ValueError, saying where, for a file that is absent, damaged, from another program, or of another version.
    The checksum is over everything but `qParams`, which viewers write back when somebody pins and groups; a graph whose
    nodes or links were edited elsewhere is refused.
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
    tokens = own.get("tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise ValueError(f"{path}: metadata.spd_lens.tokens is missing or no list of strings")
    if not isinstance(own.get("check"), dict):
        raise ValueError(f"{path}: metadata.spd_lens.check is missing")
    settings = _valid(path, metadata.get("generation_settings"), "metadata.generation_settings", GraphSettings)
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
    if own.get("checksum") != checksum_of(whole):
        raise ValueError(f"{path} is damaged or was changed by hand: its checksum does not fit its contents")
    return own


def _checked(path: Path, value: Any, where: str, kind: type[CheckedContent]) -> dict[str, Any]:
    return _valid(path, value, f"{where}.spd_lens", kind).model_dump(exclude_unset=True)


def _valid(path: Path, value: Any, where: str, kind: type[Content]) -> Content:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise ValueError(f"{path}: {where} is damaged: {in_words(error)}") from error


def _part(path: Path, value: Any, where: str, keys: Sequence[str]) -> dict[str, Any]:
    missing = [key for key in keys if not isinstance(value, dict) or key not in value]
    if missing:
        raise ValueError(f"{path}: {where} has no {missing[0]!r}")
    return value
