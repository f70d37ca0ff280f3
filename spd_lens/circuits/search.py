"""`find_circuit`: the subcomponents that one behaviour needs, found against an adversary (C3, E1, E3).

Every node (a subcomponent, or a subcomponent at one position) gets an importance of its own, free of the gates, and

    loss = mean over mask sources of D(target, masked) / S  +  minimality * sum over nodes g_upper^p

is minimised on fixed prompts, `S` being D with everything off. So `minimality` is the share of the behaviour that a
node has to be worth. Nodes whose importance stays above 0 are then pruned: first all below the smallest number that
still holds, by importance, then one chunk after another. What is left is a set: its nodes are on, entirely.

The mask source decides what was found. With `"importance"` alone, everything outside is 0, and the set found may rely
on that: such a set is reported as no circuit (E3). With `"pgd"` or `"persistent"`, the outside and the delta are
chosen by an adversary all along.

Cost: per step one forward and backward pass for every mask source, and as many more as the adversary climbs; pruning
some 10 to 100 times an adversary's ascent. Edges: `attribution_graph(..., circuit=report.circuit)`. Left out:
importances that follow the prompt (that is what gates are for).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spd_lens.circuits.behaviour import Behaviour, Metrics
from spd_lens.circuits.check import report_on
from spd_lens.circuits.circuit import Circuit
from spd_lens.circuits.circuit_report import CircuitReport
from spd_lens.circuits.config import CircuitConfig
from spd_lens.core.decomposition import Decomposition
from spd_lens.core.masks import sample_masks
from spd_lens.core.squashings import importance_of, lower_squash, upper_squash
from spd_lens.objective.adversary import PGD, Persistent
from spd_lens.objective.losses import minimality_loss
from spd_lens.objective.mask_sources import AdversarialMasks, MaskSource, mask_source
from spd_lens.objective.penalties import Power
from spd_lens.support.given import given_instance
from spd_lens.support.progress import tqdm
from spd_lens.tasks.task import Task

# Where nodes that the gates hold for unimportant start: gradients of the minimality loss end at 0.
_BELOW = -0.01


@torch.inference_mode(False)
def find_circuit(
    decomposition: Decomposition,
    prompts: Task | Tensor,
    config: CircuitConfig | None = None,
    *,
    position_mask: Bool[Tensor, "row pos"] | None = None,
    metrics: Metrics | None = None,
    **changes: Any,
) -> CircuitReport:
    """The nodes that keep the target's behaviour on `prompts` (see the module), with the measured ways it holds.

    - `prompts`: a `Task` (its clean prompts, at the position of the answer) or tokens `[row pos]`, there the positions
      of `position_mask` (None: all). One prompt: tokens `[1 pos]`.
    - `config`: how (see `CircuitConfig`; None: its defaults), and fields of it to change: `steps=100, masks="pgd"`.
    - `metrics`: as in `check_circuit`.

    The report is measured on the same prompts, to which a search that prunes to the limit fits itself: run
    `check_circuit` on others before anything is claimed. The model and the decomposition are left as they were.

    Raises ValueError for choices that make no sense, prompts that do not fit the model, and where switching all
    decomposed sites off costs nothing; TypeError for unknown choices.

    >>> from spd_lens import decompose
    >>> from spd_lens.models import load_tiny_lm
    >>> model = load_tiny_lm()
    >>> decomposition = decompose(model, {"blocks.0.mlp.W_in": 8})
    >>> tokens = model.to_tokens("Call me Ishmael")
    >>> report = find_circuit(decomposition, tokens, masks="stochastic", steps=5, budgets=(5,))
    >>> report.n_nodes <= 8
    True
    """
    config = CircuitConfig() if config is None else config
    given_instance("config", config, CircuitConfig, "CircuitConfig(steps=100), or steps=100 alone")
    config = config.changed(**changes)
    behaviour = Behaviour(
        decomposition, prompts, position_mask=position_mask, objective=config.objective, metrics=metrics
    )
    search = _Search(behaviour, config, torch.Generator(decomposition.device).manual_seed(config.seed))
    pre = search.starting_point()
    search.optimise(pre)
    circuit, distances = search.prune({name: x.detach() for name, x in pre.items()})
    return report_on(
        behaviour,
        circuit,
        budgets=config.budgets,
        step_size=0.1,
        restarts=config.restarts,
        draws=8,
        holds_above=config.holds_above,
        seed=config.seed + 1,
        how={**dataclasses.asdict(config), **distances},  # pyright: ignore[reportArgumentType]
    )


class _Search:
    """The two halves of the search, which share prompts, mask sources and scale."""

    def __init__(self, behaviour: Behaviour, config: CircuitConfig, generator: torch.Generator) -> None:
        self.behaviour, self.config, self.generator = behaviour, config, generator
        # A persistent adversary starts from what hurts first; later it follows by one ascent a step.
        budgets = {"pgd": config.pgd, "persistent": Persistent(warm_steps=0, first_steps=config.pgd.steps)}
        self.sources = [mask_source(budgets.get(name, name)) for name in config.masks]
        with torch.no_grad():
            zeros = {s: torch.zeros(1, w.n_subcomponents, device=w.V.device) for s, w in self.weights.items()}
            g = behaviour.importances(zeros)
            off = float(behaviour.distance(behaviour.forward(sample_masks(g, kind="off", generator=generator))))
            self.floor = float(behaviour.distance(behaviour.logits))
        self.scale = off - self.floor
        if not self.scale > 0:
            raise ValueError(
                f"switching all decomposed sites off changes the distance from {self.floor:.4g} to {off:.4g} on these "
                "prompts: the decomposed sites do nothing for this behaviour, so there is no circuit to find"
            )

    @property
    def weights(self) -> Decomposition:
        return self.behaviour.decomposition

    def starting_point(self) -> dict[str, Tensor]:
        """Pre-activations `p [pos C]` (or `[1 C]`), to be optimised."""
        behaviour, by_position = self.behaviour, self.config.by_position
        if by_position and any(len(lead) < 2 for lead in behaviour.leads.values()):
            raise ValueError("by_position=True, but this model's inputs have no positions")
        with torch.no_grad():
            predicted = self.weights.pre_importances(behaviour.inputs) if self.config.start == "gates" else None
        found = {}
        for name, weight in self.weights.items():
            lead = behaviour.leads[name]
            n_positions = lead[1] if by_position else 1
            if predicted is None:
                value = weight.V.new_ones(n_positions, weight.n_subcomponents)
            else:
                g = importance_of(predicted[name])
                kept = tuple({1} if by_position else ())
                value = g.amax(dim=tuple(d for d in range(g.ndim - 1) if d not in kept)).reshape(n_positions, -1)
                value = torch.where(value > 0, value, _BELOW).to(weight.V.dtype)
            found[name] = value.detach().clone().requires_grad_(True)
        return found

    def optimise(self, pre: Mapping[str, Tensor]) -> None:
        """Descend the loss of the module docstring on `pre`, in place."""
        config, lr, rows_per_step = self.config, self.config.lr, self.config.rows_per_step
        optimizer = torch.optim.Adam(pre.values(), lr=lr)
        n_rows = len(self.behaviour.tokens)
        with torch.enable_grad():
            for step in tqdm(range(config.steps), desc="circuit", leave=False, delay=2):
                optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / config.steps))
                rows = None
                if rows_per_step is not None and rows_per_step < n_rows:
                    rows = torch.randperm(n_rows, generator=self.generator, device=self.generator.device)
                    rows = rows[:rows_per_step].to(self.behaviour.tokens.device)
                g = self.behaviour.importances({name: lower_squash(x) for name, x in pre.items()}, rows)
                upper = {name: upper_squash(x).reshape(1, -1) for name, x in pre.items()}
                distance = torch.stack(
                    [self.distance(source, g, self.generator, rows) for source in self.sources]
                ).mean()
                penalty = minimality_loss(upper, penalty=Power(config.p))
                loss = (distance - self.floor) / self.scale + config.minimality * penalty
                optimizer.zero_grad(set_to_none=True)
                leaves = [leaf for source in self.sources for leaf in source.leaves()]
                loss.backward(inputs=[*pre.values(), *leaves])
                optimizer.step()
                for source in self.sources:
                    source.after_backward()

    def distance(
        self, source: MaskSource, g: Mapping[str, Tensor], generator: torch.Generator, rows: Tensor | None = None
    ) -> Float[Tensor, ""]:
        """D under one mask source, differentiable in `g`."""
        behaviour = self.behaviour
        if source.climbs:
            source.climb(behaviour.climb(g, generator, rows))
        return behaviour.distance(behaviour.forward(source.masks(g, delta=True, generator=generator), rows), rows)

    # -- pruning -----------------------------------------------------------------------------------------------------

    def prune(self, pre: Mapping[str, Tensor]) -> tuple[Circuit, dict[str, float | int]]:
        """The smallest set that pruning found, and the distances on the way (shares of the behaviour lost)."""
        sizes = [x.numel() for x in pre.values()]
        importance = torch.cat([x.flatten() for x in pre.values()])
        order = [i for i in importance.argsort(descending=True, stable=True).tolist() if importance[i] > 0]

        def nodes(chosen: Sequence[int]) -> dict[str, Tensor]:
            flat = torch.zeros_like(importance)
            flat[list(chosen)] = 1
            parts = flat.split(sizes)
            return {name: part.view(x.shape) for (name, x), part in zip(pre.items(), parts, strict=True)}

        def lost(chosen: Sequence[int]) -> float:
            return self._lost(nodes(chosen))

        before = lost(order)
        limit = before + self.config.tolerance
        low, high = 0, len(order)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if lost(order[:middle]) <= limit else (middle + 1, high)
        kept = _drop_chunks(order[:high], lost, limit, self.config.prune_tries)
        chosen = nodes(kept)
        circuit = Circuit(
            {name: x > 0 for name, x in chosen.items()},
            {name: importance_of(x) * (chosen[name] > 0) for name, x in pre.items()},
        )
        steps = {"n_candidates_above_0": len(order), "n_by_importance": high}
        return circuit, {**steps, "lost_before_pruning": before, "lost_after_pruning": lost(kept)}

    def _lost(self, nodes: Mapping[str, Tensor]) -> float:
        """The mean distance under all mask sources, as a share of the behaviour; the same draws every time.

        An adversary has two and a half times the search's steps, and two starts.
        """
        total, g = 0.0, self.behaviour.importances(nodes)
        for source in self.config.masks:
            generator = torch.Generator(self.generator.device).manual_seed(0)
            if source in ("importance", "stochastic"):
                tries = [mask_source(source)]
            else:
                pgd = PGD(math.ceil(2.5 * self.config.pgd.steps), self.config.pgd.step_size, "batch")
                tries = [AdversarialMasks(pgd) for _ in range(2)]
            with torch.no_grad():
                total += max(float(self.distance(one, g, generator)) for one in tries)
        return (total / len(self.config.masks) - self.floor) / self.scale


def _drop_chunks(kept: Sequence[int], lost: Any, limit: float, tries: int) -> list[int]:
    """Leave out chunks, the least important first, halving a chunk that is needed, until `tries` are used up."""
    kept = list(kept)
    end, chunk = len(kept), max(2, len(kept) // 4)
    while end > 0 and tries > 0:
        chunk = min(chunk, end)
        rest = kept[: end - chunk] + kept[end:]
        tries -= 1
        if lost(rest) <= limit:
            kept, end, chunk = rest, end - chunk, 2 * chunk
        elif chunk > 1:
            chunk //= 2
        else:
            end -= 1
    return kept
