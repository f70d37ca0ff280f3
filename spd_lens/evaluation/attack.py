"""The worst case: what an adversary who may choose all masks that the importances allow can do (K3, E1, E1b).

The masks are `m = g + (1 - g) s`, delta's mask is `s` itself, with sources `s in [0, 1]` of C + 1 channels per site,
one vector for a whole *span* of rows and positions. The adversary climbs by sign steps; what counts is the **largest
divergence seen at any step of any start**. Steps of one size overshoot, so the size falls along the way, after
Auto-PGD (Croce and Hein 2020): every `WINDOW` steps, if fewer than three quarters of them went up or the best value is
still the same, the step is halved and the climb goes on from the best point.

The first climb starts from U(0, 1), every further one from the worst of `CORNERS` random corners. The landscape has
several hills: on a toy of 8 sources all climbs from U(0, 1) ended at half of the worst corner, which 12 starts found. A
number of few starts is a lower bound.

The schedule looks at what has happened, never at the budget. So one long climb serves a ladder of budgets, read off on
its way, and the ladder rises by construction.

Cost: per step and start one forward and one backward pass of everything behind the first decomposed block. Gradients
are summed over batches, so memory is that of one batch, however large the span.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.inputs import checked_decomposition
from spd_lens.core.masks import Importances
from spd_lens.data.streams import first_batches
from spd_lens.evaluation.held import Passes
from spd_lens.objective.adversary import Sources, random_sources
from spd_lens.objective.divergences import Divergence
from spd_lens.objective.mask_sources import Climb, Masks, MaskSource, masks_from_sources
from spd_lens.support.given import given_list, given_number, given_seed, given_whole, given_wholes, shown
from spd_lens.support.shown import short_repr

LADDER = (20, 40, 80, 160)
WINDOW = 10
CORNERS = 8
# Auto-PGD's own numbers: the share of steps that must go up, and the weight of the new direction against the old one.
RISING_SHARE = 0.75
NEW_DIRECTION = 0.75


def _as_it_is(value: Tensor) -> Tensor:
    return value


@dataclass(frozen=True)
class Attack:
    """An adversary's budget: states what stands beside every number of it (E1b).

    - `steps`: the budgets to report; the longest is climbed, the others are read off on the way.
    - `step_size`: the first one; it falls. `starts`: independent climbs, of which the worst counts.
    - `span`: how many rows share one source (at least); None: all rows there are.
    """

    steps: tuple[int, ...] = LADDER
    step_size: float = 0.1
    starts: int = 2
    span: int | None = None

    def __post_init__(self) -> None:
        steps = given_wholes("adversary_steps", self.steps, least=0, of=f"numbers of steps, such as {LADDER}")
        object.__setattr__(self, "steps", steps)
        # Sources lie in [0, 1].
        given_number("step_size", self.step_size, above=0, most=1)
        given_whole("starts", self.starts, least=1)
        if self.span is not None:
            given_whole("span", self.span, least=1, of=" row", or_none=True)


@runtime_checkable
class Ground(Protocol):
    """A pass that the adversary climbs on: one of a span, or all of it."""

    @property
    def importances(self) -> Importances:
        """What bounds the masks."""
        ...

    def total(self, sources: Mapping[str, Tensor]) -> tuple[Tensor, Any]:
        """Divergence under the masks of these sources, summed over the positions that count, and their number."""
        ...


@dataclass(frozen=True)
class WorstCase:
    """What the adversary reached on one span: for every budget the divergence and the sources that cause it."""

    divergence: dict[int, float]
    sources: dict[int, Sources]

    __repr__ = short_repr


@torch.inference_mode(False)
@torch.no_grad()
def worst_case(
    decomposition: Decomposition,
    batches: Any,
    *,
    steps: Sequence[int] = LADDER,
    step_size: float = 0.1,
    starts: int = 2,
    importances: Mapping[str, Float[Tensor, "*_batch _C"]] | None = None,
    kind: Divergence = "kl",
    seed: int = 0,
) -> WorstCase:
    """The largest divergence that an adversary reaches with one source for all rows and positions of `batches`.

    `importances` take the place of the gates' (for one batch): what is 1 there the adversary cannot touch.

    >>> from spd_lens import decompose_layer
    >>> from spd_lens.models import load_tiny_lm
    >>> decomposition = decompose_layer(load_tiny_lm(), layer=1, n_subcomponents=8)
    >>> found = worst_case(decomposition, [torch.arange(1, 9).reshape(1, 8)], steps=(1, 4), starts=1)
    >>> found.divergence[4] >= found.divergence[1]
    True
    """
    checked_decomposition(decomposition, "worst_case")
    attack = Attack(tuple(given_list("steps", steps, f"numbers of steps, such as {LADDER}")), step_size, starts)
    if not attack.steps:
        raise ValueError(f"steps is empty; expected numbers of steps, such as {LADDER}")
    seed = given_seed(seed)
    chosen = list(first_batches(batches, decomposition, None, purpose="attack"))
    if importances is not None:
        _check_importances(decomposition, importances)
    passes = Passes(decomposition, chosen, kind, importances)
    generator = torch.Generator(decomposition.device).manual_seed(seed)
    return WorstMasks(attack).search(passes, generator)


def _check_importances(decomposition: Decomposition, importances: Any) -> None:
    if not isinstance(importances, Mapping) or set(importances) != set(decomposition):
        given = sorted(map(str, importances)) if isinstance(importances, Mapping) else shown(importances)
        raise ValueError(f"importances are of {given}; expected {{site: g [batch pos C]}} of {sorted(decomposition)}")
    for site, g in importances.items():
        count = decomposition[site].n_subcomponents
        if not isinstance(g, Tensor) or not g.is_floating_point() or g.shape[-1] != count:
            raise ValueError(f"the importances of {site} are {shown(g)}; expected floats, last axis C = {count}")


class WorstMasks(MaskSource):
    """This adversary as a mask source, so that training and the circuit search can use it, too.

    `Reconstruction(masks=WorstMasks(Attack(steps=(20,))))` trains against masks of the longest budget, which are looked
    for anew in every step, by one process. `evaluate` calls `search` on whole spans of batches.
    """

    climbs = True
    name = "worst"

    def __init__(self, attack: Attack) -> None:
        # Adds up over processes that share out the rows of a span.
        self.sum_over_processes: Callable[[Tensor], Tensor] = _as_it_is
        if not attack.steps:
            raise ValueError("an attack without a budget finds no masks; give Attack(steps=(20,)), say")
        self.attack = attack
        self.found = WorstCase({}, {})

    def climb(self, on: Climb) -> None:
        if self.whole_batch is not None:
            raise ValueError(
                "WorstMasks with several processes: each would look for masks that hurt its own rows; use PGD or "
                "Persistent, which climb on the whole batch, or one process"
            )
        self.search([_OneBatch(on)], on.generator)

    def masks(
        self, importances: Importances, *, delta: bool, generator: torch.Generator, steps: int | None = None
    ) -> Masks:
        """The worst masks that were found within so many steps (None: the longest budget), for these importances."""
        sources = self.found.sources[max(self.attack.steps) if steps is None else steps]
        return masks_from_sources(importances, sources, delta=delta)

    def search(
        self, passes: Sequence[Ground], generator: torch.Generator, after_step: Callable[[], Any] = lambda: None
    ) -> WorstCase:
        """The worst of all starts on one span, for every budget; `masks` then gives it."""
        self.found = _worst_of_starts(passes, self.attack, generator, after_step, self.sum_over_processes)
        return self.found


@dataclass(frozen=True)
class _OneBatch:
    """What a mask source climbs on in training, as one pass whose mean is its sum."""

    on: Climb

    @property
    def importances(self) -> Importances:
        return self.on.importances

    def total(self, sources: Mapping[str, Tensor]) -> tuple[Tensor, Any]:
        return self.on.of(sources), 1


def _worst_of_starts(
    passes: Sequence[Ground],
    attack: Attack,
    generator: torch.Generator,
    after_step: Callable[[], Any],
    add: Callable[[Tensor], Tensor],
) -> WorstCase:
    best: dict[int, tuple[float, Sources]] = {}
    for index in range(attack.starts):
        start = random_sources(passes[0].importances, "batch", generator)
        if index > 0:
            start = _worst_of_corners(passes, start, generator, add)
        for budget, (value, sources) in climb(passes, start, attack.steps, attack.step_size, after_step, add).items():
            if budget not in best or value > best[budget][0]:
                best[budget] = (value, sources)
    return WorstCase({n: v for n, (v, _) in best.items()}, {n: s for n, (_, s) in best.items()})


def _worst_of_corners(
    passes: Sequence[Ground], like: Sources, generator: torch.Generator, add: Callable[[Tensor], Tensor]
) -> Sources:
    """The worst of `CORNERS` random corners of the cube: climbs from its middle tend to end on the same hill."""
    best, chosen = -float("inf"), like
    for _ in range(CORNERS):
        drawn = {
            name: (torch.rand(s.shape, generator=generator, device=generator.device) < 0.5).to(s)
            for name, s in like.items()
        }
        value, _ = _value_and_gradients(passes, drawn, add, with_gradients=False)
        if value > best:
            best, chosen = value, drawn
    return chosen


def climb(
    passes: Sequence[Ground],
    start: Sources,
    budgets: Sequence[int],
    step_size: float,
    after_step: Callable[[], Any] = lambda: None,
    add: Callable[[Tensor], Tensor] = _as_it_is,
) -> dict[int, tuple[float, Sources]]:
    """One ascent; for every budget n the largest divergence among its first n + 1 points, and that point.

    `add` adds up over processes that share the span.

    Raises ValueError where the divergence is NaN, which no comparison would notice.
    """
    wanted, longest = set(budgets), max(budgets)
    found: dict[int, tuple[float, Sources]] = {}
    x = before = start
    best, best_x, best_gradients = -float("inf"), start, dict[str, Tensor]()
    size, rises, last = step_size, 0, -float("inf")
    best_at_check, halved_at_check = -float("inf"), True
    for step in range(longest + 1):
        value, gradients = _value_and_gradients(passes, x, add, with_gradients=step < longest)
        if value != value:
            raise ValueError(
                f"the divergence is NaN at step {step} of the adversary: parameters or data are not finite"
            )
        # The first point is no step.
        rises, last = rises + (step > 0 and value > last), value
        if value > best:
            best, best_x, best_gradients = value, x, gradients
        if step in wanted:
            found[step] = (best, best_x)
        if step == longest:
            break
        if step > 0 and step % WINDOW == 0:
            stuck = best == best_at_check and not halved_at_check
            halved_at_check = stuck or rises < RISING_SHARE * WINDOW
            if halved_at_check:
                size /= 2
                x = before = best_x
                gradients, last = best_gradients, best
            best_at_check, rises = best, 0
        x, before = _moved(x, before, gradients, size, NEW_DIRECTION if step > 0 else 1.0), x
        after_step()
    return found


def _moved(x: Sources, before: Sources, gradients: Sources, size: float, new: float) -> Sources:
    """A sign step, with some of the direction before kept, inside the unit cube."""
    moved = {}
    for name, own in x.items():
        aim = (own + size * gradients[name].sign()).clamp_(0, 1)
        moved[name] = own.add(aim - own, alpha=new).add_(own - before[name], alpha=1 - new).clamp_(0, 1)
    return moved


def _value_and_gradients(
    passes: Sequence[Ground], x: Sources, add: Callable[[Tensor], Tensor], *, with_gradients: bool
) -> tuple[float, Sources]:
    """Mean divergence over all counted positions of the span, and its gradients by the sources, batch by batch."""
    leaves = {name: source.detach().requires_grad_(with_gradients) for name, source in x.items()}
    gradients = {name: torch.zeros_like(source) for name, source in x.items()}
    total: Any = 0.0
    for one in passes:
        with torch.set_grad_enabled(with_gradients):
            value, n = one.total(leaves)
        if with_gradients:
            own = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
            for name, gradient in zip(leaves, own, strict=True):
                if gradient is not None:
                    gradients[name] += gradient
        total = total + torch.stack([value.detach().double(), torch.as_tensor(n, device=value.device).double()])
    value, count = add(total).tolist()
    return value / count, {name: add(gradient) for name, gradient in gradients.items()} if with_gradients else gradients
