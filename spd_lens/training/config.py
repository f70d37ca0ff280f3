"""`TrainConfig`: every choice of a training run, frozen, checked when it is made, and written into checkpoints."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from spd_lens.objective.divergences import Divergence
from spd_lens.objective.penalties import Penalty, Power, SmoothL0
from spd_lens.support.compiling import Backend
from spd_lens.support.validated import (
    Count,
    CountOrZero,
    Flag,
    NonNegative,
    Positive,
    Seed,
    Share,
    as_tuple,
    unknown_field,
    validated,
)
from spd_lens.training.readout import TunedReadout
from spd_lens.training.reconstruction import Reconstruction, masks_from_json, masks_to_json

Schedule = Literal["constant", "cosine", "linear"]


def _factors(value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError(f"expected a dict {{pattern: factor}}, not a {type(value).__name__}")
    return dict(value)


@validated
class TrainConfig:
    """All choices of `train`. Coefficients weigh the terms of the total loss.

    Optimisation
    - `steps`: training steps; `lr`: Adam's learning rate for subcomponents, `gate_lr` for gates (None: the same);
      `schedule` and `lr_warmup` (steps of linear warm-up); no weight decay. `lr_end`: share of `lr` at which the
      schedule ends.
    - `clip_subcomponents`, `clip_gates`: separate gradient-norm clipping, None for none.
    - `faithfulness_warmup`: steps on L1 alone with a throw-away Adam at `faithfulness_warmup_lr` (L8).
    - `precision`: `"bf16"` runs the forward passes under autocast; losses and master weights stay float32.

    Memory (numbers stay the same to the rounding of sums, so a run may go on with other choices)
    - `accumulate`: every batch is gone through in so many parts (rows k, k + m, ...), one optimiser step for all.
      Activations are then those of one part. Cost: a clean pass and the gates again for the frequency term, and for
      every ascent of an adversary. Terms of one's own see one part at a time and are averaged over them.
    - `recompute`: what is computed again in the backward pass instead of being kept. `"gates"`: the inside of gates,
      for one site at a time; `"passes"`: the inside of blocks in masked passes, one block at a time; `"all"`; `"none"`.
      Costs one more forward pass of what is named.
    - `offload`: blocks of the target that no pass enters (before cached residual streams, behind `stop_at`) lie in main
      memory while the run lasts.
    - `shard`: several processes share out V, U, gates, their gradients and Adam's moments (FSDP2), each keeps its part
      of every one (`spd_lens.training.sharding`). Costs a gathering of V and U for every pass, forward and backward.

    Speed
    - `compile`: backend of `torch.compile` ("inductor") for gates, squashings, the sum under masks at every site, and
      the divergence; the passes of the model around them stay eager. The same numbers to the rounding of sums. The
      first step takes up to minutes, and every new shape of a batch some seconds.

    Losses
    - `faithfulness` (L1; with `relative_faithfulness` L1r, the mean over sites of relative errors).
    - `minimality` (L2), the sum of a penalty: `penalty="power"` is `g^p` with p from `p_start` linearly to `p_end`
      (None: constant) over the run; `"smooth_l0"` is `g^2 / (g^2 + gamma^2)` (S5) with gamma from `gamma_start`
      linearly to `gamma_end` over the share `gamma_until` of the run, then held.
    - `minimality_factors`: `{pattern: factor}` on the parts of L2 of the sites that match (others: 1), for matrices
      that no single coefficient suits.
    - `relative_reconstruction`: reconstruction terms are divided by what it costs to switch everything off, measured in
      the first steps. `minimality` then is the share of the behaviour that one subcomponent has to be worth, and much
      the same for different models (`spd_lens.training.weights`).
    - `tolerance`: instead of a coefficient, the divergence that may be spent (nats for `"kl"`; with
      `relative_reconstruction` a share of everything off). `minimality`, and `frequency` with it, is then where the
      run starts; it rises and falls by at most a factor `exp(tolerance_rate)` over the run.
    - `frequency` (L3) of the same penalty; `frequency_reference`: its number of positions N, None for the batch's own.
    - `reconstructions` (L4 to L6); `hidden` (L7) on `hidden_points`, with stochastic masks of its own.
    - `delta`: the unexplained part has a random mask too (K2); without it it is left out of masked passes.
    - `squash`: variant of S1; `divergence`: KL on logits, MSE, or MSE relative to the variance of the clean output.
    - `stop_at`: local training. Passes end before this block (the number of blocks: behind the last), and what is
      reconstructed is the residual stream there, by `"relative_mse"`, `"mse"`, or `"mse"` of what a `readout` reads
      from it (`spd_lens.training.tune_readout`). A step then costs only the blocks between the first decomposed one
      and this.
    - `extra_terms`: terms of one's own, see `spd_lens.training.LossTerm`.

    Bookkeeping
    - `seed`: of masks, routing and adversaries; `log_every`, `checkpoint_every` in steps (None: only at the end);
      `keep_checkpoints`: how many of the newest stay on disk.

    Raises ValueError for values that make no sense and TypeError for unknown fields, when it is made.

    Defaults: coefficients of faithfulness and stochastic reconstruction, S and no weight decay are the paper's; delta
    and the straight squashing are the authors' later practice; lr is three times the paper's: in as many steps more
    runs on TMS 5-2 succeed (`experiments/ablations.py tms_5-2`), and the demo on SmolLM2 uses it.
    """

    steps: Count = 5_000
    lr: Positive = 3e-3
    gate_lr: Positive | None = None
    schedule: Schedule = "cosine"
    lr_warmup: CountOrZero = 0
    lr_end: Share = 0.0
    clip_subcomponents: Positive | None = None
    clip_gates: Positive | None = None
    faithfulness_warmup: CountOrZero = 0
    faithfulness_warmup_lr: Positive = 1e-2
    precision: Literal["fp32", "bf16"] = "fp32"
    accumulate: Count = 1
    recompute: Literal["none", "gates", "passes", "all"] = "none"
    offload: Flag = False
    shard: Flag = False
    compile: Backend = "none"

    faithfulness: NonNegative = 1.0
    relative_faithfulness: Flag = False
    minimality: NonNegative = 1e-3
    minimality_factors: Annotated[dict[str, NonNegative], BeforeValidator(_factors)] = field(default_factory=dict)
    penalty: Literal["power", "smooth_l0"] = "power"
    p_start: Positive = 1.0
    p_end: Positive | None = None
    gamma_start: Positive = 1.0
    gamma_end: Positive = 0.01
    gamma_until: Positive = 0.9
    relative_reconstruction: Flag = False
    tolerance: Positive | None = None
    tolerance_rate: Positive = 20.0
    frequency: NonNegative = 0.0
    frequency_reference: Count | None = None
    reconstructions: Annotated[tuple[Any, ...], as_tuple] = (Reconstruction(),)
    hidden: NonNegative = 0.0
    hidden_points: Annotated[tuple[str, ...], as_tuple] = ()
    delta: Flag = True
    squash: Literal["straight", "leaky"] = "straight"
    divergence: Divergence = "kl"
    stop_at: Count | None = None
    readout: Any = None
    extra_terms: Annotated[tuple[Any, ...], as_tuple] = ()

    seed: Seed = 0
    log_every: Count = 10
    checkpoint_every: Count | None = 500
    keep_checkpoints: Count = 2

    def __post_init__(self) -> None:
        for i, term in enumerate(self.reconstructions):
            if not isinstance(term, Reconstruction):
                raise ValueError(f"reconstructions[{i}] is a {type(term).__name__}; expected a Reconstruction")
            try:
                term.check()
            except (TypeError, ValueError) as error:
                raise ValueError(f"reconstructions[{i}]: {error}") from None
        self._check_names()
        self._check_local()
        if self.hidden > 0 and not self.hidden_points:
            raise ValueError("hidden > 0 needs hidden_points; expected names of hook points to reconstruct")
        self._check_weights()
        if self.gamma_until > 1:
            raise ValueError(f"gamma_until={self.gamma_until}; expected a share of the run, at most 1")
        keeps_output = any(term.coefficient > 0 for term in self.reconstructions) or self.hidden > 0 or self.extra_terms
        if not keeps_output and (self.minimality > 0 or self.frequency > 0 or self.faithfulness == 0):
            raise ValueError(
                "reconstructions is empty (or all have coefficient 0), so nothing keeps the output while minimality "
                "switches everything off; expected at least one Reconstruction, or minimality=0 and frequency=0"
            )

    def _check_weights(self) -> None:
        if (self.relative_reconstruction or self.tolerance is not None) and not any(
            term.coefficient > 0 for term in self.reconstructions
        ):
            raise ValueError(
                f"relative_reconstruction={self.relative_reconstruction} and tolerance={self.tolerance} without a "
                "reconstruction term; expected at least one Reconstruction with a coefficient above 0"
            )
        if self.tolerance is not None and self.minimality == 0:
            raise ValueError(
                f"tolerance={self.tolerance} with minimality=0; expected where its coefficient starts, such as 1e-3"
            )

    def _check_local(self) -> None:
        if self.stop_at is not None and self.divergence == "kl":
            raise ValueError(
                f"divergence='kl' with stop_at={self.stop_at}: what enters a block are no logits; expected "
                "divergence='relative_mse', or 'mse'"
            )
        if self.readout is None:
            return
        if not isinstance(self.readout, TunedReadout):
            raise TypeError(f"readout is a {type(self.readout).__name__}; expected a TunedReadout, from tune_readout")
        if self.stop_at is None or self.divergence != "mse":
            raise ValueError(
                f"a readout with stop_at={self.stop_at} and divergence={self.divergence!r}; expected the block that it "
                "was tuned for, and divergence='mse'"
            )

    def _check_names(self) -> None:
        names = [term.name for term in self.reconstructions]
        if len(set(names)) < len(names):
            raise ValueError(
                f"two reconstructions are the same term ({', '.join(names)}); expected different ones: give one of "
                "them more draws"
            )
        own = {f.name for f in dataclasses.fields(self)} | set(names)
        for term in self.extra_terms:
            if not (isinstance(getattr(term, "name", None), str) and callable(term) and hasattr(term, "coefficient")):
                raise ValueError(
                    f"extra_terms holds a {type(term).__name__}; expected objects with name, coefficient and "
                    "__call__(view, decomposition), see spd_lens.training.LossTerm"
                )
            if term.name in own:
                raise ValueError(f"the extra term {term.name!r} has a name that is taken; expected another")

    def changed(self, **changes: Any) -> TrainConfig:
        """A copy with some fields changed; an unknown field is an error that lists near names."""
        for name in changes:
            if name not in {f.name for f in dataclasses.fields(self)}:
                raise unknown_field(TrainConfig, name)
        return dataclasses.replace(self, **changes)

    def p_at(self, step: int) -> float:
        """Exponent of the power penalty at a step."""
        if self.p_end is None or self.steps == 1:
            return self.p_start
        return self.p_start + (self.p_end - self.p_start) * step / (self.steps - 1)

    def gamma_at(self, step: int) -> float:
        """Width of smooth L0 at a step."""
        annealed = min(1.0, step / max(1.0, self.gamma_until * (self.steps - 1)))
        return self.gamma_start + (self.gamma_end - self.gamma_start) * annealed

    def penalty_at(self, step: int) -> Penalty:
        """What importances cost at a step."""
        return Power(self.p_at(step)) if self.penalty == "power" else SmoothL0(self.gamma_at(step))

    def lr_factor(self, step: int) -> float:
        """What the learning rates are multiplied with at a step: warm-up, then the schedule down to `lr_end`."""
        if step < self.lr_warmup:
            return (step + 1) / self.lr_warmup
        progress = (step - self.lr_warmup) / max(1, self.steps - self.lr_warmup)
        match self.schedule:
            case "constant":
                return 1.0
            case "linear":
                falling = 1 - progress
            case "cosine":
                falling = 0.5 * (1 + math.cos(math.pi * progress))
        return falling if self.lr_end == 0 else self.lr_end + (1 - self.lr_end) * falling

    def to_json(self) -> dict[str, Any]:
        """Plain values for files; sources and terms of one's own stand there by name."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["reconstructions"] = [
            {f.name: getattr(term, f.name) for f in dataclasses.fields(term)} | {"masks": masks_to_json(term.masks)}
            for term in self.reconstructions
        ]
        values["extra_terms"] = [{"name": term.name, "coefficient": term.coefficient} for term in self.extra_terms]
        # Files from before there was a choice do not have it.
        for name, default in _ADDED.items():
            if values[name] == default:
                del values[name]
        values["readout"] = None if self.readout is None else self.readout.to_json()
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> TrainConfig:
        """Undo `to_json`. Raises ValueError where sources or terms of one's own would have to be made up."""
        if values.get("extra_terms"):
            names = ", ".join(term["name"] for term in values["extra_terms"])
            raise ValueError(f"this configuration has terms of one's own ({names}); expected them in config=")
        if values.get("readout"):
            raise ValueError("this configuration has a readout, which files do not hold; expected it in config=")
        terms = tuple(
            Reconstruction(**{**term, "masks": masks_from_json(term["masks"])})
            for term in values.get("reconstructions", ())
        )
        return TrainConfig(**{**values, "reconstructions": terms, "extra_terms": ()})


_ADDED = {
    "shard": False,
    "compile": "none",
    "relative_reconstruction": False,
    "tolerance": None,
    "tolerance_rate": 20.0,
}
