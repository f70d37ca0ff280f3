"""`train_apd`: many targets decomposed by APD in one batched run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from spd_lens.baselines.apd import APD
from spd_lens.baselines.apd_config import MAY_DIFFER, APDConfig
from spd_lens.baselines.apd_learner import APDLearner
from spd_lens.baselines.apd_targets import target_of
from spd_lens.support.files import made_directory
from spd_lens.support.given import given_instance, given_list
from spd_lens.support.owners import held
from spd_lens.support.progress import tqdm
from spd_lens.toys.resid_mlp import ResidMLP
from spd_lens.toys.tms import TMS


def train_apd(
    models: Sequence[TMS] | Sequence[ResidMLP],
    configs: APDConfig | Sequence[APDConfig],
    *,
    out_dir: str | Path | None = None,
    checkpoint_every: int = 1_000,
    log_every: int = 100,
) -> list[APD]:
    """Decompose every model (same sizes) with its config, all in one batched run; none enters another's numbers.

    Configs may differ in seed, k and coefficients. With `out_dir` a checkpoint is written every so many steps and
    at the end; a run that finds its own there continues it to the same end.
    """
    members = _checked(models, configs)
    learner = APDLearner(models, members)
    if out_dir is None:
        _train(learner, None, checkpoint_every, log_every)
    else:
        directory = made_directory(out_dir, "out_dir")
        with held(directory / "running.json", "training"):
            _train(learner, directory, checkpoint_every, log_every)
    return learner.results()


def _train(learner: APDLearner, directory: Path | None, checkpoint_every: int, log_every: int) -> None:
    first = learner.config
    step = 0 if directory is None else learner.load(directory)
    for now in tqdm(range(step, first.steps), initial=step, total=first.steps, desc=f"APD x {len(learner.members)}"):
        losses = learner.step(learner.batch(now), now)
        last = now + 1 == first.steps
        if last or now % log_every == 0:
            learner.log.append({"step": now, **{name: loss.tolist() for name, loss in losses.items()}})
        if directory is not None and (last or (now + 1) % checkpoint_every == 0):
            learner.save(directory, now + 1)


def _checked(
    models: Sequence[TMS] | Sequence[ResidMLP], configs: APDConfig | Sequence[APDConfig]
) -> tuple[APDConfig, ...]:
    models = given_list("models", models, "TMS or ResidMLP models, of equal sizes")
    odd = [model for model in models if not isinstance(model, (TMS, ResidMLP))]
    if odd:
        raise TypeError(f"models holds a {type(odd[0]).__name__}; expected TMS or ResidMLP models")
    single = isinstance(configs, APDConfig)
    members = (configs,) * len(models) if single else tuple(given_list("configs", configs, "APDConfig"))
    for config in members:
        given_instance("a config", config, APDConfig, "APDConfig(n_components=5, k=1, lr=1e-3, steps=100)")
    if not models or len(models) != len(members):
        raise ValueError(f"{len(models)} models and {len(members)} configs; expected one config for every model")
    for i, member in enumerate(members):
        if member.changed(**{name: getattr(members[0], name) for name in MAY_DIFFER}) != members[0]:
            raise ValueError(
                f"the config of member {i} differs from the first in more than {', '.join(MAY_DIFFER)}; train them "
                "in runs of their own"
            )
    shapes = {str([tuple(W.shape) for W in target_of(model).matrices.values()]) for model in models}
    if len(shapes) > 1:
        raise ValueError(f"the models do not have the same sizes: {', '.join(sorted(shapes))}")
    return members
