"""Decompositions of the toy models against what is known about them.

In TMS and in a residual MLP's `W_in` every feature has a direction of its own, so a right decomposition has exactly
one subcomponent per feature, with that direction and length. The +ID matrix and a residual MLP's `W_out` are one
mechanism of full rank: as many subcomponents as the rank, with no basis of their own.

What counts as success is stated at `TMSReport` and `ResidMLPReport`; each report names its reasons where it does not
succeed. The measures themselves are in `spd_lens/toys/recovery.py`.

Left out on purpose: the target itself. Whether a TMS learned its features is `tms_target_report`'s to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.support.shown import short_repr, text_html
from spd_lens.support.tables import format_table
from spd_lens.toys.features import one_hot_inputs
from spd_lens.toys.recovery import (
    DenseSite,
    FeatureSite,
    Recovery,
    alive,
    closest_subcomponents,
    target_contributions,
)


@dataclass(frozen=True)
class TMSReport:
    """A decomposed TMS. `success` asks for all of:

    - over the alive subcomponents of `W_enc`, MMCS >= 0.99 and 0.95 <= ML2R <= 1.05;
    - encoder and decoder each with exactly one alive subcomponent per feature, and identity error 0;
    - with +ID, as many alive subcomponents of `W_id` as hidden dimensions. That they are on for every feature is
      reported (`n_always_on`), not required: a direction orthogonal to a feature's is rightly off for it.
    """

    recovery: Recovery
    encoder: FeatureSite
    decoder: FeatureSite
    identity: DenseSite | None

    __repr__ = short_repr
    _repr_html_ = text_html

    @property
    def problems(self) -> tuple[str, ...]:
        """Why it is not a success; empty if it is."""
        dense = [] if self.identity is None else self.identity.problems("W_id")
        sites = self.encoder.problems("W_enc") + self.decoder.problems("W_dec")
        return (*self.recovery.problems("W_enc"), *sites, *dense)

    @property
    def success(self) -> bool:
        """Whether the known solution was found."""
        return not self.problems

    def __str__(self) -> str:
        rows = [_feature_row("W_enc", self.encoder, self.recovery), _feature_row("W_dec", self.decoder, None)]
        if self.identity is not None:
            rows.insert(1, _dense_row("W_id", self.identity))
        return _table(rows, self.problems)


@dataclass(frozen=True)
class ResidMLPLayer:
    """One block of a decomposed residual MLP.

    `contribution_error`: `|N - N'| / |N|` over features and neurons, `N` the target's contributions and `N'` those of
    each feature's closest alive subcomponent of `W_in` through the sum of the subcomponents of `W_out`
    (`resid_mlp_contributions`).
    """

    recovery: Recovery
    W_in: FeatureSite
    W_out: DenseSite
    contribution_error: float


@dataclass(frozen=True)
class ResidMLPReport:
    """A decomposed residual MLP, per block. `success` asks, in every block, for

    - MMCS >= 0.99 and 0.95 <= ML2R <= 1.05 over the alive subcomponents of `W_in`: `A V` against `A W_in`, row i of
      `A [features d_resid]` what feature i brings to the block: the slope of the residual stream in the feature's
      value, `(r(x) - r(-x)) / 2x` on one-hot inputs. In the first block that is `W_E`. Later the stream also holds what
      the blocks before wrote, which is not the same for x and -x: no rank-one matrix can carry both, and `A` is the
      least-squares fit to values symmetric about 0;
    - exactly one alive subcomponent of `W_in` per feature, with identity error 0;
    - as many alive ones of `W_out` as the block has neurons. How many are on for every feature (`n_always_on`) is
      reported, not required.

    The paper counts the alive and shows pictures; it measures neither directions nor lengths here.
    """

    layers: tuple[ResidMLPLayer, ...]

    __repr__ = short_repr
    _repr_html_ = text_html

    @property
    def problems(self) -> tuple[str, ...]:
        """Why it is not a success; empty if it is."""
        found: list[str] = []
        for i, layer in enumerate(self.layers):
            in_name, out_name = f"blocks.{i}.mlp.W_in", f"blocks.{i}.mlp.W_out"
            found += layer.recovery.problems(in_name) + layer.W_in.problems(in_name) + layer.W_out.problems(out_name)
        return tuple(found)

    @property
    def success(self) -> bool:
        """Whether the known solution was found."""
        return not self.problems

    def __str__(self) -> str:
        rows = []
        for i, layer in enumerate(self.layers):
            rows.append(_feature_row(f"blocks.{i}.mlp.W_in", layer.W_in, layer.recovery))
            rows.append(_dense_row(f"blocks.{i}.mlp.W_out", layer.W_out))
        errors = ", ".join(f"{layer.contribution_error:.1%}" for layer in self.layers)
        return _table(rows, self.problems) + f"\nneuron contributions off by {errors}"


@torch.no_grad()
def tms_report(decomposition: Decomposition, *, value: float = 0.75) -> TMSReport:
    """Compare a decomposed `TMS` with its features; importance is read on one-hot inputs of `value`."""
    _require(decomposition, "W_enc", "W_dec")
    encoder = decomposition["W_enc"]
    W = encoder.target_weight
    G = decomposition.importance(one_hot_inputs(len(W), value).to(W))
    return TMSReport(
        recovery=Recovery.of(encoder.V, encoder.U, W, G["W_enc"]),
        encoder=FeatureSite.of(G["W_enc"]),
        decoder=FeatureSite.of(G["W_dec"]),
        identity=DenseSite.of(G["W_id"], W.shape[1]) if "W_id" in G else None,
    )


@torch.no_grad()
def resid_mlp_report(decomposition: Decomposition, *, value: float = 0.75) -> ResidMLPReport:
    """Compare a decomposed `ResidMLP` with its features; importance is read on one-hot inputs of `value`."""
    n_layers, W_E = decomposition.host.n_layers(), decomposition.model.W_E
    _require(decomposition, *(f"blocks.{i}.mlp.{name}" for i in range(n_layers) for name in ("W_in", "W_out")))
    G = decomposition.importance(one_hot_inputs(len(W_E), value).to(W_E))
    return ResidMLPReport(tuple(_layer_report(decomposition, i, G, value) for i in range(n_layers)))


def _layer_report(decomposition: Decomposition, layer: int, G: Mapping[str, Tensor], value: float) -> ResidMLPLayer:
    in_name, out_name = f"blocks.{layer}.mlp.W_in", f"blocks.{layer}.mlp.W_out"
    inner, outer = decomposition[in_name], decomposition[out_name]
    wanted, found = resid_mlp_contributions(decomposition, layer, value=value)
    A = _stream_per_feature(decomposition, layer, value)
    return ResidMLPLayer(
        recovery=Recovery.of(A @ inner.V, inner.U, A @ inner.target_weight, G[in_name]),
        W_in=FeatureSite.of(G[in_name]),
        W_out=DenseSite.of(G[out_name], outer.rank_bound),
        contribution_error=float((found - wanted).norm() / wanted.norm()),
    )


@torch.no_grad()
def resid_mlp_contributions(
    decomposition: Decomposition, layer: int, *, value: float = 0.75
) -> tuple[Float[Tensor, "features neurons"], Float[Tensor, "features neurons"]]:
    """Neuron contributions in a block: the target's, and those of every feature's closest alive subcomponent of `W_in`
    through the sum of the subcomponents of `W_out` (0 if none is alive).

    Feature i stands for the residual stream that it brings to the block, as in `ResidMLPReport`.
    """
    inner, outer = (decomposition[f"blocks.{layer}.mlp.{name}"] for name in ("W_in", "W_out"))
    W_E, A = decomposition.model.W_E, _stream_per_feature(decomposition, layer, value)
    G = decomposition.importance(one_hot_inputs(len(W_E), value).to(W_E))[f"blocks.{layer}.mlp.W_in"]
    V, W_in = A @ inner.V, A @ inner.target_weight
    chosen = closest_subcomponents(V, inner.U, W_in, alive(G))
    carried = V.gather(1, chosen[:, None]) * inner.U[chosen] * alive(G).any()
    return (
        target_contributions(W_in, outer.target_weight @ W_E.T),
        target_contributions(carried, outer.weight @ W_E.T),
    )


def _stream_per_feature(decomposition: Decomposition, layer: int, value: float) -> Float[Tensor, "features d_resid"]:
    """The slope of the residual stream that enters a block in each feature's value, over one-hot inputs of `value` and
    `-value`: `W_E` in the first block. Between 0 and either of them the stream is linear, there being no biases."""
    W_E, name = decomposition.model.W_E, f"blocks.{layer}.mlp.W_in"
    x = one_hot_inputs(len(W_E), value).to(W_E)
    up, down = (decomposition.clean_pass(signed).inputs[name] for signed in (x, -x))
    return (up - down) / (2 * value)


def _require(decomposition: Decomposition, *names: str) -> None:
    missing = [name for name in names if name not in decomposition]
    if missing:
        raise ValueError(f"{missing[0]} is not decomposed; this report needs {', '.join(names)}")


def _feature_row(name: str, site: FeatureSite, recovery: Recovery | None) -> tuple[str, ...]:
    lengths = ("-",) * 4 if recovery is None else tuple(f"{value:.3f}" for value in astuple(recovery))
    return (name, f"{site.n_alive}", f"{site.n_features}", f"{site.identity_error}", *lengths)


def _dense_row(name: str, site: DenseSite) -> tuple[str, ...]:
    return (name, f"{site.n_alive}", f"{site.expected}", f"{site.error}", *(("-",) * 4))


def _table(rows: list[tuple[str, ...]], problems: tuple[str, ...]) -> str:
    header = ("site", "alive", "expected", "errors", "MMCS", "ML2R", "MMCS, all c", "ML2R, all c")
    verdict = "the known solution" if not problems else "not the known solution:\n" + "\n".join(problems)
    return format_table(header, rows) + "\n" + verdict
