"""`spd-lens evaluate`: measure a trained decomposition, and say in words whether it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spd_lens.cli.output import JsonFlag, ends_in_words, is_main_process, show
from spd_lens.cli.runs import data_for, open_saved
from spd_lens.cli.sections import EvaluateSection
from spd_lens.core import Decomposition
from spd_lens.data import TokenBatches, TokenStream, leave_processes
from spd_lens.evaluation import EvaluationReport, evaluate

HELP = """Evaluate a trained decomposition: faithfulness, six mask regimes, an adversary, deletion, a verdict.

DIRECTORY is what `spd-lens train` wrote, or a saved decomposition (then give --model and --data).
The report is saved to DIRECTORY/evaluation.json, which `spd-lens pareto` reads.

Examples:

    spd-lens evaluate runs/tiny

    spd-lens evaluate runs/tiny --quick --json

    spd-lens evaluate my_decomposition --model gpt2 --data data.yaml

    torchrun --nproc-per-node 2 -m spd_lens evaluate runs/tiny     (the rows of every batch are shared out)
"""


@ends_in_words
def command(
    directory: Annotated[Path, typer.Argument(help="A run's directory or a saved decomposition.")],
    model: Annotated[str | None, typer.Option(help="The model, where the directory does not say it.")] = None,
    data: Annotated[Path | None, typer.Option(help="A YAML file with the fields of a data section.")] = None,
    max_batches: Annotated[int | None, typer.Option(min=1, help="Batches to evaluate on.")] = None,
    adversary_steps: Annotated[list[int] | None, typer.Option(help="A budget of the adversary; repeatable.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="No adversary, no deletion test, two batches.")] = False,
    seed: Annotated[int | None, typer.Option(help="Of masks and starts.")] = None,
    save: Annotated[Path | None, typer.Option(help="Where the report goes.")] = None,
    json: JsonFlag = False,
) -> None:
    decomposition, run = open_saved(directory, model)
    section = EvaluateSection() if run is None else run.evaluate
    changes = {"max_batches": max_batches, "adversary_steps": adversary_steps, "quick": quick or None, "seed": seed}
    section = section.model_copy(update={name: value for name, value in changes.items() if value is not None})
    report = evaluate_with(decomposition, section, data_for(decomposition, run, data))
    if is_main_process():
        path = report.save(save or directory / "evaluation.json")
        text = f"{report}\n\n{report.verdict}\nsaved: {path}"
        show(text, {**report.to_json(per_text=False), "verdict": str(report.verdict), "saved": str(path)}, as_json=json)
    leave_processes()


def evaluate_with(
    decomposition: Decomposition, section: EvaluateSection, batches: TokenBatches | TokenStream
) -> EvaluationReport:
    """`evaluate` with the choices of a run's file."""
    values = section.model_dump(exclude={"data"})
    return evaluate(decomposition, batches, together=True, **values)
