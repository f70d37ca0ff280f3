"""Edits and baked models on disk: an edit as one JSON file, a baked model as a folder that other programs read."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import torch
from pydantic import Field
from torch import nn

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.inputs import checked_decomposition
from spd_lens.core.units import Unit
from spd_lens.editing.baking import given_plain
from spd_lens.editing.change import Above, Change, Rewrite
from spd_lens.editing.edits import Edit, checked_edit, edit
from spd_lens.hosts.provenance import configuration_of
from spd_lens.support.checked_json import CheckedContent, read_checked, write_checked
from spd_lens.support.files import (
    check_tokenizer,
    given_directory,
    given_path,
    new_directory,
    tensor_hash,
    write_json,
    write_tensors,
)

_FORMAT, _VERSION = "spd_lens edit", 1


# JSON has no tuples.
_Member: TypeAlias = Annotated[tuple[str, int], Field(strict=False)]


class _SavedChange(CheckedContent):
    members: list[_Member]
    name: str | None
    scale: float
    writes: list[float] | None
    reads: list[float] | None


class _SavedWhen(CheckedContent):
    threshold: float
    of: list[_Member] | None
    name: str | None


class _SavedEdit(CheckedContent):
    changes: list[_SavedChange]
    when: _SavedWhen | None
    sites: dict[str, str]


def save_edit(edit: Edit, path: str | Path) -> Path:
    """Write an edit (units, scales, directions, and hashes of the subcomponents that it means) to a JSON file.

    An edit that is there is replaced. Raises ValueError for a file of another program, OSError for a path that cannot
    be written and for a full disk; what was there before is then intact.
    """
    edit, path = checked_edit(edit, "save_edit"), given_path(path)
    if path.is_file():
        read_checked(path, _SavedEdit, format_name=_FORMAT, version=_VERSION)
    content = {
        "changes": [_change_content(change) for change in edit.changes],
        "when": None
        if edit.when is None
        else {
            "threshold": edit.when.threshold,
            "of": None if edit.when.of is None else [list(member) for member in edit.when.of.members],
            "name": None if edit.when.of is None else edit.when.of.name,
        },
        "sites": {site: _site_hash(edit.decomposition, site) for site in _meant(edit)},
    }
    with _said_where(path):
        write_checked(path, content, format_name=_FORMAT, version=_VERSION)
    return path


def load_edit(decomposition: Decomposition, path: str | Path) -> Edit:
    """Read what `save_edit` wrote, for the same decomposition.

    Raises ValueError if it was made with another one (numbers of subcomponents mean nothing there), and for files that
    are damaged or foreign.
    """
    checked_decomposition(decomposition, "load_edit")
    saved = read_checked(given_path(path), _SavedEdit, format_name=_FORMAT, version=_VERSION)
    for site, digest in saved.sites.items():
        if site not in decomposition or _site_hash(decomposition, site) != digest:
            raise ValueError(
                f"{path} is an edit of another decomposition: the subcomponents of {site} differ, so its numbers mean "
                "others; load the decomposition that it was made with"
            )
    changes: dict[Any, Any] = {}
    for line in saved.changes:
        unit = Unit(tuple(line.members), None, line.name)
        vectors = [None if v is None else torch.tensor(v, dtype=torch.float64) for v in (line.writes, line.reads)]
        changes[unit] = line.scale if vectors == [None, None] else Rewrite(*vectors, scale=line.scale)
    when = None
    if saved.when is not None:
        of = None if saved.when.of is None else Unit(tuple(saved.when.of), None, saved.when.name)
        when = Above(saved.when.threshold, of)
    return edit(decomposition, changes, when=when)


def _change_content(change: Change) -> dict[str, Any]:
    return {
        "members": [list(member) for member in change.unit.members],
        "name": change.unit.name,
        "scale": change.scale,
        "writes": None if change.writes is None else change.writes.tolist(),
        "reads": None if change.reads is None else change.reads.tolist(),
    }


def _meant(edit: Edit) -> list[str]:
    of = () if edit.when is None or edit.when.of is None else edit.when.of.sites
    return list(dict.fromkeys((*edit.sites, *of)))


def _site_hash(decomposition: Decomposition, site: str) -> str:
    weight = decomposition[site]
    return f"{tensor_hash(weight.V.detach())} {tensor_hash(weight.U.detach())}"


def save_baked(model: nn.Module, directory: str | Path, *, tokenizer: Any = None) -> Path:
    """Write a baked model to a new directory, whole or not at all.

    A Hugging Face model as its own `save_pretrained` writes it (with the tokenizer, if one is given): it loads with
    `AutoModelForCausalLM.from_pretrained`. Any other model as `model.safetensors`, its `state_dict`, and, where it has
    a configuration, `config.json`: `HookedTransformer(HookedTransformerConfig.from_dict(config))`, `load_state_dict`.

    Raises ValueError if the directory exists, OSError for a place that cannot be written and for a full disk; nothing
    is left there then.
    """
    if not isinstance(model, nn.Module) or isinstance(model, Decomposition):
        raise TypeError(f"save_baked was given a {type(model).__name__}; expected a plain model: edit.bake() makes one")
    given_plain("model", model)
    check_tokenizer(tokenizer)
    directory = given_directory(directory)
    with _said_where(directory), new_directory(directory) as temporary:
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(temporary)  # pyright: ignore[reportCallIssue]
        else:
            state = {name: value.detach().clone() for name, value in model.state_dict().items()}
            write_tensors(temporary / "model.safetensors", state)
            config = configuration_of(model)
            if config is not None:
                write_json(temporary / "config.json", config)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        for file in temporary.iterdir():
            # safetensors makes files that only their owner can read; the folder's mode tells the umask.
            file.chmod(temporary.stat().st_mode & 0o666)
    return directory


class _said_where:
    """Errors of places that cannot be written say which place, and what to do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise OSError(
                error.errno, f"{self.path} cannot be written ({os.strerror(error.errno)}); choose a folder of your own"
            ) from error
