"""Ways to take a habit out of what a model computes: directions of the residual stream, heads, neurons."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spd_lens.baselines.rival import Rival, cheapest, effect_at
from spd_lens.core import Decomposition
from spd_lens.editing import Habit, kl_from

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


def difference_of_means(
    decomposition: Decomposition,
    habit: Habit,
    controls: Tensor,
    goal: float,
    *,
    layers: Sequence[int] | None = None,
) -> Rival:
    """Project out the difference of the mean residual streams where the habit comes next and on control text.

    `layers`: blocks behind which it is tried; None: all.
    """
    rivals = []
    for layer in _layers(decomposition, layers):
        with_habit = _residuals(decomposition, habit.prompts, layer)[:, -1].mean(0)
        without = _residuals(decomposition, controls, layer)[:, 1:].flatten(0, 1).mean(0)
        v = (with_habit - without) / (with_habit - without).norm()
        change = partial(_away, v=v, mean=without)
        # Written into weights it changes every matrix that writes to the stream before; as a hook, two vectors.
        rivals.append(_residual_rival(decomposition, "difference of means", layer, change, 2 * len(v)))
    return cheapest(decomposition, rivals, habit, controls, goal)


def _layers(decomposition: Decomposition, layers: Sequence[int] | None) -> Sequence[int]:
    n = decomposition.host.n_layers()
    if layers is None:
        return range(n)
    wrong = [layer for layer in layers if layer not in range(n)]
    if wrong or not layers:
        raise ValueError(f"layers={list(layers)}; expected at least one, each in 0..{n - 1}")
    return layers


def _away(x: Tensor, *, v: Tensor, mean: Tensor) -> Tensor:
    return -((x - mean) @ v).unsqueeze(-1) * v


def leace(
    decomposition: Decomposition,
    habit: Habit,
    controls: Tensor,
    goal: float,
    *,
    layers: Sequence[int] | None = None,
) -> Rival:
    """Erase, in the least-squares sense, what tells positions with the habit from others linearly (concept-erasure).

    `layers`: blocks behind which it is tried; None: all.
    """
    try:
        with warnings.catch_warnings():
            # It compiles functions in a way that torch announces the end of.
            warnings.simplefilter("ignore", DeprecationWarning)
            from concept_erasure import LeaceEraser
    except ImportError as error:
        raise ValueError("LEACE needs concept-erasure: pip install 'spd-lens[baselines]'") from error
    rivals = []
    for layer in _layers(decomposition, layers):
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
    values: dict[str, Tensor] = {}
    added: dict[str, Tensor] = {}

    # A bridge's HookPoints have other names than those that were asked for.
    def keep(value: Tensor, hook: Any, *, point: str) -> Tensor:
        values[point], added[point] = value.detach(), torch.zeros_like(value, requires_grad=True)
        return value + added[point]

    hooks = [(point, partial(keep, point=point)) for point in points]
    with torch.enable_grad(), decomposition.model.hooks(fwd_hooks=hooks):
        total = habit.log_probability(decomposition.host.forward(habit.prompts)).mean()
        gradients = torch.autograd.grad(total, [added[point] for point in points])
    found = {}
    for (point, is_head), gradient in zip(points.items(), gradients, strict=True):
        product = (gradient * values[point]).sum((0, 1))
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
