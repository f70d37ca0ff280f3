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
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from spd_lens.circuits.behaviour import Behaviour, Measured, Metrics, Objective
from spd_lens.circuits.circuit import Circuit
from spd_lens.circuits.circuit_report import HOLDS_ABOVE, CircuitReport
from spd_lens.core.decomposition import Decomposition
from spd_lens.core.masks import SiteMask, sample_masks
from spd_lens.objective.adversary import PGD
from spd_lens.objective.mask_sources import AdversarialMasks
from spd_lens.support.given import given_instance, given_number, given_seed, given_whole, given_wholes
from spd_lens.tasks.task import Task

BUDGETS = (20, 40, 80, 160)


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
