"""Residual streams in files: written once for all blocks, mapped into memory by every job that trains one of them.

    directory/residuals.json     the blocks, the streams' dtype, the target's hashes, a SHA-256 of every file
    directory/tokens.npy         [n pos]
    directory/block-00003.npy    [n pos d_model], what enters block 3

Rows are written batch by batch and read row by row, so neither has to fit into main memory. Disk:
`n pos d_model` numbers of the model's dtype for every block.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.inputs import checked_decomposition, checked_tokens
from spd_lens.data.batches import TokenBatches
from spd_lens.data.residuals import ResidualBatches, require_no_hooks, target_of
from spd_lens.support.checked_json import CheckedContent, read_checked, write_checked
from spd_lens.support.files import file_hash, given_path, new_directory
from spd_lens.support.given import given_instance, given_wholes
from spd_lens.support.names import near_names
from spd_lens.support.progress import tqdm

_HEADER: dict[str, Any] = {"format_name": "spd_lens residual streams", "version": 2}
INDEX, TOKENS = "residuals.json", "tokens.npy"
# numpy has no bfloat16: its bits are kept as whole numbers of the same width.
_KEPT_AS = {torch.bfloat16: torch.int16}


class ResidualIndex(CheckedContent):
    """The fields of `residuals.json`; `files` are SHA-256s by name."""

    blocks: list[int]
    dtype: Literal["float16", "bfloat16", "float32", "float64"]
    made_from: dict[str, Any]
    files: dict[str, str]


def block_file(block: int) -> str:
    """The name of a block's file."""
    return f"block-{block:05d}.npy"


@torch.no_grad()
def write_residuals(
    decomposition: Decomposition, batches: TokenBatches, blocks: Sequence[int], directory: str | Path
) -> Path:
    """Write what enters the given blocks, for all rows of `batches`, to a new directory; returns it.

    One pass over the rows for each block. `decomposition` says which model; any sites of it will do. Streams keep the
    dtype that the model computes them in, so that a pass from there on gives what the whole pass gives.

    Raises ValueError if the directory is there already, for blocks that the model does not have or that passes may not
    start at, and for hooks on the model.
    """
    checked_decomposition(decomposition, "write_residuals")
    given_instance("batches", batches, TokenBatches, "TokenBatches(tokens, batch_size)")
    blocks = _checked_blocks(blocks, decomposition.host.n_layers())
    checked_tokens(batches.tokens, decomposition.host, name="the tokens of batches")
    require_no_hooks(decomposition)
    path = given_path(directory, "directory")
    if path.exists():
        raise ValueError(f"{path} exists already; use it, or choose another directory")
    with new_directory(path) as temporary:
        np.save(temporary / TOKENS, batches.tokens.cpu().numpy())
        for block in tqdm(blocks, desc="residual streams", leave=False):
            dtype = _write_block(decomposition, batches, block, temporary / block_file(block))
        names = [TOKENS, *(block_file(block) for block in blocks)]
        content = {
            "blocks": list(blocks),
            "dtype": str(dtype).removeprefix("torch."),
            "made_from": target_of(decomposition),
            "files": {name: file_hash(temporary / name) for name in names},
        }
        write_checked(temporary / INDEX, content, **_HEADER)
    return path


def _checked_blocks(blocks: Any, count: int) -> tuple[int, ...]:
    chosen = given_wholes("blocks", blocks, least=0, of="numbers of blocks, such as [1, 2]")
    if not chosen or len(set(chosen)) < len(chosen) or max(chosen) >= count:
        raise ValueError(f"blocks={list(chosen)}; expected some of 0..{count - 1}, each once")
    return chosen


def _write_block(decomposition: Decomposition, batches: TokenBatches, block: int, path: Path) -> torch.dtype:
    """Write one block's streams; their dtype."""
    file: Any = None
    at = 0
    for tokens in batches.tokens.split(batches.batch_size):
        residual = decomposition.starts.residual_before(block, tokens.to(decomposition.device).long())
        if residual is None:
            raise ValueError(f"passes of this model cannot start at block {block}; train that block on the tokens")
        kept = residual.view(_KEPT_AS.get(residual.dtype, residual.dtype)).cpu().numpy()
        if file is None:
            dtype, shape = residual.dtype, (len(batches.tokens), *residual.shape[1:])
            file = np.lib.format.open_memmap(path, mode="w+", dtype=kept.dtype, shape=shape)
        file[at : at + len(tokens)] = kept
        at += len(tokens)
    file.flush()
    return dtype


def open_residuals(
    directory: str | Path,
    block: int,
    *,
    batch_size: int,
    seed: int = 0,
    exclude: Sequence[int] = (),
    check: bool = True,
) -> ResidualBatches:
    """Batches of the streams that enter `block`, mapped into memory. With `check` the files' digests are compared,
    which reads them once.

    Raises ValueError for a directory without streams, a block that is not in it, and files that were changed.
    """
    path = given_path(directory, "directory")
    index = read_checked(path / INDEX, ResidualIndex, **_HEADER)
    if block not in index.blocks:
        near = near_names(str(block), map(str, index.blocks))
        raise ValueError(f"{path} has no streams of block {block}; near: {near}")
    for name in (TOKENS, block_file(block)):
        if not (path / name).is_file():
            raise ValueError(f"{path / name} is missing; write these streams again")
        if check and file_hash(path / name) != index.files[name]:
            raise ValueError(f"{path / name} is damaged: its contents differ from what was written (SHA-256 mismatch)")
    tokens = TokenBatches(np.load(path / TOKENS, mmap_mode="r"), batch_size, seed=seed, exclude=exclude)
    streams = _mapped(path / block_file(block), getattr(torch, index.dtype))
    return ResidualBatches(tokens, streams, block, index.made_from)


def _mapped(path: Path, dtype: torch.dtype) -> Tensor:
    """A file's numbers, read as they are asked for. Mapped copy-on-write: torch wants memory that can be written."""
    return torch.from_numpy(np.load(path, mmap_mode="c")).view(dtype)
