"""A step of many members as a CUDA graph: what `train_many` takes with `cuda_graphs=True`.

A toy's step is some hundred small kernels whatever the number of members, and each member draws from generators of its
own, so the host needs longer to launch them than the card to compute them. Learning rates follow their schedule from
step to step; what else the host decides (annealed penalties, the rate of a tolerance) moves in stairs, as in
`spd_lens.training.cuda_graphs`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spd_lens.training.cuda_graphs import STEPS_BEFORE, Recording
from spd_lens.training.member_learner import MemberLearner
from spd_lens.training.weights import MEASURED_STEPS


class GraphedMembers:
    """`learner.step`, recorded and replayed; what it returns is overwritten by the next call.

    Raises ValueError for a learner that is not on a CUDA device, and for inputs of another shape than the first.
    """

    def __init__(self, learner: MemberLearner, *, steps_per_capture: int = 50) -> None:
        device = learner.stack.device
        if device.type != "cuda":
            raise ValueError(f"the members are on {device}; cuda_graphs=True needs a CUDA device")
        self.learner = learner
        self._inputs: Tensor | None = None
        # The pass that measures everything off belongs to the first steps alone.
        measured = MEASURED_STEPS if learner.config.relative_reconstruction else 0
        self._recording = Recording(
            self._take,
            [*learner.generators, *learner.adversaries],
            steps_per_capture=steps_per_capture,
            ordinary=max(STEPS_BEFORE, measured),
        )

    def step(self, x: Tensor, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One training step of all members on `x [S ...]`."""
        if self._inputs is None:
            self._inputs = torch.empty_like(x, device=self.learner.stack.device)
        if x.shape != self._inputs.shape:
            raise ValueError(
                f"inputs of shape {tuple(x.shape)}, the recorded step has {tuple(self._inputs.shape)}; keep the batch "
                "size"
            )
        self._inputs.copy_(x, non_blocking=True)
        self.learner.begin(step)
        return self._recording(step)

    def _take(self, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        assert self._inputs is not None
        return self.learner.take(self._inputs, step)
