"""Saving and loading: what is saved comes back, and nothing else is accepted."""

from __future__ import annotations

import copy
import errno
import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from spd_lens import Decomposition, decompose, train
from spd_lens.core import CONFIG, TENSORS
from spd_lens.support import file_hash
from tests.small_models import TiedAutoencoder, tiny_transformer, tokens

SITES: dict[str, int | None] = {"blocks.1.mlp.W_*": 20, "blocks.0.attn.W_V": 6}


@pytest.mark.parametrize("gate", ["scalar", "vector", "shared", "attention", "global"])
def test_a_loaded_decomposition_computes_the_same(tmp_path: Path, gate: Any) -> None:
    original = decompose(tiny_transformer(), SITES, gate=gate, gate_width=5, seed=4)
    original.save_pretrained(tmp_path / "saved")
    loaded = Decomposition.from_pretrained(tmp_path / "saved", tiny_transformer())
    rows = tokens(3)
    for name, g in original.importance(rows).items():
        assert torch.equal(g, loaded.importance(rows)[name])
    masks = {name: torch.rand(w.n_subcomponents) for name, w in original.items()}
    outputs = []
    for decomposition in (original, loaded):
        with decomposition.model.hooks(fwd_hooks=decomposition.mask(masks, delta=0.5)):
            outputs.append(decomposition.model(rows))
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], original.model(rows))


def test_tied_sites_survive_the_round_trip(tmp_path: Path) -> None:
    original = decompose(TiedAutoencoder(), {"*": 4})
    original.save_pretrained(tmp_path / "saved")
    loaded = Decomposition.from_pretrained(tmp_path / "saved", TiedAutoencoder())
    assert torch.equal(loaded["decoder.W"].V, original["decoder.W"].V)
    assert loaded["decoder.W"].tied_to is loaded["encoder.W"]


def test_provenance_names_model_versions_seed_and_training(tmp_path: Path) -> None:
    decomposition = decompose(tiny_transformer(), SITES, seed=7)
    train(decomposition, [tokens(4)], steps=2, out_dir=tmp_path / "run")
    path = decomposition.save_pretrained(tmp_path / "saved")
    config = json.loads((path / CONFIG).read_text())
    assert config["settings"]["seed"] == 7
    assert config["training"]["config"]["steps"] == 2
    assert "loss" in config["training"]["final"]
    assert set(config["weight_hashes"]) == set(decomposition)
    assert config["versions"]["torch"]
    assert config["provenance"]["host"] in ("HookedTransformer", "TransformerBridge")
    card = (path / "README.md").read_text()
    assert "blocks.1.mlp.W_in" in card
    assert "from_pretrained" in card


def test_other_weights_are_refused_by_site_and_the_model_stays_as_it_was(tmp_path: Path) -> None:
    decompose(tiny_transformer(seed=0), SITES).save_pretrained(tmp_path / "saved")
    other = tiny_transformer(seed=1)
    names = set(other.hook_dict)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.W_V differs from the weight"):
        Decomposition.from_pretrained(tmp_path / "saved", other)
    assert set(other.hook_dict) == names


def _truncate(path: Path) -> None:
    file = path / TENSORS
    file.write_bytes(file.read_bytes()[:-100])


def _flip_a_bit(path: Path) -> None:
    data = bytearray((path / TENSORS).read_bytes())
    data[-5] ^= 1
    (path / TENSORS).write_bytes(bytes(data))


def _change_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps(config | changes))


def _drop_a_tensor(path: Path) -> None:
    tensors = load_file(path / TENSORS)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, path / TENSORS)
    _change_config(path, tensors_sha256=file_hash(path / TENSORS))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "is damaged"),
        (_flip_a_bit, "is damaged"),
        (lambda p: (p / TENSORS).unlink(), "is missing"),
        (lambda p: (p / CONFIG).unlink(), "does not hold"),
        (lambda p: (p / CONFIG).write_text("{"), "is damaged"),
        (lambda p: _change_config(p, format="other"), "was not written as"),
        (lambda p: _change_config(p, format_version=99), "Upgrade spd_lens"),
        (lambda p: _change_config(p, settings={"n_subcomponents": {"blocks.9.mlp.W_in": 3}}), "no site"),
        (_drop_a_tensor, "do not belong to these sites"),
    ],
)
def test_damaged_foreign_and_future_saves_are_refused(tmp_path: Path, damage: Any, message: str) -> None:
    path = decompose(tiny_transformer(), SITES).save_pretrained(tmp_path / "saved")
    damage(path)
    model = tiny_transformer()
    names = set(model.hook_dict)
    with pytest.raises(ValueError, match=message):
        Decomposition.from_pretrained(path, model)
    assert set(model.hook_dict) == names


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    path = decompose(tiny_transformer(), SITES).save_pretrained(tmp_path / "saved")
    torch.save({"a": torch.ones(2)}, path / TENSORS)
    _change_config(path, tensors_sha256=file_hash(path / TENSORS))
    with pytest.raises(ValueError, match="not a safetensors file"):
        Decomposition.from_pretrained(path, tiny_transformer())


def test_a_full_disk_loses_nothing_and_says_so(tmp_path: Path) -> None:
    decomposition = decompose(tiny_transformer(), SITES, seed=1)
    path = decomposition.save_pretrained(tmp_path / "saved")
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with torch.no_grad():
        decomposition["blocks.1.mlp.W_in"].V.add_(1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(OSError, match="no room to write") as caught:
            decomposition.save_pretrained(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.ENOSPC
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


def test_a_directory_with_other_files_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        decompose(tiny_transformer(), SITES).save_pretrained(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_hub_name_that_cannot_be_had_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*args: Any, **kwargs: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ValueError, match="is not a directory here, and the Hugging Face Hub"):
        Decomposition.from_pretrained("someone/something", tiny_transformer())


def test_the_hub_round_trip_uploads_what_loading_downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import shutil
    from types import SimpleNamespace

    import huggingface_hub

    hub = tmp_path / "hub"

    class FakeApi:
        def __init__(self, token: str | None = None) -> None:
            self.token = token

        def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> None:
            (hub / repo_id).mkdir(parents=True)

        def upload_folder(self, repo_id: str, folder_path: str, commit_message: str) -> Any:
            shutil.copytree(folder_path, hub / repo_id, dirs_exist_ok=True)
            return SimpleNamespace(commit_url=f"hub/{repo_id}/commit/1")

    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(hub / name))
    original = decompose(tiny_transformer(), SITES)
    assert original.push_to_hub("me/thing") == "hub/me/thing/commit/1"
    loaded = Decomposition.from_pretrained("me/thing", tiny_transformer())
    assert all(torch.equal(t, loaded.tensors()[name]) for name, t in original.tensors().items())


def test_a_deep_copy_saves_its_own_numbers(tmp_path: Path) -> None:
    original = decompose(tiny_transformer(), SITES)
    twin = copy.deepcopy(original)
    with torch.no_grad():
        twin["blocks.1.mlp.W_in"].U.zero_()
    twin.save_pretrained(tmp_path / "twin")
    loaded = Decomposition.from_pretrained(tmp_path / "twin", tiny_transformer())
    assert not loaded["blocks.1.mlp.W_in"].U.any()
    assert original["blocks.1.mlp.W_in"].U.any()
