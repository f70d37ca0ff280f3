"""Whether a circuit holds: what is left of a behaviour with the circuit alone, under any masks outside, and without it.

Masks inside a circuit are 1. Outside they are 0 (the circuit alone, "importance masks"), random, or chosen by an
adversary; the delta's mask is 0, random, or the adversary's. A set of subcomponents that works when everything else is
0 is **not** yet a circuit (E3): what was left out may cancel only because all of it is left out together. So the
verdict is read off the adversary, with its budget beside it (E1). That no adversary of this budget broke a circuit
does not show that none can.

Cost: one clean pass, `draws + 3` masked passes, and one forward and backward pass per restart and step of the largest
budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from spd_lens.circuits.behaviour import Behaviour, Measured, Metrics, Objective
from spd_lens.circuits.circuit import Circuit
from spd_lens.core.decomposition import Decomposition
from spd_lens.core.masks import SiteMask, sample_masks
from spd_lens.objective.adversary import PGD
from spd_lens.objective.mask_sources import AdversarialMasks
from spd_lens.support.given import given_instance, given_number, given_seed, given_whole, given_wholes
from spd_lens.support.pages import table_html
from spd_lens.support.tables import format_table
from spd_lens.tasks.task import Task

BUDGETS = (20, 40, 80, 160)


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


@torch.inference_mode(False)
def check_circuit(
    decomposition: Decomposition,
    circuit: Circuit,
    prompts: Task | Tensor,
    *,
    position_mask: Bool[Tensor, "row pos"] | None = None,
    objective: Objective = "kl",
    metrics: Metrics | None = None,
    budgets: Sequence[int] = BUDGETS,
    step_size: float = 0.1,
    restarts: int = 3,
    draws: int = 8,
    holds_above: float = HOLDS_ABOVE,
    seed: int = 0,
) -> CircuitReport:
    """Measure a circuit on prompts: alone, under random and adversarial masks outside of it, and knocked out.

    Arguments as in `find_circuit`; use prompts that the circuit was *not* found on. `metrics` are functions of the
    logits `[row pos d_vocab]` that are measured in every regime. Raises ValueError where the decomposed sites do not
    matter to these prompts at all, and for budgets below 1.
    """
    behaviour = Behaviour(decomposition, prompts, position_mask=position_mask, objective=objective, metrics=metrics)
    return report_on(
        behaviour,
        circuit,
        budgets=budgets,
        step_size=step_size,
        restarts=restarts,
        draws=draws,
        holds_above=holds_above,
        seed=seed,
    )


def report_on(
    behaviour: Behaviour,
    circuit: Circuit,
    *,
    budgets: Sequence[int],
    step_size: float,
    restarts: int,
    draws: int,
    holds_above: float,
    seed: int,
    how: Mapping[str, Any] | None = None,
) -> CircuitReport:
    """`check_circuit` for prompts that were prepared already."""
    given_instance("circuit", circuit, Circuit, "circuit_of(decomposition, ids), or find_circuit(...).circuit")
    budgets = check_budgets(budgets, restarts, draws)
    step_size = given_number("step_size", step_size, above=0)
    holds_above = given_number("holds_above", holds_above, above=0, most=1)
    seed = given_seed(seed)
    decomposition = behaviour.decomposition
    _check_positions(behaviour, circuit)
    generator = torch.Generator(decomposition.device).manual_seed(seed)
    g = behaviour.importances({site: k.to(decomposition[site].V.dtype) for site, k in circuit.kept.items()})
    with torch.no_grad():
        off = behaviour.forward(sample_masks(g, kind="off", generator=generator))
        kl_off = float(behaviour.kl(off))
        if not kl_off > 0:
            raise ValueError(
                "the KL with all decomposed sites off is NaN: parameters are not finite"
                if kl_off != kl_off
                else "switching all decomposed sites off changes nothing on these prompts: nothing to explain"
            )
        alone = behaviour.forward(sample_masks(g, kind="importance", generator=generator))
        random = [
            behaviour.measure(behaviour.forward(sample_masks(g, generator=generator)), kl_off) for _ in range(draws)
        ]
        without = behaviour.forward({site: SiteMask(1 - inside, None) for site, inside in g.items()})
    adversarial = _ladder(behaviour, g, budgets, step_size, restarts, kl_off, generator)
    return CircuitReport(
        circuit=circuit,
        n_nodes=circuit.n_nodes,
        n_subcomponents=circuit.n_subcomponents,
        n_parameters=circuit.n_parameters(decomposition),
        n_candidates=sum(k.numel() for k in circuit.kept.values()),
        objective=behaviour.objective,
        target=behaviour.measure(behaviour.logits, kl_off),
        off=behaviour.measure(off, kl_off),
        importance=behaviour.measure(alone, kl_off),
        stochastic=_mean(random),
        adversarial=adversarial,
        knocked_out=behaviour.measure(without, kl_off),
        step_size=step_size,
        restarts=restarts,
        draws=draws,
        holds_above=holds_above,
        how=dict(how or {}),
    )


def check_budgets(budgets: Sequence[int], restarts: int, draws: int) -> tuple[int, ...]:
    """The budgets; ValueError or TypeError unless all are at least 1 (no budget at all means no adversary)."""
    given_whole("restarts", restarts, least=1)
    given_whole("draws", draws, least=1)
    return given_wholes("budgets", budgets, least=1, of="numbers of steps, such as [20, 40]")


def _ladder(
    behaviour: Behaviour,
    g: Mapping[str, Tensor],
    budgets: Sequence[int],
    step_size: float,
    restarts: int,
    kl_off: float,
    generator: torch.Generator,
) -> dict[int, Measured]:
    """What is left at every budget, at the worst of the restarts."""
    worst: dict[int, tuple[float, Measured]] = {}
    for _ in range(restarts):
        adversary, done = AdversarialMasks(PGD(0, step_size, "batch")), 0
        on = behaviour.climb(g, generator)
        adversary.climb(on)
        reached = (-float("inf"), behaviour.measure(behaviour.logits, kl_off))
        for steps in sorted(set(budgets)):
            # One ascent, measured on its way: the first n steps of a longer ascent are an ascent of n steps.
            adversary.climb_on(on, steps - done)
            done = steps
            with torch.no_grad():
                output = behaviour.forward(adversary.masks(g, delta=True, generator=generator))
            distance = float(behaviour.distance(output))
            harm = distance if distance == distance else float("inf")  # NaN is the worst there is.
            if harm > reached[0]:
                reached = (harm, behaviour.measure(output, kl_off))
            if steps not in worst or reached[0] > worst[steps][0]:
                worst[steps] = reached
    return {steps: measured for steps, (_, measured) in worst.items()}


def _check_positions(behaviour: Behaviour, circuit: Circuit) -> None:
    if set(circuit.kept) != set(behaviour.decomposition):
        raise ValueError(
            "the circuit's sites are not those of this decomposition; make it with circuit_of or find_circuit"
        )
    for site, kept in circuit.kept.items():
        lead = behaviour.leads[site]
        count = behaviour.decomposition[site].n_subcomponents
        if kept.shape[1] != count or kept.shape[0] not in (1, *lead[1:2]):
            raise ValueError(
                f"the circuit has nodes {tuple(kept.shape)} at {site}, these prompts and this decomposition "
                f"{(*lead[1:2], count)}: a circuit with positions holds for prompts of one "
                "length, any for its own decomposition; make one with circuit_of or find_circuit"
            )


def _mean(measured: Sequence[Measured]) -> Measured:
    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None

    return Measured(
        kl=sum(m.kl for m in measured) / len(measured),
        recovered=sum(m.recovered for m in measured) / len(measured),
        logit_difference=mean([m.logit_difference for m in measured]),
        faithfulness=mean([m.faithfulness for m in measured]),
        accuracy=mean([m.accuracy for m in measured]),
        metrics={name: sum(m.metrics[name] for m in measured) / len(measured) for name in measured[0].metrics},
    )
