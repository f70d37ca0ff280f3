"""Block by block: streams on disk train what tokens train, and parts that are merged are the parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spd_lens import Decomposition, TokenBatches, TrainConfig, cache_residuals, decompose, train
from spd_lens.data import Processes, open_residuals, write_residuals
from spd_lens.training import merge_decompositions, sites_by_block
from tests.small_models import tiny_transformer, tokens

CONFIG = TrainConfig(steps=3, log_every=1)


def _part(block: int, **settings: object) -> Decomposition:
    arguments = {"gate": "shared", "gate_width": 8, "seed": block} | settings
    return decompose(tiny_transformer(), {f"blocks.{block}.mlp.W_*": 12}, **arguments)  # pyright: ignore[reportArgumentType]


def test_streams_on_disk_are_those_in_memory(tmp_path: Path) -> None:
    data = TokenBatches(tokens(16), 4, seed=2)
    cached = _part(1)
    directory = write_residuals(cached, data, [0, 1], tmp_path / "streams")
    train(cached, cache_residuals(cached, data), CONFIG, out_dir=tmp_path / "memory")
    mapped = _part(1)
    batches = open_residuals(directory, 1, batch_size=4, seed=2)
    train(mapped, batches, CONFIG, out_dir=tmp_path / "disk")
    for name, expected in cached.tensors().items():
        assert torch.equal(mapped.tensors()[name], expected), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_streams_on_disk_have_every_bit_of_the_models_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    decomposition = decompose(tiny_transformer().to(dtype), {"blocks.1.mlp.W_*": 4})
    rows = tokens(6)
    directory = write_residuals(decomposition, TokenBatches(rows, 4), [1], tmp_path / "streams")
    read = torch.cat([batch.inputs for batch in open_residuals(directory, 1, batch_size=4).once()])
    assert read.dtype == dtype
    assert torch.equal(read, decomposition.host.residual_before(1, rows))


@pytest.mark.parametrize("blocks", [[2], [99], [-1], [1, 1], [], 1, ["1"]])
def test_streams_are_written_of_blocks_that_there_are(blocks: Any, tmp_path: Path, without_type_checks: None) -> None:
    with pytest.raises((ValueError, TypeError), match=r"blocks.*; expected"):
        write_residuals(_part(1), TokenBatches(tokens(4), 4), blocks, tmp_path / "streams")
    assert not (tmp_path / "streams").exists()
    with pytest.raises(TypeError, match=r"batches is .*; expected a TokenBatches"):
        write_residuals(_part(1), tokens(4), [1], tmp_path / "streams")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streams_in_several_files_are_those_in_one(dtype: torch.dtype, tmp_path: Path) -> None:
    decomposition, data = _part(1), TokenBatches(tokens(11), 4, seed=2)
    decomposition.model.to(dtype)
    one = write_residuals(decomposition, data, [1], tmp_path / "one")
    several = write_residuals(decomposition, data, [1], tmp_path / "several", rows_per_file=3)
    names = sorted(path.name for path in several.glob("block-*"))
    assert names == [f"block-00001-0000{k}.npy" for k in range(4)]
    assert [len(np.load(several / name, mmap_mode="r")) for name in names] == [3, 3, 3, 2]
    found, expected = (open_residuals(path, 1, batch_size=4, seed=2) for path in (several, one))
    for own, other in zip(found.once(), expected.once(), strict=True):
        assert own.inputs.dtype == dtype
        assert torch.equal(own.inputs, other.inputs)
    with pytest.raises(ValueError, match="rows_per_file=0"):
        write_residuals(decomposition, data, [1], tmp_path / "none", rows_per_file=0)


def test_a_process_checks_its_share_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_residuals(_part(1), TokenBatches(tokens(8), 4), [1], tmp_path / "streams", rows_per_file=2)
    # Its files are the tokens and four of streams; process 1 of 2 checks the second and the fourth.
    values = np.load(directory / "block-00001-00001.npy", mmap_mode="r+")
    values[0] += 1
    values.flush()
    monkeypatch.setattr(Processes, "now", staticmethod(lambda: Processes(2, 1)))
    open_residuals(directory, 1, batch_size=4)
    monkeypatch.setattr(Processes, "now", staticmethod(lambda: Processes(2, 0)))
    with pytest.raises(ValueError, match=r"block-00001-00001\.npy is damaged"):
        open_residuals(directory, 1, batch_size=4)


def test_streams_that_were_changed_or_are_of_another_model_are_refused(tmp_path: Path) -> None:
    data = TokenBatches(tokens(16), 4)
    directory = write_residuals(_part(1), data, [1], tmp_path / "streams")
    with pytest.raises(ValueError, match="has no streams of block 0; near: '1'"):
        open_residuals(directory, 0, batch_size=4)
    with pytest.raises(ValueError, match="exists already"):
        write_residuals(_part(1), data, [1], directory)
    other = decompose(tiny_transformer(seed=5), {"blocks.1.mlp.W_*": 12})
    with pytest.raises(ValueError, match="another model"):
        train(other, open_residuals(directory, 1, batch_size=4), CONFIG, out_dir=tmp_path / "run")
    values = np.load(directory / "block-00001-00000.npy", mmap_mode="r+")
    values[0, 0, 0] += 1
    values.flush()
    with pytest.raises(ValueError, match=r"block-00001-00000\.npy is damaged"):
        open_residuals(directory, 1, batch_size=4)
    (directory / "block-00001-00000.npy").unlink()
    with pytest.raises(ValueError, match=r"block-00001-00000\.npy is missing"):
        open_residuals(directory, 1, batch_size=4)


def test_merged_decompositions_are_their_parts_and_train_on(tmp_path: Path) -> None:
    parts = [_part(0), _part(1)]
    for steps, part in enumerate(parts, start=3):
        part.training_record = {"steps": steps, "final": {"total": steps / 8}}
    saved = [part.save_pretrained(tmp_path / f"part-{i}") for i, part in enumerate(parts)]
    model = tiny_transformer()
    merged = merge_decompositions(model, saved)
    expected = parts[0].tensors() | parts[1].tensors()
    assert merged.tensors().keys() == expected.keys()
    for name, tensor in merged.tensors().items():
        assert torch.equal(tensor, expected[name]), name
    loaded = Decomposition.from_pretrained(merged.save_pretrained(tmp_path / "merged"), tiny_transformer())
    assert loaded.training_record["merged"] == [
        {"sites": [f"blocks.{block}.mlp.W_in", f"blocks.{block}.mlp.W_out"], "steps": 3 + block, "final": final}
        for block, final in ((0, {"total": 0.375}), (1, {"total": 0.5}))
    ]
    card = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    assert "- `blocks.1.mlp.W_in`, `blocks.1.mlp.W_out`: Trained for 4 steps. Final metrics: total 0.5." in card
    train(merged, [tokens(4)], CONFIG, out_dir=tmp_path / "run")


def test_parts_that_do_not_fit_are_refused_and_the_model_is_unchanged(tmp_path: Path) -> None:
    first = _part(0).save_pretrained(tmp_path / "first")
    twice = _part(0, seed=9).save_pretrained(tmp_path / "twice")
    wide = _part(1, gate_width=16).save_pretrained(tmp_path / "wide")
    model = tiny_transformer()
    names = set(model.hook_dict)  # pyright: ignore[reportArgumentType]
    for parts, expected in (
        ([first, twice], "which another has too"),
        ([first, wide], "shared gates of width 16, the first shared gates of width 8"),
        ([], "nothing to merge"),
    ):
        with pytest.raises(ValueError, match=expected):
            merge_decompositions(model, parts)
        assert set(model.hook_dict) == names  # pyright: ignore[reportArgumentType]


def test_sites_are_sorted_by_block() -> None:
    sites = {"blocks.10.mlp.W_in": 1, "blocks.2.attn.W_V": 2, "blocks.10.mlp.W_out": 3}
    expected = {2: {"blocks.2.attn.W_V": 2}, 10: {"blocks.10.mlp.W_in": 1, "blocks.10.mlp.W_out": 3}}
    assert sites_by_block(sites) == expected
    assert list(sites_by_block(sites)) == [2, 10]
    with pytest.raises(ValueError, match=r"embed\.W_E is in no block"):
        sites_by_block({"embed.W_E": 4})


def test_cached_streams_of_one_process_are_those_of_its_rows() -> None:
    decomposition, data = _part(1), TokenBatches(tokens(8), 4, seed=2)
    for rank in range(2):
        cached = cache_residuals(decomposition, data.for_process(rank, 2)).batches_from(0)
        plain = data.batches_from(0)
        for _ in range(3):
            batch, rows = next(cached), next(plain).inputs[rank::2]
            assert torch.equal(batch.inputs, decomposition.host.residual_before(1, rows))
