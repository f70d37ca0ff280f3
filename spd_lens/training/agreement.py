"""Whether the processes of a run were given the same model, decomposition, choices and checkpoint.

Gradients are averaged, and exchanges are made at the same steps in every process: where one has other parameters, or
other choices, the result is silently wrong, or all wait for ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.fingerprint import difference, sampled_hash
from spd_lens.data.processes import Processes
from spd_lens.support.files import plain
from spd_lens.training.belonging import described, keeps_place
from spd_lens.training.config import TrainConfig
from spd_lens.training.evaluations import Evaluations


def check_same_run(
    processes: Processes,
    decomposition: Decomposition,
    config: TrainConfig,
    batches: Any,
    belongs: Mapping[str, Any],
    evaluations: Evaluations | None,
    step: int,
) -> None:
    """ValueError, in all processes, that names the first thing that one of them was given otherwise.

    `belongs`: what each says of its target and its decomposition. Of trained tensors at most 4,096 entries each are
    read; whole batches are compared when the first is taken (`check_same_rows`).
    """
    if processes.count == 1:
        return
    own = {
        **{name: belongs[name] for name in ("target", "decomposition")},
        "config": plain(config.to_json()),
        "V, U and gates": sampled_hash(decomposition.tensors()),
        "evaluations": _choices(evaluations),
        "data": described(batches) if keeps_place(batches) else {},
        "checkpoint": {"step": step},
    }
    found = processes.of_all(own)
    for rank, other in enumerate(found):
        if (what := difference(found[0], other)) is not None:
            raise ValueError(
                f"process {rank} was given something else than process 0: {what}. Call train with the same arguments "
                "in every process: no seed depends on the rank (masks and routing differ between ranks by themselves)"
            )


def _choices(evaluations: Evaluations | None) -> dict[str, Any]:
    if not isinstance(evaluations, Evaluations):
        return {}
    # Of tensors and batches that they are there.
    options = {name: value if _is_plain(value) else "given" for name, value in evaluations.options.items()}
    return {"fast_every": evaluations.fast_every, "slow_every": evaluations.slow_every, "options": options}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))
