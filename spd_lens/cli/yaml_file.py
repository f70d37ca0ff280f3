"""YAML with the line of every value, so that an error can say where it is.

Plain YAML 1.1 with two differences: `1e-3` is a number, and a key that stands twice is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Place = tuple[str | int, ...]


class ConfigError(ValueError):
    """A configuration that makes no sense; its text names file, line and field.

    `place`: the field that is wrong, for who knows the file that it stands in (`YamlFile.named`).
    """

    def __init__(self, problem: str, place: Place | None = None) -> None:
        super().__init__(problem if place is None else f"{'.'.join(map(str, place))}: {problem}")
        self.problem, self.place = problem, place


class _Loader(yaml.SafeLoader):
    pass


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


@dataclass(frozen=True)
class YamlFile:
    """The values of a YAML file, and the line of every one of them by its place, such as `("train", "steps")`."""

    path: Path
    values: dict[str, Any]
    lines: Mapping[Place, int] = field(default_factory=dict)

    def where(self, place: Place) -> str:
        """`file, line N`, of the deepest part of the place that stands in the file."""
        for depth in range(len(place), -1, -1):
            if (line := self.lines.get(place[:depth])) is not None:
                return f"{self.path}, line {line}"
        return str(self.path)

    def error(self, place: Place, problem: str) -> ConfigError:
        """The error to raise for a value that makes no sense."""
        name = ".".join(map(str, place))
        return ConfigError(f"{self.where(place)}: {name + ': ' if name else ''}{problem}")

    @contextmanager
    def named(self) -> Iterator[None]:
        """Errors inside that are about a field of this file say where it stands."""
        try:
            yield
        except ConfigError as error:
            if error.place is None:
                raise
            raise self.error(error.place, error.problem) from None


def read_yaml(path: Path) -> YamlFile:
    """Read a YAML file whose outermost value is a mapping.

    Raises ConfigError, with the line, for a missing file, for text that is no YAML, and for a key that stands twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    return yaml_of(text, str(path))


def yaml_of(text: str, name: str) -> YamlFile:
    """As `read_yaml`, of text; `name` stands in errors."""
    path = Path(name)
    try:
        node = yaml.compose(text, Loader=_Loader)
        lines: dict[Place, int] = {}
        _note_lines(node, (), lines, path)
        values = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        raise ConfigError(f"{path}{line}: this is no YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} holds {'nothing' if values is None else 'a ' + type(values).__name__}; expected fields"
        )
    return YamlFile(path, values, lines)


def _note_lines(node: Any, place: Place, lines: dict[Place, int], path: Path) -> None:
    if node is None:
        return
    lines.setdefault(place, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*place, str(key.value))
            if inner in lines:
                raise ConfigError(
                    f"{path}, line {key.start_mark.line + 1}: {'.'.join(map(str, inner))} stands twice (first in line "
                    f"{lines[inner]})"
                )
            lines[inner] = key.start_mark.line + 1
            _note_lines(value, inner, lines, path)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            _note_lines(value, (*place, i), lines, path)


def with_changes(file: YamlFile, changes: Sequence[str]) -> YamlFile:
    """The file with fields set as `train.steps=100`; a value is read as YAML.

    Raises ConfigError for text that is no assignment.
    """
    values = _copied(file.values)
    for change in changes:
        name, found, text = change.partition("=")
        if not found or not name.strip():
            raise ConfigError(f"--set {change!r}; expected FIELD=VALUE, for example --set train.steps=100")
        try:
            value = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {change!r}: {text!r} is no YAML: {getattr(error, 'problem', error)}") from None
        set_field(values, tuple(name.strip().split(".")), value)
    return YamlFile(file.path, values, file.lines)


def set_field(values: dict[str, Any], place: tuple[str, ...], value: Any) -> None:
    """Set a nested field; sections on the way are made where they are missing."""
    for depth, key in enumerate(place[:-1]):
        inner = values.setdefault(key, {})
        if isinstance(inner, list) and place[depth + 1].isdigit():
            raise ConfigError(f"{'.'.join(place)}: {key} is a list; set the whole list")
        if not isinstance(inner, dict):
            raise ConfigError(f"{'.'.join(place)}: {key} is {inner!r}, which has no fields")
        values = inner
    values[place[-1]] = value


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _copied(v) for k, v in value.items()}
    return [_copied(v) for v in value] if isinstance(value, list) else value


def write_yaml(values: Mapping[str, Any]) -> str:
    """The values as YAML that `read_yaml` reads back."""
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
