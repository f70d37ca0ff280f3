"""`TrainConfig`: every choice of a training run, frozen, documented, and written into checkpoints."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from spd_lens.core.masks import MaskKind
from spd_lens.core.routing import Routing
from spd_lens.objective.adversary import PGD
from spd_lens.objective.divergences import Divergence

Schedule = Literal["constant", "cosine", "linear"]


@dataclass(frozen=True)
class Reconstruction:
    """One reconstruction term of the loss: a mask source times a routing (L5).

    - `coefficient`: its weight in the total.
    - `masks`: a kind of `sample_masks`; `"pgd"` (K3), `"persistent"` (K4).
    - `routing`: `"all"`, `"layerwise"`, `"subset"` or a static probability (K5).
    - `draws`: samples per step (S); 1 is enough.
    - `pgd`: budget of `"pgd"`; for `"persistent"` its `steps` are the warm ascents.
    """

    coefficient: float = 1.0
    masks: MaskKind | Literal["pgd", "persistent"] = "stochastic"
    routing: Routing = "all"
    draws: int = 1
    pgd: PGD = field(default_factory=PGD)

    @property
    def name(self) -> str:
        """Name of the term in logs."""
        return f"{self.masks}_{self.routing}"


@dataclass(frozen=True)
class TrainConfig:
    """All choices of `train`. Coefficients weigh the terms of the total loss.

    Optimisation
    - `steps`: training steps; `lr`: Adam's learning rate for subcomponents, `gate_lr` for gates (None: the same);
      `schedule` and `lr_warmup` (steps of linear warm-up); no weight decay.
    - `clip_subcomponents`, `clip_gates`: separate gradient-norm clipping, None for none.
    - `faithfulness_warmup`: steps on L1 alone with a throw-away Adam at `faithfulness_warmup_lr` (L8).
    - `precision`: `"bf16"` runs the forward passes under autocast; losses and master weights stay float32.

    Losses
    - `faithfulness` (L1); `minimality` (L2) with exponent `p_start`, annealed linearly to `p_end` (None: constant)
      over the run; `minimality_factors`: `{pattern: factor}` on the parts of L2 of the sites that match (others: 1),
      for matrices that no single coefficient suits; `frequency` (L3); `reconstructions` (L4 to L6); `hidden` (L7)
      on `hidden_points`, computed with the first reconstruction's masks.
    - `delta`: the unexplained part has a random mask too (K2); without it it is left out of masked passes.
    - `squash`: variant of S1; `divergence`: KL on logits or MSE.

    Bookkeeping
    - `seed`: of masks, routing and adversaries; `log_every`, `checkpoint_every` in steps (None: only at the end);
      `keep_checkpoints`: how many of the newest stay on disk.

    Defaults: coefficients of faithfulness and stochastic reconstruction, S and no weight decay are the paper's; delta
    and the straight squashing are the authors' later practice; lr is three times the paper's: in as many steps more
    runs on TMS 5-2 succeed (`experiments/ablations.py tms_5-2`), and the demo on SmolLM2 uses it.
    """

    steps: int = 5_000
    lr: float = 3e-3
    gate_lr: float | None = None
    schedule: Schedule = "cosine"
    lr_warmup: int = 0
    clip_subcomponents: float | None = None
    clip_gates: float | None = None
    faithfulness_warmup: int = 0
    faithfulness_warmup_lr: float = 1e-2
    precision: Literal["fp32", "bf16"] = "fp32"

    faithfulness: float = 1.0
    minimality: float = 1e-3
    minimality_factors: Mapping[str, float] = field(default_factory=dict)
    p_start: float = 1.0
    p_end: float | None = None
    frequency: float = 0.0
    reconstructions: tuple[Reconstruction, ...] = (Reconstruction(),)
    hidden: float = 0.0
    hidden_points: tuple[str, ...] = ()
    delta: bool = True
    squash: Literal["straight", "leaky"] = "straight"
    divergence: Divergence = "kl"

    seed: int = 0
    log_every: int = 10
    checkpoint_every: int | None = 500
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        for name in ("steps", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1")
        for name in ("lr", "faithfulness_warmup_lr", "p_start"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}; expected a positive number")
        for name in ("faithfulness", "minimality", "frequency", "hidden", "lr_warmup", "faithfulness_warmup"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}; expected zero or more")
        for pattern, factor in self.minimality_factors.items():
            if not factor >= 0:
                raise ValueError(f"minimality_factors[{pattern!r}]={factor}; expected zero or more")
        if self.schedule not in ("constant", "cosine", "linear"):
            raise ValueError(f"schedule={self.schedule!r}; expected 'constant', 'cosine' or 'linear'")
        names = [term.name for term in self.reconstructions]
        if len(set(names)) < len(names):
            raise ValueError(f"two reconstructions are the same term ({', '.join(names)}); give one of them more draws")
        if self.hidden > 0 and not self.hidden_points:
            raise ValueError("hidden > 0 needs hidden_points: names of hook points to reconstruct")

    def changed(self, **changes: Any) -> TrainConfig:
        """A copy with some fields changed; an unknown field is an error that lists near names."""
        known = [f.name for f in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=3) or known
                raise TypeError(f"TrainConfig has no field {name!r}; near: {', '.join(near)}")
        return dataclasses.replace(self, **changes)

    def p_at(self, step: int) -> float:
        """Exponent of the minimality loss at a step."""
        if self.p_end is None or self.steps == 1:
            return self.p_start
        return self.p_start + (self.p_end - self.p_start) * step / (self.steps - 1)

    def lr_factor(self, step: int) -> float:
        """What the learning rates are multiplied with at a step: warm-up, then the schedule down to 0."""
        if step < self.lr_warmup:
            return (step + 1) / self.lr_warmup
        progress = (step - self.lr_warmup) / max(1, self.steps - self.lr_warmup)
        match self.schedule:
            case "constant":
                return 1.0
            case "linear":
                return 1 - progress
            case "cosine":
                return 0.5 * (1 + math.cos(math.pi * progress))

    def to_json(self) -> dict[str, Any]:
        """Plain values for files."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> TrainConfig:
        """Undo `to_json`."""
        terms = tuple(
            Reconstruction(**{**term, "pgd": PGD(**term["pgd"])}) for term in values.get("reconstructions", ())
        )
        plain: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k != "reconstructions"
        }
        return TrainConfig(**plain, reconstructions=terms)
