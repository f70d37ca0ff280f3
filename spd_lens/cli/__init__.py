"""The command line, `spd-lens` or `python -m spd_lens`, and the file of a run, `RunFile`.

What a command does, Python does too: `RunFile.read("config.yaml")` checks a file, `train_run` trains it, and every
other command is one call of the function of its name."""

from spd_lens.cli.block_jobs import BlockJob, split_blocks
from spd_lens.cli.jobs import CommandJob, submit
from spd_lens.cli.output import DONE, FAILED, STOPPED, USAGE
from spd_lens.cli.program import app, run
from spd_lens.cli.run_file import RunFile
from spd_lens.cli.runs import decompose_run, load_run_data, open_run_model, open_saved
from spd_lens.cli.sections import ModelSection
from spd_lens.cli.sweep import SweepCell, run_cells, sweep_cells
from spd_lens.cli.train import train_run
from spd_lens.cli.yaml_file import ConfigError, YamlFile, read_yaml

__all__ = [
    "DONE",
    "FAILED",
    "STOPPED",
    "USAGE",
    "BlockJob",
    "CommandJob",
    "ConfigError",
    "ModelSection",
    "RunFile",
    "SweepCell",
    "YamlFile",
    "app",
    "decompose_run",
    "load_run_data",
    "open_run_model",
    "open_saved",
    "read_yaml",
    "run",
    "run_cells",
    "split_blocks",
    "submit",
    "sweep_cells",
    "train_run",
]
