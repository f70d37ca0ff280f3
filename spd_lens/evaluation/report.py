"""What `evaluate` measured, as tables and in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from spd_lens.objective.divergences import Divergence
from spd_lens.support.tables import format_table

THRESHOLDS = (0.0, 0.01, 0.1, 0.5)


@dataclass(frozen=True)
class SiteReport:
    """One site: its C and rank bound, the relative faithfulness error and the smallest that C allows, mean L0 per
    position at each threshold, and how many subcomponents exceeded 0.1 anywhere in the data."""

    n_subcomponents: int
    rank_bound: int
    relative_faithfulness: float
    smallest_possible: float
    l0: dict[float, float]
    alive: int


@dataclass(frozen=True)
class EvaluationReport:
    """What `evaluate` measured; `str(report)` is the table.

    - `divergence[regime]`: KL (or MSE) from the clean output, mean per position; `cross_entropy[regime]` in nats per
      token, with `"target"` for the clean model (empty for models without tokens).
    - `adversarial[steps]`: the same divergence under a PGD adversary of that many sign steps of 0.1, one source for
      each whole batch.
    - `warnings`: failure modes that the numbers show (E6), in words.
    """

    sites: dict[str, SiteReport]
    divergence: dict[str, float]
    cross_entropy: dict[str, float]
    adversarial: dict[int, float]
    kind: Divergence
    positions: int
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def __str__(self) -> str:
        site_rows = [
            (
                name,
                str(s.n_subcomponents),
                str(s.rank_bound),
                str(s.alive),
                *(f"{s.l0[t]:.1f}" for t in THRESHOLDS),
                f"{s.relative_faithfulness:.2e}",
                f"{s.smallest_possible:.2e}",
            )
            for name, s in self.sites.items()
        ]
        header = ("site", "C", "rank", "alive", *(f"L0>{t:g}" for t in THRESHOLDS), "|W-VU|²/|W|²", "possible")
        regime_rows = []
        if "target" in self.cross_entropy:
            regime_rows.append(("target", "0", f"{self.cross_entropy['target']:.4f}"))
        regime_rows += [
            (name, f"{value:.4g}", f"{self.cross_entropy[name]:.4f}" if name in self.cross_entropy else "-")
            for name, value in self.divergence.items()
        ]
        regime_rows += [
            (f"PGD, {steps} steps of 0.1, one source a batch", f"{v:.4g}", "-") for steps, v in self.adversarial.items()
        ]
        parts = [
            format_table(header, site_rows),
            format_table(("masks", self.kind.upper() + " from the target", "CE"), regime_rows),
            f"means over {self.positions:,} positions",
        ]
        return "\n\n".join(parts) + "".join(f"\nNote: {warning}" for warning in self.warnings)


def failure_modes(sites: Mapping[str, SiteReport], values: Mapping[str, float]) -> list[str]:
    """Known ways in which a decomposition can be empty while some numbers look good (E6), in words."""
    found = []
    for name, site in sites.items():
        if site.relative_faithfulness > 0.05 and site.relative_faithfulness > 1.5 * site.smallest_possible:
            found.append(f"{name}: {site.relative_faithfulness:.0%} of the weight is unexplained; the delta carries it")
        if site.l0[0.1] == 0:
            found.append(f"{name}: no subcomponent is important anywhere; the minimality coefficient is too high")
        if site.l0[0.1] > 0.9 * site.rank_bound:
            found.append(
                f"{name}: about as many subcomponents are on at every position ({site.l0[0.1]:.0f}) as the matrix has "
                "rank; nothing is separated yet (minimality too low, or too few steps)"
            )
    if values["stochastic"] > 0.5 * values["all off"] and values["all off"] > 0:
        found.append(
            "under stochastic masks more than half of the effect of removing everything remains: too few steps, or "
            "importance below 1 on what is needed (minimality too high)"
        )
    return found
