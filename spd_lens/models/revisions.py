"""One revision of a model on the Hugging Face Hub as a folder here."""

from __future__ import annotations

from pathlib import Path

_TEXTS = ["*.json", "*.txt", "*.model", "*.jinja"]


def downloaded_revision(hub_id: str, revision: str) -> Path:
    """The folder of a revision's configuration, weights and tokenizer, downloaded or from the cache.

    Raises ValueError, saying why, for a name or revision that is not there, and without a connection for one that was
    not downloaded before.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=[*_TEXTS, "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=[*_TEXTS, "*.bin"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{hub_id} at revision {revision!r} cannot be had ({reason}); expected a name and a branch, tag or commit "
            "of the Hub, or the path of a folder"
        ) from error
    return folder
