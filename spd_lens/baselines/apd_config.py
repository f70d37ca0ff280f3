"""`APDConfig`: all choices of an APD run, and the paper's own."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from spd_lens.support.given import given_number, given_whole

# What the members of one run may differ in; everything else decides the shapes and the operations of a step.
COEFFICIENTS = ("faithfulness", "minimality", "simplicity", "hidden")
MAY_DIFFER = ("seed", "k", *COEFFICIENTS)


@dataclass(frozen=True)
class APDConfig:
    """All choices of an APD run; the presets below are the paper's.

    - `n_components` C; `rank` m, terms per component and matrix (None: `min(d_in, d_out)`); `k`: active components per
      input, on the average over a batch.
    - `minimality` beta, `simplicity` alpha with exponent `p`, `hidden` and `faithfulness`: coefficients.
    - `attributions_from`: whether derivatives are taken at the target's parameters or at `sum_c P_c`.
    - `unit_norm`: every V[c, m] is kept at length 1, its gradient at a right angle to it.
    - `lr` of Adam (no weight decay) with a linear warm-up over a fraction `warmup` of the steps; `"cosine"` is a
      quarter of a period, `cos(pi t / 2)` with t from 0 to 1, as in the authors' code.
    - `init_scale`: V, U start normal with standard deviation `init_scale * sqrt(2 / (C m d))`, d the length of a row.
    - `seed`: of the initial values and of the data.
    """

    n_components: int
    k: float
    lr: float
    steps: int
    batch_size: int = 2048
    rank: int | None = None
    faithfulness: float = 1.0
    minimality: float = 1.0
    simplicity: float = 1.0
    p: float = 1.0
    hidden: float = 0.0
    attributions_from: Literal["target", "components"] = "target"
    unit_norm: bool = False
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: float = 0.05
    init_scale: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("n_components", "steps", "batch_size"):
            given_whole(name, getattr(self, name), least=1)
        for name in ("k", "lr", "p", "init_scale"):
            given_number(name, getattr(self, name), above=0)
        for name in ("faithfulness", "minimality", "simplicity", "hidden"):
            given_number(name, getattr(self, name), least=0)
        if self.n_active < 1:
            raise ValueError(f"k={self.k} of {self.batch_size} inputs: no component would ever be active")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup={self.warmup}; expected a fraction of the steps, at least 0 and below 1")

    @property
    def n_active(self) -> int:
        """Pairs of input and component that are active in a batch, `floor(k * batch_size)`."""
        return math.floor(self.k * self.batch_size)

    def changed(self, **changes: Any) -> APDConfig:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def lr_factor(self, step: int) -> float:
        """What the learning rate is multiplied with at a step."""
        warm = int(self.warmup * self.steps)
        if step < warm:
            return (step + 1) / warm
        if self.schedule == "constant":
            return 1.0
        return math.cos(0.5 * math.pi * (step - warm) / max(1, self.steps - warm))


# Appendix D of the paper. Its 5-2 runs have as many components as features (the authors' code).
APD_TMS_5_2 = APDConfig(
    n_components=5, k=0.211, lr=0.03, steps=20_000, minimality=1.0, simplicity=0.7, p=1.0,
    attributions_from="components",
)  # fmt: skip

APD_TMS_40_10 = APDConfig(
    n_components=50, k=1.0, lr=1e-3, steps=20_000, minimality=10.0, simplicity=20.0, p=0.9, schedule="cosine"
)

# Batch 256 is that of appendix C.2 and of the authors' code; appendix D says 2048.
APD_RESID_MLP_1 = APDConfig(
    n_components=130, k=1.28, lr=1e-3, steps=40_000, batch_size=256, minimality=1.0, simplicity=10.0, p=0.9, hidden=1.0,
    unit_norm=True, schedule="cosine", warmup=0.01, init_scale=2.0,
)  # fmt: skip
