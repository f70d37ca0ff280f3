"""Whether APD found the known mechanisms, by the criteria that SPD is judged by (`spd_lens.toys.reports`).

Two things differ. A component is a sum of rank-one terms over all matrices instead of one rank-one matrix, so cosines
and lengths are taken of its whole rows; and it has no importance between 0 and 1 but is active or not. With batch
top-k that depends on the other inputs of the batch, so `G [features C]` is read as follows: the *cut-off* is the
smallest attribution that is active in a batch of the training distribution (mean over 16 batches that were not trained
on); `G[i, c] = 1` if the attribution of c on the one-hot input of feature i is at least that, else 0. A component is
alive if it is active on some one-hot input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from spd_lens.baselines.apd import APD
from spd_lens.baselines.apd_losses import batch_top_k
from spd_lens.baselines.apd_targets import between_features, components_between_features, target_of
from spd_lens.support.shown import short_repr, text_html
from spd_lens.support.tables import format_table
from spd_lens.toys.features import one_hot_inputs
from spd_lens.toys.recovery import MIN_MMCS, FeatureSite, Recovery, alive, target_contributions

CUT_OFF_BATCHES = 16


@dataclass(frozen=True)
class APDReport:
    """An APD of a toy. `success` asks, as for SPD, for MMCS >= 0.99 and 0.95 <= ML2R <= 1.05 over the alive components,
    and exactly one active component per feature, one of its own.

    - `recovery`: of the rows of `W` (TMS), or of `W_E @ W_in` (residual MLP). Published numbers are over all c.
    - `faithfulness`: `|theta* - sum_c P_c|^2 / |theta*|^2` of every matrix.
    - `contribution_error`, of a residual MLP: `|N - N'| / |N|` of the neuron contributions, `N'[i, n]` those of the
      closest alive component of feature i, of its own `W_in` through its own `W_out`.
    """

    recovery: Recovery
    components: FeatureSite
    faithfulness: Mapping[str, float]
    cut_off: float
    contribution_error: float | None

    __repr__ = short_repr
    _repr_html_ = text_html

    @property
    def problems(self) -> tuple[str, ...]:
        """Why it is not a success; empty if it is."""
        return (*self.recovery.problems("APD"), *self.components.problems("APD"))

    @property
    def success(self) -> bool:
        """Whether the known solution was found."""
        return not self.problems

    @property
    def success_but_for_length(self) -> bool:
        """Whether all criteria but that of ML2R are met: APD shrinks what it finds, by about a tenth."""
        return self.recovery.mmcs >= MIN_MMCS and not self.components.problems("APD")

    def __str__(self) -> str:
        r, c = self.recovery, self.components
        header = ("", "alive", "expected", "errors", "MMCS", "ML2R", "MMCS, all c", "ML2R, all c")
        numbers = (f"{x:.3f}" for x in (r.mmcs, r.ml2r, r.mmcs_all, r.ml2r_all))
        row = ("components", f"{c.n_alive}", f"{c.n_features}", f"{c.identity_error}", *numbers)
        verdict = "the known solution" if self.success else "not the known solution:\n" + "\n".join(self.problems)
        left = ", ".join(f"{name} {error:.1e}" for name, error in self.faithfulness.items())
        return format_table(header, [row]) + f"\n{verdict}\nrelative error of the sum of components: {left}"


@torch.no_grad()
def apd_report(apd: APD, *, value: float = 0.75) -> APDReport:
    """Compare an APD with the features of its toy; attributions are read on one-hot inputs of `value`."""
    target = target_of(apd.model)
    P = components_between_features(apd.V, apd.U, target.constants)
    theta = {name: between_features(name, W, target.constants) for name, W in target.matrices.items()}
    read = next(iter(theta))
    limit = cut_off(apd)
    inputs = one_hot_inputs(target.n_features, value).to(theta[read])
    G = (apd.attributions(inputs) >= limit).to(inputs)
    errors = {
        name: float((apd.components(name).sum(0) - W).square().sum() / W.square().sum())
        for name, W in target.matrices.items()
    }
    return APDReport(
        recovery=component_recovery(P[read], theta[read], G),
        components=FeatureSite.of(G),
        faithfulness=errors,
        cut_off=limit,
        contribution_error=_contribution_error(P, theta, G) if "W_out" in P else None,
    )


@torch.no_grad()
def cut_off(apd: APD) -> float:
    """The smallest active attribution of a training batch, mean over 16 batches that were not trained on."""
    target, config = target_of(apd.model), apd.config
    data = target.features(target.n_features, config.batch_size, seed=config.seed)
    smallest = []
    for index in range(config.steps, config.steps + CUT_OFF_BATCHES):
        scores = apd.attributions(data.batch(index).to(next(iter(target.matrices.values()))))
        active = batch_top_k(scores[None], torch.tensor([config.n_active]))[0]
        smallest.append(scores[active > 0].min())
    return float(torch.stack(smallest).mean())


def component_recovery(
    P: Float[Tensor, "C features d_out"], W: Float[Tensor, "features d_out"], importances: Float[Tensor, "features C"]
) -> Recovery:
    """MMCS and ML2R of whole rows `P[c, j, :]` against `W[j, :]`, over alive components and over all.

    For components of rank one this is `Recovery.of`.
    """
    among = alive(importances)
    found = (*_mmcs_and_ml2r(P[among], W), *_mmcs_and_ml2r(P, W))
    return Recovery(*found)


def _mmcs_and_ml2r(P: Float[Tensor, "C features d_out"], W: Float[Tensor, "features d_out"]) -> tuple[float, float]:
    if len(P) == 0:
        return 0.0, 0.0
    cos, best = _closest(P, W)
    lengths = P[best, torch.arange(len(W))].norm(dim=1) / W.norm(dim=1)
    return float(cos.mean()), float(lengths.mean())


def _closest(P: Float[Tensor, "C features d_out"], W: Float[Tensor, "features d_out"]) -> tuple[Tensor, Tensor]:
    """The largest cosine of every row, and whose it is."""
    cos, best = (normalize(P, dim=2) * normalize(W, dim=1)).sum(2).max(dim=0)
    return cos, best


def _contribution_error(
    P: Mapping[str, Tensor], theta: Mapping[str, Tensor], importances: Float[Tensor, "features C"]
) -> float:
    wanted = target_contributions(theta["W_in"], theta["W_out"])
    among = alive(importances)
    if not bool(among.any()):
        return 1.0
    _, best = _closest(P["W_in"][among], theta["W_in"])
    rows = torch.arange(len(best))
    found = P["W_in"][among][best, rows] * P["W_out"][among][best, :, rows]
    return float((found - wanted).norm() / wanted.norm())
