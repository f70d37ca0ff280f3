"""Train a decomposition: `train`, its `TrainConfig`, and many small runs at once with `train_many`."""

from spd_lens.data.processes import Processes, join_processes, leave_processes
from spd_lens.training.belonging import belongs_to, check_belongs
from spd_lens.training.blocks import merge_decompositions, sites_by_block
from spd_lens.training.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from spd_lens.training.config import TrainConfig
from spd_lens.training.cuda_graphs import GraphedStep
from spd_lens.training.evaluations import Evaluations
from spd_lens.training.learner import Learner, make_learner
from spd_lens.training.log_figures import importance_figures
from spd_lens.training.loggers import FigureLogger, Logger, tensorboard_logger, wandb_logger
from spd_lens.training.loop import train
from spd_lens.training.many import ManyResult, train_many
from spd_lens.training.member_adam import MemberAdam
from spd_lens.training.member_learner import MemberLearner
from spd_lens.training.model_shape import SHAPES, ModelShape
from spd_lens.training.planning import DEVICES, Device, Plan, plan
from spd_lens.training.readout import TunedReadout, tune_readout
from spd_lens.training.reconstruction import Reconstruction
from spd_lens.training.run_files import RunFiles, open_run
from spd_lens.training.step import accumulate_gradients, apply_gradients, set_learning_rates, take_step
from spd_lens.training.terms import LossTerm, StepView
from spd_lens.training.train_result import TrainResult

__all__ = [
    "DEVICES",
    "SHAPES",
    "Checkpoint",
    "Device",
    "Evaluations",
    "FigureLogger",
    "GraphedStep",
    "Learner",
    "Logger",
    "LossTerm",
    "ManyResult",
    "MemberAdam",
    "MemberLearner",
    "ModelShape",
    "Plan",
    "Processes",
    "Reconstruction",
    "RunFiles",
    "StepView",
    "TrainConfig",
    "TrainResult",
    "TunedReadout",
    "accumulate_gradients",
    "apply_gradients",
    "belongs_to",
    "check_belongs",
    "importance_figures",
    "join_processes",
    "leave_processes",
    "make_learner",
    "merge_decompositions",
    "open_run",
    "plan",
    "read_checkpoint",
    "set_learning_rates",
    "sites_by_block",
    "take_step",
    "tensorboard_logger",
    "train",
    "train_many",
    "tune_readout",
    "wandb_logger",
    "write_checkpoint",
]
