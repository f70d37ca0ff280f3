"""Residual streams in files: written once for all blocks, mapped into memory by every job that trains one of them.

    directory/residuals.json     the blocks, the streams' dtype, the target's hashes, a SHA-256 of every file
    directory/tokens.npy         [n pos]
    directory/block-00003-00000.npy, block-00003-00001.npy, ...    [n pos d_model], what enters block 3

Rows are written batch by batch and read row by row, so neither has to fit into main memory; a process reads its own
rows, and checks its share of the files. Disk:
`n pos d_model` numbers of the model's dtype for every block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.inputs import checked_decomposition, checked_tokens
from spd_lens.data.batches import TokenBatches
from spd_lens.data.processes import Processes
from spd_lens.data.residuals import ResidualBatches, require_no_hooks, target_of
from spd_lens.data.row_files import FILE_BYTES, RowFiles, RowWriter
from spd_lens.support.checked_json import CheckedContent, read_checked, write_checked
from spd_lens.support.files import file_hash, given_path, new_directory
from spd_lens.support.given import given_instance, given_whole, given_wholes
from spd_lens.support.names import near_names
from spd_lens.support.progress import tqdm

_HEADER: dict[str, Any] = {"format_name": "spd_lens residual streams", "version": 2}
INDEX, TOKENS = "residuals.json", "tokens.npy"


class ResidualIndex(CheckedContent):
    """The fields of `residuals.json`; `files` are SHA-256s by name.

    `rows_per_file` and `n_rows` are None in directories from before there were several files for a block.
    """

    blocks: list[int]
    rows_per_file: int | None = Field(default=None, ge=1)
    n_rows: int | None = Field(default=None, ge=1)
    dtype: Literal["float16", "bfloat16", "float32", "float64"]
    made_from: dict[str, Any]
    files: dict[str, str]


def block_files(block: int, n_rows: int | None, rows_per_file: int | None) -> list[str]:
    """The names of a block's files."""
    if n_rows is None or rows_per_file is None:
        return [f"block-{block:05d}.npy"]
    return [f"block-{block:05d}-{k:05d}.npy" for k in range(-(-n_rows // rows_per_file))]


@torch.no_grad()
def write_residuals(
    decomposition: Decomposition,
    batches: TokenBatches,
    blocks: Sequence[int],
    directory: str | Path,
    *,
    rows_per_file: int | None = None,
) -> Path:
    """Write what enters the given blocks, for all rows of `batches`, to a new directory; returns it.

    One pass over the rows for each block. `decomposition` says which model; any sites of it will do. Streams keep the
    dtype that the model computes them in, so that a pass from there on gives what the whole pass gives. A file has
    `rows_per_file` rows, by default as many as make a gigabyte.

    Raises ValueError if the directory is there already, for blocks that the model does not have or that passes may not
    start at, and for hooks on the model.
    """
    checked_decomposition(decomposition, "write_residuals")
    given_instance("batches", batches, TokenBatches, "TokenBatches(tokens, batch_size)")
    blocks = _checked_blocks(blocks, decomposition.host.n_layers())
    if rows_per_file is not None:
        given_whole("rows_per_file", rows_per_file, least=1)
    checked_tokens(batches.tokens, decomposition.host, name="the tokens of batches")
    require_no_hooks(decomposition)
    path = given_path(directory, "directory")
    if path.exists():
        raise ValueError(f"{path} exists already; use it, or choose another directory")
    with new_directory(path) as temporary:
        np.save(temporary / TOKENS, batches.tokens.cpu().numpy())
        n_rows, names = len(batches.tokens), [TOKENS]
        for block in tqdm(blocks, desc="residual streams", leave=False):
            streams = _streams_before(decomposition, batches, block)
            first = next(streams)
            dtype, per_file = first.dtype, rows_per_file or max(1, FILE_BYTES // first[0].nbytes)
            own = block_files(block, n_rows, per_file)
            writer = RowWriter([temporary / name for name in own], n_rows, per_file)
            for part in chain([first], streams):
                writer.add(part)
            names += own
        content = {
            "blocks": list(blocks),
            "rows_per_file": per_file,
            "n_rows": n_rows,
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


def _streams_before(decomposition: Decomposition, batches: TokenBatches, block: int) -> Iterator[Tensor]:
    """What enters a block, batch by batch."""
    for tokens in batches.tokens.split(batches.batch_size):
        residual = decomposition.starts.residual_before(block, tokens.to(decomposition.device).long())
        if residual is None:
            raise ValueError(f"passes of this model cannot start at block {block}; train that block on the tokens")
        yield residual


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
    which reads them once; where several processes train together, each looks at its share of the files.

    Raises ValueError for a directory without streams, a block that is not in it, and files that were changed.
    """
    path = given_path(directory, "directory")
    index = read_checked(path / INDEX, ResidualIndex, **_HEADER)
    if block not in index.blocks:
        near = near_names(str(block), map(str, index.blocks))
        raise ValueError(f"{path} has no streams of block {block}; near: {near}")
    own = block_files(block, index.n_rows, index.rows_per_file)
    for name in (TOKENS, *own):
        if not (path / name).is_file():
            raise ValueError(f"{path / name} is missing; write these streams again")
    for name in Processes.now().share_of([TOKENS, *own]) if check else ():
        if file_hash(path / name) != index.files[name]:
            raise ValueError(f"{path / name} is damaged: its contents differ from what was written (SHA-256 mismatch)")
    tokens = TokenBatches(np.load(path / TOKENS, mmap_mode="r"), batch_size, seed=seed, exclude=exclude)
    streams = RowFiles([path / name for name in own], getattr(torch, index.dtype))
    return ResidualBatches(tokens, streams, block, index.made_from)
