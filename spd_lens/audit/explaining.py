"""`explain`: one decision of a decomposed model, in at most four reasons for it and four against it.

A reason is a place of the input (an attribute, a word) together with the subcomponents through which it acts. Its
effect is what is measured when these subcomponents are given the activations that they have in *control cases*, cases
of the data that the model decides the other way (all others, if there are too few): "compared with applicants who were
approved". What is then done to it:

- removed, and kept as the only place: necessity and sufficiency, each for itself;
- compared with random subcomponents of equal use (C7): an effect inside the middle 95 % of theirs is no reason;
- attacked: an adversary looks for masks that the importances allow and that undo the effect;
- predicted and tried: the place's token is changed in the input.

Places whose effect is large but whose evidence fails are listed as withheld, with why.

Cost: for a table of 20 attributes some thousand rows of forward passes and `budget.steps` backward passes: seconds.

Limits: a place acts through all its subcomponents at once; what two places do together is in `rest.together`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens.audit.adversary import Budget, worst_claims
from spd_lens.audit.candidates import Candidate, candidates, equal_use, mean_values, use_rates, used_cells
from spd_lens.audit.cases import Cases
from spd_lens.audit.decision import Decision, the_decision
from spd_lens.audit.report import (
    N_REASONS,
    Adversary,
    AuditReport,
    Counterfactual,
    Coverage,
    DecisionMade,
    Digests,
    Interval,
    Members,
    PastCases,
    Place,
    Reason,
    Rest,
    Settings,
    SimilarCase,
    Withheld,
    rest_value,
    rounded,
)
from spd_lens.audit.trials import Trial, Trials, record, union, without
from spd_lens.core.decomposition import Decomposition
from spd_lens.core.fingerprint import target_fingerprint
from spd_lens.core.inputs import checked_decomposition, checked_tokens
from spd_lens.support.checked_json import content_hash
from spd_lens.support.files import tensor_hash
from spd_lens.support.versions import library_versions

COVERAGE_OF_CONTROLS = 0.95
N_SIMILAR = 3
# Cases that tell how often a subcomponent is used at a place.
N_FOR_RATES = 256
# Agreement of a counterfactual: a difference of at most this share of the larger change, or this much.
CF_SHARE, CF_ABSOLUTE = 0.25, 0.05


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
        if self.n_controls < 2 or self.n_draws < 8:
            raise ValueError(
                f"n_controls={self.n_controls}, n_draws={self.n_draws}; expected at least 2 and at least 8"
            )


def explain(
    decomposition: Decomposition,
    inputs: Any,
    decision: Any,
    *,
    cases: Any,
    position: int | None = None,
    reasons_at: Sequence[int] | None = None,
    choices: Choices | None = None,
    title: str = "",
    seed: int = 0,
) -> AuditReport:
    """Audit one decision for one input `[pos]` or `[1 pos]`.

    - `decision`: the number or name of an output (against the strongest other), a pair of them, or a `Decision`; at
      `position`, the last by default.
    - `cases`: a `Cases`: what to compare with, and the words.
    - `reasons_at`: positions that may be reasons; by default those that have a name, or all of a text.

    Raises ValueError for an input outside the vocabulary, a decision that the model does not make or does not have, and
    cases of another length; TypeError for what is no decomposition.
    """
    with torch.inference_mode(False), torch.no_grad():
        audit = _Audit(decomposition, inputs, decision, cases, position, reasons_at, choices or Choices(), title, seed)
        return audit.report()


@torch.no_grad()
def claims_again(
    report: AuditReport,
    decomposition: Decomposition,
    inputs: Any,
    decision: Decision,
    cases: Cases,
    choices: Choices,
    seed: int,
) -> dict[int, Reason | Withheld]:
    """The places of a report's reasons, measured with the controls and climbs of another seed."""
    audit = _Audit(
        decomposition, inputs, decision, cases, None, report.settings.reasons_at, choices, report.title, seed
    )
    number = {candidate.position: i for i, candidate in enumerate(audit.found)}
    in_order = sorted(report.reasons, key=lambda reason: -abs(reason.effect))
    chosen = [number[r.place.position] for r in in_order if r.place.position in number]
    return {found.place.position: found for found in audit.measure(chosen, audit.effects(), at_most=len(chosen))}


class _Audit:
    """One run of `explain`: what is measured on the way."""

    def __init__(
        self,
        decomposition: Decomposition,
        inputs: Any,
        decision: Any,
        cases: Any,
        position: int | None,
        reasons_at: Sequence[int] | None,
        choices: Choices,
        title: str,
        seed: int,
    ) -> None:
        self.decomposition = checked_decomposition(decomposition, "explain")
        if not isinstance(cases, Cases):
            raise TypeError(f"cases is a {type(cases).__name__}; expected spd_lens.audit.Cases")
        self.cases, self.choices, self.title, self.seed = cases, choices, title, seed
        self.tokens = _one_input(inputs, decomposition)
        self._check_fit()
        self.own = record(decomposition, self.tokens)
        names = cases.outputs if cases.outputs is not None else self._output_names()
        self.decision = the_decision(decision, self.own.logits, names, position)
        self.trials = Trials(decomposition, self.tokens, self.decision)
        self.generator = torch.Generator().manual_seed(seed)
        self.ids: list[int] = self.tokens[0].tolist()
        self.margin = rounded(float(self.trials.margins([Trial()])[0]))
        self.case_margins = self._case_margins()
        self.control_cases = self._choose_controls()
        self.controls = record(decomposition, cases.tokens[self.control_cases])
        self.means = mean_values(self.controls)
        self.rates = use_rates(record(decomposition, cases.tokens[:N_FOR_RATES]))
        self.start = rounded(float(self.case_margins[self.control_cases].mean()))
        self.reasons_at = self._places() if reasons_at is None else [int(p) for p in reasons_at]
        self.found = candidates(self.own, self.controls, self.decision.position, self.reasons_at)

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

    def _places(self) -> list[int]:
        n_pos = self.tokens.shape[1]
        return list(range(n_pos if self.cases.places is None else len(self.cases.places)))

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

    def report(self) -> AuditReport:
        """Measure everything and say it."""
        effects = self.effects()
        chosen = self._looked_at(effects.mean(1))
        measured = self.measure(chosen, effects, at_most=self.choices.n_reasons)
        reasons = [m for m in measured if isinstance(m, Reason)]
        withheld = [m for m in measured if isinstance(m, Withheld)]
        sides = {
            side: [r for r in reasons if (r.effect > 0) == side][: self.choices.n_reasons] for side in (True, False)
        }
        kept = [*sides[True], *sides[False]]
        rest = self._rest(kept)
        absolute = sum(abs(r.effect) for r in kept)
        places = [self._place(p) for p in self.reasons_at]
        return AuditReport(
            title=self.title or f"Why {self.decision.chosen_name}?",
            inputs=self.ids,
            model_name=self.decomposition.host.provenance().model_name,
            decision=DecisionMade(**vars(self.decision), margin=self.margin, worst_margin=self.worst_margin),
            start=self.start,
            reasons_for=sides[True],
            reasons_against=sides[False],
            withheld=withheld,
            rest=rest,
            places=places,
            coverage=Coverage(
                explained=rounded(absolute / (absolute + abs(rest.value))) if absolute else 0.0,
                words=rounded(self.cases.coverage(self.ids, self.reasons_at)),
                reason_words=rounded(self.cases.coverage(self.ids, [r.place.position for r in kept])),
            ),
            similar=self._similar(),
            adversary=Adversary(**vars(self.choices.budget), span_rows=1, span_positions=len(self.ids)),
            settings=Settings(
                seed=self.seed,
                n_controls=self.choices.n_controls,
                n_draws=self.choices.n_draws,
                reasons_at=self.reasons_at,
                control_cases=self.control_cases,
                smallest_effect=self.choices.smallest_effect,
            ),
            digests=digests(self.decomposition, self.cases, self.tokens),
            versions=library_versions(),
            spd_lens_audit=code_digest(),
        )

    def _looked_at(self, effects: Float[Tensor, " candidate"]) -> list[int]:
        """Candidates by the size of their effects, of each sign at most twice as many as there can be reasons."""
        order = effects.abs().argsort(descending=True, stable=True).tolist()
        large = [i for i in order if float(effects[i].abs()) >= self.choices.smallest_effect * abs(self.margin)]
        most = 2 * self.choices.n_reasons
        kept = {i for side in (True, False) for i in [j for j in large if bool(effects[j] > 0) == side][:most]}
        return [i for i in large if i in kept]

    def measure(self, chosen: list[int], effects: Tensor, *, at_most: int) -> list[Reason | Withheld]:
        """The chosen candidates as reasons, at most so many of each sign, or as withheld."""
        means = [float(effects[i].mean()) for i in chosen]
        claims = [(self.found[i].cells, e) for i, e in zip(chosen, means, strict=True)]
        *worst, margin = worst_claims(
            self.trials, self.own.importances, claims, self.means, self.choices.budget, self.generator
        )
        self.worst_margin = rounded(margin)
        measured: list[Reason | Withheld] = []
        n_given, given = {True: 0, False: 0}, set[int]()
        for i, mean, least in zip(chosen, means, worst, strict=True):
            if n_given[mean > 0] == at_most:
                continue
            interval = self._control_interval(self.found[i], given)
            place, effect = self._place(self.found[i].position), rounded(mean)
            if interval is None:
                measured.append(Withheld(place=place, effect=effect, why="no controls of equal use"))
            elif interval.low <= effect <= interval.high:
                measured.append(
                    Withheld(place=place, effect=effect, why="no more than random subcomponents of equal use")
                )
            elif least <= 0:
                measured.append(Withheld(place=place, effect=effect, why="the adversary undoes it"))
            else:
                measured.append(self._reason(self.found[i], effects[i], interval, least))
                n_given[mean > 0] += 1
                given.add(self.found[i].position)
        return measured

    def _control_interval(self, candidate: Candidate, given: set[int]) -> Interval | None:
        """What as many random cells of equal use do, replaced by their means over the control cases.

        Places that are reasons already are left out, else the strongest would hide all others.
        """
        rates = {name: rate.clone() for name, rate in self.rates.items()}
        for rate in rates.values():
            rate[sorted(given)] = 0.0
        trials = []
        for draw in range(self.choices.n_draws):
            k = draw % len(self.control_cases)
            cells = equal_use(candidate.position, used_cells(candidate, self.controls, k), rates, self.generator)
            if cells is None:
                return None
            trials.append(Trial(replaced=cells, values=self.means))
        effects = self.margin - self.trials.margins(trials)
        outside = (1 - COVERAGE_OF_CONTROLS) / 2
        low, high = effects.quantile(torch.tensor([outside, 1 - outside], dtype=effects.dtype)).tolist()
        return Interval(low=rounded(low), high=rounded(high), draws=len(trials))

    def _reason(self, candidate: Candidate, effects: Tensor, interval: Interval, worst: float) -> Reason:
        every = union([c.used for c in self.found])
        without_all, only, removed = self.trials.margins(
            [Trial(removed=every), Trial(removed=without(every, candidate.used)), Trial(removed=candidate.used)]
        ).tolist()
        members = [
            Members(site=name, ids=cells[candidate.position].nonzero().squeeze(1).tolist())
            for name, cells in candidate.cells.items()
            if bool(cells.any())
        ]
        return Reason(
            place=self._place(candidate.position),
            members=members,
            effect=rounded(float(effects.mean())),
            effect_low=rounded(float(effects.min())),
            effect_high=rounded(float(effects.max())),
            remove=rounded(self.margin - removed),
            flips=removed < 0,
            keep_only=rounded(only - without_all),
            controls=interval,
            worst=rounded(worst),
            counterfactual=self._counterfactual(candidate),
            past=self._past(candidate.position),
        )

    def _counterfactual(self, candidate: Candidate) -> Counterfactual | None:
        """The place's token becomes the one that most control cases have there; None where all have this one."""
        p = candidate.position
        there = self.cases.tokens[self.control_cases, p]
        others, counts = there[there != self.ids[p]].unique(return_counts=True)
        if not len(others):
            return None
        token = int(others[counts.argmax()])
        changed = self.tokens.clone()
        changed[0, p] = token
        after = record(self.decomposition, changed)
        measured = self.margin - float(self.decision.margin(after.logits).double())
        trial = Trial(replaced=candidate.cells, values=after.row(0))
        predicted = self.margin - float(self.trials.margins([trial])[0])
        gap, size = abs(measured - predicted), max(abs(measured), abs(predicted))
        agrees = measured * predicted > 0 and gap <= max(CF_SHARE * size, CF_ABSOLUTE)
        return Counterfactual(
            instead=_short(self.cases.token_text(token)),
            token=token,
            predicted=rounded(predicted),
            measured=rounded(measured),
            agrees=agrees,
        )

    def _rest(self, reasons: list[Reason]) -> Rest:
        effects = [r.effect for r in reasons]
        value = rest_value(self.margin, self.start, effects)
        joint = 0.0
        if reasons:
            at = {r.place.position for r in reasons}
            cells = union([c.cells for c in self.found if c.position in at])
            trials = [Trial(replaced=cells, values=self.controls.row(k)) for k in range(len(self.control_cases))]
            joint = self.margin - float(self.trials.margins(trials).mean())
        together = rounded(joint - sum(effects))
        return Rest(value=value, together=together, elsewhere=rest_value(value, together, []))

    # -- what the data say ------------------------------------------------------------------------------------------

    def _place(self, position: int) -> Place:
        token = self.ids[position]
        return Place(
            position=position,
            name=_short(self.cases.place(position)),
            token=token,
            says=_short(self.cases.token_text(token)),
            words=self.cases.words(position, token),
        )

    def _past(self, position: int) -> PastCases:
        same = self.cases.tokens[:, position] == self.ids[position]
        alike = same & (self.case_margins > 0)
        outcomes: dict[str, int] = {}
        for i in same.nonzero().squeeze(1).tolist() if self.cases.outcomes is not None else []:
            outcome = _short(str(self.cases.outcomes[i]))  # pyright: ignore[reportOptionalSubscript]
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
        return PastCases(same=int(same.sum()), decided_alike=int(alike.sum()), outcomes=outcomes)

    def _similar(self) -> list[SimilarCase]:
        """The past cases that are equal at most places; none for running text."""
        if self.cases.places is None:
            return []
        equal = (self.cases.tokens == self.tokens.cpu())[:, self.reasons_at].sum(1)
        order = equal.argsort(descending=True, stable=True)[:N_SIMILAR].tolist()
        return [
            SimilarCase(
                number=i if self.cases.numbers is None else int(self.cases.numbers[i]),
                equal_places=int(equal[i]),
                margin=rounded(float(self.case_margins[i])),
                outcome=None if self.cases.outcomes is None else _short(str(self.cases.outcomes[i])),
            )
            for i in order
        ]


def _one_input(inputs: Any, decomposition: Decomposition) -> Tensor:
    given = torch.as_tensor(inputs)[None] if getattr(inputs, "ndim", 2) == 1 else inputs
    tokens = checked_tokens(given, decomposition.host, name="inputs")
    if tokens.is_floating_point() or len(tokens) != 1:
        raise ValueError(f"inputs has shape {tuple(tokens.shape)}, {tokens.dtype}; expected one row of tokens [pos]")
    return tokens.to(decomposition.device)


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:199]}…"


# -- digests -----------------------------------------------------------------------------------------------------------


def digests(decomposition: Decomposition, cases: Cases, tokens: Tensor) -> Digests:
    """SHA-256 of the model, its decomposition, the cases and the input."""
    made_from = target_fingerprint(decomposition)
    tensors = {name: tensor_hash(tensor) for name, tensor in decomposition.tensors().items()}
    return Digests(
        model=made_from["weights"],
        host=made_from["host"],
        sites=made_from["sites"],
        decomposition=content_hash(tensors),
        cases=cases.digest(),
        input=hashlib.sha256(tokens.cpu().to(torch.int64).contiguous().numpy().tobytes()).hexdigest(),
    )


def code_digest() -> str:
    """SHA-256 of the source of this package: which code made a report."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
