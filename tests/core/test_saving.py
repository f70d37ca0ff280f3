"""Saving and loading: what is saved comes back, and nothing else is accepted."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from spd_lens import Decomposition, decompose, train
from spd_lens.components import Components
from spd_lens.core import CONFIG, TENSORS, Unit, model_card
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
    """Changes with a checksum that fits, computed here as the docs say: over the sorted values without itself."""
    config = json.loads((path / CONFIG).read_text()) | changes
    del config["checksum"]
    text = json.dumps(config, sort_keys=True, separators=(",", ":"))
    config["checksum"] = hashlib.sha256(text.encode()).hexdigest()
    (path / CONFIG).write_text(json.dumps(config))


def _settings(path: Path, **changes: Any) -> None:
    _change_config(path, settings=json.loads((path / CONFIG).read_text())["settings"] | changes)


def _drop_a_tensor(path: Path) -> None:
    tensors = load_file(path / TENSORS)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, path / TENSORS)
    _change_config(path, tensors_sha256=file_hash(path / TENSORS))


def _enlarge(path: Path) -> None:
    counts = json.loads((path / CONFIG).read_text())["settings"]["n_subcomponents"]
    _settings(path, n_subcomponents=counts | {"blocks.0.attn.W_V": 10**12})


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
        (lambda p: _change_config(p, format_version=1), "before its first release"),
        (lambda p: _change_config(p, format_version=-1), "its format version is '-1'"),
        (lambda p: _change_config(p, new=1), "new: Extra inputs are not permitted"),
        (lambda p: _change_config(p, settings=None), "settings: Input should be"),
        (lambda p: _settings(p, gate=[]), "settings.gate"),
        (lambda p: _settings(p, seed=True), "settings.seed"),
        (lambda p: _settings(p, gate_width=10**12), "names sizes that no tensor"),
        (lambda p: _settings(p, n_subcomponents={"blocks.9.mlp.W_in": 3}), "name other sites"),
        (lambda p: (p / CONFIG).write_text("[" * 200_000), "nested too deeply"),
        (lambda p: (p / CONFIG).write_text((p / CONFIG).read_text().replace('"seed": 0', '"seed": 1')), "checksum"),
        (_drop_a_tensor, "do not belong to these sites"),
        (_enlarge, "it gives blocks.0.attn.W_V 1000000000000 subcomponents, but V in"),
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


def test_nothing_but_our_own_files_is_touched(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    own = {tmp_path / ".git" / "HEAD": "main", tmp_path / "notes.txt": "mine", tmp_path / "README.md": "# my card"}
    for file, text in own.items():
        file.write_text(text)
    for seed in (1, 2):
        decompose(tiny_transformer(), SITES, seed=seed).save_pretrained(tmp_path)
    assert {file: file.read_text() for file in own} == own
    assert {p.name for p in tmp_path.iterdir()} == {".git", "notes.txt", "README.md", TENSORS, CONFIG}


@pytest.mark.parametrize("name", [TENSORS, CONFIG])
def test_files_of_other_programs_with_our_names_are_not_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"mine": 1}')
    with pytest.raises(ValueError, match=f"{name} is of another program"):
        decompose(tiny_transformer(), SITES).save_pretrained(tmp_path)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(name, '{"mine": 1}')]


def test_a_generated_card_follows_the_save_until_somebody_edits_it(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    decompose(tiny_transformer(), SITES, seed=1).save_pretrained(tmp_path)
    first = card.read_text()
    decompose(tiny_transformer(), SITES, seed=22).save_pretrained(tmp_path, license="mit")
    assert "seed 22" in card.read_text()
    assert "license: other" in first
    assert "license: mit" in card.read_text()
    card.write_text(card.read_text().replace("# SPD decomposition", "My own words.\n# SPD decomposition"))
    edited = card.read_text()
    decompose(tiny_transformer(), SITES, seed=3).save_pretrained(tmp_path)
    assert card.read_text() == edited


def test_names_in_the_card_are_text() -> None:
    hostile = "<b>x</b> [a](http://b) | `c`\n# d \u202e"
    config = {
        "provenance": {"model_name": hostile, "host": "h", "weight_processing": "w"},
        "settings": {"n_subcomponents": {hostile: 3}, "gate": "scalar", "seed": 0},
        "training": {},
        "versions": {},
    }
    card = model_card(config, license="other")
    title = next(line for line in card.splitlines() if line.startswith("# "))
    assert title == (r"# SPD decomposition of &lt;b&gt;x&lt;/b&gt; \[a\](http://b) \| \`c\`U+000A\# d U+202E")
    assert r"| `` <b>x</b> [a](http://b) \| `c`U+000A# d U+202E `` | 3 |" in card.splitlines()


def test_a_save_is_for_colleagues_as_the_umask_says(tmp_path: Path) -> None:
    decomposition = decompose(tiny_transformer(), SITES)
    before = os.umask(0o027)
    try:
        decomposition.save_pretrained(tmp_path / "saved")
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "saved").iterdir()} == {0o640}


def test_paths_as_users_give_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_type_checks: None) -> None:
    decomposition = decompose(tiny_transformer(), SITES)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert decomposition.save_pretrained("~/saved") == tmp_path / "saved"
    (tmp_path / "file").write_text("")
    for place in ("file", "file/below"):
        with pytest.raises(ValueError, match="file is a file; expected a directory"):
            decomposition.save_pretrained(place)
    with pytest.raises(ValueError, match="file is a file; expected the directory that save_pretrained wrote"):
        Decomposition.from_pretrained("file", tiny_transformer())
    with pytest.raises(TypeError, match="directory is a NoneType; expected a str or a Path"):
        decomposition.save_pretrained(None)  # pyright: ignore[reportArgumentType]
    Decomposition.from_pretrained("~/saved", tiny_transformer())
    with pytest.raises(ValueError, match="revision='v1' is for the Hub"):
        Decomposition.from_pretrained("~/saved", tiny_transformer(), revision="v1")


def test_a_model_in_another_dtype_is_told_so(tmp_path: Path) -> None:
    decompose(tiny_transformer(), SITES).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="It was float32 and is bfloat16 here: load the model as float32"):
        Decomposition.from_pretrained(tmp_path, tiny_transformer().to(torch.bfloat16))


def test_a_hub_name_that_cannot_be_had_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*args: Any, **kwargs: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ValueError, match="is not a directory here, and the Hugging Face Hub"):
        Decomposition.from_pretrained("someone/something", tiny_transformer())
    with pytest.raises(ValueError, match=r"'someone/something' is not a directory .* did not give components"):
        Components.load("someone/something", decompose(tiny_transformer(), SITES))


def test_the_hub_round_trip_uploads_what_loading_downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import shutil
    from types import SimpleNamespace

    import huggingface_hub

    hub = tmp_path / "hub"

    class FakeApi:
        def __init__(self, token: str | None = None) -> None:
            self.token = token

        def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> None:
            (hub / repo_id).mkdir(parents=True, exist_ok=True)

        def file_exists(self, repo_id: str, name: str) -> bool:
            return (hub / repo_id / name).exists()

        def hf_hub_download(self, repo_id: str, name: str) -> str:
            return str(hub / repo_id / name)

        def upload_folder(self, repo_id: str, folder_path: str, commit_message: str, ignore_patterns: Any) -> Any:
            ignored = shutil.ignore_patterns(*(ignore_patterns or ()))
            shutil.copytree(folder_path, hub / repo_id, dirs_exist_ok=True, ignore=ignored)
            return SimpleNamespace(commit_url=f"hub/{repo_id}/commit/1")

    asked = []

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(revision)
        shutil.copytree(hub / name, tmp_path / "snapshots" / "abc123", dirs_exist_ok=True)
        return str(tmp_path / "snapshots" / "abc123")

    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    original = decompose(tiny_transformer(), SITES)
    assert original.push_to_hub("me/thing") == "hub/me/thing/commit/1"
    loaded = Decomposition.from_pretrained("me/thing", tiny_transformer(), revision="v1")
    assert asked == ["v1"]
    assert all(torch.equal(t, loaded.tensors()[name]) for name, t in original.tensors().items())
    # Where it came from is in what is saved from then on.
    loaded.save_pretrained(tmp_path / "again")
    provenance = json.loads((tmp_path / "again" / CONFIG).read_text())["provenance"]
    assert provenance["loaded_from"] == {"hub_id": "me/thing", "revision": "v1", "commit": "abc123"}
    # Components go with it, if they are its own.
    components = Components.of(original, [Unit(((site, 0),), name=site) for site in original])
    original.push_to_hub("me/thing", components=components)
    assert [unit.name for unit in Components.load(hub / "me/thing", original)] == list(original)
    monkeypatch.chdir(tmp_path / "again")
    components_again = Components.load("me/thing", loaded, revision="v2")
    assert (list(components_again), asked[-1]) == (list(components), "v2")
    with pytest.raises(ValueError, match="belong to another decomposition"):
        Components.load("me/thing", decompose(tiny_transformer(seed=1), SITES, seed=1))
    (hub / "me/thing" / "components.json").unlink()
    shutil.rmtree(tmp_path / "snapshots")
    with pytest.raises(ValueError, match=r"'me/thing' has no components.json on the Hugging Face Hub; .*push_to_hub"):
        Components.load("me/thing", loaded)
    with pytest.raises(ValueError, match=r"revision='v1' is for the Hub, and .*again.* is a path here"):
        Components.load(tmp_path / "again", loaded, revision="v1")
    with pytest.raises(ValueError, match=r"components\.json does not exist"):
        Components.load("me/components.json", loaded)
    with pytest.raises(ValueError, match="another"):
        decompose(tiny_transformer(seed=1), SITES, seed=1).push_to_hub("me/other", components=components)
    assert not (hub / "me/other").exists()
    # A card that its owner edited on the Hub stays.
    (hub / "me/thing" / "README.md").write_text("mine")
    original.push_to_hub("me/thing")
    assert (hub / "me/thing" / "README.md").read_text() == "mine"


def test_a_deep_copy_saves_its_own_numbers(tmp_path: Path) -> None:
    original = decompose(tiny_transformer(), SITES)
    twin = copy.deepcopy(original)
    with torch.no_grad():
        twin["blocks.1.mlp.W_in"].U.zero_()
    twin.save_pretrained(tmp_path / "twin")
    loaded = Decomposition.from_pretrained(tmp_path / "twin", tiny_transformer())
    assert not loaded["blocks.1.mlp.W_in"].U.any()
    assert original["blocks.1.mlp.W_in"].U.any()
