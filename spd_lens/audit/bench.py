"""The bench that an audit is measured on: one input, its decision, control cases, and candidates for reasons.

`Bench` does every experiment of an audit; `explain` makes a report of them, `judge_places` scores what others claim.
Candidates are the places of the input, or components (see `candidates`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens.audit.adversary import Budget, worst_claims
from spd_lens.audit.candidates import (
    Candidate,
    barred,
    candidates,
    equal_use,
    mean_values,
    named_units,
    use_rates,
    used_cells,
)
from spd_lens.audit.cases import Cases
from spd_lens.audit.decision import the_decision
from spd_lens.audit.judged import Change, Judged
from spd_lens.audit.trials import Trial, Trials, record
from spd_lens.core.decomposition import Decomposition
from spd_lens.core.inputs import checked_decomposition, checked_tokens

# An audit never gives more reasons for a decision, or against it.
N_REASONS = 4
# A report may ask for no more.
MOST_CONTROLS, MOST_DRAWS = 1_024, 4_096
COVERAGE_OF_CONTROLS = 0.95
# Seeds of audits are below this; the second draw of everything random has `seed + N_SEEDS`, which no first one has.
N_SEEDS = 1 << 32
# Cases that tell how often a subcomponent is used at a place.
N_FOR_RATES = 256


@dataclass(frozen=True)
class Choices:
    """How much is measured. What moves less than the share `smallest_effect` of the margin is never a reason."""

    n_reasons: int = N_REASONS
    n_controls: int = 16
    n_draws: int = 64
    smallest_effect: float = 0.02
    budget: Budget = field(default_factory=Budget)

    def __post_init__(self) -> None:
        if not 1 <= self.n_reasons <= N_REASONS:
            raise ValueError(
                f"n_reasons={self.n_reasons}; expected 1 to {N_REASONS}: more are not likely to be helpful"
            )
        if not (2 <= self.n_controls <= MOST_CONTROLS and 8 <= self.n_draws <= MOST_DRAWS):
            raise ValueError(
                f"n_controls={self.n_controls}, n_draws={self.n_draws}; expected 2 to {MOST_CONTROLS:,} and 8 to "
                f"{MOST_DRAWS:,}"
            )
        if not 0 <= self.smallest_effect <= 1:
            raise ValueError(f"smallest_effect={self.smallest_effect}; expected a share of the margin, 0 to 1")


@torch.no_grad()
def judge_places(
    decomposition: Decomposition,
    inputs: Any,
    decision: Any,
    *,
    cases: Any,
    position: int | None = None,
    reasons_at: Sequence[int] | None = None,
    choices: Choices | None = None,
    seed: int = 0,
) -> dict[int, Judged]:
    """Every place of an input, judged by the interventions of an audit: for claims that other methods make.

    Arguments and errors as in `explain`; places that have no subcomponents which depend on the case are not in it.
    """
    bench = Bench(decomposition, inputs, decision, cases, position, reasons_at, choices or Choices(), seed)
    return {judged.position: judged for judged in bench.all_judged()}


class Bench:
    """One input and everything that is done to it. Made and used without gradients."""

    def __init__(
        self,
        decomposition: Decomposition,
        inputs: Any,
        decision: Any,
        cases: Any,
        position: int | None,
        reasons_at: Sequence[int] | None,
        choices: Choices,
        seed: int,
        components: Any = None,
    ) -> None:
        self.decomposition = checked_decomposition(decomposition, "explain")
        if not isinstance(cases, Cases):
            raise TypeError(f"cases is a {type(cases).__name__}; expected spd_lens.audit.Cases")
        self.cases, self.choices = cases, choices
        self.tokens = _one_input(inputs, decomposition)
        self._check_fit()
        self.units = named_units(decomposition, components, self.tokens.shape[1])
        self.own = record(decomposition, self.tokens)
        names = cases.outputs if cases.outputs is not None else self._output_names()
        self.decision = the_decision(decision, self.own.logits, names, position)
        self.trials = Trials(decomposition, self.tokens, self.decision)
        self.generator = torch.Generator().manual_seed(seed)
        self.ids: list[int] = self.tokens[0].tolist()
        self.margin = float(self.trials.margins([Trial()])[0])
        self.case_margins = self._case_margins()
        self.control_cases = self._choose_controls()
        self.controls = record(decomposition, cases.tokens[self.control_cases])
        self.means = mean_values(self.controls)
        self.rates = use_rates(record(decomposition, cases.tokens[_evenly(len(cases.tokens), N_FOR_RATES)]))
        self.start = float(self.case_margins[self.control_cases].mean())
        self.reasons_at = self._places(reasons_at)
        self.found = candidates(self.own, self.controls, self.decision.position, self.reasons_at, self.units)

    # -- what is given ----------------------------------------------------------------------------------------------

    def _check_fit(self) -> None:
        n_pos, expected = self.tokens.shape[1], self.cases.tokens.shape[1]
        if n_pos != expected:
            raise ValueError(f"the input has {n_pos} tokens and the cases have {expected}; expected equal lengths")
        checked_tokens(self.cases.tokens, self.decomposition.host, name="cases.tokens")
        size = self.decomposition.host.vocabulary_size()
        if size is not None and len(self.cases.vocabulary) < size:
            raise ValueError(f"the vocabulary has {len(self.cases.vocabulary)} texts; the model has {size} tokens")

    def _output_names(self) -> Sequence[str] | None:
        fits = len(self.cases.vocabulary) >= self.own.logits.shape[-1]
        return [str(text) for text in self.cases.vocabulary] if fits else None

    def _places(self, given: Sequence[int] | None) -> list[int]:
        n_pos = self.tokens.shape[1]
        if given is None:
            return list(range(n_pos if self.cases.places is None else len(self.cases.places)))
        odd = [p for p in given if not 0 <= p < n_pos]
        if odd or len(set(given)) < len(given):
            raise ValueError(f"reasons_at={list(given)[:20]}; expected different positions, 0..{n_pos - 1}")
        return [int(p) for p in given]

    def _case_margins(self) -> Float[Tensor, " n"]:
        rows = self.cases.tokens.split(256)
        host, device = self.decomposition.host, self.decomposition.device
        return torch.cat([self.decision.margin(host.forward(part.to(device))).double().cpu() for part in rows])

    def _choose_controls(self) -> list[int]:
        """Cases that the model decides the other way, drawn at random; where there are too few, any others."""
        n, same = self.choices.n_controls, (self.cases.tokens == self.tokens.cpu()).all(1)
        other_way = ((self.case_margins < 0) & ~same).nonzero().squeeze(1)
        if len(other_way) < n:
            other_way = (~same).nonzero().squeeze(1)
        if len(other_way) < 2:
            raise ValueError("the cases hold fewer than two inputs other than this one; give more to compare with")
        order = torch.randperm(len(other_way), generator=self.generator)[:n]
        return sorted(other_way[order].tolist())

    # -- what is measured -------------------------------------------------------------------------------------------

    def effects(self) -> Float[Tensor, "candidate control"]:
        """What replacing each candidate by each control case takes from the margin."""
        trials = [
            Trial(replaced=used_cells(c, self.controls, k), values=self.controls.row(k))
            for c in self.found
            for k in range(len(self.control_cases))
        ]
        return self.margin - self.trials.margins(trials).view(len(self.found), len(self.control_cases))

    def all_judged(self) -> list[Judged]:
        """Every candidate, those of the largest effects first."""
        effects = self.effects()
        return self.judged(effects.mean(1).abs().argsort(descending=True, stable=True).tolist(), effects)

    def judged(self, chosen: Sequence[int], effects: Tensor) -> list[Judged]:
        """The chosen candidates, in their order."""
        means = [float(effects[i].mean()) for i in chosen]
        claims = [(self.found[i].cells, e) for i, e in zip(chosen, means, strict=True)]
        *worst, self.worst_margin = worst_claims(
            self.trials, self.own.importances, claims, self.means, self.choices.budget, self.generator
        )
        found: list[Judged] = []
        given: list[Candidate] = []
        asked = [self.found[i] for i in chosen]
        changes = self.changes(asked)
        for i, candidate, mean, least, change in zip(chosen, asked, means, worst, changes, strict=True):
            controls = self._controls(candidate, given)
            singles = tuple(effects[i].tolist())
            place = _place_of(candidate, change)
            one = Judged(place, mean, singles, controls, least, change, candidate.component)
            found.append(one)
            if one.why_not is None:
                given.append(candidate)
        return found

    def _controls(self, candidate: Candidate, given: Sequence[Candidate]) -> tuple[float, float] | None:
        """What as many random cells of equal use do, replaced by their means over the control cases.

        Those of reasons found already are left out, else the strongest would hide all others.
        """
        used = [used_cells(candidate, self.controls, k) for k in range(len(self.control_cases))]
        own = barred([candidate, *given])
        drawn = equal_use(own, used, self.rates, self.choices.n_draws, self.generator)
        if drawn is None:
            return None
        effects = self.margin - self.trials.margins([Trial(replaced=cells, values=self.means) for cells in drawn])
        outside = (1 - COVERAGE_OF_CONTROLS) / 2
        low, high = effects.quantile(torch.tensor([outside, 1 - outside], dtype=effects.dtype)).tolist()
        return low, high

    def changes(self, asked: Sequence[Candidate]) -> list[Change | None]:
        """A place's token becomes the one that most control cases have there; None where all have this one.

        For a component this is tried at every place of `reasons_at`, and the change that it predicts most of counts.
        """
        found: list[Change | None] = [None] * len(asked)
        for p in self.reasons_at:
            rows = [i for i, candidate in enumerate(asked) if candidate.position in (None, p)]
            token = self._usual_token(p)
            if not rows or token is None:
                continue
            changed = self.tokens.clone()
            changed[0, p] = token
            after = record(self.decomposition, changed)
            measured = self.margin - float(self.decision.margin(after.logits).double())
            trials = [Trial(replaced=asked[i].cells, values=after.row(0)) for i in rows]
            for i, margin in zip(rows, self.trials.margins(trials).tolist(), strict=True):
                change, before = Change(p, token, self.margin - margin, measured), found[i]
                if before is None or abs(change.predicted) > abs(before.predicted):
                    found[i] = change
        return found

    def _usual_token(self, p: int) -> int | None:
        there = self.cases.tokens[self.control_cases, p]
        others, counts = there[there != self.ids[p]].unique(return_counts=True)
        return int(others[counts.argmax()]) if len(others) else None


def checked_seed(seed: Any) -> None:
    """Raise ValueError for what is no seed of an audit."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < N_SEEDS:
        raise ValueError(f"seed={seed!r}; expected a whole number from 0 to {N_SEEDS - 1:,}")


def _evenly(n: int, most: int) -> Tensor:
    """At most `most` of `n` rows, all over them: data are often sorted."""
    return torch.linspace(0, n - 1, min(n, most)).round().long()


def _place_of(candidate: Candidate, change: Change | None) -> int:
    """The candidate's place; a component's is the one whose change moves it most, else the first where it is used."""
    if candidate.position is not None:
        return candidate.position
    if change is not None:
        return change.position
    return min(int(cells.any(1).nonzero()[0]) for cells in candidate.cells.values() if bool(cells.any()))


def _one_input(inputs: Any, decomposition: Decomposition) -> Tensor:
    given = torch.as_tensor(inputs)[None] if getattr(inputs, "ndim", 2) == 1 else inputs
    tokens = checked_tokens(given, decomposition.host, name="inputs")
    if tokens.is_floating_point() or len(tokens) != 1:
        raise ValueError(f"inputs has shape {tuple(tokens.shape)}, {tokens.dtype}; expected one row of tokens [pos]")
    return tokens.to(decomposition.device)
