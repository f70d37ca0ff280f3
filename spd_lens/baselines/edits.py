"""Other ways to take a habit out of a model, behind one interface, to be compared with edits at equal effect.

Each function looks at the same examples (prompts with the habit) and the same control text, and gives a `Rival`: a
change with a strength, which a bisection sets so that all have the same effect on the examples. Those that train
(`task_vector`, `lora`, `fine_tuning`) are in `edits_tuned`.

Left out: every method's own tricks. Where a choice is needed (the block, the number of heads), the one with the smaller
KL on the control text is taken.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from spd_lens.core import Decomposition
from spd_lens.editing import Edit, Found, Habit, Rewrite, edit, kl_from


@dataclass(frozen=True)
class Rival:
    """A change of a model with a strength: inside `at(s)` the decomposition's model computes what the changed one does.

    - `strongest`: the largest strength that makes sense. `parameters_changed`: of the weights that it would be written
      into, or, for an intervention that is not in the weights, the numbers that it keeps.
    """

    name: str
    at: Callable[[float], AbstractContextManager[Any]]
    parameters_changed: int
    strongest: float = 1.0

    def forward(self, decomposition: Decomposition, strength: float) -> Callable[[Tensor], Tensor]:
        """The changed model as a function of tokens."""

        def run(tokens: Tensor) -> Tensor:
            with torch.no_grad(), self.at(strength):
                return decomposition.host.forward(tokens)

        return run


def effect_at(decomposition: Decomposition, rival: Rival, habit: Habit, strength: float) -> float:
    """The share of the habit's probability that is gone at a strength."""
    before = habit.probability(decomposition.host.forward).mean()
    return 1 - float(habit.probability(rival.forward(decomposition, strength)).mean() / before)


def strength_for(decomposition: Decomposition, rival: Rival, habit: Habit, goal: float, *, halvings: int = 4) -> float:
    """The smallest strength found with an effect of at least `goal` on the habit; the strongest if none has it."""
    low, high = 0.0, min(1.0, rival.strongest)
    # From below: far beyond what a change was made for, anything may happen.
    while effect_at(decomposition, rival, habit, high) < goal:
        if high >= rival.strongest:
            return high
        low, high = high, min(2 * high, rival.strongest)
    for _ in range(halvings):
        middle = (low + high) / 2
        low, high = (low, middle) if effect_at(decomposition, rival, habit, middle) >= goal else (middle, high)
    return high


def cheapest(
    decomposition: Decomposition, rivals: Sequence[Rival], habit: Habit, controls: Tensor, goal: float
) -> Rival:
    """The rival with the smallest KL on the controls at equal effect, of those that come nearest to the goal."""
    if len(rivals) == 1:
        return rivals[0]

    def cost(rival: Rival) -> tuple[float, float]:
        strength = strength_for(decomposition, rival, habit, goal)
        missed = max(0.0, goal - effect_at(decomposition, rival, habit, strength))
        with torch.no_grad():
            clean = decomposition.host.forward(controls)
        return round(missed, 2), float(kl_from(clean, rival.forward(decomposition, strength)(controls)).mean())

    return min(rivals, key=cost)


# -- subcomponents -----------------------------------------------------------------------------------------------------


def edit_rival(name: str, made: Edit, strongest: float = 2.0) -> Rival:
    """An edit, at any strength."""

    def at(strength: float) -> AbstractContextManager[Any]:
        return made.scaled(max(strength, 1e-9)).applied()

    return Rival(name, at, sum(made.parameters_changed().values()), strongest)


def components(
    decomposition: Decomposition, habit: Habit, controls: Tensor, goal: float, found: Found
) -> tuple[Rival, Edit]:
    """Ours: subcomponents that `find` names, scaled; of several numbers of them the one that costs least."""
    ranked = found.clear or found.units
    edits = [edit(decomposition, ranked[:k]) for k in (1, 4, 8, 16, 32) if k <= len(ranked)]
    rivals = [edit_rival("components", made) for made in edits]
    best = cheapest(decomposition, rivals, habit, controls, goal)
    return best, edits[next(k for k, rival in enumerate(rivals) if rival is best)]


def component_writes(
    decomposition: Decomposition, habit: Habit, found: Found, *, n: int = 8, lr: float = 3e-2, steps: int = 20
) -> tuple[Rival, Edit]:
    """Ours: what the best subcomponents write is turned to a direction that is trained against the habit."""
    units = [unit for unit in (found.clear or found.units) if len(unit.members) == 1][:n]
    by_site: dict[str, list[int]] = {}
    for unit in units:
        by_site.setdefault(unit.site, []).append(unit.id)
    turned = {
        site: torch.zeros(len(ids), decomposition[site].U.shape[1], device=decomposition.device, requires_grad=True)
        for site, ids in by_site.items()
    }
    acts: dict[str, Tensor] = {}
    hooks = []
    for site, ids in by_site.items():
        weight = decomposition[site]
        hooks.append((weight.site.point_names()[0], partial(_keep, acts=acts, site=site, ids=ids)))
        moved = partial(_write_more, acts=acts, site=site, weight=weight, more=turned[site])
        hooks.append((weight.site.output.name, moved))
    forward = decomposition.host.forward
    with torch.no_grad():
        clean = forward(habit.prompts)
    optimiser = torch.optim.Adam(list(turned.values()), lr=lr)
    for _ in range(steps):
        with torch.enable_grad(), decomposition.model.hooks(fwd_hooks=hooks):
            loss = against(habit, forward(habit.prompts), clean)
            optimiser.zero_grad()
            loss.backward()
        optimiser.step()
    changes = {
        site: {
            c: Rewrite(writes=(decomposition[site].U[c] + turned[site][k]).detach())
            for k, c in enumerate(by_site[site])
        }
        for site in by_site
    }
    made = edit(decomposition, changes)
    return edit_rival("components, trained writes", made, 16.0), made


def _keep(value: Tensor, hook: Any, *, acts: dict[str, Tensor], site: str, ids: list[int]) -> None:
    acts[site] = value[..., ids]


def _write_more(value: Tensor, hook: Any, *, acts: dict[str, Tensor], site: str, weight: Any, more: Tensor) -> Tensor:
    return value + weight.through_U(acts[site], value, more)


def against(habit: Habit, logits: Tensor, clean: Tensor) -> Tensor:
    """`-log(1 - p(answers))` where the habit comes next, plus the KL to the unedited model at the other positions."""
    p = habit.log_probability(logits).exp()
    first, second = clean[:, :-1].detach().log_softmax(-1), logits[:, :-1].log_softmax(-1)
    return -torch.log1p(-p.clamp_max(0.9999)).mean() + (first.exp() * (first - second)).sum(-1).mean()


# -- directions in the residual stream ---------------------------------------------------------------------------------


def _residuals(decomposition: Decomposition, tokens: Tensor, layer: int) -> Tensor:
    """The residual stream after a block, `[row pos d_model]`."""
    point = decomposition.host.residual_point(layer)
    return decomposition.clean_pass(tokens, hidden_points=[point]).hidden[point]


def _residual_rival(
    decomposition: Decomposition, name: str, layer: int, change: Callable[[Tensor], Tensor], n: int
) -> Rival:
    def moved(value: Tensor, hook: Any, *, strength: float) -> Tensor:
        return value + strength * change(value)

    def at(strength: float) -> AbstractContextManager[Any]:
        hooks = [(decomposition.host.residual_point(layer), partial(moved, strength=strength))]
        return decomposition.model.hooks(fwd_hooks=hooks)

    return Rival(name, at, n)


def difference_of_means(decomposition: Decomposition, habit: Habit, controls: Tensor, goal: float) -> Rival:
    """Project out the difference of the mean residual streams where the habit comes next and on control text."""
    rivals = []
    for layer in range(decomposition.host.n_layers()):
        with_habit = _residuals(decomposition, habit.prompts, layer)[:, -1].mean(0)
        without = _residuals(decomposition, controls, layer)[:, 1:].flatten(0, 1).mean(0)
        v = (with_habit - without) / (with_habit - without).norm()
        change = partial(_away, v=v, mean=without)
        # Written into weights it changes every matrix that writes to the stream before; as a hook, two vectors.
        rivals.append(_residual_rival(decomposition, "difference of means", layer, change, 2 * len(v)))
    return cheapest(decomposition, rivals, habit, controls, goal)


def _away(x: Tensor, *, v: Tensor, mean: Tensor) -> Tensor:
    return -((x - mean) @ v).unsqueeze(-1) * v


def leace(decomposition: Decomposition, habit: Habit, controls: Tensor, goal: float) -> Rival:
    """Erase, in the least-squares sense, what tells positions with the habit from others linearly (concept-erasure)."""
    try:
        with warnings.catch_warnings():
            # It compiles functions in a way that torch announces the end of.
            warnings.simplefilter("ignore", DeprecationWarning)
            from concept_erasure import LeaceEraser
    except ImportError as error:
        raise ValueError("LEACE needs concept-erasure: pip install 'spd-lens[baselines]'") from error
    rivals = []
    for layer in range(decomposition.host.n_layers()):
        with_habit = _residuals(decomposition, habit.prompts, layer)[:, -1]
        without = _residuals(decomposition, controls, layer)[:, 1:].flatten(0, 1)
        x = torch.cat([with_habit, without])
        z = torch.cat([torch.ones(len(with_habit)), torch.zeros(len(without))]).to(x)
        eraser = LeaceEraser.fit(x, z[:, None])
        change = partial(_erased, eraser=eraser)
        n = sum(t.numel() for t in (eraser.proj_left, eraser.proj_right, eraser.bias) if t is not None)
        rivals.append(_residual_rival(decomposition, "LEACE", layer, change, n))
    return cheapest(decomposition, rivals, habit, controls, goal)


def _erased(x: Tensor, *, eraser: Any) -> Tensor:
    return eraser(x.flatten(0, -2)).view_as(x) - x


# -- heads and neurons -------------------------------------------------------------------------------------------------


def heads_and_neurons(
    decomposition: Decomposition, habit: Habit, controls: Tensor, goal: float, *, n_measured: int = 16
) -> Rival:
    """The heads and neurons with the largest measured effect for their KL on the controls, as many as are needed."""
    model, points = decomposition.model, _head_and_neuron_points(decomposition)
    gradients = _gradient_times_value(decomposition, habit, points)
    cells = [(p, i) for p, g in gradients.items() for i in g.argsort(descending=True)[:n_measured].tolist()]
    cells = sorted(cells, key=lambda cell: -float(gradients[cell[0]][cell[1]]))[:n_measured]
    with torch.no_grad():
        clean, before = model(controls), habit.log_probability(model(habit.prompts))
        scores = []
        for cell in cells:
            with model.hooks(fwd_hooks=_scaled_cells([cell], points, 1.0)):
                drop = float((before - habit.log_probability(model(habit.prompts))).mean())
                scores.append((drop, float(kl_from(clean, model(controls)).mean())))
    floor = max(sorted(cost for _, cost in scores)[len(scores) // 2], 1e-9)
    order = sorted(range(len(cells)), key=lambda k: -scores[k][0] / (scores[k][1] + floor))
    chosen = [cells[k] for k in order if scores[k][0] > 0] or [cells[order[0]]]
    size = 1
    while size < len(chosen):
        rival = Rival("heads and neurons", partial(_cells_at, model, chosen[:size], points), 0)
        if effect_at(decomposition, rival, habit, 1.0) >= goal:
            break
        size = min(2 * size, len(chosen))
    host = decomposition.host
    per_head, d_model = host.parameters_per_head(), host.d_model()
    changed = sum(per_head if points[p] else 2 * d_model for p, _ in chosen[:size])
    return Rival("heads and neurons", partial(_cells_at, model, chosen[:size], points), changed, strongest=2.0)


def _head_and_neuron_points(decomposition: Decomposition) -> dict[str, bool]:
    """HookPoints of heads (True) and neurons (False)."""
    found, host = {}, decomposition.host
    for layer in range(host.n_layers()):
        found[host.heads_point(layer)] = True
        neurons = host.neurons_point(layer)
        if neurons is not None:
            found[neurons] = False
    return found


def _gradient_times_value(decomposition: Decomposition, habit: Habit, points: dict[str, bool]) -> dict[str, Tensor]:
    """By how much `log p` falls without each head or neuron, to first order."""
    found = {}
    for point, is_head in points.items():
        values: list[Tensor] = []

        def keep(value: Tensor, hook: Any, values: list[Tensor] = values) -> Tensor:
            values.append(value.detach().requires_grad_())
            return values[0]

        with torch.enable_grad(), decomposition.model.hooks(fwd_hooks=[(point, keep)]):
            total = habit.log_probability(decomposition.host.forward(habit.prompts)).mean()
            (gradient,) = torch.autograd.grad(total, values)
        product = (gradient * values[0].detach()).sum((0, 1))
        found[point] = product.sum(-1) if is_head else product
    return found


def _scaled_cells(cells: Sequence[tuple[str, int]], points: dict[str, bool], strength: float) -> list[tuple[str, Any]]:
    hooks = []
    for point in dict.fromkeys(p for p, _ in cells):
        ids = [i for p, i in cells if p == point]
        hooks.append((point, partial(_scaled, ids=ids, is_head=points[point], strength=strength)))
    return hooks


def _scaled(value: Tensor, hook: Any, *, ids: list[int], is_head: bool, strength: float) -> Tensor:
    value = value.clone()
    if is_head:
        value[:, :, ids] *= 1 - strength
    else:
        value[..., ids] *= 1 - strength
    return value


def _cells_at(
    model: Any, cells: Sequence[tuple[str, int]], points: dict[str, bool], strength: float
) -> AbstractContextManager[Any]:
    return model.hooks(fwd_hooks=_scaled_cells(cells, points, strength))


# -- weights -----------------------------------------------------------------------------------------------------------


@contextmanager
def weights_moved(deltas: Sequence[tuple[Tensor, Tensor]], strength: float) -> Iterator[None]:
    """While open, every parameter is `p + strength * delta`; afterwards it is bit for bit what it was."""
    before = [p.detach().clone() for p, _ in deltas]
    with torch.no_grad():
        try:
            for p, delta in deltas:
                p += strength * delta
            yield
        finally:
            for (p, _), old in zip(deltas, before, strict=True):
                p.copy_(old)


def weight_rival(name: str, deltas: Sequence[tuple[Tensor, Tensor]], strongest: float = 16.0) -> Rival:
    """A change of parameters, `(parameter, delta)`, at any strength."""
    changed = sum(int((delta != 0).sum()) for _, delta in deltas)
    return Rival(name, partial(weights_moved, list(deltas)), changed, strongest)


def site_deltas(decomposition: Decomposition, deltas: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """`(parameter, delta)` of changes `[d_in d_out]` of sites."""
    found = []
    for site, delta in deltas.items():
        matrix = decomposition[site].site.matrix
        found.append((matrix.stored(), matrix.as_stored(delta).to(matrix.stored().dtype)))
    return found


def rank_one(
    decomposition: Decomposition,
    habit: Habit,
    controls: Int[Tensor, "row pos"],
    goal: float,
    *,
    steps: int = 20,
) -> Rival:
    """A rank-one edit of an output matrix with the covariance of its keys, as in ROME.

    `W' = W + C^-1 k v^T / (k^T C^-1 k)`: `k` the mean input where the habit comes next, `C` the second moment of inputs
    on control text, `v` what has to be added to the output there, found by gradient descent on `log p(answers)`.
    """
    sites = [s for s in decomposition if s.endswith("mlp.W_out")] or [s for s in decomposition if s.endswith("W_O")]
    rivals = []
    for site in sites:
        x = decomposition.clean_pass(controls).inputs[site]
        x = x.flatten(2) if x.ndim == 4 else x
        k = decomposition.clean_pass(habit.prompts).inputs[site][:, -1]
        k = (k.flatten(1) if k.ndim == 3 else k).mean(0)
        x = x.flatten(0, 1)
        C = x.T @ x / len(x)
        C = C + 1e-3 * C.diagonal().mean() * torch.eye(len(C), device=C.device)
        direction = torch.linalg.solve(C, k)
        v = _value_against(decomposition, site, habit, steps)
        delta = torch.outer(direction / (k @ direction), v)
        rivals.append(weight_rival("rank one, key covariance", site_deltas(decomposition, {site: delta}), 16.0))
    return cheapest(decomposition, rivals, habit, controls, goal)


def _value_against(decomposition: Decomposition, site: str, habit: Habit, steps: int) -> Tensor:
    point = decomposition[site].site.output.name
    v = torch.zeros(decomposition[site].U.shape[1], device=decomposition.device, requires_grad=True)
    optimiser = torch.optim.Adam([v], lr=0.1)

    def added(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[:, -1] = value[:, -1] + v
        return value

    for _ in range(steps):
        with torch.enable_grad(), decomposition.model.hooks(fwd_hooks=[(point, added)]):
            loss = habit.log_probability(decomposition.host.forward(habit.prompts)).mean() + 0.05 * v.square().sum()
            optimiser.zero_grad()
            loss.backward()
        optimiser.step()
    return v.detach()
