"""The program `spd-lens`: which commands there are."""

from __future__ import annotations

from typing import Annotated

import typer

import spd_lens
import spd_lens.cli.audit as audit
import spd_lens.cli.browse as browse
import spd_lens.cli.compare as compare
import spd_lens.cli.components as components
import spd_lens.cli.demo as demo
import spd_lens.cli.edit as edit
import spd_lens.cli.evaluate as evaluate
import spd_lens.cli.export as export
import spd_lens.cli.graph as graph
import spd_lens.cli.harvest as harvest
import spd_lens.cli.merge as merge
import spd_lens.cli.pareto as pareto
import spd_lens.cli.plan as plan
import spd_lens.cli.specialise as specialise
import spd_lens.cli.sweep as sweep
import spd_lens.cli.train as train
from spd_lens.cli.output import OneCommand, Program

app = typer.Typer(
    name="spd-lens",
    cls=Program,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Stochastic Parameter Decomposition of TransformerLens models. Begin with: spd-lens demo",
    epilog="Exit statuses: 0 done; 1 failed; 2 the command or its file makes no sense; 75 stopped after a checkpoint, "
    "the same command goes on. Shell completion: spd-lens --install-completion",
)
# In the order of `--help`.
COMMANDS = {
    "demo": demo,
    "plan": plan,
    "train": train,
    "evaluate": evaluate,
    "harvest": harvest,
    "browse": browse,
    "graph": graph,
    "components": components,
    "compare": compare,
    "pareto": pareto,
    "sweep": sweep,
    "edit": edit,
    "specialise": specialise,
    "merge": merge,
    "export": export,
    "audit": audit,
}
for _name, _module in COMMANDS.items():
    _named = app.command(_name, cls=OneCommand, help=_module.HELP, short_help=_module.HELP.split(".")[0])
    _named(_module.command)


def _print_version(asked: bool) -> bool:
    """Before a missing command is missed."""
    if asked:
        typer.echo(spd_lens.__version__)
        raise typer.Exit
    return asked


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


def run() -> None:
    """The program's entry point."""
    app()
