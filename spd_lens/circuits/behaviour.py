"""The behaviour that a circuit is to keep: the target's answers to some prompts, and how far a masked model is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.inputs import as_mask
from spd_lens.core.masks import SiteMask
from spd_lens.objective.divergences import divergence, log_probs
from spd_lens.objective.mask_sources import Climb, Masks
from spd_lens.patching.arguments import checked_input
from spd_lens.support.given import given_function, shown
from spd_lens.tasks.task import Task

Objective: TypeAlias = Literal["kl", "answer"]


Metrics: TypeAlias = Mapping[str, Callable[[Tensor], Any]]


Nodes: TypeAlias = Mapping[str, Float[Tensor, "_pos _C"]]


@dataclass(frozen=True)
class Measured:
    """One regime's numbers.

    - `kl`: mean KL from the target at the positions that count; `recovered` `= 1 - kl / kl with everything off`.
    - for tasks: mean `logit_difference`; `faithfulness` `= (m - m_corrupted) / (m_clean - m_corrupted)` of it;
      `accuracy`, the share of rows with the right answer before the wrong one.
    - `metrics`: what the user's functions of the logits gave.
    """

    kl: float
    recovered: float
    logit_difference: float | None = None
    faithfulness: float | None = None
    accuracy: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


class Behaviour:
    """What a circuit is to keep: the target's answers to some prompts, and the distance from them.

    - `prompts`: a `Task` (its clean prompts; only the position that predicts the answer counts), or tokens
      `[row pos]` of which the positions in `position_mask` count (None: all).
    - `objective`: `"kl"`, mean KL(target || masked) over the positions that count; `"answer"` (tasks only),
      mean over rows of `-log sum of p(answers)`.

    The residual streams of the clean pass are kept, so that masked passes start at the first decomposed block.
    """

    def __init__(
        self,
        decomposition: Decomposition,
        prompts: Task | Tensor,
        *,
        position_mask: Bool[Tensor, "row pos"] | None = None,
        objective: Objective = "kl",
        metrics: Metrics | None = None,
    ) -> None:
        if objective not in ("kl", "answer"):
            raise ValueError(f"objective={objective!r}; expected 'kl' or 'answer'")
        if metrics is not None and not isinstance(metrics, Mapping):
            raise TypeError(f"metrics={shown(metrics)}; expected {{name: function of the logits}}")
        for name, metric in (metrics or {}).items():
            given_function(f"the metric {name!r}", metric, "of the logits that returns one number")
        self.decomposition, self.metrics = decomposition, dict(metrics or {})
        self.objective: Objective = objective
        self.task = prompts.to(decomposition.device) if isinstance(prompts, Task) else None
        if self.task is not None:
            if position_mask is not None:
                raise ValueError("position_mask is given with a task, which says itself which position counts")
            self.tokens = checked_input(decomposition, self.task.clean, "the task's clean prompts")
            checked_input(decomposition, self.task.corrupted, "the task's corrupted prompts")
            position_mask = torch.zeros_like(self.tokens, dtype=torch.bool)
            position_mask[torch.arange(len(self.tokens)), self.task.at] = True
        elif objective == "answer":
            raise ValueError("objective='answer' needs a task (spd_lens.tasks), which knows the answers; use 'kl'")
        else:
            self.tokens = checked_input(decomposition, prompts, "prompts (a Task, or tokens [row pos])")
        clean = decomposition.clean_pass(self.tokens)
        self.logits, self.log_probs, self.residuals = clean.output, log_probs(clean.output), clean.residuals
        self.inputs = clean.inputs
        self.leads = {
            name: x.shape if decomposition[name].site.is_lookup else x.shape[:-1] for name, x in clean.inputs.items()
        }
        self.position_mask = None if position_mask is None else self._checked_mask(position_mask)
        self.corrupted_difference: float | None = None
        if self.task is not None:
            with torch.no_grad():
                corrupted = decomposition.host.forward(self.task.corrupted)
            self.corrupted_difference = float(self.task.logit_difference(corrupted).mean())
            clean_difference = float(self.task.logit_difference(self.logits).mean())
            if objective == "answer" and not clean_difference > self.corrupted_difference:
                raise ValueError(
                    f"objective='answer', but the mean logit difference on {self.task.name!r} is "
                    f"{clean_difference:.4g} on clean prompts and {self.corrupted_difference:.4g} on corrupted ones: "
                    "this model does not do the task, so no share of it is kept; use objective='kl', or another task"
                )

    def _checked_mask(self, position_mask: Tensor) -> Tensor:
        shape = self.logits.shape[:-1]
        position_mask = as_mask(position_mask, shape, "position_mask")
        if not bool(position_mask.any()):
            raise ValueError("position_mask is False everywhere; expected at least one position that counts")
        return position_mask.to(self.decomposition.device)

    def importances(self, nodes: Nodes, rows: Tensor | None = None) -> dict[str, Tensor]:
        """Importances `[row pos C]` of every site from those of nodes, `[pos C]` (or `[1 C]` for all positions)."""
        found = {}
        for name, g in nodes.items():
            lead = self.leads[name]
            if len(lead) > 1:
                g = g.reshape(1, g.shape[0], *([1] * (len(lead) - 2)), g.shape[1])
            if rows is not None and lead[0] == len(self.tokens):
                lead = (len(rows), *lead[1:])
            found[name] = g.expand(*lead, g.shape[-1])
        return found

    def forward(self, masks: Mapping[str, SiteMask], rows: Tensor | None = None) -> Tensor:
        """The model's output under masks, on some rows or all."""
        tokens, residuals = self.tokens, self.residuals
        if rows is not None:
            tokens, residuals = tokens[rows], {layer: r[rows] for layer, r in residuals.items()}
        return self.decomposition.masked_forward(tokens, masks, residuals=residuals)

    def distance(self, output: Tensor, rows: Tensor | None = None) -> Float[Tensor, ""]:
        """The objective, in nats: lower is nearer to the target's behaviour."""
        if self.objective == "kl":
            return self.kl(output, rows)
        assert self.task is not None
        return -answer_log_prob(self.task if rows is None else self.task[rows], output).mean()

    def kl(self, output: Tensor, rows: Tensor | None = None) -> Float[Tensor, ""]:
        """Mean KL(target || masked) over the positions that count."""
        clean, where = self.log_probs, self.position_mask
        if rows is not None:
            clean, where = clean[rows], None if where is None else where[rows]
        if where is not None:
            clean, output = clean[where], output[where]
        return divergence(clean, output, clean_is_log_probs=True)

    def climb(self, importances: Mapping[str, Tensor], generator: torch.Generator, rows: Tensor | None = None) -> Climb:
        """What an adversary climbs on: the distance, by the masks, at fixed importances."""

        def objective(masks: Masks, _: int | None) -> Tensor:
            return self.distance(self.forward(masks, rows), rows)

        return Climb(objective, {name: g.detach() for name, g in importances.items()}, generator)

    @torch.no_grad()
    def measure(self, output: Tensor, kl_off: float) -> Measured:
        """All numbers of one output."""
        kl = float(self.kl(output))
        difference = accuracy = faithfulness = None
        if self.task is not None:
            assert self.corrupted_difference is not None
            difference = float(self.task.logit_difference(output).mean())
            accuracy = float(self.task.correct(output).float().mean())
            clean = float(self.task.logit_difference(self.logits).mean())
            span = clean - self.corrupted_difference
            faithfulness = (difference - self.corrupted_difference) / span if span != 0 else float("nan")
        extra = {name: float(metric(output)) for name, metric in self.metrics.items()}
        return Measured(kl, 1 - kl / kl_off, difference, faithfulness, accuracy, extra)


def answer_log_prob(task: Task, output: Float[Tensor, "row pos d_vocab"]) -> Float[Tensor, " row"]:
    """`log sum over answers of p(answer)` where each row's answer is predicted."""
    logits = output[torch.arange(len(task), device=output.device), task.at.to(output.device)]
    log_p = log_probs(logits)
    ids = task.answers.to(output.device)
    return log_p.gather(1, ids.clamp_min(0)).masked_fill(ids < 0, -torch.inf).logsumexp(-1)
