"""Does the model respond to a protected attribute, where, and what happens to decisions without it?

For one place of a table, over many cases:

- *changed*: the place's token becomes each other value that the data have there, all else equal; how far margins move,
  and how many decisions change (a counterfactual in the input: it needs no decomposition);
- *removed*: the place's subcomponents, those whose activation depends on the case, get their mean activation over all
  cases; how far margins move and how many decisions change, by group;
- *responding*: subcomponents elsewhere whose importance or activation follows the change.

Limits: other attributes may stand for the protected one (a proxy); removing its own place does not remove these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spd_lens.audit.cases import Cases
from spd_lens.audit.decision import Decision
from spd_lens.audit.trials import record
from spd_lens.core.decomposition import Decomposition
from spd_lens.core.inputs import checked_decomposition, checked_tokens
from spd_lens.support.names import near_names
from spd_lens.support.pages import visible
from spd_lens.support.tables import format_table

N_RESPONDING = 5


@dataclass(frozen=True)
class Group:
    """Cases with one value at the place: how many, the share decided as `chosen`, and that share with it removed."""

    value: str
    n: int
    chosen_share: float
    chosen_share_removed: float


@dataclass(frozen=True)
class Responding:
    """A subcomponent and how far its activation moves when the place's value is changed, in units of its own spread."""

    site: str
    id: int
    moves: float


@dataclass(frozen=True)
class FairnessView:
    """What `fairness_view` found for one place; `str` is a table."""

    place: str
    n_cases: int
    changed_margin: float
    changed_decisions: float
    removed_margin: float
    removed_decisions: float
    groups: tuple[Group, ...]
    responding: tuple[Responding, ...]

    def __str__(self) -> str:
        rows = [
            (visible(g.value), str(g.n), f"{g.chosen_share:.1%}", f"{g.chosen_share_removed:.1%}") for g in self.groups
        ]
        title = (
            f"{visible(self.place)}, {self.n_cases} cases. Changed: margins move by {self.changed_margin:.3f} on "
            f"average, {self.changed_decisions:.1%} of decisions change. Removed: {self.removed_margin:.3f}, "
            f"{self.removed_decisions:.1%}."
        )
        return f"{title}\n{format_table(('value', 'cases', 'decided so', 'with it removed'), rows)}"


@torch.no_grad()
def fairness_view(
    decomposition: Decomposition,
    cases: Cases,
    decision: Decision,
    protected: str,
    *,
    groups: Mapping[str, Any] | None = None,
) -> FairnessView:
    """The view of one place, named as in `cases.places`, over all cases.

    `groups` names groups of tokens' texts, `{"women": ["personal status and sex: female : ..."]}`; by default every
    value is a group. Raises ValueError for a place that the cases do not have, and for cases without places.
    """
    checked_decomposition(decomposition, "fairness_view")
    if cases.places is None:
        raise ValueError("these cases are running text: their positions have no names; a fairness view needs places")
    if protected not in cases.places:
        raise ValueError(f"no place {protected!r}; near: {near_names(str(protected), cases.places)}")
    p = list(cases.places).index(protected)
    tokens = checked_tokens(cases.tokens, decomposition.host, name="cases.tokens").to(decomposition.device)
    found = record(decomposition, tokens)
    margins = decision.margin(found.logits)
    own, values = tokens[:, p], tokens[:, p].unique().tolist()
    moves, flips, responses = _changed(decomposition, tokens, p, values, decision, margins, found.activations)
    removed = _removed(decomposition, tokens, p, decision, found.activations)
    named = _groups(cases, values, groups)
    return FairnessView(
        place=protected,
        n_cases=len(tokens),
        changed_margin=moves,
        changed_decisions=flips,
        removed_margin=float((removed - margins).abs().mean()),
        removed_decisions=float(((removed > 0) != (margins > 0)).float().mean()),
        groups=tuple(_group(name, ids, own, margins, removed) for name, ids in named.items()),
        responding=responses,
    )


def _group(name: str, ids: Sequence[int], own: Tensor, margins: Tensor, removed: Tensor) -> Group:
    rows = torch.isin(own, torch.tensor(ids, device=own.device))
    share = float((margins[rows] > 0).float().mean())
    return Group(name, int(rows.sum()), share, float((removed[rows] > 0).float().mean()))


def _groups(cases: Cases, values: Sequence[int], groups: Mapping[str, Any] | None) -> dict[str, list[int]]:
    texts = {cases.token_text(token): token for token in values}
    if groups is None:
        return {text: [token] for text, token in texts.items()}
    named = {}
    for name, members in groups.items():
        unknown = [text for text in members if text not in texts]
        if unknown:
            raise ValueError(f"group {name!r} has {unknown[0]!r}; near: {near_names(str(unknown[0]), texts)}")
        named[name] = [texts[text] for text in members]
    return named


def _changed(
    decomposition: Decomposition,
    tokens: Int[Tensor, "n pos"],
    p: int,
    values: Sequence[int],
    decision: Decision,
    margins: Float[Tensor, " n"],
    activations: Mapping[str, Float[Tensor, "n pos C"]],
) -> tuple[float, float, tuple[Responding, ...]]:
    """Mean change of margins, share of changed decisions, and what responds, over all other values of the place."""
    moved, flipped, n = 0.0, 0, 0
    follows = {name: torch.zeros(a.shape[-1], dtype=torch.float64) for name, a in activations.items()}
    for value in values:
        changed = tokens.clone()
        changed[:, p] = value
        rows = tokens[:, p] != value
        after = record(decomposition, changed[rows])
        margin = decision.margin(after.logits)
        moved += float((margin - margins[rows]).abs().sum())
        flipped += int(((margin > 0) != (margins[rows] > 0)).sum())
        n += int(rows.sum())
        for name, a in after.activations.items():
            # The decision's position alone: what the place does there, not that it says something else itself.
            before = activations[name][rows][:, decision.position]
            follows[name] += (a[:, decision.position] - before).abs().sum(0).double().cpu()
    responding = []
    for name, total in follows.items():
        spread = activations[name][:, decision.position].std(0).double().cpu()
        share = torch.where(spread > 1e-6, total / max(1, n) / spread.clamp_min(1e-6), torch.zeros_like(spread))
        responding += [Responding(name, c, float(v)) for c, v in enumerate(share)]
    responding.sort(key=lambda r: -r.moves)
    return moved / max(1, n), flipped / max(1, n), tuple(responding[:N_RESPONDING])


def _removed(
    decomposition: Decomposition,
    tokens: Int[Tensor, "n pos"],
    p: int,
    decision: Decision,
    activations: Mapping[str, Float[Tensor, "n pos C"]],
) -> Float[Tensor, " n"]:
    """Margins with the place's activations at every site set to their means over the cases."""
    hooks = []
    for name, weight in decomposition.items():
        mean = activations[name][:, p].mean(0)

        def put(value: Tensor, hook: Any, mean: Tensor = mean) -> Tensor:
            value[:, p] = mean
            return value

        hooks.append((weight.site.point_names()[0], put))
    with decomposition.model.hooks(fwd_hooks=hooks):
        return decision.margin(decomposition.host.forward(tokens))
