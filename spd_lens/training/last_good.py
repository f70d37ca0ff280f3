"""`LastGood`: the state that a run goes back to when its loss or a parameter is no longer finite."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from spd_lens.training.checkpoint import Checkpoint, read_checkpoint
from spd_lens.training.learner import Learner
from spd_lens.training.shards import read_shards


class Diverged(ValueError):
    """A loss or a parameter is not finite: all processes find that at the same step, and are back at the same state."""


class LastGood:
    """A checkpoint on disk, or the start, kept in memory until there is one."""

    def __init__(self, learner: Learner, checkpoint: Checkpoint | None) -> None:
        self.learner, self.checkpoint = learner, checkpoint
        self.start: dict[str, Tensor] | None = None
        if checkpoint is None:
            self.start = {name: t.detach().clone() for name, t in learner.decomposition.tensors().items()}

    def is_now(self, checkpoint: Checkpoint) -> None:
        """A checkpoint has been written; the start is not needed any more."""
        self.checkpoint, self.start = checkpoint, None

    def put_back(self) -> str:
        """Put the state back into the learner; what it was, in words."""
        if self.checkpoint is None:
            assert self.start is not None
            self.learner.decomposition.load_tensors(self.start)
            return "there was no checkpoint yet, the decomposition is as it was before"
        checkpoint = self.checkpoint
        try:
            self.learner.load(_tensors_of(checkpoint, self.learner))
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"{checkpoint.path} does not fit this run: {error}") from error
        return f"the decomposition is back at step {checkpoint.step} ({checkpoint.path})"

    def give_up(self, what: str, losses: Mapping[str, Tensor]) -> None:
        """Raise Diverged, with the last good state put back."""
        wrong = [name for name, loss in losses.items() if not bool(loss.isfinite())]
        kept = self.put_back()
        raise Diverged(
            f"{what} (terms: {', '.join(wrong) or 'all finite here'}); {kept}. Lower lr, or clip gradients with "
            "clip_subcomponents=1.0 and clip_gates=1.0"
        )


def _tensors_of(checkpoint: Checkpoint, learner: Learner) -> Mapping[str, Tensor]:
    """What a checkpoint holds; of shards those that the learner needs."""
    if not checkpoint.tensors and not checkpoint.shards:
        checkpoint = read_checkpoint(checkpoint.path)
    return read_shards(checkpoint.path, learner.shared()) if checkpoint.shards else checkpoint.tensors
