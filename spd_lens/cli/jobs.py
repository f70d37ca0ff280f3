"""Commands as jobs of submitit: an array on SLURM, or processes here that are treated alike.

Shortly before a job's time is over, or when it is preempted, submitit asks for a checkpoint: the command gets SIGTERM,
writes its own, and the same command is put into the queue again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spd_lens.cli.output import DONE, STOPPED
from spd_lens.cli.yaml_file import ConfigError, yaml_of
from spd_lens.support.names import near_names

CLUSTERS = ("slurm", "local")


class CommandJob:
    """Runs commands of `spd-lens` one after another, each a list of arguments; gives the last one's exit status.

    It ends at the first that fails. The commands must be able to begin again (`train --resume auto`).
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self, commands: Sequence[Sequence[str]]) -> int:
        status = DONE
        for arguments in commands:
            self._process = subprocess.Popen([sys.executable, "-m", "spd_lens", *arguments])
            while (found := self._process.poll()) is None:
                time.sleep(0.2)
            if (status := found) != DONE:
                break
        return status

    def checkpoint(self, commands: Sequence[Sequence[str]]) -> Any:
        """What submitit calls, in a signal's handler, before it puts the job into the queue again."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            # Not Popen.wait: the poll that the signal interrupted may hold its lock.
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(CommandJob(), commands)


def submit(
    jobs: Sequence[Sequence[Sequence[str]]],
    folder: Path,
    *,
    cluster: str,
    options: Sequence[str] = (),
    at_once: int = 0,
) -> list[Any]:
    """Submit jobs, each a list of commands, as one array; returns submitit's jobs.

    - `options`: parameters of submitit's executor as `NAME=VALUE`, for example `timeout_min=600`, `gpus_per_node=1`,
      `slurm_partition=gpu`.
    - `at_once`: how many run at the same time on SLURM (0: as many as there is room for).

    Raises ConfigError for a cluster and options that submitit does not know, and ModuleNotFoundError without it.
    """
    try:
        import submitit
    except ModuleNotFoundError:
        raise ModuleNotFoundError("submitit is missing; pip install 'spd-lens[cluster]'") from None
    if cluster not in CLUSTERS:
        raise ConfigError(f"cluster {cluster!r}; near: {near_names(cluster, CLUSTERS)}")
    folder.mkdir(parents=True, exist_ok=True)
    # Time for a checkpoint is taken off at the end.
    given: dict[str, Any] = {"timeout_min": 24 * 60, **_options(options)}
    if at_once:
        given.setdefault("slurm_array_parallelism", at_once)
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        executor.update_parameters(**given)
    except (NameError, ValueError, RuntimeError, TypeError) as error:
        raise ConfigError(f"submitit refuses {cluster} with {given}: {error}") from None
    return executor.map_array(CommandJob(), [[list(map(str, c)) for c in commands] for commands in jobs])


def statuses_of(jobs: Sequence[Any]) -> list[int]:
    """Wait for jobs; their exit statuses. A job that was cancelled or lost counts as stopped."""
    from submitit.core.utils import FailedJobError, UncompletedJobError

    found = []
    for job in jobs:
        try:
            found.append(int(job.result()))
        except (UncompletedJobError, FailedJobError):
            found.append(STOPPED)
    return found


def _options(texts: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for text in texts:
        name, given, value = text.partition("=")
        if not given or not name:
            raise ConfigError(f"--job {text!r}; expected NAME=VALUE, for example --job timeout_min=600")
        found[name] = yaml_of(f"value: {value}", "--job").values["value"]
    return found
