"""The saved form of a decomposition: files that can be checked, loaded and put on the Hugging Face Hub.

They are `subcomponents.safetensors` (every V, U and gate), `spd_config.json` (settings and provenance: model,
weight-processing state, a hash of every decomposed weight, versions, training configuration, metrics; a checksum over
it all) and a generated `README.md`. Other files in their directory are left alone. A save loads onto a model with the
same weights only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field
from torch import Tensor

from spd_lens.core.card import is_replaceable, model_card
from spd_lens.core.hub import downloaded
from spd_lens.core.settings import Settings
from spd_lens.hosts.host import Host
from spd_lens.hosts.site import Site
from spd_lens.support.checked_json import CheckedContent, checked_text, read_checked, read_json_object
from spd_lens.support.files import given_directory, given_path, tensor_hash
from spd_lens.support.given import shown
from spd_lens.support.saved_pair import SavedPair
from spd_lens.support.versions import library_versions

FORMAT = "spd_lens decomposition"
FORMAT_VERSION = 2
TENSORS, CONFIG, CARD = "subcomponents.safetensors", "spd_config.json", "README.md"
_SHA256 = r"^[0-9a-f]{64}$"


class SavedProvenance(CheckedContent):
    """What a decomposition was made from; `loaded_from` if it was itself loaded from the Hub."""

    model_name: str
    host: str
    weight_processing: str
    details: dict[str, Any]
    loaded_from: dict[str, str | None] | None = None


class SavedConfig(CheckedContent):
    """The fields of `spd_config.json`."""

    settings: Settings
    tensors_sha256: str = Field(pattern=_SHA256)
    provenance: SavedProvenance
    weight_hashes: dict[str, str]
    weight_dtypes: dict[str, str]
    versions: dict[str, str]
    training: dict[str, Any]


@dataclass(frozen=True)
class SavedDecomposition:
    """What `read_decomposition` found: trained tensors by name, the settings that rebuild their modules, the rest."""

    directory: Path
    tensors: dict[str, Tensor]
    settings: Settings
    config: SavedConfig
    loaded_from: dict[str, str | None] | None


def _files(directory: Path) -> SavedPair[SavedConfig]:
    def read(path: Path) -> SavedConfig:
        if not path.exists():
            raise ValueError(
                f"{path} is missing: {directory} does not hold a {FORMAT}; expected one that save_pretrained wrote"
            )
        return read_checked(path, SavedConfig, format_name=FORMAT, version=FORMAT_VERSION)

    return SavedPair(directory, TENSORS, CONFIG, read, lambda config: config.tensors_sha256)


def write_decomposition(
    directory: str | Path,
    tensors: Mapping[str, Tensor],
    *,
    host: Host,
    sites: Sequence[Site],
    settings: Settings,
    training: Mapping[str, Any],
    license: str,
    loaded_from: Mapping[str, str | None] | None = None,
) -> Path:
    """Write a decomposition to `directory`, replacing an earlier save there and nothing else; returns the path.

    Raises ValueError if files of other programs have the names of ours, OSError if the disk is full; what was there
    is intact.
    """
    directory = given_directory(directory)
    _check_license(license)
    _check_names(directory)
    provenance = host.provenance()
    content = {
        "settings": settings.to_json(),
        "provenance": {**vars(provenance), "details": dict(provenance.details), "loaded_from": loaded_from},
        "weight_hashes": {site.name: tensor_hash(site.matrix.read()) for site in sites},
        "weight_dtypes": {site.name: _dtype(site) for site in sites},
        "versions": library_versions(),
        "training": dict(training),
    }
    others = {CARD: model_card(content, license=license)} if is_replaceable(directory / CARD) else {}

    def config(digest: str) -> str:
        return checked_text({**content, "tensors_sha256": digest}, format_name=FORMAT, version=FORMAT_VERSION)

    _files(directory).write(tensors, config, others)
    return directory


def _check_license(license: Any) -> None:
    if not isinstance(license, str):
        raise TypeError(f"license={license!r}; expected the Hub's word for one, such as 'mit' or 'other'")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", license):
        raise ValueError(f"license={license!r}; expected the Hub's word for one, such as 'mit' or 'apache-2.0'")


def _check_names(directory: Path) -> None:
    """ValueError if a file of another program stands where ours would be written."""
    foreign = None
    for name in (TENSORS, CONFIG):
        if (directory / name).is_dir():
            foreign = name
    if foreign is None and (directory / CONFIG).exists():
        try:
            content = read_json_object(directory / CONFIG)
        except ValueError:
            return  # a damaged save of ours may be written anew
        foreign = CONFIG if content.get("format") != FORMAT else None
    elif foreign is None and (directory / TENSORS).exists():
        try:
            _files(directory).load()
        except ValueError:
            foreign = TENSORS
    if foreign is not None:
        raise ValueError(f"{directory / foreign} is of another program; choose a directory without such a file")


def read_decomposition(directory_or_hub_id: str | Path, revision: str | None = None) -> SavedDecomposition:
    """Read a save from a directory, or from the Hugging Face Hub if there is no such directory.

    Raises ValueError for a truncated, altered, foreign or newer save.
    """
    directory, loaded_from = given_path(directory_or_hub_id, "the name of a saved decomposition"), None
    if directory.is_file():
        raise ValueError(f"{directory} is a file; expected the directory that save_pretrained wrote")
    if not directory.is_dir():
        files = [TENSORS, CONFIG, CARD]
        directory, loaded_from = downloaded(str(directory_or_hub_id), revision, files, "a decomposition")
    elif revision is not None:
        raise ValueError(f"revision={revision!r} is for the Hub, but {directory} is a directory here; leave it away")
    config, tensors = _files(directory).load()
    _check_counts(directory, config, tensors)
    return SavedDecomposition(directory, tensors, config.settings, config, loaded_from)


def _check_counts(directory: Path, config: SavedConfig, tensors: Mapping[str, Tensor]) -> None:
    """Every size in the JSON is one that the tensors have, before anything of that size is made."""
    counts, hashes = config.settings.n_subcomponents, config.weight_hashes
    if counts.keys() != hashes.keys() or counts.keys() != config.weight_dtypes.keys():
        odd = sorted(counts.keys() ^ hashes.keys())
        raise ValueError(f"{directory / CONFIG} is damaged: settings and weight_hashes name other sites: {odd[:3]}")
    for name, count in counts.items():
        V = tensors.get(f"{name}.V")
        if V is not None and (V.ndim != 2 or V.shape[1] != count):
            raise ValueError(
                f"{directory / CONFIG} is damaged: it gives {name} {count} subcomponents, but V in {TENSORS} has shape "
                f"{tuple(V.shape)}"
            )
    most = max((size for t in tensors.values() for size in t.shape), default=0)
    largest = max(counts.values(), default=0)
    settings = config.settings
    if (
        largest > most
        or max(settings.gate_width or 0, settings.gate_heads) > most
        or settings.gate_blocks > len(tensors)
    ):
        raise ValueError(f"{directory / CONFIG} is damaged: it names sizes that no tensor in {TENSORS} has")


def check_tensors(own: Mapping[str, Tensor], saved: Any) -> None:
    """Raise TypeError or ValueError unless `saved` has the names and shapes of `own`, and numbers that are finite."""
    if not isinstance(saved, Mapping) or not all(isinstance(t, Tensor) for t in saved.values()):
        raise TypeError(f"the saved tensors are {shown(saved)}; expected {{name: tensor}}, as tensors() gives")
    if own.keys() != saved.keys():
        odd = sorted(own.keys() ^ saved.keys())[:3]
        raise ValueError(f"the saved tensors do not belong to these sites; first differences: {odd}")
    for name, tensor in own.items():
        if tensor.shape != saved[name].shape:
            raise ValueError(f"{name} has shape {tuple(saved[name].shape)}; expected {tuple(tensor.shape)}")
        if not saved[name].is_meta and not bool(saved[name].isfinite().all()):
            raise ValueError(f"{name} is NaN or infinite in the saved tensors; nothing was loaded")


def check_same_weights(saved: SavedDecomposition, sites: Sequence[Site]) -> None:
    """Raise ValueError, naming the site, unless every weight is the one that the decomposition was made from."""
    made_from, config = saved.config.provenance, saved.config
    for site in sites:
        if site.matrix.read().is_meta:
            raise ValueError(f"{site.name} is on the meta device and has no numbers; load the model's weights first")
        if tensor_hash(site.matrix.read()) == config.weight_hashes[site.name]:
            continue
        then, now = config.weight_dtypes[site.name], _dtype(site)
        dtypes = f" It was {then} and is {now} here: load the model as {then}." if then != now else ""
        raise ValueError(
            f"{site.name} differs from the weight that this decomposition was made from "
            f"({made_from.model_name}, {made_from.host}, {made_from.weight_processing}); load the same "
            f"model with the same weight processing.{dtypes}"
        )


def _dtype(site: Site) -> str:
    return str(site.matrix.stored().dtype).removeprefix("torch.")
