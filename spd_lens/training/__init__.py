"""Train a decomposition: `train`, its `TrainConfig`, and many small runs at once with `train_many`."""

from spd_lens.training.checkpoint import Checkpoint
from spd_lens.training.config import Reconstruction, TrainConfig
from spd_lens.training.loggers import tensorboard_logger, wandb_logger
from spd_lens.training.loop import TrainResult, make_accelerator, make_learner, train
from spd_lens.training.many import ManyResult, train_many
from spd_lens.training.member_adam import MemberAdam
from spd_lens.training.run_files import RunFiles
from spd_lens.training.step import Learner, accumulate_gradients

__all__ = [
    "Checkpoint",
    "Learner",
    "ManyResult",
    "MemberAdam",
    "Reconstruction",
    "RunFiles",
    "TrainConfig",
    "TrainResult",
    "accumulate_gradients",
    "make_accelerator",
    "make_learner",
    "tensorboard_logger",
    "train",
    "train_many",
    "wandb_logger",
]
