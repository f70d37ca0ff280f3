"""`explain`: one decision of a decomposed model, in at most four reasons for it and four against it.

A reason is a place of the input (an attribute, a word) together with the subcomponents through which it acts, or a
component: a group of subcomponents that somebody named, wherever they act. Its effect is what is measured when these
subcomponents are given the activations that they have in *control cases*, cases of the data that the model decides the
other way (all others, if there are too few): "compared with applicants who were approved". What is then done to it:

- removed, and kept as the only place: necessity and sufficiency, each for itself;
- compared with random subcomponents of equal use (C7): an effect inside the middle 95 % of theirs is no reason;
- attacked: an adversary looks for masks that the importances allow and that undo the effect;
- predicted and tried: the place's token is changed in the input;
- tried again: what passed has to pass with other control cases, other random subcomponents and other starts of the
  adversary. One draw of each is a sample, and what passes once by luck is no reason.

Places whose effect is large but whose evidence fails are listed as withheld, with why.

Cost: for a table of 20 attributes some thousand rows of forward and twice `budget.steps` backward passes: seconds.

Limits: a place acts through all its subcomponents at once; what two reasons do together is in `rest.together`. So is
what two components do one after the other: an effect that passes through both is in both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens.audit.bench import N_SEEDS, Bench, Choices, checked_seed
from spd_lens.audit.candidates import Key
from spd_lens.audit.fingerprints import code_digest, digests
from spd_lens.audit.judged import Judged, Why
from spd_lens.audit.report import (
    MAX_TEXT,
    Adversary,
    AuditReport,
    Counterfactual,
    Coverage,
    DecisionMade,
    Interval,
    Library,
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
from spd_lens.audit.trials import Cells, Trial, union, without
from spd_lens.core.decomposition import Decomposition
from spd_lens.support.versions import library_versions

N_SIMILAR = 3


def explain(
    decomposition: Decomposition,
    inputs: Any,
    decision: Any,
    *,
    cases: Any,
    position: int | None = None,
    reasons_at: Sequence[int] | None = None,
    components: Any = None,
    choices: Choices | None = None,
    title: str = "",
    seed: int = 0,
) -> AuditReport:
    """Audit one decision for one input `[pos]` or `[1 pos]`.

    - `decision`: the number or name of an output (against the strongest other), a pair of them, or a `Decision`; at
      `position`, the last by default.
    - `cases`: a `Cases`: what to compare with, and the words.
    - `reasons_at`: positions that may be reasons; by default those that have a name, or all of a text.
    - `components`: `Components`, or a list of named units: these may be reasons instead of places, each with all its
      subcomponents wherever they are used; `reasons_at` are then the places that may be said to move them.

    Raises ValueError for components of another decomposition or two of one name, for an input outside the vocabulary, a
    decision that the model does not make or does not have, and cases of another length; TypeError for what is no
    decomposition.
    """
    choices = choices or Choices()
    checked_seed(seed)
    if len(title) > MAX_TEXT:
        raise ValueError(f"title has {len(title):,} characters: {title[:40]!r}...; expected at most {MAX_TEXT:,}")
    with torch.inference_mode(False), torch.no_grad():
        first, second = (
            partial(Bench, decomposition, inputs, decision, cases, position, reasons_at, choices, own, components)
            for own in (seed, seed + N_SEEDS)
        )
        return _Account(first(), second).report(title, seed)


class _Account:
    """A report out of what a bench measures."""

    def __init__(self, bench: Bench, second: Callable[[], Bench]) -> None:
        self.bench, self.cases, self.choices, self.ids = bench, bench.cases, bench.choices, bench.ids
        self.second = second
        self.candidate = {c.key: c for c in bench.found}
        self.every = union([c.used for c in bench.found]) if bench.found else None

    def report(self, title: str, seed: int) -> AuditReport:
        """Measure everything and say it."""
        bench = self.bench
        effects = bench.effects()
        judged = self._judged(effects)
        reasons = [self._reason(j) for j, why in judged if why is None]
        sides = {side: [r for r in reasons if (r.effect > 0) == side] for side in (True, False)}
        kept = [*sides[True], *sides[False]]
        rest = self._rest(kept)
        moved = sum(abs(r.effect) for r in kept)
        decision, choices = bench.decision, self.choices
        return AuditReport(
            title=title or f"Why {_short(decision.chosen_name)}?",
            model_name=_short(bench.decomposition.host.provenance().model_name),
            inputs=self.ids,
            decision=DecisionMade(
                chosen=decision.chosen,
                other=decision.other,
                position=decision.position,
                chosen_name=_short(decision.chosen_name),
                other_name=_short(decision.other_name),
                margin=rounded(bench.margin),
                worst_margin=rounded(bench.worst_margin),
            ),
            start=rounded(bench.start),
            reasons_for=sides[True],
            reasons_against=sides[False],
            withheld=[
                Withheld(component=j.component, place=self._place(j.position), effect=rounded(j.effect), why=why)
                for j, why in judged
                if why is not None
            ],
            rest=rest,
            places=[self._place(p) for p in bench.reasons_at],
            coverage=Coverage(
                explained=rounded(moved / (moved + abs(rest.value))) if moved else 0.0,
                words=rounded(self.cases.coverage(self.ids, bench.reasons_at)),
                reason_words=rounded(self.cases.coverage(self.ids, [r.place.position for r in kept])),
            ),
            similar=self._similar(),
            adversary=Adversary(**vars(choices.budget), span_rows=1, span_positions=len(self.ids)),
            settings=Settings(
                seed=seed,
                n_reasons=choices.n_reasons,
                n_controls=choices.n_controls,
                n_draws=choices.n_draws,
                reasons_at=bench.reasons_at,
                control_cases=bench.control_cases,
                smallest_effect=choices.smallest_effect,
            ),
            digests=digests(bench.decomposition, self.cases, bench.tokens, bench.units or None),
            versions=cast("dict[Library, str]", library_versions()),
            spd_lens_audit=code_digest(),
        )

    def _judged(self, effects: Float[Tensor, "candidate control"]) -> list[tuple[Judged, Why | None]]:
        """Every candidate that is looked at, and why it is no reason; None: it is one."""
        judged = self.bench.judged(self._looked_at(effects.mean(1)), effects)
        lasting = self._lasting([j.key for j in judged if j.why_not is None])
        told: list[tuple[Judged, Why | None]] = []
        given = {True: 0, False: 0}
        for j in judged:
            why: Why | None = j.why_not
            if why is None and (j.key, j.effect > 0) not in lasting:
                why = "it does not come out again with other control cases"
            elif why is None and given[j.effect > 0] == self.choices.n_reasons:
                why = "as many stronger reasons are given"
            given[j.effect > 0] += why is None
            told.append((j, why))
        return told

    def _lasting(self, keys: list[Key]) -> set[tuple[Key, bool]]:
        """Of these candidates those that pass again, each with the sign of its effect then."""
        if not keys:
            return set()
        again = self.second()
        found = {c.key: i for i, c in enumerate(again.found)}
        judged = again.judged([found[key] for key in keys if key in found], again.effects())
        return {(j.key, j.effect > 0) for j in judged if j.why_not is None}

    def _looked_at(self, effects: Float[Tensor, " candidate"]) -> list[int]:
        """Candidates by the size of their effects, of each sign at most twice as many as there can be reasons."""
        order = effects.abs().argsort(descending=True, stable=True).tolist()
        large = [i for i in order if float(effects[i].abs()) >= self.choices.smallest_effect * abs(self.bench.margin)]
        most = 2 * self.choices.n_reasons
        kept = {i for side in (True, False) for i in [j for j in large if bool(effects[j] > 0) == side][:most]}
        return [i for i in large if i in kept]

    def _reason(self, judged: Judged) -> Reason:
        bench, candidate = self.bench, self.candidate[judged.key]
        assert self.every is not None
        assert judged.controls is not None
        without_all, only, removed = bench.trials.margins(
            [
                Trial(removed=self.every),
                Trial(removed=without(self.every, candidate.used)),
                Trial(removed=candidate.used),
            ]
        ).tolist()
        low, high = judged.controls
        return Reason(
            component=judged.component,
            place=self._place(judged.position),
            members=_members(candidate.cells),
            effect=rounded(judged.effect),
            effect_low=rounded(min(judged.effects)),
            effect_high=rounded(max(judged.effects)),
            remove=rounded(bench.margin - removed),
            flips=removed < 0,
            keep_only=rounded(only - without_all),
            controls=Interval(low=rounded(low), high=rounded(high), draws=self.choices.n_draws),
            worst=rounded(judged.worst),
            counterfactual=self._counterfactual(judged),
            past=self._past(judged.position),
        )

    def _counterfactual(self, judged: Judged) -> Counterfactual | None:
        change = judged.change
        if change is None:
            return None
        return Counterfactual(
            instead=_short(self.cases.token_text(change.token)),
            token=change.token,
            predicted=rounded(change.predicted),
            measured=rounded(change.measured),
            agrees=change.agrees,
        )

    def _rest(self, reasons: list[Reason]) -> Rest:
        bench, effects = self.bench, [r.effect for r in reasons]
        value = rest_value(rounded(bench.margin), rounded(bench.start), effects)
        joint = 0.0
        if reasons:
            cells = union([self.candidate[r.key].cells for r in reasons])
            trials = [Trial(replaced=cells, values=bench.controls.row(k)) for k in range(len(bench.control_cases))]
            joint = bench.margin - float(bench.trials.margins(trials).mean())
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
        alike = same & (self.bench.case_margins > 0)
        outcomes: dict[str, int] = {}
        for i in same.nonzero().squeeze(1).tolist() if self.cases.outcomes is not None else []:
            outcome = _short(str(self.cases.outcomes[i]))  # pyright: ignore[reportOptionalSubscript]
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
        return PastCases(same=int(same.sum()), decided_alike=int(alike.sum()), outcomes=outcomes)

    def _similar(self) -> list[SimilarCase]:
        """The past cases that are equal at most places; none for running text."""
        if self.cases.places is None:
            return []
        equal = (self.cases.tokens == self.bench.tokens.cpu())[:, self.bench.reasons_at].sum(1)
        order = equal.argsort(descending=True, stable=True)[:N_SIMILAR].tolist()
        return [
            SimilarCase(
                number=i if self.cases.numbers is None else int(self.cases.numbers[i]),
                equal_places=int(equal[i]),
                margin=rounded(float(self.bench.case_margins[i])),
                outcome=None if self.cases.outcomes is None else _short(str(self.cases.outcomes[i])),
            )
            for i in order
        ]


def _members(cells: Cells) -> list[Members]:
    """Cells as sites, positions and ids; positions with the same ids stand together."""
    found = []
    for name, own in cells.items():
        at: dict[tuple[int, ...], list[int]] = {}
        for position in own.any(1).nonzero().squeeze(1).tolist():
            at.setdefault(tuple(own[position].nonzero().squeeze(1).tolist()), []).append(position)
        found += [Members(site=name, positions=positions, ids=list(ids)) for ids, positions in at.items()]
    return found


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:199]}…"
