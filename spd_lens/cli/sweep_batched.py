"""Runs of a sweep as one batched run of `train_many`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from spd_lens.cli.run_file import RunFile
from spd_lens.cli.runs import DECOMPOSITION, RUN_FILE, decompose_run, load_run_data, open_run_model
from spd_lens.cli.train import sigterm_returns
from spd_lens.cli.yaml_file import ConfigError
from spd_lens.training import train_many


def train_batched(config: Path, cells: Sequence[tuple[Sequence[str], Path]], directory: Path) -> bool:
    """Train all cells, each `(changes, directory)`, as one run in `directory`; whether it was interrupted.

    Every cell's directory gets its file and its decomposition, as `spd-lens train` leaves them; trained ones are left.
    Raises ConfigError for sections that a batched run has no use for, ValueError (from `train_many`) for cells that
    cannot be trained together.
    """
    if all((where / DECOMPOSITION).is_dir() for _, where in cells):
        return False
    runs = [RunFile.read(config, changes) for changes, _ in cells]
    for section in ("evaluations", "readout"):
        if getattr(runs[0], section) is not None:
            raise ConfigError(f"--batched with a section {section}, which runs trained as one do not have")
    members = [decompose_run(open_run_model(run.model), run.decompose) for run in runs]
    batches = [load_run_data(run.data, member) for run, member in zip(runs, members, strict=True)]
    with sigterm_returns():
        result = train_many(members, batches, [run.train_config for run in runs], out_dir=directory)
    if result.interrupted:
        return True
    for run, member, (_, where), failed in zip(runs, members, cells, result.failed, strict=True):
        if failed is None:
            run.write(where / RUN_FILE)
            member.save_pretrained(where / DECOMPOSITION)
    return False
