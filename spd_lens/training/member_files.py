"""Files and data of a run of many: what they belong to, and where a run that is found there goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import tee
from typing import Any

from spd_lens.core.decomposition import Decomposition
from spd_lens.data.batches import Batch
from spd_lens.data.streams import endless_batches
from spd_lens.support.checked_json import CheckedContent, read_checked, write_checked
from spd_lens.support.files import plain
from spd_lens.training.belonging import FREE, SeenData, belongs_to, check_belongs, compare_now, same_data, started
from spd_lens.training.checkpoint import Checkpoint
from spd_lens.training.config import TrainConfig
from spd_lens.training.run_files import RunFiles

FORMAT = "spd_lens run of many"
FORMAT_VERSION = 2


class _Members(CheckedContent):
    """The fields of `members.json`."""

    members: list[dict[str, Any]]
    belongs: dict[str, Any]


def members_belong_to(
    decompositions: Sequence[Decomposition], members: Sequence[TrainConfig], batches: Sequence[Any]
) -> dict[str, Any]:
    """What the files of a run belong to, by member."""
    each = zip(decompositions, members, batches, strict=True)
    return {f"member {i}": belongs_to(d, m, data) for i, (d, m, data) in enumerate(each)}


def open_members(files: RunFiles, members: Sequence[TrainConfig], belongs: Mapping[str, Any]) -> Checkpoint | None:
    """Begin a run in a directory that is held, or find the checkpoint of the one that is there.

    Raises ValueError, naming the difference, if that one is another.
    """
    path = files.directory / "members.json"
    if not path.is_file():
        files.begin(members[0], {})
        content = {"members": [m.to_json() for m in members], "belongs": belongs}
        write_checked(path, content, format_name=FORMAT, version=FORMAT_VERSION)
        return None
    saved = read_checked(path, _Members, format_name=FORMAT, version=FORMAT_VERSION)
    numbers = [{k: v for k, v in m.to_json().items() if k not in FREE} for m in members]
    if [{k: v for k, v in m.items() if k not in FREE} for m in plain(saved.members)] != plain(numbers):
        raise ValueError(
            f"{files.directory} holds a run of {len(saved.members)} members with other configurations; choose another "
            "out_dir"
        )
    checkpoint = files.newest()
    for name, own in belongs.items():
        then = saved.belongs if checkpoint is None else checkpoint.belongs
        found = then.get(name)
        if not isinstance(found, dict):
            raise ValueError(f"{path} is damaged: it does not say what {name} belongs to")
        if checkpoint is None:
            found, own = {**found, "data": {}}, {**own, "data": {}}
        check_belongs(found, own, f"{files.directory} ({name})")
    return checkpoint


def member_data(
    batches: Sequence[Any], decompositions: Sequence[Decomposition], checkpoint: Checkpoint | None, *, goes_on: bool
) -> tuple[list[SeenData], list[Iterator[Batch]]]:
    """For every member the record of its data and the batches that come next; ValueError for other data than before."""
    seen, streams = [], []
    shared: dict[int, Iterator[Batch]] = {}
    for i, (data, member) in enumerate(zip(batches, decompositions, strict=True)):
        before = None if checkpoint is None else checkpoint.data[str(i)]
        if checkpoint is not None:
            data = same_data(data, before, f"{checkpoint.path} (member {i})")
            if not goes_on:
                compare_now(data)
        stream = endless_batches(data, member, start=0 if checkpoint is None else checkpoint.step)
        if hasattr(data, "batches_from"):
            # Its batches depend on their number alone; members go through them in step.
            stream, shared[id(data)] = tee(shared.get(id(data), stream))
        seen.append(SeenData(before))
        streams.append(started(stream) if checkpoint is not None and goes_on else stream)
    return seen, streams
