"""The saved form of a decomposition: a directory that can be checked, loaded and put on the Hugging Face Hub.

It holds `subcomponents.safetensors` (every V, U and gate), `spd_config.json` (settings and provenance: model,
weight-processing state, a hash of every decomposed weight, versions, training configuration, metrics) and a generated
`README.md`. It loads onto a model with the same weights only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from spd_lens.hosts.host import Host
from spd_lens.hosts.site import Site
from spd_lens.support.files import new_directory, read_json, read_tensors, tensor_hash, write_json, write_tensors
from spd_lens.support.versions import library_versions

FORMAT = "spd_lens decomposition"
FORMAT_VERSION = 1


TENSORS, CONFIG, CARD = "subcomponents.safetensors", "spd_config.json", "README.md"


@dataclass(frozen=True)
class SavedDecomposition:
    """What `read_decomposition` found: trained tensors by name, the settings that rebuild their modules, the rest."""

    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    config: dict[str, Any]


def write_decomposition(
    directory: str | Path,
    tensors: Mapping[str, Tensor],
    *,
    host: Host,
    sites: Sequence[Site],
    settings: Mapping[str, Any],
    training: Mapping[str, Any],
) -> Path:
    """Write a decomposition to `directory`, replacing an earlier save there; returns the path.

    Raises ValueError if `directory` holds something else, OSError if the disk is full; what was there is intact.
    """
    directory = Path(directory)
    if directory.exists() and any(directory.iterdir()) and not (directory / CONFIG).is_file():
        raise ValueError(f"{directory} holds other files; choose a new or empty directory")
    provenance = host.provenance()
    with new_directory(directory, replace=True) as temporary:
        config = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "settings": dict(settings),
            "tensors_sha256": write_tensors(temporary / TENSORS, tensors),
            "provenance": vars(provenance) | {"details": dict(provenance.details)},
            "weight_hashes": {site.name: tensor_hash(site.matrix.read()) for site in sites},
            "versions": library_versions(),
            "training": dict(training),
        }
        write_json(temporary / CONFIG, config)
        (temporary / CARD).write_text(model_card(config), encoding="utf-8")
    return directory


def read_decomposition(directory_or_hub_id: str | Path) -> SavedDecomposition:
    """Read a save from a directory, or from the Hugging Face Hub if there is no such directory.

    Raises ValueError for a truncated, altered, foreign or newer save.
    """
    directory = Path(directory_or_hub_id)
    if not directory.is_dir():
        directory = _download(str(directory_or_hub_id))
    config = read_json(directory / CONFIG, format_name=FORMAT, newest_version=FORMAT_VERSION)
    for key in ("settings", "weight_hashes", "tensors_sha256", "provenance"):
        if key not in config:
            raise ValueError(f"{directory / CONFIG} is damaged: it has no {key!r}")
    tensors = read_tensors(directory / TENSORS, config["tensors_sha256"])
    return SavedDecomposition(tensors, config["settings"], config)


def check_same_weights(saved: SavedDecomposition, sites: Sequence[Site]) -> None:
    """Raise ValueError, naming the site, unless every weight is the one that the decomposition was made from."""
    made_from = saved.config["provenance"]
    for site in sites:
        if tensor_hash(site.matrix.read()) != saved.config["weight_hashes"].get(site.name):
            raise ValueError(
                f"{site.name} differs from the weight that this decomposition was made from "
                f"({made_from['model_name']}, {made_from['host']}, {made_from['weight_processing']}); load the same "
                "model with the same weight processing"
            )


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=[TENSORS, CONFIG, CARD]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{hub_id!r} is not a directory here, and the Hugging Face Hub did not give a decomposition of that "
            f"name: {error}"
        ) from error


def upload(directory: Path, repo_id: str, *, private: bool, token: str | None) -> str:
    """Put a saved decomposition on the Hugging Face Hub; returns the address of the commit."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    commit = api.upload_folder(repo_id=repo_id, folder_path=str(directory), commit_message="Upload decomposition")
    return str(commit.commit_url)


def model_card(config: Mapping[str, Any]) -> str:
    """A README for the Hub: what was decomposed, how to load it, how it was trained and what was measured."""
    made_from, training = config["provenance"], config["training"] or {}
    sites = "\n".join(f"| `{name}` | {count} |" for name, count in config["settings"]["n_subcomponents"].items())
    lines = [
        "---",
        "library_name: spd_lens",
        "tags: [interpretability, parameter-decomposition, transformer-lens]",
        "---",
        f"# SPD decomposition of {made_from['model_name']}",
        "",
        "Stochastic Parameter Decomposition (arXiv 2506.20790): each matrix below is written as a sum of rank-one "
        "subcomponents with a gate that predicts, per input, how much each one matters.",
        "",
        f"Made from a {made_from['host']} ({made_from['weight_processing']}); gate: {config['settings']['gate']}; "
        f"seed {config['settings']['seed']}.",
        "",
        "| site | C |",
        "|---|---|",
        sites,
        "",
        "```python",
        "from spd_lens import Decomposition",
        "decomposition = Decomposition.from_pretrained(PATH_OR_HUB_ID, model)",
        "```",
        "",
        f"Trained for {training.get('steps', 0)} steps. Final metrics: {training.get('final', 'not recorded')}.",
        "",
        "Versions: " + ", ".join(f"{k} {v}" for k, v in config["versions"].items()) + ".",
        "",
    ]
    return "\n".join(lines)
