"""`report`: what an edit does to a habit, what it costs elsewhere, and whether it is gone (C5, items a to h).

Everything is compared with the *unedited* model at the same positions. Habits are measured on prompts that were not
used to find the edit; the caller says which these are.

Cost: a few passes over the prompts and the text, `n_random` times the same for random edits, `n_generated` passes for
generations, and a fine-tuning of the baked model where `relearn_on` is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.units import ALIVE_ABOVE, Unit
from spd_lens.editing.change import Change
from spd_lens.editing.edits import Edit, checked_edit
from spd_lens.editing.habit import NEAR, Forward, Habit, check_other_text, checked_habit, generate, kl_from
from spd_lens.editing.relearning_steps import Relearning, relearning
from spd_lens.patching.arguments import checked_input
from spd_lens.support.files import given_path, write_text
from spd_lens.support.given import given_function, given_seed, given_whole, shown
from spd_lens.support.pages import filled_page, table_html
from spd_lens.support.tables import format_table
from spd_lens.tasks.task import Task


@dataclass(frozen=True)
class EditEffect:
    """What one edit does.

    - `before`, `after`: mean probability of the answers; `effect` `= 1 - after / before`.
    - `count_before`, `count_after`: how many of the tokens that are generated after the prompts are answers.
    - `kl_at`: KL to the unedited model where the answer is predicted, among the other tokens (the answers left out).
    - `kl_near`: the same over the next five positions of the text, all tokens; NaN where the text is not known.
    - `kl_elsewhere`: on unrelated text.
    """

    before: float
    after: float
    count_before: int
    count_after: int
    kl_at: float
    kl_near: float
    kl_elsewhere: float

    @property
    def effect(self) -> float:
        """The share of the probability that is gone; NaN where there was none."""
        return 1 - self.after / self.before if self.before else float("nan")


def measure(
    clean: Forward, edited: Forward, habit: Habit, unrelated: Tensor, *, n_generated: int = 20, seed: int = 0
) -> EditEffect:
    """`EditEffect` of any two models, given as functions of tokens. Raises ValueError for outputs that are NaN."""
    for name, forward in (("clean", clean), ("edited", edited)):
        given_function(name, forward, f"{name}(tokens [row pos]) -> logits")
    habit, n_generated = checked_habit(habit, "measure"), given_whole("n_generated", n_generated, least=0)
    with torch.no_grad():
        at = habit.prompts.shape[1] - 1
        first, second = clean(habit.tokens), edited(habit.tokens)
        for name, logits in (("clean", first), ("edited", second)):
            if bool(logits.isnan().any()):
                raise ValueError(
                    f"the {name} model gives NaN on the prompts of {habit.name!r}; give a model that does not"
                )
        near = float("nan")
        if habit.continuations is not None and habit.continuations.shape[1] >= 1:
            near = float(kl_from(first, second)[:, at + 1 : at + 1 + NEAR].mean())
        elsewhere = float(kl_from(clean(unrelated), edited(unrelated)).mean())
        counts = [0, 0]
        if n_generated:
            for k, forward in enumerate((clean, edited)):
                counts[k] = int(habit.is_answer(generate(forward, habit.prompts, n_generated, seed=seed)).sum())
    return EditEffect(
        before=float(habit.log_probability(first).exp().mean()),
        after=float(habit.log_probability(second).exp().mean()),
        count_before=counts[0],
        count_after=counts[1],
        kl_at=float(_kl_of_others(first[:, at], second[:, at], habit.answers).mean()),
        kl_near=near,
        kl_elsewhere=elsewhere,
    )


def _kl_of_others(clean: Tensor, edited: Tensor, answers: Tensor) -> Float[Tensor, " row"]:
    """KL between the two distributions over the tokens that are no answers."""
    # A column more takes the -1 that fills short rows.
    out = torch.zeros(*clean.shape[:-1], clean.shape[-1] + 1, dtype=torch.bool, device=clean.device)
    out = out.scatter(-1, answers.to(clean.device) % out.shape[-1], True)[..., :-1]
    p, q = (x.float().masked_fill(out, -torch.inf).log_softmax(-1) for x in (clean, edited))
    return torch.where(out, 0.0, p.exp() * (p - q)).sum(-1)


@dataclass(frozen=True, repr=False)
class EditReport:
    """What an edit does, by the items of C5.

    - `here`: on the habit's prompts (a, c). `wordings`: on other wordings (b).
    - `random`: of random subcomponents with the same scales that fire about as often (d).
    - `parameters_changed`, `ranks`: per site (e). `baked_difference`: the largest difference between the logits of the
      baked and the hooked model, None for an edit that cannot be baked (f).
    - `largest_change`: of any logit; that it is not 0 was checked (g).
    - `relearning`: how many fine-tuning steps bring the habit back (h), None if that was not asked for.
    """

    habit: str
    lines: tuple[str, ...]
    n_prompts: int
    n_generated: int
    here: EditEffect
    wordings: Mapping[str, EditEffect]
    random: tuple[EditEffect, ...]
    parameters_changed: Mapping[str, int]
    ranks: Mapping[str, int]
    baked_difference: float | None
    largest_change: float
    relearning: Relearning | None

    def _rows(self) -> list[list[str]]:
        named = [(self.habit, self.here), *self.wordings.items()]
        rows = [[name, *_numbers(effect)] for name, effect in named]
        if self.random:
            means = {k: sum(asdict(e)[k] for e in self.random) / len(self.random) for k in asdict(self.random[0])}
            counts = {k: round(means[k]) for k in ("count_before", "count_after")}
            rows.append(
                [f"random subcomponents (mean of {len(self.random)})", *_numbers(EditEffect(**{**means, **counts}))]
            )
        return rows

    def _notes(self) -> list[str]:
        changed = sum(self.parameters_changed.values())
        ranks = ", ".join(f"{site} {rank}" for site, rank in self.ranks.items())
        baked = "not baked: conditional" if self.baked_difference is None else f"{self.baked_difference:.2g}"
        notes = [
            f"{changed:,} parameters change; rank by site: {ranks}",
            f"largest change of a logit {self.largest_change:.3g}; baked against hooked logits {baked}",
            f"counts are of {self.n_generated} generated tokens after each of {self.n_prompts} prompts",
        ]
        return notes + ([] if self.relearning is None else [str(self.relearning)])

    def __str__(self) -> str:
        return "\n".join([*self.lines, format_table(_HEADER, self._rows()), *self._notes()])

    def __repr__(self) -> str:
        return f"EditReport({self.habit!r}: {self.here.effect:.1%} of the probability gone)"

    def _repr_html_(self) -> str:
        return table_html("; ".join(self.lines), _HEADER, self._rows(), notes=self._notes())

    def to_html(self, path: str | Path, *, title: str | None = None) -> Path:
        """Write the report as one page that needs nothing else."""
        path = given_path(path)
        data = {
            "lines": list(self.lines),
            "header": list(_HEADER),
            "rows": self._rows(),
            "notes": self._notes(),
            "sites": [[site, f"{n:,}", str(self.ranks[site])] for site, n in self.parameters_changed.items()],
            "curves": [] if self.relearning is None else self.relearning.curves(),
        }
        write_text(path, filled_page("edit.html", title=title or f"Edit: {self.habit}", data=data))
        return path


_HEADER = ("measured on", "p before", "p after", "effect", "count", "KL at, others", "KL next five", "KL elsewhere")


def _numbers(e: EditEffect) -> list[str]:
    kls = [f"{kl:.2g}" for kl in (e.kl_at, e.kl_near, e.kl_elsewhere)]
    return [f"{e.before:.3f}", f"{e.after:.3f}", f"{e.effect:+.1%}", f"{e.count_before} > {e.count_after}", *kls]


def report(
    edit: Edit,
    habit: Habit | Task,
    unrelated: Int[Tensor, "row pos"],
    *,
    wordings: Mapping[str, Habit | Task] | None = None,
    n_random: int = 5,
    n_generated: int = 20,
    relearn_on: Habit | Task | None = None,
    seed: int = 0,
) -> EditReport:
    """Measure an edit (C5): the effect on held-out prompts and other wordings, its costs, controls, and relearning.

    - `habit`: prompts that the edit was not found on. `unrelated`: tokens of other text.
    - `wordings`: the same habit in other words, by name. `n_random`: how many random edits are measured beside it.
    - `relearn_on`: prompts that a fine-tuning of the baked model may see; None leaves that out.

    Raises ValueError if the edit changes no output at all on these prompts (a conditional edit that never acts), and if
    `unrelated` is the habit's own text.
    """
    decomposition = checked_edit(edit, "report").decomposition
    habit = checked_habit(habit, "report", decomposition)
    n_random = given_whole("n_random", n_random, least=0)
    unrelated = checked_input(decomposition, unrelated, "unrelated")
    check_other_text(habit, unrelated, "unrelated")
    clean = decomposition.host.forward
    if wordings is not None and not (isinstance(wordings, Mapping) and all(isinstance(k, str) for k in wordings)):
        raise TypeError(f"wordings={shown(wordings)}; expected {{name: habit}}")
    others = {name: checked_habit(h, "report", decomposition) for name, h in (wordings or {}).items()}
    relearn_on = None if relearn_on is None else checked_habit(relearn_on, "report", decomposition)
    seed = given_seed(seed)
    with torch.no_grad():
        largest = float((edit.logits(habit.tokens) - clean(habit.tokens)).abs().max())
    if largest == 0:
        raise ValueError(
            f"this edit changes no output on the prompts of {habit.name!r}: {edit!r}"
            + ("" if edit.when is None else "; it acts at none of their positions")
        )
    _check_generated(decomposition, [habit, *others.values()], n_generated)
    plain = None if edit.when is not None else edit.bake()
    return EditReport(
        habit=habit.name,
        lines=tuple(str(edit).splitlines()),
        n_prompts=len(habit),
        n_generated=n_generated,
        here=measure(clean, edit.logits, habit, unrelated, n_generated=n_generated, seed=seed),
        wordings={
            name: measure(clean, edit.logits, other, unrelated, n_generated=n_generated, seed=seed)
            for name, other in others.items()
        },
        random=tuple(
            measure(clean, other.logits, habit, unrelated, n_generated=n_generated, seed=seed)
            for other in random_edits(edit, unrelated, n_random, seed=seed)
        ),
        parameters_changed=edit.parameters_changed(),
        ranks={site: edit.rank(site) for site in edit.sites},
        baked_difference=None if plain is None else edit.difference(plain, habit.tokens),
        largest_change=largest,
        relearning=None if plain is None or relearn_on is None else _relearning(edit, plain, habit, relearn_on),
    )


def _check_generated(decomposition: Decomposition, habits: Sequence[Habit], n_generated: int) -> None:
    limit, n = decomposition.host.context_length(), given_whole("n_generated", n_generated, least=0)
    longest = max(habit.prompts.shape[1] for habit in habits)
    if limit is not None and longest + n > limit:
        raise ValueError(
            f"n_generated={n} after prompts of {longest} tokens is more than this model's context of {limit}; give at "
            f"most {limit - longest}"
        )


def _relearning(edit: Edit, plain: nn.Module, habit: Habit, on: Habit) -> Relearning:
    goal = float(habit.probability(edit.decomposition.host.forward).mean())
    return relearning(plain, on, habit, goal=goal)


def random_edits(edit: Edit, tokens: Tensor, n: int, *, seed: int = 0) -> list[Edit]:
    """Edits with the same scales of other subcomponents of the same sites that fire about as often on `tokens`.

    Each is drawn from the ten that are nearest in firing rate. Edits of directions have no such control and are taken
    as removals. Raises ValueError where a site has no other subcomponents.
    """
    decomposition = checked_edit(edit, "random_edits").decomposition
    tokens = checked_input(decomposition, tokens)
    generator, n = torch.Generator().manual_seed(given_seed(seed)), given_whole("n", n, least=0)
    if n == 0:
        return []
    rates = {
        s: (g > ALIVE_ABOVE).float().flatten(0, -2).mean(0).cpu() for s, g in decomposition.importance(tokens).items()
    }
    edited = {member for change in edit.changes for member in change.unit.members}
    found = []
    for _ in range(n):
        taken, changes = set(edited), []
        for change in edit.changes:
            members = []
            for site, c in change.unit.members:
                free = [k for k in range(len(rates[site])) if (site, k) not in taken]
                if not free:
                    raise ValueError(f"{site} has no subcomponent left that is not edited; use n_random=0")
                free.sort(key=lambda k: abs(float(rates[site][k] - rates[site][c])))
                drawn = free[int(torch.randint(min(10, len(free)), (), generator=generator))]
                taken.add((site, drawn))
                members.append((site, drawn))
            changes.append(Change(Unit(tuple(members)), 0.0 if change.is_rewrite else change.scale))
        found.append(Edit(decomposition, tuple(changes), edit.when))
    return found
