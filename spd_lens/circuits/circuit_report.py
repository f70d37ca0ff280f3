"""`CircuitReport`: how a circuit held under every regime of masks, and what may be claimed of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from spd_lens.circuits.behaviour import Measured, Objective
from spd_lens.circuits.circuit import Circuit
from spd_lens.support.pages import table_html
from spd_lens.support.tables import format_table

# Share of the behaviour that has to be left for a circuit to count as holding.
HOLDS_ABOVE = 0.8


@dataclass(frozen=True, repr=False)
class CircuitReport:
    """A circuit and how it held. `str(report)` is a table that ends with the verdict.

    - `target`, `off`: the model itself, and with every subcomponent and delta of all decomposed sites at 0.
    - `importance`: the circuit alone: masks 1 inside, 0 outside, delta 0. For monitoring only (E3).
    - `stochastic`: outside and delta U(0, 1), fresh at every position; mean over `draws` draws.
    - `adversarial[steps]`: outside and delta chosen by a PGD ascent of so many sign steps of `step_size`, one source
      for all rows and positions (E1); the worst of `restarts` random starts, each measured at every budget up to this
      one, so that a larger budget is never farther from harm (E1b).
    - `knocked_out`: the circuit's masks 0, all else the target's (completeness: little should be left).
    - `how`: the settings with which it was found.
    """

    circuit: Circuit
    n_nodes: int
    n_subcomponents: int
    n_parameters: int
    n_candidates: int
    objective: Objective
    target: Measured
    off: Measured
    importance: Measured
    stochastic: Measured
    adversarial: Mapping[int, Measured]
    knocked_out: Measured
    step_size: float
    restarts: int
    draws: int
    holds_above: float = HOLDS_ABOVE
    how: Mapping[str, Any] = field(default_factory=dict)

    def kept(self, measured: Measured) -> float:
        """The share of the behaviour that is left: `recovered` for KL, `faithfulness` for answers."""
        if self.objective == "kl":
            return measured.recovered
        assert measured.faithfulness is not None
        return measured.faithfulness

    @property
    def is_circuit(self) -> bool:
        """Whether it holds alone, with random masks outside, and against every adversary tried (at least one)."""
        tried = [self.importance, self.stochastic, *self.adversarial.values()]
        return bool(self.adversarial) and all(self._holds(measured) for measured in tried)

    @property
    def holds_up_to(self) -> int | None:
        """The largest budget (steps) up to which it holds at every smaller one too; None: at none."""
        last = None
        for steps, measured in sorted(self.adversarial.items()):
            if not self._holds(measured):
                break
            last = steps
        return last

    def _holds(self, measured: Measured) -> bool:
        return self.kept(measured) >= self.holds_above

    @property
    def verdict(self) -> str:
        """In words, what may be claimed."""
        what = "KL recovered" if self.objective == "kl" else "logit difference recovered"
        line = f"{what} at least {self.holds_above:g}"
        alone, random = self.kept(self.importance), self.kept(self.stochastic)
        worst = {steps: self.kept(m) for steps, m in sorted(self.adversarial.items())}
        listed = ", ".join(f"{value:.3g} at {steps} steps" for steps, value in worst.items()) or "not measured"
        if not self._holds(self.importance):
            text = f"does not hold: alone it keeps {alone:.3g} of the behaviour"
        elif not self._holds(self.stochastic):
            text = (
                f"NOT A CIRCUIT: it holds only under importance masks ({alone:.3g}); with random masks outside it "
                f"keeps {random:.3g}, under the adversary {listed}"
            )
        elif not worst:
            text = f"holds with everything else off ({alone:.3g}) and random ({random:.3g}); no adversary was tried"
        elif self.holds_up_to is None:
            text = (
                f"NOT A CIRCUIT: it holds under importance masks ({alone:.3g}) and random ones ({random:.3g}), and an "
                f"adversary breaks it: {listed}"
            )
        elif not self.is_circuit:
            text = (
                f"holds against an adversary of {self.holds_up_to} steps of {self.step_size:g}, not of more: {listed}"
            )
        else:
            text = (
                f"holds against every adversary tried: {listed} of {self.step_size:g} (the worst of {self.restarts} "
                "ascents, one source for all rows and positions)"
            )
        return f"{text} (holds means: {line})"

    def to_json(self) -> dict[str, Any]:
        """Plain values; `nodes` are `[site, id, position]`, the position null for a node at all of them."""
        skip = ("circuit", "adversarial")
        values = {k: v for k, v in vars(self).items() if k not in skip}
        plain = {k: asdict(v) if isinstance(v, Measured) else v for k, v in values.items()}
        ladder = {str(steps): asdict(m) for steps, m in self.adversarial.items()}
        nodes = [[unit.site, unit.id, unit.position] for unit in self.circuit.units]
        ends = {"ids": self.circuit.ids, "nodes": nodes, "verdict": self.verdict}
        return plain | {"adversarial": ladder, **ends}

    def _table(self) -> tuple[str, list[str], list[list[str]]]:
        """Title, header and rows, one for every regime."""
        regimes = {
            "target": self.target,
            "circuit alone (importance masks)": self.importance,
            "random outside": self.stochastic,
        }
        regimes |= {f"PGD outside, {steps} steps of {self.step_size:g}": m for steps, m in self.adversarial.items()}
        regimes |= {"circuit knocked out": self.knocked_out, "everything off": self.off}
        header = ["masks", "KL", "KL recovered"]
        with_task = self.target.logit_difference is not None
        header += ["logit diff", "recovered", "accuracy"] if with_task else []
        header += list(self.target.metrics)
        rows = []
        for name, m in regimes.items():
            row = [name, f"{m.kl:.4g}", f"{m.recovered:.3f}"]
            if with_task:
                row += [f"{m.logit_difference:.3f}", f"{m.faithfulness:.3f}", f"{m.accuracy:.3f}"]
            rows.append([*row, *(f"{value:.3f}" for value in m.metrics.values())])
        size = f"{self.n_nodes:,} nodes of {self.n_candidates:,}"
        size += f" ({self.n_subcomponents:,} subcomponents)" if self.circuit.by_position else ""
        title = f"circuit: {size}, {self.n_parameters:,} parameters"
        return title, header, rows

    def __str__(self) -> str:
        title, header, rows = self._table()
        return f"{title}\n{format_table(header, rows)}\nVerdict: {self.verdict}"

    def __repr__(self) -> str:
        return f"CircuitReport({self.n_nodes:,} nodes of {self.n_candidates:,}; {self.verdict})"

    def _repr_html_(self) -> str:
        return table_html(*self._table(), notes=[f"Verdict: {self.verdict}"])
