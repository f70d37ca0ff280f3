"""What commands print and how they end: text for people, one JSON object for programs, four exit statuses.

0   done
1   it failed: damaged files, data that cannot be run, a loss that became NaN
2   the command or its configuration makes no sense
75  stopped by SIGTERM or Ctrl-C after a checkpoint was written; the same command goes on (`EX_TEMPFAIL`)
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from spd_lens.cli.yaml_file import ConfigError
from spd_lens.support.files import plain
from spd_lens.support.pages import visible_lines

DONE, FAILED, USAGE, STOPPED = 0, 1, 2, 75

F = TypeVar("F", bound=Callable[..., Any])

JSON = "--json"
JsonFlag = Annotated[bool, typer.Option(JSON, help="Print one JSON object instead of text.")]


def is_main_process() -> bool:
    """Whether this process prints; under torchrun the first alone does."""
    return os.environ.get("RANK", "0") == "0"


def show(text: str, values: Mapping[str, Any], *, as_json: bool) -> None:
    """Print the result of a command, in the first process."""
    if is_main_process():
        typer.echo(json.dumps(plain(values), allow_nan=False) if as_json else visible_lines(text))


class Program(TyperGroup):
    """The group of all commands: with `--json` on the line, words that no command has are told as an object, too.

    An option that does not exist, a missing argument, a value of the wrong kind: these end before any command begins.
    """

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        if not standalone_mode or JSON not in (sys.argv[1:] if args is None else args):
            return super().main(args, prog_name, complete_var, standalone_mode, **extra)
        try:
            # What a command gives is the status it ends with, or nothing.
            status = super().main(args, prog_name, complete_var, False, **extra) or DONE
        except _UsageError as error:
            _tell(error.format_message(), type(error).__name__, USAGE, as_json=True)
            status = USAGE
        sys.exit(status)


# The base of all such errors; typer gives it no name of its own, and newer ones carry a click of their own.
_UsageError: Any = typer.BadParameter.__base__


# The options that stand on the line of the command that runs, by their names in Python.
_GIVEN: ContextVar[Mapping[str, str] | None] = ContextVar("options that were given", default=None)


class OneCommand(TyperCommand):
    """A command that knows which of its options were given, so that it can refuse what it would read over."""

    def invoke(self, ctx: Any) -> Any:
        sources = {p: ctx.get_parameter_source(p.name) for p in self.params}
        given = {str(p.name): p.opts[0] for p, source in sources.items() if source and source.name == "COMMANDLINE"}
        token = _GIVEN.set(given)
        try:
            return super().invoke(ctx)
        finally:
            _GIVEN.reset(token)


def refuse_options(names: Iterable[str], why: str) -> None:
    """ConfigError for the first of these options that was given: nothing would come of it."""
    given = _GIVEN.get() or {}
    for name in names:
        if (flag := given.get(name)) is not None:
            raise ConfigError(f"{flag} {why}")


def _tell(error: str, kind: str, status: int, *, as_json: bool) -> None:
    """An error on stderr."""
    content = {"error": error, "kind": kind, "status": status}
    typer.echo(json.dumps(content) if as_json else visible_lines(f"error: {error}"), err=True)


def ends_in_words(command: F) -> F:
    """Errors of users become one line on stderr (with `--json` an object) and an exit status, not a traceback."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except (ValueError, TypeError, OverflowError, OSError, ModuleNotFoundError) as error:
            if os.environ.get("SPD_LENS_TRACEBACK"):
                raise
            status = USAGE if isinstance(error, ConfigError) else FAILED
            _tell(str(error), type(error).__name__, status, as_json=bool(kwargs.get("json")))
            raise typer.Exit(status) from None

    # typer reads annotations from here, in the module of the command.
    wrapped.__signature__ = inspect.signature(command, eval_str=True)  # pyright: ignore[reportAttributeAccessIssue]
    return wrapped  # pyright: ignore[reportReturnType]


def about_what_was_asked(command: F) -> F:
    """For a command that reads nothing but its file: whatever it refuses was asked for wrongly."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(str(error)) from None

    return wrapped  # pyright: ignore[reportReturnType]
