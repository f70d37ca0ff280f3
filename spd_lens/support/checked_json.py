"""JSON that is checked before it is used: what wrote it, which version, a checksum, and every field's type.

The checksum is over the values, not over the text, so a file may be formatted anew. Fields that a user may change by
hand are left out of it.
"""

from __future__ import annotations

import copy
import hashlib
import hmac
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from spd_lens.support.files import json_text, plain, write_text
from spd_lens.support.pages import visible

# Far more than any of our files has, and little enough to read at once.
_LARGEST = 1 << 30
Content = TypeVar("Content", bound="CheckedContent")


class CheckedContent(BaseModel):
    """The fields of one kind of file; a subclass names and types them, and nothing else is accepted."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


def checked_text(
    content: Mapping[str, Any], *, format_name: str, version: int, free: Sequence[tuple[str, str]] = ()
) -> str:
    """`content` as JSON with its format, version and checksum; `free`: `(field, key)`s left out of it."""
    whole = plain({"format": format_name, "format_version": version, **content})
    return json_text({**whole, "checksum": _checksum(whole, free)})


def write_checked(
    path: Path,
    content: Mapping[str, Any],
    *,
    format_name: str,
    version: int,
    free: Sequence[tuple[str, str]] = (),
) -> None:
    """Write `checked_text` to `path`."""
    write_text(path, checked_text(content, format_name=format_name, version=version, free=free))


def read_checked(
    path: Path, kind: type[Content], *, format_name: str, version: int, free: Sequence[tuple[str, str]] = ()
) -> Content:
    """Read what `write_checked` wrote, as a `kind`.

    Raises ValueError, naming the file, if it is absent, foreign, damaged, of another version, or has other fields.
    """
    whole = read_checked_values(path, format_name=format_name, version=version, free=free)
    content = {k: v for k, v in whole.items() if k not in ("format", "format_version")}
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise ValueError(f"{path} is damaged: {in_words(error)}") from error


def read_checked_values(
    path: Path, *, format_name: str, version: int, free: Sequence[tuple[str, str]] = ()
) -> dict[str, Any]:
    """As `read_checked`, but the values as they stand, for content that checks its own fields."""
    whole = read_json(path, format_name=format_name, newest_version=version)
    found = whole["format_version"]
    if found < version:
        raise ValueError(
            f"{path} has format version {found}, of an spd_lens before its first release; this one reads {version}. "
            "Make it again, or read it with the spd_lens that wrote it"
        )
    expected = whole.pop("checksum", None)
    given = expected.encode("utf-8", "backslashreplace") if isinstance(expected, str) else b""
    if not hmac.compare_digest(given, _checksum(whole, free).encode()):
        raise ValueError(f"{path} is damaged or was changed by hand: its checksum does not fit its contents")
    return whole


def read_json(path: Path, *, format_name: str, newest_version: int) -> dict[str, Any]:
    """Read JSON that `format_name` wrote without a checksum.

    Raises ValueError if it is absent, foreign, damaged or from the future.
    """
    whole = read_json_object(path)
    if whole.get("format") != format_name:
        raise ValueError(f"{path} was not written as a {format_name} by spd_lens; choose another path")
    found = whole.get("format_version")
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise ValueError(f"{path} is damaged: its format version is {str(found)[:40]!r}")
    if found > newest_version:
        raise ValueError(
            f"{path} has format version {found}; this spd_lens reads up to {newest_version}. Upgrade spd_lens"
        )
    return whole


def in_words(error: ValidationError) -> str:
    """The first thing that is wrong, with the field where it is."""
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(visible(str(part)) for part in first["loc"])
    return f"{where or 'the whole'}: {first['msg']}"


def _checksum(whole: Mapping[str, Any], free: Sequence[tuple[str, str]]) -> str:
    counted = copy.deepcopy(dict(whole))
    for field, key in free:
        if isinstance(counted.get(field), dict):
            counted[field].pop(key, None)
    return content_hash(counted)


def content_hash(content: Mapping[str, Any]) -> str:
    """SHA-256 of JSON values, whatever their order and layout in a file."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_json_object(path: Path) -> dict[str, Any]:
    """Any JSON file that holds an object. Raises ValueError, naming the file, for everything else."""
    if not path.is_file():
        what = "does not exist" if not path.exists() else "is no file"
        raise ValueError(f"{path} {what}; give the path of a file that spd_lens wrote")
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        text = path.read_text(encoding="utf-8")
        whole = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_each_once)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing") from error
    except RecursionError as error:
        raise ValueError(f"{path} is damaged: it is nested too deeply") from error
    except ValueError as error:  # also json.JSONDecodeError, UnicodeDecodeError, and integers of too many digits
        raise ValueError(f"{path} is damaged: {error}; expected JSON that spd_lens wrote") from error
    if not isinstance(whole, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(whole).__name__}; expected an object")
    return whole


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A key twice is two files in one: which value counts is up to the reader."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"it holds the key {next(k for k in keys if keys.count(k) > 1)[:80]!r} twice")
    return found
