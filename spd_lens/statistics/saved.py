"""A harvest on disk: `harvest.safetensors` and `harvest.json`, which may stand beside the decomposition's own files.

The JSON says what it was made from: the target by the hashes of its weights, the decomposition by a hash of all its
tensors, and the data by a hash of every token that was read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, TypeAdapter
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.fingerprint import difference, target_fingerprint
from spd_lens.statistics.directions import SiteDirections
from spd_lens.statistics.harvest_sums import HarvestSums
from spd_lens.statistics.sums import HarvestSettings
from spd_lens.support.checked_json import CheckedContent, checked_text, content_hash, read_checked
from spd_lens.support.files import given_directory, tensor_hash
from spd_lens.support.saved_pair import SavedPair
from spd_lens.support.versions import library_versions

FORMAT, FORMAT_VERSION = "spd_lens harvest", 1
HARVEST_TENSORS, HARVEST_CONFIG = "harvest.safetensors", "harvest.json"
_SHA256 = r"^[0-9a-f]{64}$"


@dataclass(frozen=True)
class MadeFrom:
    """What a harvest was made from: the target's fingerprint, and the hash of all tensors of the decomposition."""

    target: dict[str, Any]
    decomposition: str

    def check_same(self, other: MadeFrom, what: str) -> None:
        """ValueError, naming the first difference, unless both are of the same decomposition of the same target."""
        found = difference(self.target, other.target)
        if found is not None:
            raise ValueError(f"{what} is of another target: {found}")
        if self.decomposition != other.decomposition:
            raise ValueError(f"{what} is of another decomposition of this target (its V, U or gates differ)")


def tensors_sha256(decomposition: Decomposition) -> str:
    """A hash of all tensors of a decomposition. Cost: reads them once."""
    return content_hash({name: tensor_hash(t) for name, t in decomposition.tensors().items()})


def made_from(decomposition: Decomposition) -> MadeFrom:
    """The fingerprints of a decomposition that is in its model."""
    return MadeFrom(target_fingerprint(decomposition), tensors_sha256(decomposition))


class SavedHarvestConfig(CheckedContent):
    """The fields of `harvest.json`."""

    settings: dict[str, int | float]
    counts: dict[str, int]
    d_vocab: int = Field(ge=1)
    n_positions: int = Field(ge=0)
    n_batches: int = Field(ge=0)
    effect_positions: int = Field(ge=0)
    read: str
    finished: bool
    token_strings: dict[str, str]
    target: dict[str, Any]
    decomposition_sha256: str = Field(pattern=_SHA256)
    tensors_sha256: str = Field(pattern=_SHA256)
    versions: dict[str, str]


@dataclass(frozen=True)
class SavedHarvest:
    """What `read_harvest` found."""

    sums: HarvestSums
    made: MadeFrom
    directions: dict[str, SiteDirections]
    token_strings: dict[int, str]
    finished: bool


def write_harvest(
    directory: str | Path,
    sums: HarvestSums,
    made: MadeFrom,
    *,
    directions: Mapping[str, SiteDirections],
    token_strings: Mapping[int, str],
    finished: bool,
) -> Path:
    """Write both files; whatever moment it is killed at, the earlier save or the new one can be read."""
    directory = given_directory(directory)
    tensors: dict[str, Tensor] = {f"sums/{name}": t for name, t in sums.tensors().items()}
    for site, found in directions.items():
        tensors |= {f"directions/{site}|{name}": t for name, t in found.tensors().items()}
    content = {
        "settings": asdict(sums.settings),
        "counts": sums.counts,
        "d_vocab": sums.d_vocab,
        "n_positions": sums.n_positions,
        "n_batches": sums.n_batches,
        "effect_positions": sums.effect_positions,
        "read": sums.read,
        "finished": finished,
        "token_strings": {str(i): text for i, text in token_strings.items()},
        "target": made.target,
        "decomposition_sha256": made.decomposition,
        "versions": library_versions(),
    }

    def config(digest: str) -> str:
        return checked_text({**content, "tensors_sha256": digest}, format_name=FORMAT, version=FORMAT_VERSION)

    _files(directory).write(tensors, config)
    return directory


def read_harvest(directory: str | Path, *, missing_ok: bool = False) -> SavedHarvest | None:
    """What `write_harvest` wrote. Raises ValueError for files that are damaged, foreign or newer.

    With `missing_ok`, None if there is no harvest.
    """
    directory = given_directory(directory)
    if not (directory / HARVEST_CONFIG).exists() and not (directory / HARVEST_TENSORS).exists():
        if missing_ok:
            return None
        raise ValueError(f"{directory} holds no harvest ({HARVEST_CONFIG}); harvest(..., out_dir=...) writes one")
    config, tensors = _files(directory).load()
    try:
        sums = HarvestSums(config.counts, config.d_vocab, TypeAdapter(HarvestSettings).validate_python(config.settings))
        sums.n_positions, sums.n_batches = config.n_positions, config.n_batches
        sums.effect_positions, sums.read = config.effect_positions, config.read
        prefix = "sums/"
        sums.load({k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)})
        directions = {}
        for site in sums.sites if config.finished else ():
            prefix = f"directions/{site}|"
            own = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
            directions[site] = SiteDirections.of(own)
        strings = {int(i): text for i, text in config.token_strings.items()}
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"the harvest in {directory} is damaged: {error}") from error
    made = MadeFrom(config.target, config.decomposition_sha256)
    return SavedHarvest(sums, made, directions, strings, config.finished)


def _files(directory: Path) -> SavedPair[SavedHarvestConfig]:
    def read(path: Path) -> SavedHarvestConfig:
        return read_checked(path, SavedHarvestConfig, format_name=FORMAT, version=FORMAT_VERSION)

    return SavedPair(directory, HARVEST_TENSORS, HARVEST_CONFIG, read, lambda config: config.tensors_sha256)
