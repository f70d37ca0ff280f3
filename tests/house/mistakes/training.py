"""Training."""

from __future__ import annotations

import torch

from spd_lens import Reconstruction, TrainConfig, decompose, train
from spd_lens.training import read_checkpoint, train_many
from tests.house.mistakes.table import SITE, T, Table, file_in, other, result, saved
from tests.small_models import tiny_transformer, tokens

TABLE = Table()
add = TABLE.add

add("train config text", lambda d, m, p: train(d, T, "config"))
add("train config dict", lambda d, m, p: train(d, T, {"steps": 3}))
add("train config class", lambda d, m, p: train(d, T, TrainConfig))
add("train field typo", lambda d, m, p: train(d, T, step=3))
add("train field lr text", lambda d, m, p: train(d, T, lr="fast"))
add("train hidden typo", lambda d, m, p: train(d, T, steps=1, hidden=1.0, hidden_points=["nope"], out_dir=p / "r"))
add(
    "train minimality pattern nothing",
    lambda d, m, p: train(d, T, steps=1, minimality_factors={"blocks.7*": 2.0}, out_dir=p / "r"),
)
add("train loggers not list", lambda d, m, p: train(d, T, steps=1, out_dir=p / "r", loggers=print))
add("train loggers text", lambda d, m, p: train(d, T, steps=1, out_dir=p / "r", loggers="wandb"))
add("train loggers list of text", lambda d, m, p: train(d, T, steps=1, out_dir=p / "r", loggers=["wandb"]))
add("train out_dir file", lambda d, m, p: train(d, T, steps=1, out_dir=file_in(p)))
add("train out_dir below file", lambda d, m, p: train(d, T, steps=1, out_dir=file_in(p) / "r"))
add("train out_dir number", lambda d, m, p: train(d, T, steps=1, out_dir=3))
add("train out_dir empty", lambda d, m, p: train(d, T, steps=1, out_dir=""))
add("train out_dir unknown user", lambda d, m, p: train(d, T, steps=1, out_dir="~nobodyatall/x"))
add("train out_dir NUL", lambda d, m, p: train(d, T, steps=1, out_dir="a\0b"))
add("train out_dir used", lambda d, m, p: (result(d, p), result(d, p)))
add("train out_dir unwritable", lambda d, m, p: train(d, T, steps=1, out_dir="/proc/x/run"))
add("train resume nothing", lambda d, m, p: train(d, T, resume_from=p / "none"))
add("train resume empty dir", lambda d, m, p: train(d, T, resume_from=p))
add("train resume file", lambda d, m, p: train(d, T, resume_from=file_in(p)))
add("train resume None-text", lambda d, m, p: train(d, T, resume_from=True))
add("train resume other steps", lambda d, m, p: train(d, T, resume_from=result(d, p).directory, steps=5))
add("train resume other model", lambda d, m, p: train(other(), T, resume_from=result(d, p).directory))
add("train resume other seed", lambda d, m, p: train(d, T, resume_from=result(d, p).directory, seed=5))
add("train resume other data", lambda d, m, p: train(d, tokens(2, seed=5), resume_from=result(d, p).directory))
add("train resume and out_dir", lambda d, m, p: train(d, T, resume_from=result(d, p).directory, out_dir=p / "z"))
add("train resume a save", lambda d, m, p: train(d, T, resume_from=saved(d, p)))
add("train resume a TrainResult", lambda d, m, p: train(d, T, resume_from=result(d, p)))
add("train no decomposition", lambda d, m, p: train(None, T, steps=1))
add("train generator too short", lambda d, m, p: train(d, iter([T]), steps=3, out_dir=p / "r"))
add("train nan target", lambda d, m, p: (d[SITE].V.data.fill_(float("nan")), train(d, T, steps=1, out_dir=p / "r")))
add("train bf16 on...", lambda d, m, p: TrainConfig(precision=torch.bfloat16))
add("train_many one", lambda d, m, p: train_many(d, T, TrainConfig(steps=1)))
add("train_many lengths", lambda d, m, p: train_many([d], [T, T], TrainConfig(steps=1)))
add("train_many configs lengths", lambda d, m, p: train_many([d], [T], [TrainConfig(steps=1)] * 2))
add("train_many empty", lambda d, m, p: train_many([], [], TrainConfig(steps=1)))
add("train_many same twice", lambda d, m, p: train_many([d, d], [T, T], TrainConfig(steps=1)))
add("train_many dict config", lambda d, m, p: train_many([d], [T], {"steps": 1}))
add(
    "train_many steps differ",
    lambda d, m, p: train_many([d, other()], [T, T], [TrainConfig(steps=1), TrainConfig(steps=2)]),
)
add(
    "train_many adversary",
    lambda d, m, p: train_many([d], [T], TrainConfig(steps=1, reconstructions=[Reconstruction(masks="persistent")])),
)
add("train_many text data", lambda d, m, p: train_many([d], ["abc"], TrainConfig(steps=1)))
add("train_many None data", lambda d, m, p: train_many([d], [None], TrainConfig(steps=1)))
add("train_many out_dir file", lambda d, m, p: train_many([d], [T], TrainConfig(steps=1), out_dir=file_in(p)))
add(
    "train_many other C",
    lambda d, m, p: train_many([d, decompose(tiny_transformer(), {SITE: 5})], [T, T], TrainConfig(steps=1)),
)
add("train_many models", lambda d, m, p: train_many([m], [T], TrainConfig(steps=1)))
add("read_checkpoint none", lambda d, m, p: read_checkpoint(p / "x"))
add("read_checkpoint text", lambda d, m, p: read_checkpoint("x"))
