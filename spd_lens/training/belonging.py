"""What a run's files belong to: target, decomposition, configuration and data, compared when the run goes on.

A resumed run equals the uninterrupted one only on the same data in the same order. Of data that can be asked
(`TokenBatches`, lists, DataLoaders) a description is kept, and of all data the hashes of the first batch and of the
last one before the checkpoint. `DataLoader(shuffle=True)` without a generator of its own takes its order from the
global random state, which no checkpoint holds: a run on it cannot be resumed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import chain
from typing import Any

from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.fingerprint import difference, target_fingerprint
from spd_lens.data.batch_hashes import batch_hash
from spd_lens.data.batches import Batch, as_batch, is_one_batch
from spd_lens.data.processes import Processes
from spd_lens.support.files import plain
from spd_lens.training.config import TrainConfig

# Fields of the configuration that no number depends on, but for the rounding of sums: they may be changed by hand in a
# run's config.json, or when it goes on.
FREE = ("checkpoint_every", "keep_checkpoints", "accumulate", "recompute", "offload", "shard", "compile")
_UNSEEDED = "shuffled by the global random state"


def belongs_to(decomposition: Decomposition, config: TrainConfig, batches: Any) -> dict[str, Any]:
    """What a run of `decomposition` on `batches` is, in values for JSON; nothing is taken from `batches`.

    None in their place: nothing is said of the data."""
    settings = decomposition.settings
    return {
        "target": target_fingerprint(decomposition),
        "decomposition": plain(settings.to_json()),
        "config": {k: v for k, v in plain(config.to_json()).items() if k not in FREE},
        "data": described(batches),
    }


def check_belongs(saved: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Raise ValueError, naming the first difference, unless what was saved belongs to the run of now."""
    if (found := difference(saved, now, ignore=("data",))) is not None:
        raise ValueError(
            f"{where} belongs to another run: {found}. Resume with the same model, decomposition and configuration, or "
            "start a new run"
        )
    then, here = saved.get("data", {}), now.get("data", {})
    if _UNSEEDED in (then.get("order"), here.get("order")):
        raise ValueError(
            f"{where} cannot be resumed as it was: its DataLoader(shuffle=True) takes the order from the global random "
            "state, which is gone. Give the loader generator=torch.Generator().manual_seed(0), or use TokenBatches, "
            "and start a new run"
        )
    both = [key for key in then if key in here]
    if (found := difference({k: then[k] for k in both}, {k: here[k] for k in both})) is not None:
        raise ValueError(
            f"{where} belongs to a run on other data: {found}. Resume on the same data, or start a new run"
        )


def described(batches: Any) -> dict[str, Any]:
    """What can be said of data without taking a batch; objects with a method `fingerprint` say it themselves."""
    if is_one_batch(batches):
        return {"batches": 1}
    if hasattr(batches, "fingerprint"):
        return plain(batches.fingerprint())  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(batches, DataLoader):
        found: dict[str, Any] = {"batch_size": batches.batch_size, "drop_last": batches.drop_last}
        if isinstance(batches.dataset, Sized):
            found["rows"] = len(batches.dataset)
        random = isinstance(batches.sampler, (RandomSampler, SubsetRandomSampler, WeightedRandomSampler))
        generator = getattr(batches.sampler, "generator", None)
        if random:
            found["order"] = _UNSEEDED if generator is None else f"shuffled with seed {generator.initial_seed()}"
        return plain(found)
    return {"batches": len(batches)} if isinstance(batches, Sequence) else {}


class SeenData:
    """Hashes of a run's first batch and of the last one before a checkpoint.

    `expected` is what an earlier checkpoint has of them.
    """

    def __init__(self, expected: Mapping[str, Any] | None = None) -> None:
        self.first: str | None = None if expected is None else expected.get("first")

    def note(self, batch: Batch) -> Batch:
        """The batch itself; the first one of a run is remembered."""
        if self.first is None:
            self.first = batch_hash(batch)
        return batch

    def until(self, batch: Batch, index: int) -> dict[str, Any]:
        """What a checkpoint keeps when `batch`, number `index`, was the last."""
        return {"first": self.first, "last": batch_hash(batch), "index": index}


def keeps_place(batches: Any) -> bool:
    """Whether data says where it is and goes on from there, as a `TokenStream` does."""
    return hasattr(batches, "position") and hasattr(batches, "at")


def place_of(batches: Any, processes: Processes) -> dict[str, Any] | None:
    """What a checkpoint keeps of data that keeps its place, from all processes; None for other data."""
    if not keeps_place(batches):
        return None
    places = processes.of_all(batches.position())
    streams = {name: place for one in places for name, place in one["streams"].items()}
    return {"position": {**places[0], "streams": streams}}


def same_data(batches: Any, saved: Mapping[str, Any] | None, where: str) -> Any:
    """`batches`, compared with what a checkpoint has of its data: at once, or as they are gone through.

    Streams that keep their place (`TokenStream`) go on from it, and compare what they read themselves.

    Raises ValueError if the first batch, or the last one before the checkpoint, is another.
    """
    if not saved:
        return batches
    if keeps_place(batches) != ("position" in saved):
        raise ValueError(f"{where} belongs to a run on other data: then it was {_kind(saved)}")
    if "position" in saved:
        return batches.at(saved["position"])
    wanted = {0: saved["first"], int(saved["index"]): saved["last"]}
    if hasattr(batches, "batches_from"):
        for index, expected in wanted.items():
            _compare(next(iter(batches.batches_from(index))), expected, index, where)  # pyright: ignore[reportAttributeAccessIssue]
        return batches
    return _Compared([batches] if is_one_batch(batches) else batches, wanted, where)


def _kind(saved: Mapping[str, Any]) -> str:
    return "a stream that keeps its place" if "position" in saved else "batches that were taken by their number"


def started(stream: Iterator[Batch]) -> Iterator[Batch]:
    """The same stream with its first batch taken already, so that everything before that has been gone through."""
    return chain([next(stream)], stream)


def compare_now(batches: Any) -> None:
    """Compare what `same_data` returned at once, for a run that is at its end and takes no batch any more.

    What can only be gone through once is left as it is.
    """
    if not isinstance(batches, _Compared) or isinstance(batches.batches, Iterator):
        return
    while batches.wanted:
        before = batches.count
        for _ in batches:
            if not batches.wanted:
                break
        if batches.count == before:
            return


class _Compared:
    """Passes batches on; those at certain numbers, counted over all epochs, are compared."""

    def __init__(self, batches: Iterable[Any], wanted: Mapping[int, str], where: str) -> None:
        self.batches, self.wanted, self.where = batches, dict(wanted), where
        self.count = 0

    def __iter__(self) -> Iterator[Any]:
        for item in self.batches:
            if (expected := self.wanted.pop(self.count, None)) is not None:
                _compare(item, expected, self.count, self.where)
            self.count += 1
            yield item


def _compare(item: Any, expected: str, index: int, where: str) -> None:
    if batch_hash(as_batch(item)) != expected:
        raise ValueError(
            f"{where} belongs to a run on other data: batch number {index} is another than then, or they come in "
            "another order. Resume on the same data (DataLoader(shuffle=True) needs a generator with a fixed seed), or "
            "start a new run"
        )
