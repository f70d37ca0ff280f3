"""The Hugging Face Hub: what is saved with a decomposition goes there and comes back through huggingface_hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from spd_lens.core.card import is_replaceable

_CARD = "README.md"


def downloaded(
    hub_id: str, revision: str | None, files: Sequence[str], what: str
) -> tuple[Path, dict[str, str | None]]:
    """Some files of a repository of the Hub: the directory that they are in, and where they came from.

    Raises ValueError if the Hub does not give them.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        directory = Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(files)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        at = "" if revision is None else f" at revision {revision!r}"
        raise ValueError(
            f"{hub_id!r} is not a directory here, and the Hugging Face Hub did not give {what} of that "
            f"name{at}: {error}"
        ) from error
    # The cache has one directory for each commit, called by its hash.
    commit = directory.name if directory.parent.name == "snapshots" else None
    return directory, {"hub_id": hub_id, "revision": revision, "commit": commit}


def upload(directory: Path, repo_id: str, *, private: bool, token: str | None) -> str:
    """Put a saved decomposition on the Hugging Face Hub; returns the address of the commit.

    A README there that is not a card of ours, or was edited, stays.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    keeps_readme = api.file_exists(repo_id, _CARD) and not is_replaceable(Path(api.hf_hub_download(repo_id, _CARD)))
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=str(directory),
        commit_message="Upload decomposition",
        ignore_patterns=[_CARD] if keeps_readme else None,
    )
    return str(commit.commit_url)
