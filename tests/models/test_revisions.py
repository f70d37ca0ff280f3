"""A model at a revision of the Hub, offline, from a cache laid out as huggingface_hub lays it out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.families import write_checkpoint
from spd_lens import Decomposition, decompose
from spd_lens.cli import ConfigError, ModelSection, open_run_model
from spd_lens.models import open_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with the repository `someone/small` at one commit, called v1; without a connection."""
    from huggingface_hub import constants

    repository = tmp_path / "models--someone--small"
    write_checkpoint("GPT-2", repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return repository / "snapshots" / COMMIT


def test_a_revision_is_opened_and_its_commit_is_in_the_provenance(cache: Path, tmp_path: Path) -> None:
    tokens = torch.randint(1, 2000, (2, 7))
    for revision in ("v1", COMMIT):
        model: Any = open_model("someone/small", revision=revision)
        assert torch.equal(model(tokens), open_model(cache)(tokens))  # pyright: ignore[reportCallIssue]
        decomposition = decompose(model, {"blocks.0.mlp.W_in": 3})
        details = decomposition.host.provenance().details
        assert details["revision"] == {"hub_id": "someone/small", "revision": revision, "commit": COMMIT}
        assert decomposition.host.provenance().model_name == "someone/small"
        saved = decomposition.save_pretrained(tmp_path / revision)
        assert COMMIT in (saved / "spd_config.json").read_text()
        again = Decomposition.from_pretrained(saved, open_run_model(ModelSection(name="someone/small", revision="v1")))
        assert list(again) == ["blocks.0.mlp.W_in"]


def test_what_has_no_revision_is_refused_in_words(cache: Path) -> None:
    with pytest.raises(ValueError, match="someone/small at revision 'v2' cannot be had"):
        open_model("someone/small", revision="v2")
    with pytest.raises(ValueError, match=r"is for the Hub, but .* is a folder here"):
        open_model(cache, revision="v1")
    with pytest.raises(ConfigError, match="tiny_lm ships with the package"):
        open_run_model(ModelSection(name="tiny_lm", revision="v1"))
