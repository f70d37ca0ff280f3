"""`spd-lens demo`: train, evaluate and harvest on the model and the text that ship with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spd_lens.cli.evaluate import evaluate_with
from spd_lens.cli.output import STOPPED, JsonFlag, ends_in_words, refuse_options, show
from spd_lens.cli.run_file import RunFile
from spd_lens.cli.runs import load_run_data, open_saved
from spd_lens.cli.train import train_run
from spd_lens.cli.yaml_file import with_changes, yaml_of
from spd_lens.core import Decomposition
from spd_lens.statistics import SiteHarvest, harvest

EXAMPLE = """\
# A run of `spd-lens train`: block 1 of the tiny language model that ships with the package, on Moby Dick.
model: {name: tiny_lm}
decompose:
  sites: {"blocks.1.mlp.W_*": 192}
  gate: shared
  init: exact
data: {text: moby_dick, split: train, context: 64, batch_size: 8, prepend_bos: true}
train:
  steps: 300
  lr: 3.0e-3
  faithfulness: 100
  minimality: 1e-4
  p_end: 0.5
  clip_subcomponents: 1.0
  clip_gates: 1.0
evaluate:
  data: {split: held_out}
  max_batches: 2
out_dir: runs/demo
"""

HELP = """Decompose one block of a tiny language model, evaluate it, and show what its subcomponents fire on.

Nothing is downloaded. With --config the run's file is printed and nothing is done: a start for your own.

Examples:

    spd-lens demo

    spd-lens demo --config > config.yaml

    spd-lens demo --steps 50 --out runs/quick
"""


@ends_in_words
def command(
    config: Annotated[bool, typer.Option("--config", help="Only print the run's file.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 300,
    out: Annotated[Path, typer.Option(help="The run's directory.")] = Path("runs/demo"),
    json: JsonFlag = False,
) -> None:
    if config:
        refuse_options(["steps", "out"], "is for a run; --config only prints the file")
        show(EXAMPLE.rstrip("\n"), {"config": EXAMPLE}, as_json=json)
        return
    # In memory there is no file to name in an error; the text is ours.
    run = RunFile.of(with_changes(yaml_of(EXAMPLE, "the demo's file"), [f"train.steps={steps}"]))
    result = train_run(run, out, resume="auto")
    if result.interrupted:
        stopped = {"interrupted": True, "steps": result.steps, "out_dir": str(out)}
        show(f"stopped after {result.steps} steps; the same command goes on", stopped, as_json=json)
        raise typer.Exit(STOPPED)
    decomposition, _ = open_saved(out, None)
    report = evaluate_with(decomposition, run.evaluate, load_run_data(run.evaluation_data, decomposition))
    report.save(out / "evaluation.json")
    found = harvest(decomposition, load_run_data(run.data, decomposition), max_batches=16)
    contexts = {name: _contexts(decomposition, site) for name, site in found.items()}
    lines = [f"{name}\n" + "\n".join(f"    {line}" for line in shown) for name, shown in contexts.items()]
    text = f"{report}\n\n{report.verdict}\n\n" + "\n".join(lines) + f"\n\nfiles: {out}"
    values = {"verdict": str(report.verdict), "l0": report.l0, "contexts": contexts, "out_dir": str(out)}
    show(text, values, as_json=json)


def _contexts(decomposition: Decomposition, site: SiteHarvest) -> list[str]:
    """The strongest position of the two most used subcomponents that are on at under 5 % of positions."""
    tokenizer = decomposition.model.tokenizer
    lines = []
    for c in site.most_used(2, below=0.05):
        example = site.examples(c)[0]
        words = [tokenizer.decode([token]) for token in example.tokens]
        words[example.at] = f"[[{words[example.at]}]]"
        lines.append(f"{c}: on at {float(site.firing_rate[c]):.1%}: " + "".join(words).replace("\n", "⏎"))
    return lines
